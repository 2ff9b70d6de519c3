"""Reader of images with a prompt each, for vision-language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from compressor.data.readers.base import Array, Feeds, Progress, Samples, Targets
from compressor.data.readers.decode_image import BrokenImageError, Conversion, decode, limitations_of
from compressor.data.readers.image_text.pairs import metadata_of, read_pairs
from compressor.data.readers.token_targets import IGNORED
from compressor.data.sample_cache import Store, digest_of_feeds
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess
from compressor.workspace.special_files import special_kind
from runtimes.base.vision_language import PLACES, QUERY_IDS, SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator

CHANNELS = 3
EXPECTED = 'a metadata.jsonl in it with a line {"file_name": "cat.png", "text": "What is this? A cat."} for each image'


def read_prompts(folder: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read a folder of images with their texts; see `compressor.data.readers.image_text.pairs`.

    The text behind the image is what the model is evaluated on: each of its tokens is predicted from the image and the
    tokens before.

    Raises:
        DataError: the folder has no file of texts, that file cannot be read, or the model has no processor.
    """
    if preprocess.image_text is None:
        raise DataError(
            f"{name} holds images and texts, but the model has no processor; add its processor_config.json, "
            "preprocessor_config.json and tokenizer files, or pass --data random"
        )
    metadata = metadata_of(folder)
    if metadata is None:
        raise DataError(f"the folder {name} holds no metadata.jsonl and no metadata.csv; expected {EXPECTED}")
    pairs = read_pairs(metadata, name)
    source = _Prompts(folder, pairs.files, pairs.texts, preprocess)
    return Samples(
        pairs.ids,
        source.feeds,
        f"images with texts {pairs.field!r} of {metadata.name}",
        label_kind=None if preprocess.bidirectional else "tokens",
        targets=source.targets,
        skipped=pairs.skipped,
        faults=source.faults,
        shown=source.shown,
        content=source.content,
        lengths=source.lengths,
        limitations=(*pairs.limitations, *_limitations(pairs.texts, preprocess)),
        findings=source.findings,
    )


def _limitations(texts: Sequence[str], preprocess: Preprocess) -> Iterator[Limitation]:
    """Yield where images stand if the texts do not say it, and why the texts are no targets."""
    without = sum(preprocess.placeholder not in text for text in texts)
    if without:
        yield Limitation(
            "place of the images",
            f"{without:,} of {len(texts):,} texts hold no {preprocess.placeholder}, so the image stands before them",
        )
    if preprocess.bidirectional:
        yield Limitation(
            "targets of the data",
            "the model reads a prompt at once, each token all others, so it predicts none of them: results are "
            "compared with the original",
        )


@dataclass(frozen=True)
class _Prompts:
    """Images with texts, prepared by the processor of the model one by one, and padded on the right in a batch.

    Attributes:
        folder: the folder of the images.
        files: path of each image in it.
        texts: text of each image.
        preprocess: preprocessing of the model.
        tokens: the prepared tokens by position, without the pixels.
        pixels: the prepared pixels of images that have one size, as long as there is space.
        conversions: what was converted in each decoded image, by position.
    """

    folder: Path
    files: tuple[str, ...]
    texts: tuple[str, ...]
    preprocess: Preprocess
    tokens: dict[int, Array] = field(default_factory=dict)
    pixels: dict[str, Store] = field(default_factory=dict)
    conversions: dict[int, Conversion] = field(default_factory=dict)

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Return the inputs of samples, padded to the longest text and to the most tiles of the batch."""
        rows = [self._prepared(index) for index in indices]
        return {name: _padded([row[name] for row in rows], self._fill(name)) for name in self.preprocess.inputs}

    def targets(self, indices: Sequence[int]) -> Targets:
        """Return the next token of each position as its label, where it is a token of the text behind the image."""
        ids = [self._prepared(index)["input_ids"] for index in indices]
        labels = _padded([self._labels(row) for row in ids], IGNORED)
        return Targets(None if self.preprocess.bidirectional else labels, labels != IGNORED)

    def lengths(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the number of tokens of each sample, the placeholders of its image included; 1 of one with a fault."""
        return [[len(self.tokens.get(index, (0,)))] for index in indices]

    def shown(self, index: int) -> Image.Image:
        """Return the decoded image, before preprocessing."""
        return self._decoded(index)

    def content(self, index: int) -> bytes:
        """Return a hash of the inputs of a sample."""
        return digest_of_feeds(self._prepared(index))

    def findings(self) -> tuple[Limitation, ...]:
        """Return the limitations of the images that were decoded so far."""
        return tuple(limitations_of(tuple(self.conversions.values())))

    def faults(self, indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
        """Prepare samples once; return the reasons of those that cannot be used, by position."""
        broken: dict[int, str] = {}
        for done, index in enumerate(indices, 1):
            reason = self._fault(index)
            if reason is not None:
                broken[index] = reason
            if progress is not None:
                progress(done, len(indices))
        return broken

    def _fault(self, index: int) -> str | None:
        kind = special_kind(self.folder / self.files[index])
        if kind is not None:
            return f"{kind}, not a file"
        try:
            row = self._prepared(index)["input_ids"]
        except BrokenImageError as error:
            return str(error)
        longest = self.preprocess.longest
        if longest is not None and len(row) > longest:
            return f"the image and its text have {len(row):,} tokens, more than the {longest:,} of the model"
        return None if (self._labels(row) != IGNORED).any() else "no text stands behind the image"

    def _labels(self, ids: Array) -> Array:
        """Return the next tokens [tokens], from the last token of the image on; the last token predicts nothing."""
        images = np.flatnonzero(ids == self.preprocess.image_token)
        labels = np.full(len(ids), IGNORED, dtype=np.int64)
        first = int(images[-1]) if len(images) else 0
        labels[first:-1] = ids[first + 1 :]
        return labels

    def _fill(self, name: str) -> int:
        return {"input_ids": self.preprocess.padding, PLACES: -1}.get(name, 0)

    def _prepared(self, index: int) -> Feeds:
        """Return the inputs of one sample without the axis of rows.

        Raises:
            BrokenImageError: the image cannot be decoded.
            DataError: the processor fails.
        """
        stored = {name: store.get(index) for name, store in self.pixels.items() if index in store}
        if index in self.tokens and stored:
            ids = self.tokens[index]
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)} | stored
        assert self.preprocess.image_text is not None
        try:
            found = self.preprocess.image_text(self._decoded(index), self.texts[index])
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"the processor of the model fails for {self.files[index]} and its text ({first_line(error)}); check "
                "its config, and that the text holds its image no more than once"
            ) from error
        self._check(found, index)
        self._store(found, index)
        return found

    def _check(self, found: Feeds, index: int) -> None:
        """Check that the processor leaves as many placeholders as the model has features, and images of its size.

        Raises:
            DataError: it does not.
        """
        assert self.preprocess.image_tokens is not None
        pixels = found[self.preprocess.inputs[0]]
        expected = self.preprocess.example[self.preprocess.inputs[0]]
        axes = slice(-1 if pixels.ndim < CHANNELS else -CHANNELS, None)  # patches vary in number
        if SIZES in found and pixels.ndim == CHANNELS:  # height and width vary
            axes = slice(-CHANNELS, -CHANNELS + 1)
        if pixels.shape[axes] != expected.shape[axes]:
            raise DataError(
                f"the processor of the model makes images {list(pixels.shape[axes])}, but the model takes "
                f"{list(expected.shape[axes])}; check its preprocessor_config.json"
            )
        count = int((found["input_ids"] == self.preprocess.image_token).sum())
        wanted = self.preprocess.image_tokens(found)
        if count != wanted:
            raise DataError(
                f"the processor of the model makes {count} image tokens of {self.files[index]}, but the model has "
                f"{wanted} features for it; check the patch_size and the strategy in its processor_config.json"
            )

    def _store(self, found: Feeds, index: int) -> None:
        self.tokens[index] = found["input_ids"]
        first = self.preprocess.inputs[0]
        alone = not any(name in found for name in (SIZES, QUERY_IDS))  # other inputs vary with the size or the text
        if found[first].ndim == CHANNELS and alone:  # tiles vary in number
            if first not in self.pixels:
                self.pixels[first] = Store(found[first].shape, found[first].dtype)
            self.pixels[first].put(index, found[first])

    def _decoded(self, index: int) -> Image.Image:
        decoded = decode(partial(Image.open, self.folder / self.files[index]), CHANNELS)
        self.conversions[index] = decoded.conversion
        return decoded.shown()


def _padded(rows: Sequence[Array], fill: int) -> Array:
    """Return arrays of the same number of axes as one, each axis padded behind to that of the longest."""
    longest = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    padded = np.full((len(rows), *longest), fill, dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[tuple(map(slice, row.shape))] = row
    return padded
