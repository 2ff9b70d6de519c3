"""Rows of inputs, of which those of a model of images and texts have batches of different sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Values = TypeVar("Values", bound=Any)  # NumPy arrays or tensors


def take_rows(feeds: Mapping[str, Values], rows: Sequence[int]) -> dict[str, Values]:
    """Return some rows of each input; an input with fewer rows begins again with its first.

    Args:
        feeds: input name to array or tensor [rows, ...].
        rows: the rows.

    >>> import numpy as np
    >>> {name: value.tolist() for name, value in take_rows({"a": np.arange(3), "b": np.arange(2)}, range(3)).items()}
    {'a': [0, 1, 2], 'b': [0, 1, 0]}
    """
    return {name: value[[row % len(value) for row in rows]] for name, value in feeds.items()}


def cut_texts(feeds: Mapping[str, Values], axes: Mapping[str, Mapping[int, str]], kept: slice) -> dict[str, Values]:
    """Return feeds with some of the tokens of their texts; inputs without an axis of tokens stay whole.

    Args:
        feeds: input name to array or tensor [rows, ...].
        axes: the names of the dynamic axes of each input, of which those of tokens end with ``sequence``.
        kept: the tokens to keep.

    >>> import numpy as np
    >>> cut_texts({"ids": np.ones((2, 5)), "x": np.ones((2, 5))}, {"ids": {1: "sequence"}}, slice(3))["ids"].shape
    (2, 3)
    """
    texts = {name for name, each in axes.items() if each.get(1, "").endswith("sequence")}
    return {name: value[:, kept] if name in texts else value for name, value in feeds.items()}


def bounded_texts(feeds: Mapping[str, Values], axes: Mapping[str, Mapping[int, str]], most: int) -> dict[str, Values]:
    """Return feeds of a causal language model with at most `most` tokens in sum, but one in each row at least.

    The first tokens are kept; the last, if a text is padded on the left.

    Args:
        feeds: input name to array or tensor [rows, ...], with ``input_ids`` and an empty cache.
        axes: see `cut_texts`.
        most: the number of tokens.
    """
    rows, length = feeds["input_ids"].shape
    kept = min(length, max(1, most // rows))
    on_the_left = "attention_mask" in feeds and not feeds["attention_mask"][:, 0].all()
    return cut_texts(feeds, axes, slice(length - kept, None) if on_the_left else slice(kept))
