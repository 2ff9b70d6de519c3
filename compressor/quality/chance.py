"""Check that the original tells samples apart and is better than chance, before losses are measured that mean nothing.

The usual causes are a last layer without its weights, and labels that are not the model's classes: another order,
another column, reversed scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment

from compressor.data.class_labels import format_pairs
from compressor.data.readers.base import CLASS_ORDER
from compressor.data.splits import Batch, Split
from compressor.errors import CompressorError
from compressor.limitations import Limitation
from compressor.models import Model
from compressor.quality import evaluate
from compressor.quality.answer_variation import ROUNDING, AnswerVariation
from compressor.quality.evaluate import BATCH, graph_runner, join, metric_value, sample_columns
from compressor.quality.heads.registry import head_for
from compressor.quality.intervals import Array, Columns, Figure, by_text
from compressor.quality.metrics import METRICS as ALL
from passes.execute.interpreter import Program
from passes.graph.graph import Graph

RANKED = ("spearman", "rank_correlation")
SHARES = ("f1", "exact_match", "mean_iou", "token_accuracy")  # scores of 0 for a model that is always wrong
METRICS = ("accuracy", "perplexity", "masked_perplexity", "mae", *RANKED, *SHARES)
MARGIN = 0.1  # share of the way from chance to a perfect model that counts as no better than chance
FEWEST = 8  # texts, or sentence pairs; fewer give no interval
FEW = 4  # samples in a batch without labels; the answers of a trained model differ in the first
TEXTS = 4  # texts of a language model in a batch; a trained one is better than chance after the first few
GAIN = 0.2  # accuracy that another numbering must add to be reported
SAMPLES_PER_CLASS = 10  # fewest samples by which another numbering is reported


class ChanceError(CompressorError):
    """The original model is no better than chance on the data."""


@dataclass(frozen=True)
class Standing:
    """The metric of the original model and where it stands between chance and a perfect model.

    Attributes:
        metric: the metric.
        figure: its value with a 95 % interval.
        chance: its value for a model that guesses.
        skill: 0 at chance and 1 for a perfect model, with the interval of `figure`.
        fault: a clause that says why the labels judge no model; None if they do.
    """

    metric: str
    figure: Figure
    chance: float
    skill: Figure
    fault: str | None = None

    @property
    def better(self) -> bool:
        """Whether the model is better than chance: beyond the interval, or for perplexity beyond the margin."""
        beyond = self.skill.low > 0 or (self.metric.endswith("perplexity") and self.skill.value > MARGIN)
        return beyond and self.fault is None

    @property
    def no_better(self) -> bool:
        """Whether the model is at or below chance, and its interval excludes a model that is clearly better.

        So it is with labels that judge no model.

        The interval need not end below chance: with 1,000 classes, no correct answer among 3,000 leaves accuracies
        above 0.1 % possible, but 36 samples exclude 10 %.
        """
        return self.fault is not None or (self.skill.value <= 0 and self.skill.high <= MARGIN)

    def __str__(self) -> str:
        """Return the metric with its interval, and chance."""
        figure = self.figure
        if self.metric == "accuracy":
            text = f"an accuracy of {figure.value:.1f} % ({figure.low:.1f} to {figure.high:.1f} %)"
            return f"{text} on {figure.n} samples, where chance is {self.chance:.1f} %"
        if self.metric == "mae":
            text = f"a mean absolute error of {figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"
            return f"{text} on {figure.n} samples, where the best constant has {self.chance:.4g}"
        if self.metric in SHARES:
            label = ALL[self.metric].label
            name = f"a {label}" if self.metric == "token_accuracy" else f"an {label}"  # exact match, F1, mIoU
            text = f"{name} of {figure.value:.1f} % ({figure.low:.1f} to {figure.high:.1f} %)"
            return f"{text} on {figure.n} samples, where chance is {self.chance:.1f} %"
        if self.metric in RANKED:
            text = f"a Spearman correlation x 100 of {figure.value:.1f} ({figure.low:.1f} to {figure.high:.1f})"
            return f"{text} with the scores of {figure.n} pairs"
        text = f"a perplexity of {figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"
        return f"{text} on {figure.n} texts, where a guess among its {self.chance:,.0f} tokens has {self.chance:,.0f}"


def standing(metric: str, columns: Columns, outputs: int) -> Standing:
    """Compare a metric with chance, and find out whether the labels can judge a model at all.

    Args:
        metric: one of `METRICS`.
        columns: the columns of `sample_columns`, one row per sample or text.
        outputs: number of classes, or of tokens in the vocabulary; not used for Spearman correlation.
    """
    found = _compared(metric, columns, outputs)
    return replace(found, fault=_fault(found, columns))


def _fault(found: Standing, columns: Columns) -> str | None:
    """Return a clause on the data that says why its labels judge no model; None if they do."""
    count = found.figure.n
    if "gold" in columns and count >= FEWEST and float(np.ptp(columns["gold"])) == 0.0:
        score = f"has the score {columns['gold'][0]:.4g} for all {count} samples that were compared"
        return f"{score}, with which nothing correlates and than which no model is better"
    if found.metric == "mae" and found.figure.value <= ROUNDING * found.chance:
        scores = f"has the model's own outputs as scores, up to an error of {found.figure.value:.2g}"
        return f"{scores}, and a loss relative to an error of 0 is not defined"
    unions = [column for name, column in columns.items() if name.startswith("union ")]
    counted = columns.get("tokens", sum(unions) if unions else 1)
    if not np.any(counted):
        return f"marks everything in the {count} samples that were compared as not scored"
    return None


def _compared(metric: str, columns: Columns, outputs: int) -> Standing:
    """Compare a metric with chance.

    The interval is that of Clopper and Pearson (1934) for accuracy, which also holds at 0 % where a bootstrap has no
    width, that of Fieller, Hartley and Pearson (1957) for Spearman correlation, and a bootstrap over texts for
    perplexity.
    """
    count = len(next(iter(columns.values())))
    if metric in SHARES or metric == "mae":
        return _bootstrapped(metric, columns, outputs)
    if metric == "accuracy":
        correct = int(columns["accuracy"].sum())
        low, high = stats.binomtest(correct, count).proportion_ci(0.95, "exact")
        figure, chance = Figure(100.0 * correct / count, 100.0 * low, 100.0 * high, count), 100.0 / outputs
        value, low, high = ((value - chance) / (100.0 - chance) for value in (figure.value, figure.low, figure.high))
    elif metric in RANKED:
        figure, chance = _spearman(metric_value(metric, columns), count), 0.0
        value, low, high = figure.value / 100.0, figure.low / 100.0, figure.high / 100.0
    else:
        figure, chance = evaluate.figure(metric, columns), float(outputs)
        logs = [math.log(value) / math.log(outputs) for value in (figure.value, figure.high, figure.low)]
        value, low, high = (1.0 - log for log in logs)
        high = high if count >= FEWEST else 1.0
    return Standing(metric, figure, chance, Figure(value, low, high, count))


def _bootstrapped(metric: str, columns: Columns, outputs: int) -> Standing:
    """Compare a score with 0 (of tokens: with one class of all), or an error with that of the best constant."""
    count = len(next(iter(columns.values())))
    figure = evaluate.figure(metric, columns)
    if metric == "mae":
        chance = float(np.abs(columns["gold"] - np.median(columns["gold"])).mean())
        value, high, low = (1.0 - each / max(chance, 1e-12) for each in (figure.value, figure.low, figure.high))
    else:
        chance = 100.0 / outputs if metric == "token_accuracy" else 0.0
        value, low, high = ((each - chance) / (100.0 - chance) for each in (figure.value, figure.low, figure.high))
    return Standing(metric, figure, chance, Figure(value, low, high if count >= FEWEST else 1.0, count))


def _spearman(value: float, count: int) -> Figure:
    """Return a Spearman correlation x 100 with the interval of its Fisher transform, of variance 1.06 / (n - 3)."""
    if count < FEWEST:
        return Figure(value, -100.0, 100.0, count)
    center = math.atanh(max(-0.999999, min(0.999999, value / 100.0)))
    half = 1.96 * math.sqrt(1.06 / (count - 3))
    return Figure(value, 100.0 * math.tanh(center - half), 100.0 * math.tanh(center + half), count)


@dataclass
class _Run:
    """The columns of the batches so far, and of a classifier also its predictions and labels."""

    metric: str
    variation: AnswerVariation
    parts: list[Columns] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    predicted: list[Array] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)
    outputs: int = 0

    @property
    def settled(self) -> bool:
        """Whether no further batch is needed."""
        return self.variation.settled and (self.metric not in METRICS or self.standing().better)

    def add(self, answer: Array, batch: Batch, columns: Columns) -> None:
        """Take in a batch of samples with labels, or of texts."""
        self.outputs = answer.shape[-1]
        self.parts.append(columns)
        self.owners += batch.ids
        if self.metric == "accuracy":
            assert batch.labels is not None
            self.predicted.append(answer.argmax(-1))
            self.labels.append(batch.labels)

    def standing(self) -> Standing:
        columns = join(self.parts)
        columns = by_text(columns, self.owners) if self.metric == "perplexity" else columns
        return standing(self.metric, columns, self.outputs)

    def numbering(self) -> tuple[dict[int, int], float]:
        """Return the class numbers of the labels that agree best with the predictions, and their accuracy.

        It is the assignment of the largest sum over the confusion matrix (Kuhn 1955).
        """
        labels, predicted = np.concatenate(self.labels), np.concatenate(self.predicted)
        used = np.unique(np.concatenate([labels, predicted]))
        confusion = np.zeros((len(used), len(used)), dtype=np.int64)
        np.add.at(confusion, (np.searchsorted(used, labels), np.searchsorted(used, predicted)), 1)
        rows, columns = linear_sum_assignment(confusion, maximize=True)
        best = {int(used[row]): int(used[column]) for row, column in zip(rows, columns, strict=True)}
        return best, float(confusion[rows, columns].sum() / len(labels))


@torch.inference_mode()
def check_original(graph: Graph, model: Model, split: Split, metric: str, source: str) -> tuple[Limitation, ...]:
    """Run the original on a split until its answers differ and it is better than chance; return the limitations.

    A model whose answers differ, and that is clearly better than chance, needs one batch. All samples are used if class
    names were numbered without the model's names, to find out whether another numbering fits better.

    Args:
        graph: graph of the original.
        model: its description.
        split: samples, with labels or without, or texts of a language model.
        metric: a metric; only those in `METRICS` are compared with chance.
        source: name of the data in messages.

    Raises:
        ChanceError: the model gives the same answer for all samples, or is no better than chance.
    """
    head = head_for(model.task, model.problem_type)
    run, answer_of = _Run(metric, AnswerVariation(head)), graph_runner(model, Program(graph).run)
    numbering = split.samples.numbering
    doubtful = metric == "accuracy" and numbering is not None and numbering.by == "order"
    for batch in split.whole(TEXTS) if metric == "perplexity" else split.bounded_batches(_batch_size(metric)):
        answer = answer_of(batch.feeds)
        run.variation.add(answer)
        if metric in METRICS:
            run.add(answer, batch, sample_columns(head, metric, batch, answer, None, model.name, diverging=False))
        if not doubtful and run.settled:
            return ()
    check_varies(run.variation, model.name, source)
    only = tuple(_only_class(run.variation, model))
    if metric not in METRICS:
        return only
    found = run.standing()
    if found.no_better:
        raise ChanceError(_stop(found, run, model, split, source))
    return (*only, *_limitations(found, run, split, model))


def check_varies(variation: AnswerVariation, name: str, source: str) -> None:
    """Refuse a model whose answers are the same for all samples.

    Raises:
        ChanceError: they are.
    """
    if variation.constant:
        raise ChanceError(
            f"{name} gives the same answer for all {variation.rows} inputs of {source} that were compared, so no loss "
            "against it can be measured; check its weights, such as a last layer of zeros, and that the samples "
            "differ, or give --data random to measure speed alone."
        )


def _batch_size(metric: str) -> int:
    return BATCH if metric in METRICS else FEW


def _only_class(variation: AnswerVariation, model: Model) -> Iterator[Limitation]:
    """Yield a limitation if the original predicts one class for all samples."""
    number = variation.only_class
    if number is not None:
        name = None if model.class_names is None else model.class_names.first(number)
        yield Limitation(
            "classes of the original",
            f"it predicts class {number}{'' if name is None else f' ({name})'} for all {variation.rows} inputs that "
            "were compared, so agreement on them says nothing about its other classes; give samples of several classes",
        )


def check_measured(metric: str, columns: Columns, outputs: int, name: str, source: str) -> tuple[Limitation, ...]:
    """Check columns of the original that were already measured, as `check_original` does.

    Raises:
        ChanceError: the model is no better than chance.
    """
    if metric not in METRICS:
        return ()
    found = standing(metric, columns, outputs)
    if found.no_better:
        raise ChanceError(_refusal(found, name, source))
    return () if found.better else (_not_better(found),)


def constant_scores(metric: str, splits: Sequence[Split]) -> Iterator[Limitation]:
    """Yield a limitation for the splits whose samples all have one score, so that correlations are not defined."""
    for split in splits if metric in (*RANKED, "mae") else ():
        labels = split.labels
        if labels is not None and float(np.ptp(labels)) == 0.0:
            yield Limitation(
                "scores of the data",
                f"all {len(split):,} {split.name} samples have the score {labels.flat[0]:.4g}, with which nothing "
                "correlates: a Spearman correlation on them is not defined, and stands as 0; give scores that differ",
            )


def _refusal(found: Standing, name: str, source: str) -> str:
    """Return the message about a model that is no better than chance, or about labels that judge no model."""
    if found.fault is None:
        return f"{name} has {found}, so {_cause(found, source)}."
    labels = "scores" if found.metric in (*RANKED, "mae") else "labels"
    return (
        f"{source} {found.fault}, so no loss of {name} can be measured; correct its {labels}, or give the data without "
        f"{labels} to compare the result with the original."
    )


def _stop(found: Standing, run: _Run, model: Model, split: Split, source: str) -> str:
    if found.metric != "accuracy":
        return _refusal(found, model.name, source)
    hint = _other_numbering(found, run, split, model)
    return f"{model.name} has {found}, so {_cause(found, source)} ({_pairs(split, model)}){hint and f'; {hint}'}."


def _cause(found: Standing, source: str) -> str:
    """Return the likely cause of a metric at chance, and the way round it."""
    if found.metric == "accuracy":
        return (
            f"the labels of {source} are probably not its classes; correct them, or give the data without labels to "
            "compare the result with the original"
        )
    if found.metric == "mae":
        return (
            f"the scores of {source} are probably on another scale than its output; rescale them, or give the data "
            "without scores to compare the result with the original"
        )
    if found.metric in SHARES:
        return (
            f"the labels of {source} are probably not those of the model; correct them, or give the data without "
            "labels to compare the result with the original"
        )
    if found.metric in RANKED:
        return (
            f"the scores of {source} probably do not rise with similarity; reverse them if a high score means "
            "different, or give the data without scores to compare the result with the original"
        )
    return (
        f"{source} is probably not text that the model can predict; check the data, the tokenizer and the checkpoint, "
        "or give --data random to measure speed alone"
    )


def _not_better(found: Standing) -> Limitation:
    return Limitation(
        "quality of the original", f"it has {found}, so it is not certain to be better than chance; use more samples"
    )


def _limitations(found: Standing, run: _Run, split: Split, model: Model) -> Iterator[Limitation]:
    """Yield limitations if the model may be no better than chance, or if another numbering fits its answers better."""
    if not found.better:
        yield _not_better(found)
    if found.metric == "accuracy" and (other := _other_numbering(found, run, split, model)):
        yield Limitation(CLASS_ORDER, f"with these numbers the original has {found}; {other}")


def _pairs(split: Split, model: Model) -> str:
    """Return the first labels of the data with the model's classes that they stand for."""
    numbering = split.samples.numbering
    if numbering is not None:
        return f"found {format_pairs(numbering.numbers, model.class_names)}"
    labels = [] if split.labels is None else np.unique(split.labels).tolist()
    return f"found {format_pairs({str(label): label for label in labels}, model.class_names)}"


def _other_numbering(found: Standing, run: _Run, split: Split, model: Model) -> str:
    """Return a clause on the numbering that fits the predictions best; empty if it is not clearly better."""
    best, accuracy = run.numbering()
    enough = found.figure.n >= SAMPLES_PER_CLASS * len(best)
    if not enough or accuracy * 100.0 < found.figure.value + GAIN * 100.0:
        return ""
    numbering = split.samples.numbering
    names = {} if numbering is None else {number: name for name, number in numbering.numbers.items()}
    changed = {names.get(label, str(label)): number for label, number in best.items() if label != number}
    return f"with {format_pairs(changed, model.class_names)} the accuracy would be {accuracy:.1%}"
