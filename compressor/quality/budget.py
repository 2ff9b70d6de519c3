"""The loss that a budget bounds, and its upper confidence bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from compressor.choices import ACCURACY, AGREEMENT
from compressor.errors import CompressorError
from compressor.quality.evaluate import figure, loss, loss_figure, metric_value
from compressor.quality.heads.base import Head
from compressor.quality.intervals import Array, Columns, Figure
from compressor.quality.metrics import METRICS

NORMAL = 3.92  # width of a 95 % interval in standard errors
DOUBT = 0.5  # standard error of an expected loss, as a share of it


class BudgetError(CompressorError):
    """The head of a model has no loss of the kind that was asked for."""


@dataclass(frozen=True)
class Budget:
    """What ``--max-loss`` bounds, for the head of a model.

    ``accuracy`` is the loss of the reported metric. A few hundred labels measure a loss of accuracy only to a point or
    two, so where the head can expect a loss (`Head.expected_loss`), that is taken, with labels and without. Labels
    that measure a larger loss raise it by their precision (`_raised`). ``agreement`` is the share of samples with
    another prediction than the original's. ``divergence`` is the mean divergence from the original's output, in
    hundredths of a nat (of features: of 1 - cosine).

    Attributes:
        head: how outputs are evaluated.
        metric: the reported metric.
        kind: ``accuracy``, ``agreement`` or ``divergence``.

    Raises:
        BudgetError: the output of the head holds no predictions that could agree.
    """

    head: Head
    metric: str
    kind: str = ACCURACY

    def __post_init__(self) -> None:
        free = self.head.metrics[None]
        if self.kind == AGREEMENT and not METRICS[free].compares:
            raise BudgetError(
                f"--budget agreement compares predictions, but this model is judged by {METRICS[free].title}; give "
                "--budget accuracy or divergence"
            )

    @property
    def expects_loss(self) -> bool:
        """Whether the bounded loss is one that the head expects from the original's probabilities."""
        return self.kind == ACCURACY and self.judged in self.head.expects

    @property
    def judged(self) -> str:
        """The metric whose loss is bounded, or ``divergence``."""
        if self.kind == AGREEMENT:
            return self.head.metrics[None]
        return self.head.judged(self.metric) if self.kind == ACCURACY else self.kind

    @property
    def compares(self) -> bool:
        """Whether the loss is computed from a comparison with the outputs of the original."""
        return self.kind != ACCURACY or self.head.compares(self.metric)

    def loss(self, reference: Columns, columns: Columns) -> float:
        """Return the loss in percent.

        Args:
            reference: columns of the original, of the same samples.
            columns: columns of the changed model, compared with the original.
        """
        if self.kind == ACCURACY:
            return self._loss_of_accuracy(reference, columns)
        if self.kind == AGREEMENT:
            return loss(self.judged, 100.0, metric_value(self.judged, columns))
        return float(columns["divergence"].mean()) * 100.0

    def _loss_of_accuracy(self, reference: Columns, columns: Columns) -> float:
        """Return the expected loss, raised by a larger measured one; the measured one without an expectation."""
        expected = self.head.expected_loss(self.judged, columns)
        if expected is None:
            return loss(self.metric, *(metric_value(self.metric, each) for each in (reference, columns)))
        if self.judged != self.metric:
            return expected
        return _raised(expected, loss_figure(self.metric, reference, columns))

    def lower_bound(self, columns: Columns, reference: Columns, before: float) -> float:
        """Return a lower bound of the loss from the first samples, see `Head.lower_bound`."""
        if self.judged in METRICS:
            return self.head.lower_bound(self.judged, columns, reference, before)
        return float(columns["divergence"].sum()) / len(next(iter(reference.values()))) * 100.0

    def sample_losses(self, columns: Columns) -> Array | None:
        """Return the loss of each sample as a share of 1, [samples]; None for a loss that is no mean of such shares."""
        if self.kind == ACCURACY and self.judged in self.head.expects:
            return columns.get("regret")
        if self.judged in METRICS and METRICS[self.judged].compares and self.judged in columns:
            losses: Array = 1.0 - columns[self.judged]
            return losses
        return None

    def standard_error(self, reference: Columns, columns: Columns) -> float:
        """Return the standard error of a loss that is no mean of shares of 1 over samples, in percent; 0 of others.

        It is that of a paired bootstrap over the samples (Efron 1979).
        """
        if self.sample_losses(columns) is not None:
            return 0.0
        if self.kind == ACCURACY:
            found = loss_figure(self.metric, reference, columns)
            return (found.high - found.low) / NORMAL
        if self.judged in METRICS:  # an agreement of tokens, of which texts have several
            found = figure(self.judged, columns)
            return (found.high - found.low) / NORMAL
        return float(columns["divergence"].std() / math.sqrt(len(columns["divergence"]))) * 100.0


def _raised(expected: float, measured: Figure) -> float:
    """Return the mean of an expected and a larger measured loss, weighted by the inverse of their variances.

    The standard error of the measured loss is that of its interval. That of the expected loss is taken as `DOUBT` times
    the larger of the two, as the original's probabilities may be off. A smaller measured loss changes nothing: a search
    finds the plans whose labels are lucky.
    """
    if measured.value <= expected:
        return expected
    error = (measured.high - measured.low) / NORMAL
    doubt = DOUBT * measured.value
    return expected + (measured.value - expected) * doubt**2 / (doubt**2 + error**2)


def upper_bound(losses: Array, confidence: float, *, precision: float = 1e-6) -> float:
    """Return an upper confidence bound of the mean of losses between 0 and 1, which holds for any distribution.

    It is the betting bound of Waudby-Smith and Ramdas (Estimating means of bounded random variables by betting, 2020)
    in the form of Bates et al. (Distribution-free, risk-controlling prediction sets, 2021, proposition 5): the smallest
    mean at which the capital of a bettor against it exceeds 1 / (1 - confidence).

    Args:
        losses: independent losses, [samples].
        confidence: probability with which the bound holds, between 0 and 1.
        precision: largest error of the bound.

    >>> round(upper_bound(np.zeros(230), 0.9), 3), round(upper_bound(np.zeros(460), 0.9), 3)
    (0.01, 0.005)
    """
    ahead = np.arange(1, len(losses) + 1)
    means = (0.5 + np.cumsum(losses)) / (1 + ahead)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (1 + ahead)
    before = np.concatenate([[0.25], variances[:-1]])  # a bet may depend on the samples before it only
    bets = np.minimum(1.0, np.sqrt(2.0 * math.log(1.0 / (1.0 - confidence)) / (len(losses) * before)))

    def rejected(mean: float) -> bool:
        capital = np.cumsum(np.log1p(-bets * (losses - mean)))
        return bool(capital.max(initial=-math.inf) > -math.log(1.0 - confidence))

    low, high = 0.0, 1.0
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def samples_needed(losses: Array, limit: float, confidence: float) -> int | None:
    """Return about how many samples like these make the upper bound at most `limit`; None if their mean is no lower.

    Args:
        losses: losses between 0 and 1, [samples].
        limit: largest mean.
        confidence: probability with which the bound holds.
    """
    gap = limit - float(losses.mean())
    if gap <= 0:
        return None
    # Bernstein's inequality: log(1/d) = n gap^2 / (2 (variance + gap / 3))
    count = math.log(1.0 / (1.0 - confidence)) * 2.0 * (float(losses.var()) + gap / 3.0) / gap**2
    return max(math.ceil(count), len(losses) + 1)
