"""A set of labels per sample: multi-label classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from compressor.quality.heads.base import SCALES, Head, Metrics, log_of_probabilities, row_means
from compressor.quality.intervals import Array, Columns
from compressor.quality.metrics import f1

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch

LEAST_REST = 2.0**-25  # half of the distance from 1 to the float32 before it


class LabelSets(Head):
    """Logits [rows, labels]; a label applies if its logit is positive, so its probability is above one half."""

    metrics: ClassVar[Metrics] = {"labels": "f1", None: "set_agreement"}
    scales = SCALES
    class_axis = -1
    expects = frozenset({"f1"})

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the sum over labels of KL(original || answer) of their Bernoulli distributions in nats, [rows]."""
        from torch.nn.functional import logsigmoid

        answer, original = answer.float(), original.float()
        present = original.sigmoid() * (logsigmoid(original) - logsigmoid(answer))
        absent = (-original).sigmoid() * (logsigmoid(-original) - logsigmoid(-answer))
        return row_means((present + absent).sum(-1), mask)

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return the counts of the F1 score, and the comparison of label sets and decisions with the original.

        ``expected ...`` are the counts to expect if labels are drawn with the original's probabilities.
        """
        chosen = answer > 0
        columns: Columns = {"predicted": chosen.sum(-1).astype(np.float64)}
        if metric == "f1":
            assert batch.labels is not None
            columns |= {
                "hits": (chosen & (batch.labels > 0)).sum(-1).astype(np.float64),
                "positive": (batch.labels > 0).sum(-1).astype(np.float64),
            }
        if original is not None:
            before, shares = original > 0, 1.0 / (1.0 + np.exp(-np.clip(original.astype(np.float64), -500, 500)))
            columns |= {
                "set_agreement": (chosen == before).all(-1).astype(np.float64),
                "decisions": (chosen == before).mean(-1),
                "expected hits": (shares * chosen).sum(-1),
                "expected positive": shares.sum(-1),
                "original hits": (shares * before).sum(-1),
                "original predicted": before.sum(-1).astype(np.float64),
            }
        return columns

    def logits(self, probabilities: Any) -> Any:
        """Return the logarithm of the odds, which is positive where a label is more probable than not."""
        return log_of_probabilities(probabilities) - log_of_probabilities((1.0 - probabilities).clip(LEAST_REST))

    def decisions(self, output: Array) -> Array:
        """Return the label sets, bool [rows, labels]."""
        sets: Array = output > 0
        return sets

    def margin(self, original: Array) -> Array:
        """Return the smallest distance of a logit from zero."""
        margin: Array = np.abs(original).min(-1)
        return margin

    def expected_loss(self, metric: str, columns: Columns) -> float | None:
        """Return the loss of F1 in points if labels are drawn with the original's probabilities."""
        if metric != "f1" or "expected hits" not in columns:
            return None
        total = {key: values.sum() for key, values in columns.items()}
        before = f1(total["original hits"], total["original predicted"], total["expected positive"])
        after = f1(total["expected hits"], total["predicted"], total["expected positive"])
        return float(before - after) * 100.0
