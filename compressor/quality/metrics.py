"""The quality metrics: their names, units, and formulas on per-sample columns. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compressor.quality.intervals import Array, Columns

LARGEST_NLL = 700.0  # exp() of a larger value overflows; such a model is useless anyway


@dataclass(frozen=True)
class Metric:
    """A figure over samples.

    Attributes:
        title: its description, for sentences.
        label: its short name, for tables of 80 columns.
        unit: its unit, ``%`` or none.
        hub: its name in model cards of the Hugging Face hub.
        compute: computes it along the last axis of the columns; leading axes hold bootstrap resamples.
        relative: lower is better, and the loss is the relative increase in percent. Otherwise the loss is the drop in
            points.
        compares: it measures the closeness to the original model and needs no labels.
    """

    title: str
    label: str
    unit: str
    hub: str
    compute: Callable[[Columns], Array]
    relative: bool = False
    compares: bool = False

    @property
    def loss_unit(self) -> str:
        """Return the unit of the loss."""
        return "%" if self.relative else self.unit

    def loss(self, before: Array, after: Array) -> Array:
        """Return the loss in percent or points; negative for an improvement."""
        lost: Array = (after / before - 1.0) * 100.0 if self.relative else before - after
        return lost


def weighted_mean(columns: Columns, key: str) -> Array:
    """Average a column over samples, weighted by the number of scored tokens where samples are texts."""
    if "tokens" not in columns:
        mean: Array = columns[key].mean(-1)
        return mean
    tokens = columns["tokens"]
    weighted: Array = (columns[key] * tokens).sum(-1) / np.maximum(tokens.sum(-1), 1.0)
    return weighted


def correlation(left: Array, right: Array) -> Array:
    """Compute the Pearson correlation along the last axis; 0 where one side is constant."""
    left, right = left - left.mean(-1, keepdims=True), right - right.mean(-1, keepdims=True)
    spread = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    coefficient: Array = (left * right).sum(-1) / np.where(spread > 0, spread, 1.0)
    return coefficient


def _spearman(prediction: str) -> Callable[[Columns], Array]:
    def compute(columns: Columns) -> Array:
        from scipy import stats  # a device that builds engines may lack it

        ranks = (stats.rankdata(columns[key], axis=-1) for key in (prediction, "gold"))
        return correlation(*ranks) * 100.0

    return compute


def _percent(key: str) -> Callable[[Columns], Array]:
    return lambda columns: weighted_mean(columns, key) * 100.0


def _perplexity(columns: Columns) -> Array:
    mean = columns["nll"].sum(-1) / np.maximum(columns["tokens"].sum(-1), 1.0)
    value: Array = np.exp(np.minimum(mean, LARGEST_NLL))
    return value


def f1(hits: Array, predicted: Array, positive: Array) -> Array:
    """Return 2 hits / (predicted + positive), the F1 score; 0 where nothing is predicted and nothing is positive."""
    score: Array = 2.0 * hits / np.maximum(predicted + positive, 1e-12)
    return score


def _micro_f1(columns: Columns) -> Array:
    return f1(*(columns[key].sum(-1) for key in ("hits", "predicted", "positive"))) * 100.0


def _r_squared(columns: Columns) -> Array:
    """Compute 1 - sum (a - o)^2 / sum (o - mean o)^2, summed over the outputs."""
    spread = sum(
        ((values - values.mean(-1, keepdims=True)) ** 2).sum(-1)
        for key, values in columns.items()
        if key.startswith("original ")
    )
    value: Array = 100.0 * (1.0 - columns["squares"].sum(-1) / np.maximum(spread, 1e-12))
    return value


def _mean_iou(columns: Columns) -> Array:
    """Average the intersection over union of all classes that occur in labels or predictions."""
    names = [key.removeprefix("union ") for key in columns if key.startswith("union ")]
    unions = np.stack([columns[f"union {name}"].sum(-1) for name in names])
    shares = np.stack([columns[f"both {name}"].sum(-1) for name in names]) / np.maximum(unions, 1.0)
    mean: Array = 100.0 * shares.sum(0) / np.maximum((unions > 0).sum(0), 1)
    return mean


def _comparison(title: str, label: str, column: str = "agreement", *, hub: str = "agreement") -> Metric:
    """Return a metric in percent that compares with the original: the mean of a column."""
    return Metric(title, label, "%", hub, _percent(column), compares=True)


METRICS = {
    "accuracy": Metric("top-1 accuracy in %", "top-1 accuracy", "%", "accuracy", _percent("accuracy")),
    "agreement": _comparison("top-1 agreement with the original in %", "top-1 agreement"),
    "f1": Metric("micro-averaged F1 of the label sets in %", "F1 of labels", "%", "f1", _micro_f1),
    "set_agreement": _comparison(
        "samples with the same label set as the original in %", "same label sets", "set_agreement"
    ),
    "mae": Metric("mean absolute error", "mean abs. error", "", "mae", lambda c: c["error"].mean(-1), relative=True),
    "rank_correlation": Metric(
        "Spearman correlation of the predictions with the gold scores, x 100",
        "Spearman x 100",
        "",
        "spearmanr",
        _spearman("prediction"),
    ),
    "r_squared": Metric(
        "coefficient of determination (R2) of the original's predictions in %",
        "R2 of original",
        "%",
        "r_squared",
        _r_squared,
        compares=True,
    ),
    "token_accuracy": Metric(
        "accuracy of the classes of tokens in %", "token accuracy", "%", "accuracy", _percent("accuracy")
    ),
    "entity_f1": Metric("micro-averaged F1 of entities in %", "F1 of entities", "%", "f1", _micro_f1),
    "token_agreement": _comparison("tokens with the same class as by the original in %", "token agreement"),
    "frame_agreement": _comparison(
        "frames with the same class as by the original in %", "frame agreement", hub="frame_agreement"
    ),
    "query_agreement": _comparison(
        "object queries with the same class as by the original in %", "query agreement", hub="query_agreement"
    ),
    "perplexity": Metric("perplexity", "perplexity", "", "perplexity", _perplexity, relative=True),
    "masked_perplexity": Metric(
        "perplexity of masked tokens", "masked perplexity", "", "perplexity", _perplexity, relative=True
    ),
    "exact_match": Metric("exact matches of answer spans in %", "exact match", "%", "exact_match", _percent("exact")),
    "span_agreement": _comparison("samples with the same answer span as by the original in %", "same spans"),
    "mean_iou": Metric("mean intersection over union (mIoU) in %", "mIoU", "%", "mean_iou", _mean_iou),
    "pixel_agreement": _comparison("pixels with the same class as by the original in %", "pixel agreement"),
    "depth_agreement": _comparison(
        "pixels whose depth is within a factor of 1.25 of the original's in %", "depth agreement", hub="delta1"
    ),
    "spearman": Metric(
        "Spearman correlation with the gold scores, x 100", "Spearman x 100", "", "spearmanr", _spearman("cosine")
    ),
    "fidelity": _comparison(
        "cosine similarity to the original's features in %", "feature cosine", "fidelity", hub="cosine_similarity"
    ),
}
# Figures beside the metric that compare a model with the original: their titles in tables, and the factor to percent.
EXPECTED_LOSS = "expected loss, %"  # by the original's probabilities, of a variant without labels
LABEL_FREE = {
    "agreement": ("same answers, %", 100.0),
    "decisions": ("same decisions, %", 100.0),
    "divergence": ("divergence", 1.0),
}
