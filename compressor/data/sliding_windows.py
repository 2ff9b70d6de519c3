"""Long texts scored whole: cut into windows that overlap, each token scored once, behind enough tokens of context.

The convention of Hugging Face's guide "Perplexity of fixed-length models": windows of `length` tokens start every
`stride` tokens; of each, only the tokens that no window before it held are scored, so that every token but a text's
first is scored exactly once, those beyond the first window behind at least length - stride tokens of context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compressor.data.readers.base import Array, Feeds
from compressor.errors import DataError

USUAL = 2048  # tokens of a window where none are asked for and the model takes as many
TOKENS = 4096  # tokens of one batch of windows: with a vocabulary of 128,000 their logits are 2 GB


@dataclass(frozen=True)
class Window:
    """How long texts are cut: tokens of a window, and from the start of one to that of the next."""

    length: int
    stride: int

    def cut(self, tokens: int) -> tuple[Cut, ...]:
        """The windows of a text of so many tokens.

        >>> Window(4, 2).cut(7)
        (Cut(start=0, end=4, scored=1), Cut(start=2, end=6, scored=4), Cut(start=4, end=7, scored=6))
        """
        cuts = [Cut(0, min(self.length, tokens), 1)]
        while cuts[-1].end < tokens:
            start = cuts[-1].start + self.stride
            cuts.append(Cut(start, min(start + self.length, tokens), cuts[-1].end))
        return tuple(cuts)


class Cut(NamedTuple):
    """One window: its tokens from `start` to `end`, of which those from `scored` on count."""

    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class Piece:
    """A batch of windows: feeds, which tokens are scored (bool [rows, tokens]), and of which text each row is."""

    feeds: Feeds
    scored: Array
    owners: tuple[int, ...]


def chosen(length: int | None, stride: int | None, most: int | None) -> Window:
    """The window that was asked for, else the usual one: what the model takes, at most 2,048 tokens.

    Args:
        length: as asked.
        stride: as asked; half of the length where it was not.
        most: tokens that the model takes, as far as that is known.

    Raises:
        DataError: the window is longer than the model takes, or the stride not shorter than the window.
    """
    if length is not None and most is not None and length > most:
        raise DataError(f"found --max-length {length}, but the model takes at most {most} tokens; give fewer")
    length = length if length is not None else min(USUAL, USUAL if most is None else most)
    stride = stride if stride is not None else max(1, length // 2)
    if not 0 < stride < length:
        raise DataError(
            f"found --stride {stride} with windows of {length} tokens; expected 1 to {length - 1}, as the first token "
            "of a window that shares none with the one before it could not be scored"
        )
    return Window(length, stride)


def pieces(
    texts: Iterable[tuple[int, Feeds]], window: Window, complete: Callable[[Feeds], Feeds], rows: int
) -> Iterator[Piece]:
    """All windows of some texts in order, at most `rows` and `TOKENS` together; a single row may be longer.

    Args:
        texts: number of a text, and its tokens by input name, [tokens] each, without padding.
        window: how they are cut.
        complete: adds what follows from the tokens.
        rows: windows at a time.
    """
    held: list[tuple[int, Feeds, Cut]] = []
    for owner, feeds in texts:
        for cut in window.cut(len(feeds["input_ids"])):
            longest = max([cut.end - cut.start, *(one.end - one.start for _, _, one in held)])
            if held and (len(held) == rows or longest * (len(held) + 1) > TOKENS):
                yield _piece(held, complete)
                held = []
            held.append((owner, feeds, cut))
    if held:
        yield _piece(held, complete)


def _piece(held: Sequence[tuple[int, Feeds, Cut]], complete: Callable[[Feeds], Feeds]) -> Piece:
    longest = max(cut.end - cut.start for _, _, cut in held)
    feeds = {
        name: np.stack([_padded(one[name][cut.start : cut.end], longest, name) for _, one, cut in held])
        for name in held[0][1]
    }
    scored = np.zeros((len(held), longest), dtype=bool)
    for row, (_, _, cut) in enumerate(held):
        scored[row, cut.scored - cut.start : cut.end - cut.start] = True
    return Piece(complete(feeds), scored, tuple(owner for owner, _, _ in held))


def _padded(values: Array, length: int, name: str) -> Array:
    """Padding on the right: the mask with 0, the others with their last value, a token that the model surely knows."""
    room = (0, length - len(values))
    return np.pad(values, room) if name == "attention_mask" else np.pad(values, room, mode="edge")
