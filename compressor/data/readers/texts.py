"""Reader of text files; texts are tokenized batch by batch with the model's tokenizer, and small batches are cached."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from compressor.data.readers.base import Feeds, LabelKind, Samples, Skipped, other_kind
from compressor.data.readers.token_targets import MEMORY, masked_tokens, plain_tokens
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

NUL = "\0"
HOLDS_NUL = "the text holds a NUL character, so the file may be damaged"


@dataclass
class Tokens:
    """Texts by position, as padded batches of tokens.

    Whole batches are cached instead of single texts, because the tokenizer pads them and iterations repeat batches.
    With `paired`, the two texts of a sample are two rows (a0, b0, a1, b1, ...); otherwise they are one row.
    """

    name: str
    first: Sequence[str]
    second: Sequence[str] | None
    paired: bool
    preprocess: Preprocess
    limit: int = MEMORY
    _batches: dict[tuple[int, ...], Feeds] = field(default_factory=dict)
    _bytes: int = 0

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Return token arrays by input name, [rows, longest row of the batch]."""
        key = tuple(indices)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._tokenize(key)
            size = sum(array.nbytes for array in batch.values())
            if self._bytes + size <= self.limit:
                self._batches[key] = batch
                self._bytes += size
        return {name: array.copy() for name, array in batch.items()}

    def shown(self, index: int) -> str:
        """Return the text of a sample; two texts are two lines."""
        return self.first[index] if self.second is None else f"{self.first[index]}\n{self.second[index]}"

    def lengths(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the numbers of tokens of the rows of each sample, without truncation."""
        assert self.preprocess.lengths is not None
        rows = 2 if self.paired and self.second is not None else 1
        lengths = self.preprocess.lengths(*self._texts(indices))
        return [lengths[start : start + rows] for start in range(0, len(lengths), rows)]

    def _texts(self, indices: Sequence[int]) -> tuple[list[str], list[str] | None]:
        """Return the texts of the rows, and the second texts, if a row has two."""
        first = [self.first[index] for index in indices]
        second = None if self.second is None else [self.second[index] for index in indices]
        if self.paired and second is not None:
            return [text for pair in zip(first, second, strict=True) for text in pair], None
        return first, second

    def _tokenize(self, indices: Sequence[int]) -> Feeds:
        assert self.preprocess.text is not None
        batch = self.preprocess.text(*self._texts(indices))
        for name in self.preprocess.inputs:
            if name not in batch:
                raise DataError(
                    f"the tokenizer returns {', '.join(batch)}, but the model also takes {name}; "
                    "pass token arrays as .npz with all inputs"
                )
        return {name: batch[name] for name in self.preprocess.inputs}

    def whole(self, index: int) -> Feeds:
        """Return the tokens of a single text without padding or truncation, [tokens] by input name."""
        assert self.preprocess.whole is not None
        return self.preprocess.whole(self.first[index])


def tokens(
    name: str, first: Sequence[str], second: Sequence[str] | None, paired: bool, preprocess: Preprocess
) -> Tokens:
    """Return the texts, to be tokenized for the model.

    Raises:
        DataError: the model does not take texts, or has no tokenizer.
    """
    if preprocess.kind != "text":
        raise other_kind(name, "texts", preprocess.kind, preprocess.inputs)
    if preprocess.text is None:
        raise DataError(
            f"{name} holds texts, but the model has no tokenizer; add its tokenizer files (tokenizer.json, "
            "tokenizer_config.json), or pass token ids as .npy"
        )
    return Tokens(name, first, second, paired, preprocess)


def text_of(path: Path, name: str) -> str:
    """Return the content of a UTF-8 file, without its byte order mark, with line ends as a line feed.

    Raises:
        DataError: the file has another encoding, which is not guessed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        found = "UTF-16 text" if wide else f"not UTF-8 text (byte {error.start})"
        raise DataError(f"{name} is {found}; save it as UTF-8") from error
    if text.count(NUL) * 4 > len(text):  # every other byte of ASCII text in UTF-16 is 0
        raise DataError(
            f"{name} consists of NUL characters for a quarter or more, as UTF-16 text does; save it as UTF-8"
        )
    return text


def read_lines(path: Path, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read a .txt file with one text per line; ids are line numbers from 0, and empty lines are ignored."""
    found = [(row, line) for row, line in enumerate(text_of(path, name).split("\n")) if line.strip()]
    lines = [(row, line) for row, line in found if NUL not in line]
    skipped = tuple(Skipped(str(row), HOLDS_NUL) for row, line in found if NUL in line)
    if not lines:
        raise DataError(f"{name} holds no text; expected one text per line")
    source = tokens(name, [line for _, line in lines], None, False, preprocess)
    samples = text_samples(source, tuple(str(row) for row, _ in lines), "one text per line", task, seed)
    return replace(samples, skipped=skipped)


def text_samples(source: Tokens, ids: tuple[str, ...], reading: str, task: str, seed: int) -> Samples:
    """Return texts without labels: for heads with a decision per token, with the positions that are scored."""
    preprocess = source.preprocess
    if task == "question-answering":
        raise DataError(
            f"{source.name} holds single texts; question answering needs a question and a context for each sample, in "
            "a .csv or .jsonl file"
        )
    lengths = None if preprocess.lengths is None else source.lengths
    if preprocess.decoder is not None:
        return Samples(ids, source.feeds, reading, shown=source.shown, lengths=lengths)
    if task in ("fill-mask", "token-classification"):
        masks = task == "fill-mask"
        aligned = (
            masked_tokens(ids, preprocess, seed, source.feeds) if masks else plain_tokens(preprocess, source.feeds)
        )
        kind: LabelKind | None = "tokens" if masks else None
        return Samples(
            ids,
            aligned.feeds,
            reading,
            label_kind=kind,
            shown=source.shown,
            targets=aligned.targets,
            lengths=lengths,
        )
    kind = "tokens" if task == "text-generation" else None
    whole = source.whole if kind == "tokens" and preprocess.whole is not None else None
    return Samples(ids, source.feeds, reading, label_kind=kind, shown=source.shown, whole=whole, lengths=lengths)
