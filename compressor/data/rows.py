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
