"""The span of an answer in a text: extractive question answering."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.quality.heads.base import SCALES, Head, Metrics, probabilities, relative_entropy, token_mask
from compressor.quality.intervals import Array, Columns

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch

LONGEST = 30  # tokens of an answer, the default of the SQuAD scripts of transformers
MASKED = -1e4  # logit of positions that cannot be chosen; finite in float16


class Spans(Head):
    """Logits of the first and of the last token of the answer, [rows, 2, tokens].

    The answer is the span first <= last of at most `LONGEST` tokens with the largest sum of logits, among the positions
    that the data allows: the tokens of the context, and the first token, which stands for no answer.
    """

    metrics: ClassVar[Metrics] = {"spans": "exact_match", None: "span_agreement"}
    scales = SCALES
    class_axis = -1
    expects = frozenset({"exact_match"})

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute KL(original || answer) of first plus last token in nats, over all positions but padding, [rows]."""
        if mask is not None:
            padding = mask[:, None] == 0
            answer, original = (side.masked_fill(padding, MASKED) for side in (answer, original))
        return relative_entropy(answer, original).sum(1)

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``exact``, and ``agreement`` and ``regret`` if there is an original to compare with."""
        allowed = self._allowed(batch)
        chosen = best_spans(answer, allowed)
        columns: Columns = {}
        if metric == "exact_match":
            assert batch.labels is not None
            columns["exact"] = (chosen[:, None] == batch.labels).all(-1).any(-1).astype(np.float64)
        if original is not None:
            before = best_spans(original, allowed)
            columns["agreement"] = (chosen == before).all(-1).astype(np.float64)
            columns["span_agreement"] = columns["agreement"]
            shares = probabilities(np.where(allowed[:, None], original, MASKED))
            columns["regret"] = _probability(shares, before) - _probability(shares, chosen)
        return columns

    def expected_loss(self, metric: str, columns: Columns) -> float | None:
        """Return the mean drop of the original's probability of the chosen span, in points."""
        return float(columns["regret"].mean()) * 100.0 if "regret" in columns else None

    def _allowed(self, batch: Batch) -> Array:
        if batch.scored is not None:
            return batch.scored
        return token_mask(batch)


def best_spans(logits: Array, allowed: Array) -> Array:
    """Return the first and last position of the best span of each row, [rows, 2].

    Args:
        logits: of first and last positions, [rows, 2, tokens].
        allowed: positions that may be chosen, bool [rows, tokens].
    """
    first, last = np.moveaxis(np.where(allowed[:, None], logits.astype(np.float64), -np.inf), 1, 0)
    rows, tokens = first.shape
    sums = np.full((rows, tokens, min(LONGEST, tokens)), -np.inf)  # by first token and number of further tokens
    for further in range(sums.shape[-1]):
        sums[:, : tokens - further, further] = first[:, : tokens - further] + last[:, further:]
    sums[:, 0, 1:] = -np.inf  # the first token is no part of an answer: a span that begins there ends there
    start, further = np.unravel_index(sums.reshape(rows, -1).argmax(-1), sums.shape[1:])
    return np.stack([start, start + further], -1).astype(np.int64)


def _probability(shares: Array, spans: Array) -> Array:
    rows = np.arange(len(spans))
    product: Array = shares[rows, 0, spans[:, 0]] * shares[rows, 1, spans[:, 1]]
    return product
