"""The base class of all heads, and the formulas that several share.

The modules of heads import torch only in the functions that need it: a device evaluates engines without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compressor.quality.intervals import Array, Columns
from compressor.quality.metrics import METRICS

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch
    from compressor.quality.disagreements import Disagreement

Metrics = Mapping[str | None, str]  # name of the metric, by kind of labels

LEAST_PROBABILITY = 1e-30
CHUNK = 2**20  # logits at a time: their log-probabilities, 4 MB, stay in the cache of the processor
# Dropping branches changes the confidence of a classifier without changing its predictions, so its logits are compared
# at the best of these scales. Outputs that are used as they are, such as probabilities and scores, are not scaled.
SCALES = (1.0, 0.6, 0.75, 0.87, 1.15, 1.33, 1.6, 2.0)


class Head:
    """How the output of a model is evaluated.

    Attributes:
        metrics: metric by kind of labels; that of None is used without labels, and for labels of another kind.
        scales: factors of the output, of which the divergence takes the best.
        expects: metrics with labels whose loss the head can also expect from the original's probabilities.
        by_token: the output has one row of logits per token, of which a few are enough for the divergence.
        by_window: long texts are evaluated whole, in sliding windows.
        class_axis: the axis of the output that the probabilities of classes sum to 1 along; None if it has no classes.
    """

    metrics: ClassVar[Metrics]
    scales: ClassVar[tuple[float, ...]] = (1.0,)
    expects: ClassVar[frozenset[str]] = frozenset()
    by_token: ClassVar[bool] = False
    by_window: ClassVar[bool] = False
    class_axis: ClassVar[int | None] = None

    def metric(self, label_kind: str | None, *, pairs: bool = False) -> str:
        """Return the metric for labels of a kind; `pairs` tells that each sample has two texts."""
        return self.metrics.get(label_kind, self.metrics[None])

    def compares(self, metric: str) -> bool:
        """Return whether the columns of a metric compare with the output of the original."""
        return METRICS[metric].compares or metric in self.expects

    def judged(self, metric: str) -> str:
        """Return the metric whose loss a budget bounds.

        Without labels, it is the metric with labels whose loss the head expects from the original's probabilities, so
        that a budget means the same with and without labels. Otherwise it is the reported metric.
        """
        return next(iter(self.expects), metric) if METRICS[metric].compares else metric

    def further(self, metric: str) -> tuple[str, ...]:
        """Return the metrics that are reported beside the metric of the head, from the same columns."""
        return ()

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the divergence of the changed model's output from the original's, [rows].

        Args:
            answer: output of the changed model, first axis: rows.
            original: output of the original model, of the same shape.
            mask: [rows, tokens], 0 at padding, which is left out where there is an output for each token.
        """
        raise NotImplementedError

    def training_loss(
        self, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the loss that distillation minimises, a scalar; by default the mean divergence."""
        return self.divergence(answer, target, mask).mean()

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Compute the per-sample columns of a metric; those that compare with the original only if it is given."""
        raise NotImplementedError

    def disagreements(
        self, batch: Batch, answer: Array, original: Array, columns: Columns, start: int
    ) -> Sequence[Disagreement]:
        """Return the samples of a batch whose class changed; `start` is the place of the first in the split."""
        return ()

    def decisions(self, output: Array) -> Array | None:
        """Return what a user reads off the output, such as classes, rows first; None for numbers and features."""
        return None

    def margin(self, original: Array) -> Array | None:
        """Return the margin of each decision, [rows]; None without one. Small margins are evaluated first."""
        return None

    def logits(self, probabilities: Any) -> Any:
        """Return the logits of a model that returns probabilities; a tensor or an array of the same shape."""
        return log_of_probabilities(probabilities)

    def divergence_mask(self, batch: Batch) -> Array | None:
        """Return the mask of the positions whose divergence is reported, [rows, tokens]; None without positions."""
        return batch.feeds.get("attention_mask")

    def expected_loss(self, metric: str, columns: Columns) -> float | None:
        """Return the loss to expect on new samples, by the original's own probabilities; None if there is none."""
        return None

    def lower_bound(self, metric: str, columns: Columns, reference: Columns, before: float) -> float:
        """Return a lower bound of the loss from the columns of the first samples; the others can at best lose nothing.

        Args:
            metric: name of the metric.
            columns: columns of the samples so far.
            reference: columns of the original on all samples.
            before: metric of the original.
        """
        if METRICS[metric].compares and metric in columns:
            count = len(next(iter(reference.values())))
            return float((1.0 - columns[metric]).sum()) / count * 100.0
        return -math.inf


def token_mask(batch: Batch) -> Array:
    """Return the mask of the tokens that are no padding, bool [rows, tokens]; all, if the model has no mask.

    The token ids are the first input of a module that names them otherwise.
    """
    ids = batch.feeds.get("input_ids", next(iter(batch.feeds.values())))
    return batch.feeds.get("attention_mask", np.ones_like(ids)).astype(bool)


def log_of_probabilities(values: Any) -> Any:
    """Return the logarithm of a tensor or an array of probabilities.

    Values that float32 does not tell apart from 0 are taken for the least that it does.

    >>> log_of_probabilities(np.array([0.5, 0.0])).round(2).tolist()
    [-0.69, -69.08]
    """
    if isinstance(values, np.ndarray):
        return np.log(np.maximum(values, LEAST_PROBABILITY))
    return values.clamp(min=LEAST_PROBABILITY).log()


def chunks(*sides: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split tensors along the first axis into parts of at most `CHUNK` values of the first tensor, at least one row."""
    import torch

    rows = max(1, CHUNK // max(1, sides[0].shape[1:].numel()))
    return zip(*(torch.split(side, rows) for side in sides), strict=True)


def relative_entropy(answer: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Compute KL(original || answer) in nats of logits along the last axis, chunk by chunk."""
    import torch

    rows = (side.reshape(-1, answer.shape[-1]) for side in (answer, original))
    return torch.cat([_relative_entropy(*chunk) for chunk in chunks(*rows)]).reshape(answer.shape[:-1])


def _relative_entropy(answer: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    reference = original.float().log_softmax(-1)
    return (reference.exp() * (reference - answer.float().log_softmax(-1))).sum(-1)


def row_means(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Average values over all axes but the first, without padding where there is one value per token."""
    if mask is not None and values.shape == mask.shape:
        return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return values.reshape(len(values), -1).mean(1)


def probabilities(logits: Array) -> Array:
    """Return the softmax along the last axis in float64."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    shares: Array = exponents / exponents.sum(-1, keepdims=True)
    return shares


def regret(answer: Array, original: Array) -> Array:
    """Compute p(original's class) - p(new class) along the last axis, with the original's probabilities p.

    Its mean is the expected loss of accuracy if the original is calibrated. It needs no labels and varies far less
    from sample to sample than the 0/1 correctness does.
    """
    shares = probabilities(original)
    chosen = np.take_along_axis(shares, answer.argmax(-1)[..., None], -1)[..., 0]
    lost: Array = shares.max(-1) - chosen
    return lost


def top_margin(logits: Array) -> Array:
    """Return the difference of the two largest logits, [rows]."""
    best = np.sort(logits, axis=-1)[..., -2:]
    margin: Array = best[..., -1] - best[..., 0]
    return margin
