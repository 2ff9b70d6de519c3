"""Numbers: text and image models with `problem_type` regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.quality.heads.base import Head, Metrics, row_means
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch


class Regression(Head):
    """Values [rows, outputs].

    Scores of pairs of texts are judged by their order, as cross-encoders and STS-B are, and scores of single texts and
    images by their distance.
    """

    metrics: ClassVar[Metrics] = {"score": "mae", None: "r_squared"}

    def metric(self, label_kind: str | None, *, pairs: bool = False) -> str:
        """Return ``rank_correlation`` for scores of pairs, ``mae`` for other scores, ``r_squared`` without scores."""
        return "rank_correlation" if pairs and label_kind == "score" else super().metric(label_kind)

    def further(self, metric: str) -> tuple[str, ...]:
        """Return the other of mean absolute error and Spearman correlation."""
        return {"mae": ("rank_correlation",), "rank_correlation": ("mae",)}.get(metric, ())

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute half the squared difference, the KL divergence of normal distributions of variance 1, [rows]."""
        return row_means((answer.float() - original.float()).square() / 2, mask)

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``error``, ``prediction`` and ``gold``, and the squared differences from the original."""
        values = answer.reshape(len(answer), -1).astype(np.float64)
        columns: Columns = {}
        if metric in ("mae", "rank_correlation"):
            assert batch.labels is not None
            gold = np.asarray(batch.labels, dtype=np.float64).reshape(values.shape)
            columns |= {
                "error": np.abs(values - gold).mean(-1),
                "prediction": values.mean(-1),
                "gold": gold.mean(-1),
            }
        if original is not None:
            before = original.reshape(len(original), -1).astype(np.float64)
            columns["squares"] = ((values - before) ** 2).sum(-1)
            columns |= {f"original {index}": column for index, column in enumerate(before.T)}
        return columns
