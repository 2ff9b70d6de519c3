"""One class per sample: image and text classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.quality.disagreements import Disagreement, find_disagreements
from compressor.quality.heads.base import SCALES, Head, Metrics, regret, relative_entropy, row_means, top_margin
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch


class SingleClass(Head):
    """Logits [rows, classes], of which the largest is the predicted class."""

    metrics: ClassVar[Metrics] = {"class": "accuracy", None: "agreement"}
    scales = SCALES
    class_axis = -1
    expects = frozenset({"accuracy"})

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute KL(original || answer) in nats, [rows]."""
        return row_means(relative_entropy(answer, original), mask)

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``accuracy``, and ``agreement`` and ``regret`` if there is an original to compare with."""
        columns: Columns = {}
        if metric == "accuracy":
            assert batch.labels is not None
            columns["accuracy"] = (answer.argmax(-1) == batch.labels).astype(np.float64)
        if original is not None:
            columns["agreement"] = (answer.argmax(-1) == original.argmax(-1)).astype(np.float64)
            columns["regret"] = regret(answer, original)
        return columns

    def disagreements(
        self, batch: Batch, answer: Array, original: Array, columns: Columns, start: int
    ) -> Sequence[Disagreement]:
        """Return the samples of a batch whose predicted class changed."""
        return find_disagreements(batch, answer, original, columns["regret"], start)

    def decisions(self, output: Array) -> Array:
        """Return the class of each row."""
        classes: Array = output.argmax(-1)
        return classes

    def margin(self, original: Array) -> Array:
        """Return the difference of the two largest logits."""
        return top_margin(original)

    def expected_loss(self, metric: str, columns: Columns) -> float | None:
        """Return the mean regret in points."""
        return float(columns["regret"].mean()) * 100.0 if "regret" in columns else None

    def lower_bound(self, metric: str, columns: Columns, reference: Columns, before: float) -> float:
        """Return the regret (for accuracy) or disagreement so far, over all samples."""
        if metric == "accuracy":
            return float(columns["regret"].sum()) / len(next(iter(reference.values()))) * 100.0
        return super().lower_bound(metric, columns, reference, before)
