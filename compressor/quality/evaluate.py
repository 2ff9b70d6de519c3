"""Evaluation of model outputs against labels or, without labels, against the original model.

Outputs are reduced to a few numbers per sample and then discarded. These columns allow a comparison of any two models
sample by sample and a bootstrap interval for every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from compressor.data.splits import Batch, Split
from compressor.errors import CompressorError
from compressor.models import Model
from compressor.models.base import EvaluatedOutput
from compressor.quality.answer_variation import AnswerVariation
from compressor.quality.disagreements import Disagreement, largest_regret
from compressor.quality.heads.base import Head
from compressor.quality.intervals import Array, Columns, Figure, bootstrap, by_text
from compressor.quality.metrics import LABEL_FREE, METRICS, weighted_mean

Runner = Callable[[Mapping[str, Array]], Array]

BATCH = 32


class EvaluationError(CompressorError):
    """A model returned outputs that cannot be evaluated."""


def metric_value(metric: str, columns: Columns) -> float:
    """Compute the metric from the columns of all samples."""
    return float(METRICS[metric].compute(columns))


def loss(metric: str, before: float, after: float) -> float:
    """Return the loss in percent: the drop of a score in points, or the relative increase of perplexity or error.

    A negative loss is an improvement.
    """
    return float(METRICS[metric].loss(np.asarray(before), np.asarray(after)))


def figure(metric: str, columns: Columns, *, seed: int = 0) -> Figure:
    """Compute the metric with a percentile bootstrap interval over samples."""
    return bootstrap(METRICS[metric].compute, columns, seed)


def loss_figure(metric: str, before: Columns, after: Columns, *, seed: int = 0) -> Figure:
    """Compute the loss from `before` to `after` with a paired bootstrap interval (the same samples of both models)."""
    return paired_figure(metric, (before, after), METRICS[metric].loss, seed=seed)


def interaction_figure(metric: str, original: Columns, one: Columns, other: Columns, both: Columns) -> Figure:
    """Compute the interaction of two changes: the loss of both minus the sum of their separate losses.

    loss(original, both) - (loss(original, one) + loss(original, other)), with a paired bootstrap interval. It is 0
    where the losses add up and negative where both changes together lose less.
    """
    loss_of = METRICS[metric].loss

    def excess(start: Array, first: Array, second: Array, end: Array) -> Array:
        return loss_of(start, end) - loss_of(start, first) - loss_of(start, second)

    return paired_figure(metric, (original, one, other, both), excess)


def paired_figure(metric: str, models: Sequence[Columns], statistic: Callable[..., Array], *, seed: int = 0) -> Figure:
    """Compute `statistic` of the metrics of several models with a paired bootstrap interval."""
    merged = {f"{index} {key}": value for index, columns in enumerate(models) for key, value in columns.items()}

    def resampled_statistic(part: Columns) -> Array:
        sides = [{key: part[f"{index} {key}"] for key in columns} for index, columns in enumerate(models)]
        return statistic(*(METRICS[metric].compute(side) for side in sides))

    return bootstrap(resampled_statistic, merged, seed)


# ------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Evaluation:
    """Per-sample columns of each evaluated model and the metric to compute from them.

    For classifiers, `changed` maps each model to its disagreements with the reference, those of the largest regret.
    `head` computed the columns; without one, nothing but the metric is known. `outputs` is the number of classes, or of
    tokens in the vocabulary. `variation` tells whether the answers of the reference depend on the samples; None if that
    is not known.
    """

    metric: str
    columns: Mapping[str, Columns]
    changed: Mapping[str, Sequence[Disagreement]] = field(default_factory=dict)
    head: Head = field(default_factory=Head)
    outputs: int = 1
    variation: AnswerVariation | None = None

    def value(self, name: str) -> float:
        """Return the metric of one model."""
        return metric_value(self.metric, self.columns[name])

    def figure(self, name: str) -> Figure:
        """Return the metric of one model with its interval."""
        return figure(self.metric, self.columns[name])

    def further(self, name: str) -> dict[str, Figure]:
        """Return the metrics that the head reports beside its own, such as Spearman beside the mean absolute error."""
        return {metric: figure(metric, self.columns[name]) for metric in self.head.further(self.metric)}

    def label_free(self, name: str) -> dict[str, Figure]:
        """Return the agreement with the reference in % and the divergence from it, where these columns exist."""
        columns = self.columns[name]
        return {
            key: bootstrap(lambda part, key=key, scale=scale: weighted_mean(part, key) * scale, columns, 0)  # type: ignore[misc]
            for key, (_, scale) in LABEL_FREE.items()
            if key in columns
        }

    def loss_value(self, before: str, after: str) -> float:
        """Return the loss of `after` against `before` in percent, without an interval."""
        return loss(self.metric, self.value(before), self.value(after))

    def expected_loss(self, reference: str, after: str) -> float:
        """Return the loss of `after` against the reference to expect on new samples, in percent.

        A few hundred labels measure a loss of accuracy only to about one point. Heads with probabilities know the loss
        that they expect (see `Head.expected_loss`), which varies far less. For other heads it is the measured loss.
        """
        expected = self.head.expected_loss(self.head.judged(self.metric), self.columns[after])
        return self.loss_value(reference, after) if expected is None else expected

    def expected_loss_figure(self, after: str) -> Figure | None:
        """Return the loss of `after` that the head expects against the reference, with its interval.

        None with labels, whose measured loss is reported, and for heads that expect no loss.
        """
        judged = self.head.judged(self.metric)
        if judged == self.metric or self.head.expected_loss(judged, self.columns[after]) is None:
            return None

        def statistic(part: Columns) -> Array:
            if next(iter(part.values())).ndim == 1:
                return np.asarray(self.head.expected_loss(judged, part))
            rows = range(len(next(iter(part.values()))))
            return np.array(
                [self.head.expected_loss(judged, {key: each[row] for key, each in part.items()}) for row in rows]
            )

        return bootstrap(statistic, self.columns[after])

    def loss(self, before: str, after: str) -> Figure:
        """Return the loss of `after` against `before` with its interval."""
        return loss_figure(self.metric, self.columns[before], self.columns[after])

    def excess(self, original: str, one: str, other: str, both: str) -> Figure:
        """Return the interaction of two changes with its interval (see `interaction_figure`)."""
        return interaction_figure(self.metric, *(self.columns[name] for name in (original, one, other, both)))


def evaluate(
    split: Split,
    runners: Mapping[str, Runner],
    *,
    head: Head,
    metric: str,
    reference: str,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate all models on a split, every model on one batch before the next batch.

    Args:
        split: samples.
        runners: model name to a function from feeds to the model's output (first axis: rows).
        head: how outputs are evaluated.
        metric: a metric of this head.
        reference: name of the runner that the others are compared with.
        batch_size: maximum number of samples in a batch.
        progress: called with the number of samples done and the total.

    Raises:
        EvaluationError: an output contains NaN or infinity, or models have outputs of other shapes.
    """
    measured = Measured(head, metric, reference)
    parts = (measured.part(runners, batch, place) for batch, place in measured.batches(split, batch_size))
    return measured.joined(parts, split, progress)


class Compared(NamedTuple):
    """The columns of one model on one batch, and its disagreements with the reference, those of the largest regret."""

    columns: Columns
    changed: Sequence[Disagreement]


@dataclass(frozen=True)
class Part:
    """What an evaluation keeps of one batch.

    Attributes:
        ids: the sample of each row of the columns.
        compared: what was found for each model.
        variation: that of the reference.
        outputs: number of classes, or of tokens in the vocabulary.
    """

    ids: tuple[str, ...]
    compared: Mapping[str, Compared]
    variation: AnswerVariation
    outputs: int


@dataclass(frozen=True)
class Measured:
    """An evaluation of models, batch by batch: in any process, and in any number of them.

    Attributes:
        head: how outputs are evaluated.
        metric: a metric of this head.
        reference: name of the model that the others are compared with.
    """

    head: Head
    metric: str
    reference: str

    def batches(self, split: Split, batch_size: int = BATCH) -> Iterator[tuple[Batch, int]]:
        """Yield each batch with the place of its first sample in the split."""
        owners, place = set[str](), 0
        for batch in split.whole(batch_size) if self.head.by_window else split.bounded_batches(batch_size):
            yield batch, place
            owners.update(batch.ids if self.head.by_window else ())
            place = len(owners) if self.head.by_window else place + len(batch.ids)

    def part(self, runners: Mapping[str, Runner], batch: Batch, place: int) -> Part:
        """Run all models on one batch.

        Raises:
            EvaluationError: an output contains NaN or infinity, or models have outputs of other shapes.
        """
        original = runners[self.reference](batch.feeds)
        compared = {
            name: self.compared(name, original if name == self.reference else run(batch.feeds), original, batch, place)
            for name, run in runners.items()
        }
        return self.part_of(compared, original, batch)

    def compared(self, name: str, answer: Array, original: Array, batch: Batch, place: int) -> Compared:
        """Compare the output of one model with that of the reference on one batch.

        Raises:
            EvaluationError: the output contains NaN or infinity, or has another shape.
        """
        _check_outputs(name, answer, self.reference, original)
        columns = sample_columns(self.head, self.metric, batch, answer, original, name)
        return Compared(columns, largest_regret(self.head.disagreements(batch, answer, original, columns, place)))

    def part_of(self, compared: Mapping[str, Compared], original: Array, batch: Batch) -> Part:
        """Put together what was found on one batch for each model; `original` is the output of the reference."""
        variation = AnswerVariation.of(self.head, original)
        return Part(batch.ids, compared, variation, original.shape[-1])

    def joined(
        self, parts: Iterable[Part], split: Split, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Put the parts of all batches together, in their order.

        Args:
            parts: one for each batch.
            split: the samples.
            progress: called with the number of samples done and the total.
        """
        columns, changed = dict[str, list[Columns]](), dict[str, list[Disagreement]]()
        rows, variation = list[str](), AnswerVariation(self.head)
        for part in parts:
            variation.join(part.variation)
            for name, found in part.compared.items():
                columns.setdefault(name, []).append(found.columns)
                changed[name] = largest_regret([*changed.get(name, ()), *found.changed])
            rows += part.ids
            if progress is not None:
                progress(len(set(rows)) if self.head.by_window else len(rows), len(split))
        joined = {name: join(found) for name, found in columns.items()}
        if self.head.by_window:
            joined = {name: by_text(found, rows) for name, found in joined.items()}
        return Evaluation(self.metric, joined, changed, self.head, part.outputs, variation)


def _check_outputs(name: str, answer: Array, reference: str, original: Array) -> None:
    """Raise if two models differ in their outputs, such as in the number of classes or of tokens in the vocabulary."""
    if answer.shape != original.shape:
        sizes = [" x ".join(map(str, each.shape[1:])) for each in (answer, original)]
        raise EvaluationError(
            f"{name} gives {sizes[0]} values for each sample, and {reference} {sizes[1]}, so they cannot be compared; "
            "give models of the same classes or the same vocabulary."
        )


def join(parts: list[Columns]) -> Columns:
    """Concatenate the columns of consecutive batches."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def sample_columns(
    head: Head,
    metric: str,
    batch: Batch,
    answer: Array,
    original: Array | None,
    name: str = "model",
    *,
    diverging: bool = True,
) -> Columns:
    """Compute the per-sample columns of one batch.

    Args:
        head: how outputs are evaluated.
        metric: the metric that the columns are for.
        batch: feeds and labels.
        answer: output of the model, first axis: rows.
        original: output of the reference model; None where the metric does not need it.
        name: name of the model in the error message.
        diverging: also compute the divergence from `original`, which a search does not need.

    Raises:
        EvaluationError: `answer` contains NaN or infinity.
    """
    rows = answer.reshape(len(answer), -1)
    finite = np.isfinite(rows.min(1)) & np.isfinite(rows.max(1))  # NaN is the extreme of any row that has one
    if not finite.all():
        first = batch.ids[int(finite.argmin()) // batch.rows_per_sample]
        few = f"that sample, as {int(finite.sum())} others in its batch of {len(rows)} are finite"
        raise EvaluationError(
            f"{name} gave NaN or infinity for sample {first}; check {few if finite.any() else 'its weights'}."
        )
    columns = head.columns(metric, batch, answer, original)
    if original is None or not diverging or metric == "fidelity":  # 1 - fidelity is the divergence
        return columns
    return {"divergence": _divergence_column(head, batch, answer, original)} | columns


def _divergence_column(head: Head, batch: Batch, answer: Array, original: Array) -> Array:
    """Compute the divergence from the original's output per sample, row by row to limit the memory in use."""
    if answer is original:
        return np.zeros(len(answer) // batch.rows_per_sample)
    mask = head.divergence_mask(batch)
    rows = []
    for row in range(len(answer)):
        after, before = (torch.from_numpy(side[row : row + 1]) for side in (answer, original))
        row_mask = torch.from_numpy(mask[row : row + 1]) if mask is not None and answer.ndim > 2 else None
        rows.append(float(head.divergence(after, before, row_mask)))
    means: Array = np.array(rows).reshape(-1, batch.rows_per_sample).mean(1)
    return means


def graph_runner(
    model: Model | EvaluatedOutput, run: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]
) -> Runner:
    """Wrap a function from tensors to the outputs of `model` as a runner on numpy arrays."""

    def answer(feeds: Mapping[str, Array]) -> Array:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        values: Array = model.evaluated_in(run(tensors)).numpy()
        return values

    return answer


def tensor_batches(split: Split, batch_size: int = BATCH) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the feeds of each of the `Split.bounded_batches` of a split as tensors."""
    for batch in split.bounded_batches(batch_size):
        yield {name: torch.from_numpy(value) for name, value in batch.feeds.items()}
