"""Features and sentence embeddings, which are compared by their direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.quality.heads.base import Head, Metrics, row_means
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch


class Features(Head):
    """Features [rows, ..., width]."""

    metrics: ClassVar[Metrics] = {None: "fidelity"}

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute 1 - cosine similarity, [rows]; the mean over tokens without padding."""
        from torch.nn.functional import cosine_similarity

        return row_means(1.0 - cosine_similarity(answer.float(), original.float(), dim=-1), mask)

    def training_loss(
        self, answer: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute half the relative squared error.

        At equal vector lengths it equals 1 - cosine, the reported divergence; it also preserves the length.
        """
        target = target.float()
        errors = (answer.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12) / 2
        if mask is not None and errors.shape == mask.shape:
            return (errors * mask).sum() / mask.sum().clamp(min=1)
        return errors.mean()

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``fidelity``, the cosine similarity to the original's features."""
        assert original is not None
        return {"fidelity": _similarity(answer, original, batch)}


class SentenceEmbedding(Features):
    """One vector per text; with gold scores, the cosine similarities of pairs are ranked against them."""

    metrics: ClassVar[Metrics] = {"score": "spearman", None: "fidelity"}

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``cosine`` and ``gold`` of pairs, or ``fidelity`` without gold scores."""
        if metric != "spearman":
            return super().columns(metric, batch, answer, original)
        first, second = answer[0::2].astype(np.float64), answer[1::2].astype(np.float64)
        assert batch.labels is not None
        return {"cosine": cosine(first, second), "gold": np.asarray(batch.labels, dtype=np.float64)}


def cosine(left: Array, right: Array) -> Array:
    """Return the cosine similarity along the last axis; 0 where a vector is 0."""
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    value: Array = (left * right).sum(-1) / np.maximum(norms, 1e-12)
    return value


def _similarity(answer: Array, original: Array, batch: Batch) -> Array:
    """Average the cosine similarity over the tokens of a sample, without padding; one vector per row has one cosine."""
    similarity = cosine(answer.astype(np.float64), original.astype(np.float64))
    mask = batch.feeds.get("attention_mask")
    if mask is not None and similarity.shape == mask.shape:
        similarity = (similarity * mask).sum(1) / np.maximum(mask.sum(1), 1)
    per_row = similarity.reshape(len(similarity), -1).mean(1)
    means: Array = per_row.reshape(-1, batch.rows_per_sample).mean(1)
    return means
