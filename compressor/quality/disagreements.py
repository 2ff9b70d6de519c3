"""Disagreements of a changed classifier with the reference: the worst samples, collected batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compressor.data.splits import Batch
    from compressor.quality.intervals import Array

KEPT = 8  # samples reported for each model


@dataclass(frozen=True)
class Disagreement:
    """A sample for which a model and the reference predict different classes.

    `place` is the index of the sample in the split. `label` is its true class, None without labels. `before` and
    `after` are the predictions of the reference and of the model, each a class with the probability that its own model
    assigns to it. `regret` is the drop in the reference's probability from the class in `before` to that in `after`.
    """

    place: int
    id: str
    label: int | None
    before: tuple[int, float]
    after: tuple[int, float]
    regret: float


def find_disagreements(batch: Batch, answer: Array, original: Array, regret: Array, start: int) -> list[Disagreement]:
    """Return the samples of a batch for which two classifiers predict different classes.

    Args:
        batch: samples, one row each.
        answer: logits of the changed model, [rows, classes].
        original: logits of the reference, [rows, classes].
        regret: regret of each row, [rows].
        start: index of the batch's first sample in the split.
    """
    rows = np.flatnonzero(answer.argmax(-1) != original.argmax(-1))
    return [
        Disagreement(
            place=start + int(row),
            id=batch.ids[row],
            label=None if batch.labels is None else int(batch.labels[row]),
            before=_top(original[row]),
            after=_top(answer[row]),
            regret=float(regret[row]),
        )
        for row in rows
    ]


def largest_regret(disagreements: Sequence[Disagreement]) -> list[Disagreement]:
    """Return the `KEPT` disagreements with the largest regret, in descending order."""
    return sorted(disagreements, key=lambda sample: -sample.regret)[:KEPT]


def _top(logits: Array) -> tuple[int, float]:
    """Return the most probable class and its probability."""
    shifted = logits.astype(np.float64) - logits.max()
    return int(logits.argmax()), float(1.0 / np.exp(shifted).sum())
