"""The --data string as deterministic, disjoint calibration, validation and test parts of ready model inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from compressor.data.readers import read
from compressor.data.readers.base import Array, Feeds, LabelKind, Progress, Samples, Skipped
from compressor.data.sliding_windows import Window, chosen, pieces
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess

__all__ = ["Batch", "Data", "DataError", "Shares", "Skipped", "Split", "load"]


@dataclass(frozen=True)
class Shares:
    """How samples are shared out: fractions, largest numbers, and how many are looked at in total (None: all).

    What the two caps leave over goes to the test part.
    """

    calibration: float = 0.25
    validation: float = 0.25
    calibration_cap: int = 512
    validation_cap: int = 512
    total: int | None = None

    def __post_init__(self) -> None:
        if not (self.calibration > 0 and self.validation > 0 and self.calibration + self.validation < 1):
            raise DataError(
                f"found the fractions {self.calibration} for calibration and {self.validation} for validation; "
                "expected positive numbers that leave something for test"
            )
        if min(self.calibration_cap, self.validation_cap, 3 if self.total is None else self.total) < 1:
            raise DataError("a cap or total number of samples below 1 leaves a part empty; give at least 1")

    def sizes(self, count: int) -> tuple[int, int, int]:
        """Sizes of calibration, validation and test for `count` >= 3 samples.

        >>> Shares().sizes(1379), Shares().sizes(50000), Shares().sizes(3)
        ((344, 344, 691), (512, 512, 48976), (1, 1, 1))
        """
        calibration = min(self.calibration_cap, max(1, int(count * self.calibration)), count - 2)
        validation = min(self.validation_cap, max(1, int(count * self.validation)), count - 1 - calibration)
        return calibration, validation, count - calibration - validation


@dataclass(frozen=True)
class Batch:
    """Ready model inputs, first axis rows, and their labels, one a sample.

    With `rows_per_sample` 2 the rows are a0, b0, a1, b1, ... of sentence pairs. `scored`, bool [rows, tokens], is there
    where rows are windows of texts: a token that is not scored is context only, and a text may have several rows.
    """

    feeds: Feeds
    labels: Array | None
    rows_per_sample: int
    ids: tuple[str, ...]
    scored: Array | None = None


@dataclass(frozen=True)
class Windows:
    """How long texts are cut, and what adds to a window what the model takes beyond tokens."""

    window: Window
    complete: Callable[[Feeds], Feeds]


@dataclass(frozen=True, eq=False)
class Split:
    """One part of the data, prepared batch by batch; every pass over it gives the same batches."""

    name: str
    samples: Samples = field(repr=False)
    indices: tuple[int, ...] = field(repr=False)
    windows: Windows | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> tuple[str, ...]:
        """File names relative to the folder, or row numbers from 0."""
        return tuple(self.samples.ids[index] for index in self.indices)

    @property
    def labels(self) -> Array | None:
        """The labels of all samples, without preparing any of them."""
        return None if self.samples.labels is None else self.samples.labels[list(self.indices)]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples, `batch_size` at a time; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"found the batch size {batch_size}, expected at least 1")
        return (self._batch(start, batch_size) for start in range(0, len(self.indices), batch_size))

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """All samples, long texts as windows that follow each other; other samples as `batches` gives them."""
        if self.windows is None:
            yield from self.batches(batch_size)
            return
        ids, samples = self.samples.ids, self.samples
        assert samples.whole is not None
        texts = ((index, samples.whole(index)) for index in self.indices)
        for piece in pieces(texts, self.windows.window, self.windows.complete, batch_size):
            yield Batch(piece.feeds, None, 1, tuple(ids[owner] for owner in piece.owners), piece.scored)

    def head(self, n: int) -> Split:
        """A part of at most `n` samples, evenly spaced over this one and sharing its prepared samples."""
        if n < 1:
            raise DataError(f"found {n} samples for a subset, expected at least 1")
        count = len(self.indices)
        if n >= count:
            return self
        return replace(self, indices=tuple(self.indices[place * count // n] for place in range(n)))

    def beside(self, other: Split, n: int) -> Split:
        """At most `n` samples of this part that are not in `other`, evenly spaced; none where there are no more."""
        taken = set(other.indices)
        left = tuple(index for index in self.indices if index not in taken)
        rest = replace(self, indices=left)
        return rest.head(n) if left else rest

    def _batch(self, start: int, size: int) -> Batch:
        part = self.indices[start : start + size]
        samples = self.samples
        labels = None if samples.labels is None else samples.labels[list(part)]
        return Batch(samples.feeds(part), labels, samples.rows_per_sample, tuple(samples.ids[index] for index in part))


@dataclass(frozen=True, eq=False)
class Data:
    """The three parts of one source, and how they came about."""

    source: str
    label_kind: LabelKind | None
    calibration: Split
    validation: Split
    test: Split
    skipped: tuple[Skipped, ...]
    random: bool
    reading: str
    seed: int
    shares: Shares
    window: Window | None = None
    limitations: tuple[Limitation, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Everything that report.json says about the data, as plain JSON values."""
        parts = (self.calibration, self.validation, self.test)
        return {
            "source": self.source,
            "reading": self.reading,
            "label_kind": self.label_kind,
            "random": self.random,
            "seed": self.seed,
            "fractions": {"calibration": self.shares.calibration, "validation": self.shares.validation},
            "caps": {"calibration": self.shares.calibration_cap, "validation": self.shares.validation_cap},
            "total": self.shares.total,
            "window": None if self.window is None else asdict(self.window),
            "sizes": {part.name: len(part) for part in parts},
            "skipped": [{"id": sample.id, "reason": sample.reason} for sample in self.skipped],
            "test_ids": list(self.test.ids),
        }


def load(
    spec: str,
    preprocess: Preprocess,
    *,
    task: str,
    seed: int = 0,
    shares: Shares | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    max_length: int | None = None,
    stride: int | None = None,
) -> Data:
    """Read, check and split the data that `spec` names.

    Images are really decoded here, once, and kept prepared; `progress(done, total)` follows that. `max_length` and
    `stride` say how texts are cut for a language model: its own length, at most 2,048 tokens, and half of that where
    they are not given. What is calibrated on is the first window of each text. Raises DataError.
    """
    shares = Shares() if shares is None else shares
    window = chosen(max_length, stride, preprocess.longest) if task == "text-generation" else None
    if window is not None:
        preprocess = preprocess.limited(window.length)
    samples = read(spec, preprocess, task=task, seed=seed, revision=revision)
    window = window if samples.whole is not None else None
    if window is not None:
        samples = replace(samples, feeds=_beginnings(samples.feeds, window))
    windows = None if window is None else Windows(window, preprocess.complete or dict)
    if preprocess.complete is not None:
        samples = replace(samples, feeds=_completed(samples.feeds, preprocess.complete))
    order = shuffled(samples.ids, seed)[: shares.total]
    faults = samples.faults(order, progress)
    usable = tuple(index for index in order if index not in faults)
    skipped = (*samples.skipped, *(Skipped(samples.ids[index], faults[index]) for index in sorted(faults)))
    _check_usable(spec, usable, skipped, faults, samples.ids)
    calibration, validation, _ = shares.sizes(len(usable))
    between = calibration + validation
    return Data(
        source=spec,
        label_kind=samples.label_kind,
        calibration=Split("calibration", samples, usable[:calibration], windows),
        validation=Split("validation", samples, usable[calibration:between], windows),
        test=Split("test", samples, usable[between:], windows),
        skipped=skipped,
        random=spec == "random",
        reading=samples.reading,
        seed=seed,
        shares=shares,
        window=window,
        limitations=samples.limitations,
    )


def _beginnings(feeds: Callable[[Sequence[int]], Feeds], window: Window) -> Callable[[Sequence[int]], Feeds]:
    """Rows of token arrays cut at the first window; texts are by their tokenizer, which knows where it pads."""
    return lambda indices: {name: array[:, : window.length] for name, array in feeds(indices).items()}


def _completed(feeds: Callable[[Sequence[int]], Feeds], complete: Callable[[Feeds], Feeds]) -> Callable[..., Feeds]:
    return lambda indices: complete(feeds(indices))


def shuffled(ids: Sequence[str], seed: int) -> tuple[int, ...]:
    """Positions in an order given by a hash of seed and id.

    The order of two samples does not depend on the other samples, the file system, or a library's generator.
    """
    keys = [hashlib.sha256(f"{seed}:{id}".encode(errors="surrogateescape")).digest() for id in ids]
    return tuple(sorted(range(len(ids)), key=keys.__getitem__))


def _check_usable(
    spec: str, usable: Sequence[int], skipped: Sequence[Skipped], faults: Mapping[int, str], ids: Sequence[str]
) -> None:
    if not usable and faults:
        first = min(faults)
        raise DataError(
            f"none of the {len(faults)} images in {spec} can be decoded (first: {ids[first]}: {faults[first]}); "
            "check how they were copied"
        )
    if len(usable) < 3:
        left_out = f" ({len(skipped)} skipped, first {skipped[0].id}: {skipped[0].reason})" if skipped else ""
        raise DataError(
            f"found {len(usable)} usable samples in {spec}{left_out}, expected at least 3, one each for calibration, "
            "validation and test; give more data"
        )
