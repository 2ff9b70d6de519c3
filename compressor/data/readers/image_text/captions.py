"""Reader of images with a text each, for models that take both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compressor.data.readers.base import Feeds, Samples
from compressor.data.readers.image_text.pairs import Pairs, read_pairs
from compressor.data.readers.images import open_image, pictures
from compressor.data.sample_cache import digest
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess


def read_captions(metadata: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read a folder of images with a text each: a row of the image and a row of the text for each pair.

    Args:
        metadata: the metadata file of the folder, see `compressor.data.readers.image_text.pairs`.
        name: name of the folder in messages.
        preprocess: preprocessing of a model of images and texts.

    Raises:
        DataError: the file cannot be read, or the model has no image processor or no tokenizer.
    """
    pairs = read_pairs(metadata, name)
    if preprocess.text is None:
        raise DataError(
            f"{name} holds images with texts, but the model has no tokenizer; add its tokenizer files (tokenizer.json, "
            "tokenizer_config.json)"
        )
    samples = _with_images(metadata, name, preprocess, pairs)
    return replace(
        samples,
        feeds=lambda indices: samples.feeds(indices) | _tokens(preprocess, pairs, indices),
        lengths=lambda indices: _lengths(preprocess, pairs, indices),
        has_texts=True,
        content=lambda index: _content(samples, pairs, index),
    )


def read_written(metadata: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read a folder of images with a text each, which an encoder-decoder is to write.

    Args:
        metadata: the metadata file of the folder, see `compressor.data.readers.image_text.pairs`.
        name: name of the folder in messages.
        preprocess: preprocessing of the encoder.

    Raises:
        DataError: the file cannot be read, or the model has no image processor.
    """
    pairs = read_pairs(metadata, name)
    return replace(_with_images(metadata, name, preprocess, pairs), target_texts=pairs.texts)


def _with_images(metadata: Path, name: str, preprocess: Preprocess, pairs: Pairs) -> Samples:
    """Return a sample for each pair, which feeds its image."""
    source = pictures(name, pairs.ids, lambda index: open_image(metadata.parent / pairs.files[index]), preprocess)
    return Samples(
        pairs.ids,
        source.feeds,
        f"images with texts {pairs.field!r} of {metadata.name}",
        skipped=pairs.skipped,
        faults=source.faults,
        shown=source.shown,
        findings=source.findings,
        limitations=pairs.limitations,
        content=source.content,
    )


def _content(samples: Samples, pairs: Pairs, index: int) -> bytes:
    """Return a hash of a pair, which is equal to another if both its image and its text are."""
    assert samples.content is not None, "`pictures` sets it"
    return samples.content(index) + digest(pairs.texts[index])


def _tokens(preprocess: Preprocess, pairs: Pairs, indices: Sequence[int]) -> Feeds:
    assert preprocess.text is not None
    return preprocess.text([pairs.texts[index] for index in indices], None)


def _lengths(preprocess: Preprocess, pairs: Pairs, indices: Sequence[int]) -> list[list[int]]:
    assert preprocess.lengths is not None
    return [[length] for length in preprocess.lengths([pairs.texts[index] for index in indices], None)]
