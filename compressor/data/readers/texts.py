"""Texts: tokenised batch by batch with the model's own tokenizer, remembered while they are small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compressor.data.readers.base import Feeds, LabelKind, Samples
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

MEMORY = 64 * 1024**2  # bytes of token ids remembered: 512 rows of 128 tokens are 1.5 MB with three inputs


@dataclass
class Tokens:
    """Texts by position as padded token batches.

    Whole batches are remembered, not single texts: only the tokenizer knows how it pads, and sweeps repeat batches.
    With `paired`, the two texts of a sample are two rows (a0, b0, a1, b1, ...), otherwise they are one row together.
    """

    name: str
    first: Sequence[str]
    second: Sequence[str] | None
    paired: bool
    preprocess: Preprocess
    limit: int = MEMORY
    _kept: dict[tuple[int, ...], Feeds] = field(default_factory=dict)
    _bytes: int = 0

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Token arrays by input name, [rows, longest of the batch]."""
        key = tuple(indices)
        batch = self._kept.get(key)
        if batch is None:
            batch = self._tokenised(key)
            size = sum(array.nbytes for array in batch.values())
            if self._bytes + size <= self.limit:
                self._kept[key] = batch
                self._bytes += size
        return {name: array.copy() for name, array in batch.items()}

    def shown(self, index: int) -> str:
        """The text itself; two texts as two lines."""
        return self.first[index] if self.second is None else f"{self.first[index]}\n{self.second[index]}"

    def _tokenised(self, indices: Sequence[int]) -> Feeds:
        assert self.preprocess.text is not None
        first = [self.first[index] for index in indices]
        second = None if self.second is None else [self.second[index] for index in indices]
        if self.paired and second is not None:
            first, second = [text for pair in zip(first, second, strict=True) for text in pair], None
        batch = self.preprocess.text(first, second)
        for name in self.preprocess.inputs:
            if name not in batch:
                raise DataError(
                    f"the tokenizer gives {', '.join(batch)}, but the model also takes {name}; "
                    "give token arrays as .npz with all inputs"
                )
        return {name: batch[name] for name in self.preprocess.inputs}

    def whole(self, index: int) -> Feeds:
        """The tokens of a single text, neither padded nor cut, [tokens] by input name."""
        assert self.preprocess.whole is not None
        return self.preprocess.whole(self.first[index])


def tokens(
    name: str, first: Sequence[str], second: Sequence[str] | None, paired: bool, preprocess: Preprocess
) -> Tokens:
    """Texts for a model that takes texts; DataError for any other model."""
    if preprocess.kind != "text":
        raise DataError(f"{name} holds texts, but the model takes {preprocess.kind} inputs; give --data of that kind")
    if preprocess.text is None:
        raise DataError(
            f"{name} holds texts, but the model comes without a tokenizer; add its tokenizer files (tokenizer.json, "
            "tokenizer_config.json), or give token ids as .npy"
        )
    return Tokens(name, first, second, paired, preprocess)


def text_of(path: Path, name: str) -> str:
    """The content of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_lines(path: Path, name: str, preprocess: Preprocess, task: str) -> Samples:
    """A .txt file with one text a line; the ids are line numbers from 0, empty lines are no samples."""
    lines = [(row, line) for row, line in enumerate(text_of(path, name).split("\n")) if line.strip()]
    if not lines:
        raise DataError(f"{name} holds no text; expected one text a line")
    source = tokens(name, [line for _, line in lines], None, False, preprocess)
    kind: LabelKind | None = "tokens" if task == "text-generation" else None
    ids = tuple(str(row) for row, _ in lines)
    whole = source.whole if kind == "tokens" and preprocess.whole is not None else None
    return Samples(ids, source.feeds, "one text a line", label_kind=kind, shown=source.shown, whole=whole)
