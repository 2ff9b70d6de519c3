"""Sliding windows over long texts, for perplexity: every token is scored once, with enough context.

The convention is that of Hugging Face's guide "Perplexity of fixed-length models". Windows of `length` tokens start
every `stride` tokens. Of each window, only the tokens that are in no earlier window are scored. So every token of a
text except the first is scored once, and after the first window with at least length - stride tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compressor.data.readers.base import Array, Feeds
from compressor.errors import DataError

USUAL = 2048  # default window length in tokens, if the model takes as many
TOKENS = 4096  # maximum number of tokens in a batch
LOGITS = 2**26  # maximum number of logits in a batch, 256 MiB; evaluation holds several copies for each engine


@dataclass(frozen=True)
class Window:
    """A sliding window: its length, and the stride between the starts of successive windows, in tokens."""

    length: int
    stride: int

    def cut(self, tokens: int) -> tuple[WindowSpan, ...]:
        """Return the windows of a text with `tokens` tokens.

        >>> Window(4, 2).cut(6)
        (WindowSpan(start=0, end=4, scored=1), WindowSpan(start=2, end=6, scored=4))
        """
        cuts = [WindowSpan(0, min(self.length, tokens), 1)]
        while cuts[-1].end < tokens:
            start = cuts[-1].start + self.stride
            cuts.append(WindowSpan(start, min(start + self.length, tokens), cuts[-1].end))
        return tuple(cuts)


class WindowSpan(NamedTuple):
    """One window: the tokens from `start` to `end`, of which those from `scored` on are scored."""

    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class WindowBatch:
    """A batch of windows: feeds, mask of the scored tokens (bool [rows, tokens]), and text number of each row."""

    feeds: Feeds
    scored: Array
    owners: tuple[int, ...]


def resolve_window(length: int | None, stride: int | None, max_tokens: int | None) -> Window:
    """Return the sliding window for the options; the default length is that of the model, at most 2,048 tokens.

    Args:
        length: window length in tokens; None for the default.
        stride: stride in tokens; None for half of the length.
        max_tokens: maximum number of tokens that the model takes; None if it is unknown.

    Raises:
        DataError: the window is longer than the model takes, or the stride is not shorter than the window.
    """
    if length is not None and max_tokens is not None and length > max_tokens:
        raise DataError(
            f"found --max-length {length}, but the model takes at most {max_tokens} tokens; set a smaller --max-length"
        )
    length = length if length is not None else min(USUAL, USUAL if max_tokens is None else max_tokens)
    stride = stride if stride is not None else max(1, length // 2)
    if not 0 < stride < length:
        raise DataError(
            f"found --stride {stride} with windows of {length} tokens; expected 1 to {length - 1}, because successive "
            "windows must overlap for the first token of a window to be scored"
        )
    return Window(length, stride)


def tokens_at_once(logits: int | None) -> int:
    """Return the maximum number of tokens in a batch of a model that gives a number of logits for each token.

    >>> tokens_at_once(None), tokens_at_once(2), tokens_at_once(128_256)
    (4096, 4096, 523)
    """
    return TOKENS if logits is None else min(TOKENS, max(1, LOGITS // logits))


def window_batches(
    texts: Iterable[tuple[int, Feeds]],
    window: Window,
    complete: Callable[[Feeds], Feeds],
    rows: int,
    *,
    least: int = 0,
    most: int = TOKENS,
    left: int | None = None,
) -> Iterator[WindowBatch]:
    """Yield all windows of the texts in order, in batches of at most `rows` windows and `most` tokens.

    A batch of a single window may have more than `most` tokens.

    Args:
        texts: number of each text, and its tokens by input name, [tokens] each, without padding.
        window: the sliding window.
        complete: adds the inputs that are derived from the tokens.
        rows: maximum number of windows in a batch.
        least: number of tokens to which windows are padded at least.
        most: maximum number of tokens in a batch.
        left: token id of a padding on the left; None for padding on the right, which no earlier token reads.
    """
    batch: list[tuple[int, Feeds, WindowSpan]] = []
    for owner, feeds in texts:
        for cut in window.cut(len(feeds["input_ids"])):
            longest = max([least, cut.end - cut.start, *(other.end - other.start for _, _, other in batch)])
            if batch and (len(batch) == rows or longest * (len(batch) + 1) > most):
                yield _piece(batch, complete, least, left)
                batch = []
            batch.append((owner, feeds, cut))
    if batch:
        yield _piece(batch, complete, least, left)


def _piece(
    batch: Sequence[tuple[int, Feeds, WindowSpan]], complete: Callable[[Feeds], Feeds], least: int, left: int | None
) -> WindowBatch:
    longest = max(least, *(cut.end - cut.start for _, _, cut in batch))
    feeds = {
        name: np.stack([_padded(inputs[name][cut.start : cut.end], longest, name, left) for _, inputs, cut in batch])
        for name in batch[0][1]
    }
    scored = np.zeros((len(batch), longest), dtype=bool)
    for row, (_, _, cut) in enumerate(batch):
        first = cut.start if left is None else cut.end - longest
        scored[row, cut.scored - first : cut.end - first] = True
    return WindowBatch(complete(feeds), scored, tuple(owner for owner, _, _ in batch))


def _padded(values: Array, length: int, name: str, left: int | None) -> Array:
    """Pad the attention mask with 0, and other inputs on the right with their last value, which is a valid token."""
    missing = length - len(values)
    if left is not None:
        return np.pad(values, (missing, 0), constant_values=left if name == "input_ids" else 0)
    padding = (0, missing)
    return np.pad(values, padding) if name == "attention_mask" else np.pad(values, padding, mode="edge")
