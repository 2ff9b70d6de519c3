"""Deterministic, disjoint splits of the --data argument, as model inputs: calibration, validation, decision, test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.choices import ZERO_SHOT
from compressor.data.class_labels import with_class_numbers
from compressor.data.class_prompts import ClassPrompts, with_class_prompts
from compressor.data.decoder_inputs import DECODER_IDS, with_decoder_inputs
from compressor.data.equal_samples import equal_samples
from compressor.data.readers import read
from compressor.data.readers.base import ONE_CLASS, Array, Feeds, LabelKind, Progress, Samples, Skipped
from compressor.data.sample_cache import DIGEST, digest, digest_of_feeds
from compressor.data.sliding_windows import TOKENS, Window, resolve_window, tokens_at_once, window_batches
from compressor.data.text_lengths import check_lengths, check_unknown
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess

if TYPE_CHECKING:
    from compressor.models.class_names import ClassNames

DIGESTED = 32  # samples of a batch whose hash is computed
MIDDLE = 3  # samples that `Split.middle` takes at least, however long they are

__all__ = ["Batch", "Data", "DataError", "Shares", "Skipped", "Split", "load"]


@dataclass(frozen=True)
class Shares:
    """The sizes of the splits: fractions, caps, and the total number of samples that are used (None: all).

    Samples beyond the caps go to the test split. A `decision` of 0 makes no decision split.
    """

    calibration: float = 0.25
    validation: float = 0.25
    decision: float = 0.0
    calibration_cap: int = 512
    validation_cap: int = 512
    decision_cap: int = 1024
    total: int | None = None

    def __post_init__(self) -> None:
        parts = (self.calibration, self.validation, self.decision)
        if not (min(parts[:2]) > 0 <= self.decision and sum(parts) < 1):
            raise DataError(
                f"found the fractions {self.calibration} for calibration, {self.validation} for validation and "
                f"{self.decision} for the decision; expected positive numbers with a sum below 1, so that the test "
                "split is not empty"
            )
        caps = (self.calibration_cap, self.validation_cap, self.decision_cap)
        if min(*caps, 3 if self.total is None else self.total) < 1:
            raise DataError(
                "found a cap or total number of samples below 1, which leaves a split empty; set at least 1"
            )

    def sizes(self, count: int) -> tuple[int, int, int, int]:
        """Return the sizes of calibration, validation, decision and test for `count` >= 3 samples.

        >>> Shares().sizes(1379), Shares().sizes(50000), Shares().sizes(3)
        ((344, 344, 0, 691), (512, 512, 0, 48976), (1, 1, 0, 1))
        >>> Shares(decision=0.25).sizes(800), Shares(decision=0.25).sizes(3)
        ((200, 200, 200, 200), (1, 1, 0, 1))
        """
        calibration = min(self.calibration_cap, max(1, int(count * self.calibration)), count - 2)
        validation = min(self.validation_cap, max(1, int(count * self.validation)), count - 1 - calibration)
        rest = count - calibration - validation
        decision = min(self.decision_cap, int(count * self.decision), rest - 1)
        return calibration, validation, decision, rest - decision


@dataclass(frozen=True)
class Batch:
    """Model inputs with rows as the first axis, and one label per sample.

    With `rows_per_sample` 2, the rows are a0, b0, a1, b1, ... of sentence pairs. If the rows are sliding windows, a
    text may have several rows, and `scored`, bool [rows, tokens], marks the scored tokens; the others are context.
    """

    feeds: Feeds
    labels: Array | None
    rows_per_sample: int
    ids: tuple[str, ...]
    scored: Array | None = None


@dataclass(frozen=True)
class Windows:
    """The sliding window over long texts, what adds the derived inputs to a window, and its padding.

    Attributes:
        window: the window.
        complete: adds the derived inputs.
        least: number of tokens to which windows are padded at least.
        left: see `window_batches`.
    """

    window: Window
    complete: Callable[[Feeds], Feeds]
    least: int = 0
    left: int | None = None

    @staticmethod
    def of(window: Window, preprocess: Preprocess) -> Windows:
        """Return the windows of a model."""
        return Windows(window, preprocess.complete or dict, preprocess.padded or 0, preprocess.left_padding)


@dataclass(frozen=True, eq=False)
class Split:
    """One split of the data, prepared batch by batch; every iteration yields the same batches.

    Attributes:
        name: calibration, validation, decision or test.
        samples: all samples of the source.
        indices: positions of the samples of this split. Texts are sorted by length, the longest first, so that a batch
            has little padding.
        windows: the sliding windows over long texts; None for other data.
        tokens: number of tokens of a sample's longest row by position; empty for data other than texts.
        most_tokens: maximum number of tokens in a batch, padding included; a batch of a single sample may have more.
    """

    name: str
    samples: Samples = field(repr=False)
    indices: tuple[int, ...] = field(repr=False)
    windows: Windows | None = field(default=None, repr=False)
    tokens: Mapping[int, int] = field(default_factory=dict, repr=False)
    most_tokens: int = TOKENS

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the sample ids: file names relative to the folder, or row numbers from 0."""
        return tuple(self.samples.ids[index] for index in self.indices)

    @property
    def labels(self) -> Array | None:
        """Return the labels of all samples without preparing the samples."""
        return None if self.samples.labels is None else self.samples.labels[list(self.indices)]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Return an iterator over batches of `batch_size` samples; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"found the batch size {batch_size}; expected at least 1")
        starts = range(0, len(self.indices), batch_size)
        return (self._batch(self.indices[start : start + batch_size]) for start in starts)

    def bounded_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield consecutive batches of at most `batch_size` samples and `most_tokens` tokens, padding included.

        Memory then does not grow with the length of the texts.
        """
        return map(self._batch, self.bounded_groups(batch_size))

    def bounded_groups(self, batch_size: int) -> Iterator[tuple[int, ...]]:
        """Yield the positions of the samples in each of the `bounded_batches`."""
        batch: tuple[int, ...] = ()
        batch_size = max(batch_size, self.samples.at_once)
        for index in self.indices:
            longer = (*batch, index)
            padded = len(longer) * self.samples.rows_per_sample * max(self.tokens.get(each, 0) for each in longer)
            if batch and (len(batch) == batch_size or padded > self.most_tokens):
                yield batch
                longer = (index,)
            batch = longer
        if batch:
            yield batch

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of all samples: texts as consecutive sliding windows, others as in `bounded_batches`."""
        if self.windows is None:
            yield from self.bounded_batches(batch_size)
            return
        ids, samples = self.samples.ids, self.samples
        assert samples.whole is not None
        texts = ((index, samples.whole(index)) for index in self.indices)
        windows = self.windows
        sizes = {"least": windows.least, "most": self.most_tokens}
        for piece in window_batches(texts, windows.window, windows.complete, batch_size, left=windows.left, **sizes):
            yield Batch(piece.feeds, None, 1, tuple(ids[owner] for owner in piece.owners), piece.scored)

    def head(self, n: int) -> Split:
        """Return a subset of at most `n` evenly spaced samples, which shares the prepared samples of this split."""
        if n < 1:
            raise DataError(f"found {n} samples for a subset; expected at least 1")
        count = len(self.indices)
        if n >= count:
            return self
        return replace(self, indices=tuple(self.indices[position * count // n] for position in range(n)))

    def sparse(self, tokens: int, least: int) -> Split:
        """Return an evenly spaced subset of about `tokens` tokens, of at least `least` samples; all but texts: itself.

        Args:
            tokens: number of tokens of the longest rows, in sum.
            least: minimum number of samples, if the split has as many.
        """
        total = sum(self.tokens.get(index, 0) for index in self.indices)
        return self.head(max(least, len(self) * tokens // total)) if total else self

    def middle(self, n: int, tokens: int | None = None) -> Split:
        """Return a subset of at most `n` samples in the middle: of texts, those of about the median length.

        Args:
            n: maximum number of samples.
            tokens: tokens of texts in sum; texts that have more are fewer than `n`, but at least `MIDDLE`. None: any.
        """
        if tokens is not None:
            median = self.tokens.get(self.indices[len(self.indices) // 2], 0)
            n = min(n, max(MIDDLE, tokens // median)) if median else n
        start = max(0, (len(self.indices) - n) // 2)
        return replace(self, indices=self.indices[start : start + n])

    def beside(self, other: Split, n: int) -> Split:
        """Return at most `n` evenly spaced samples that are not in `other`; the result may be empty."""
        excluded = set(other.indices)
        remaining = tuple(index for index in self.indices if index not in excluded)
        rest = replace(self, indices=remaining)
        return rest.head(n) if remaining else rest

    def digest(self) -> bytes:
        """Return a hash of the inputs and the labels of all samples, as a model and its metric see them."""
        found = hashlib.blake2b(digest_size=DIGEST)
        for batch in self.bounded_batches(DIGESTED):
            found.update(digest_of_feeds(batch.feeds))
            found.update(b"" if batch.labels is None else digest(batch.labels))
        return found.digest()

    def _batch(self, indices: Sequence[int]) -> Batch:
        samples = self.samples
        ids = tuple(samples.ids[index] for index in indices)
        if samples.targets is not None:
            targets = samples.targets(indices)
            return Batch(samples.feeds(indices), targets.labels, samples.rows_per_sample, ids, targets.scored)
        labels = None if samples.labels is None else samples.labels[list(indices)]
        return Batch(samples.feeds(indices), labels, samples.rows_per_sample, ids)


@dataclass(frozen=True, eq=False)
class Data:
    """The splits of a data source, with the settings and the findings of reading it.

    `decision` holds the samples on which a budget decides between the plans of a search; None without such a budget.
    `prompts` are the classes of images as texts; None for all models but those of images and texts.
    """

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
    pairs: bool = False
    decision: Split | None = None
    prompts: ClassPrompts | None = None

    @property
    def parts(self) -> tuple[Split, ...]:
        """Return all splits; they are disjoint."""
        decision = () if self.decision is None else (self.decision,)
        return self.calibration, self.validation, *decision, self.test

    def describe(self) -> dict[str, Any]:
        """Return the entry of report.json about the data, as JSON values."""
        shares = self.shares
        return {
            "source": self.source,
            "reading": self.reading,
            "label_kind": self.label_kind,
            "random": self.random,
            "seed": self.seed,
            "fractions": {
                "calibration": shares.calibration,
                "validation": shares.validation,
                "decision": shares.decision,
            },
            "caps": {
                "calibration": shares.calibration_cap,
                "validation": shares.validation_cap,
                "decision": shares.decision_cap,
            },
            "total": shares.total,
            "window": None if self.window is None else asdict(self.window),
            "prompts": None if self.prompts is None else self.prompts.describe(),
            "sizes": {part.name: len(part) for part in self.parts},
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
    class_names: ClassNames | None = None,
    names_file: str | Path | None = None,
    template: str | None = None,
    logits: int | None = None,
) -> Data:
    """Read, check and split the data.

    All images are decoded and preprocessed once and cached. The calibration split has the first window of each text.

    Args:
        spec: the --data argument.
        preprocess: preprocessing of the model.
        task: task of the model.
        seed: seed of the shuffling.
        shares: sizes of the splits.
        revision: revision of a hub dataset.
        progress: called with the number of decoded images and their total.
        max_length: window length in tokens for a language model; by default the maximum length of the model, at most
            2,048 tokens.
        stride: stride of the windows in tokens; by default half of the length.
        class_names: names of the model's classes, by which class names in the data are numbered.
        names_file: file of class names for a model of images and texts; by default those of the data.
        template: prompt template for class names; by default that of the model.
        logits: number of logits that the model gives for each token, which bounds the tokens in a batch; None for
            models that give none, or an unknown number.

    Raises:
        DataError: the data cannot be read, does not fit the model, or has fewer than three usable samples.
    """
    shares = Shares() if shares is None else shares
    length = max_length if preprocess.padded is None else preprocess.padded
    window = resolve_window(length, stride, preprocess.longest) if task == "text-generation" else None
    if window is not None:
        preprocess = preprocess.limited(window.length)
    decoder = None if spec == "random" else preprocess.decoder
    source = preprocess if decoder is None else _without_decoder_inputs(preprocess)
    samples = found = read(spec, source, task=task, seed=seed, revision=revision)
    prompts = None
    if task == ZERO_SHOT and spec != "random":
        samples, prompts = with_class_prompts(samples, preprocess, spec, file=names_file, template=template)
    elif task.endswith("classification"):
        samples = with_class_numbers(samples, class_names, spec)
    window = window if samples.whole is not None else None
    if window is not None:
        samples = replace(samples, feeds=_first_windows(samples.feeds, window))
    windows = None if window is None else Windows.of(window, preprocess)
    order = shuffled(samples.ids, seed)[: shares.total]
    faults = samples.faults(order, progress)
    check_unknown(samples, [index for index in order if index not in faults], preprocess, spec)
    lengths = check_lengths(samples, order, *((preprocess.limit, 1) if window is None else (None, 2)))
    usable = tuple(index for index in order if index not in faults and index not in lengths.faults)
    unusable = sorted((*faults.items(), *lengths.faults.items()))
    skipped = (*samples.skipped, *(Skipped(samples.ids[index], reason) for index, reason in unusable))
    _check_usable(spec, usable, skipped, faults, samples.ids)
    if decoder is not None:
        samples = with_decoder_inputs(samples, decoder, spec)
    if preprocess.complete is not None:
        samples = replace(samples, feeds=_completed(samples.feeds, preprocess.complete))
    limit = preprocess.limit if window is None else window.length
    tokens = {index: count if limit is None else min(count, limit) for index, count in lengths.tokens.items()}
    splits = _split(samples, usable, shares, windows, tokens)
    splits = {name: replace(split, most_tokens=tokens_at_once(logits)) for name, split in splits.items()}
    copies = () if spec == "random" else equal_samples(found, tuple(splits.values()))
    return Data(
        source=spec,
        label_kind=samples.label_kind,
        calibration=splits["calibration"],
        validation=splits["validation"],
        decision=splits.get("decision"),
        test=splits["test"],
        skipped=skipped,
        random=spec == "random",
        reading=samples.reading,
        seed=seed,
        shares=shares,
        window=window,
        limitations=(
            *samples.limitations,
            *samples.findings(),
            *lengths.limitations,
            *_left_out(skipped, len(usable)),
            *_one_class(samples, usable),
            *copies,
        ),
        pairs=samples.pairs,
        prompts=prompts,
    )


def _left_out(skipped: Sequence[Skipped], usable: int) -> Iterator[Limitation]:
    """Yield a limitation that counts the samples that cannot be used, with the first and its reason."""
    if skipped:
        ids = ", ".join(sample.id for sample in skipped[:5]) + ", ..." * (len(skipped) > 5)
        yield Limitation(
            "samples left out",
            f"{len(skipped):,} of {len(skipped) + usable:,} cannot be used: {ids} (the first: {skipped[0].reason})",
        )


def _one_class(samples: Samples, usable: Sequence[int]) -> Iterator[Limitation]:
    """Yield a limitation if all samples have one class: a model that always answers it would be perfect."""
    if samples.labels is None or samples.label_kind != "class":
        return
    found = set(samples.labels[list(usable)].tolist())
    if len(found) == 1:
        (number,) = found
        numbers = {} if samples.numbering is None else samples.numbering.numbers
        name = next((repr(name) for name, each in numbers.items() if each == number), str(number))
        yield Limitation(
            ONE_CLASS,
            f"all {len(usable):,} samples have the class {name}, so that a model which always answers it has an "
            "accuracy of 100 %, and the figures say nothing of the others; give samples of all classes",
        )


def _split(
    samples: Samples, usable: Sequence[int], shares: Shares, windows: Windows | None, tokens: Mapping[int, int]
) -> dict[str, Split]:
    """Return the splits that are not empty, by name, each sorted by the numbers of `tokens`, the longest first."""
    splits, start = {}, 0
    for name, size in zip(("calibration", "validation", "decision", "test"), shares.sizes(len(usable)), strict=True):
        if size:
            indices = sorted(usable[start : start + size], key=lambda index: -tokens.get(index, 0))
            splits[name] = Split(name, samples, tuple(indices), windows, tokens)
        start += size
    return splits


def _first_windows(feeds: Callable[[Sequence[int]], Feeds], window: Window) -> Callable[[Sequence[int]], Feeds]:
    """Truncate the rows of token arrays to the first window; the tokenizer truncates and pads texts itself."""
    return lambda indices: {name: array[:, : window.length] for name, array in feeds(indices).items()}


def _without_decoder_inputs(preprocess: Preprocess) -> Preprocess:
    """Return the preprocessing of the sources alone."""
    return replace(preprocess, inputs=tuple(name for name in preprocess.inputs if name != DECODER_IDS))


def _completed(feeds: Callable[[Sequence[int]], Feeds], complete: Callable[[Feeds], Feeds]) -> Callable[..., Feeds]:
    return lambda indices: complete(feeds(indices))


def shuffled(ids: Sequence[str], seed: int) -> tuple[int, ...]:
    """Return the positions of the samples, sorted by a hash of seed and id.

    The order of two samples does not depend on the other samples, the file system, or a random number generator.
    """
    keys = [hashlib.sha256(f"{seed}:{id}".encode(errors="surrogateescape")).digest() for id in ids]
    return tuple(sorted(range(len(ids)), key=keys.__getitem__))


def _check_usable(
    spec: str, usable: Sequence[int], skipped: Sequence[Skipped], faults: Mapping[int, str], ids: Sequence[str]
) -> None:
    if not usable and faults:
        first = min(faults)
        raise DataError(
            f"none of the {len(faults)} files in {spec} can be decoded (first: {ids[first]}: {faults[first]}); "
            "check that the files were copied completely"
        )
    if len(usable) < 3:
        left_out = f" ({len(skipped)} skipped, first {skipped[0].id}: {skipped[0].reason})" if skipped else ""
        raise DataError(
            f"found {len(usable)} usable samples in {spec}{left_out}; expected at least 3, one each for calibration, "
            "validation and test; pass more data"
        )
