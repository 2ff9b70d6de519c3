"""The decoder inputs of encoder-decoders: target texts of the data, or what the original generates from the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from compressor.data.readers.base import Array, Feeds, Samples, Targets
from compressor.data.readers.token_targets import IGNORED, AlignedSamples, Prepared
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import DecoderSide

DECODER_IDS = "decoder_input_ids"


def with_decoder_inputs(samples: Samples, decoder: DecoderSide, name: str) -> Samples:
    """Add the decoder inputs to samples of sources, and the tokens that they are to predict.

    Args:
        samples: the sources, with their target texts if the data has any.
        decoder: how the decoder inputs are made.
        name: name of the data in messages.

    Returns:
        Samples whose labels are the tokens of the targets. Without targets they have no labels: the decoder reads what
        the original generates greedily, and results are compared with the original.

    Raises:
        DataError: there are target texts but no tokenizer.
    """
    rows = _Generated(samples, decoder).rows if samples.target_texts is None else _Targets(samples, decoder, name).rows
    labelled = samples.target_texts is not None

    def prepare(indices: Sequence[int]) -> Prepared:
        ids, labels = rows(indices)
        labels[:, : len(decoder.prompt)] = IGNORED
        scored = labels != IGNORED
        return {**samples.feeds(indices), DECODER_IDS: ids}, Targets(labels if labelled else None, scored)

    source = AlignedSamples(prepare)
    added = (
        ()
        if labelled
        else (
            Limitation(
                "targets of the data",
                f"it has none, so the decoder reads up to {decoder.generated} tokens that the original generates "
                "greedily from each source, and results are compared with the original",
            ),
        )
    )
    return replace(
        samples,
        feeds=source.feeds,
        targets=source.targets,
        label_kind="tokens" if labelled else None,
        limitations=(*samples.limitations, *added),
    )


class _Targets:
    """Decoder inputs and labels from target texts."""

    def __init__(self, samples: Samples, decoder: DecoderSide, name: str) -> None:
        if decoder.encode is None:
            raise DataError(
                f"{name} holds target texts, but the model has no tokenizer; add its tokenizer files (tokenizer.json, "
                "tokenizer_config.json), or leave the targets out to compare with what the original generates"
            )
        self._encode, self._decoder, self._texts = decoder.encode, decoder, samples.target_texts

    def rows(self, indices: Sequence[int]) -> tuple[Array, Array]:
        """Return the decoder inputs and the labels of samples, [rows, tokens] each."""
        labels = _padded(self._encode([cast("Sequence[str]", self._texts)[index] for index in indices]), IGNORED)
        return self._decoder.shift(labels), labels


class _Generated:
    """Decoder inputs and labels from what the original generates; each sample is generated once."""

    def __init__(self, samples: Samples, decoder: DecoderSide) -> None:
        self._samples, self._decoder = samples, decoder
        self._rows: dict[int, list[int]] = {}

    def rows(self, indices: Sequence[int]) -> tuple[Array, Array]:
        """Return the decoder inputs and the labels of samples, [rows, tokens] each."""
        missing = [index for index in indices if index not in self._rows]
        if missing:
            self._rows |= dict(zip(missing, self._decoder.generate(self._feeds(missing)), strict=True))
        rows = [self._rows[index] for index in indices]
        return _padded([row[:-1] for row in rows], rows[0][0]), _padded([row[1:] for row in rows], IGNORED)

    def _feeds(self, indices: Sequence[int]) -> Feeds:
        feeds: Mapping[str, Array] = self._samples.feeds(indices)
        return dict(feeds)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Array:
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
