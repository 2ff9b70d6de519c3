"""Samples that a classifier answers differently after it was changed: the few worst are kept while they stream by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compressor.data.splits import Batch
    from compressor.quality.intervals import Array

KEPT = 8  # samples that are named for each model


@dataclass(frozen=True)
class Changed:
    """A sample that a model puts into another class than the reference does.

    `place` is its position in the split, `label` its class where that is known, `before` and `after` the classes with
    the probability that each model gives to its own. `regret` is how much less probable the reference holds `after`.
    """

    place: int
    id: str
    label: int | None
    before: tuple[int, float]
    after: tuple[int, float]
    regret: float


def changed_of(batch: Batch, answer: Array, original: Array, regret: Array, start: int) -> list[Changed]:
    """The samples of a batch that two classifiers put into different classes.

    Args:
        batch: the samples, one row each.
        answer: logits of the changed model, [rows, classes].
        original: logits of the reference.
        regret: by row.
        start: the place of the batch's first sample in the split.
    """
    rows = np.flatnonzero(answer.argmax(-1) != original.argmax(-1))
    return [
        Changed(
            place=start + int(row),
            id=batch.ids[row],
            label=None if batch.labels is None else int(batch.labels[row]),
            before=_top(original[row]),
            after=_top(answer[row]),
            regret=float(regret[row]),
        )
        for row in rows
    ]


def worst(found: Sequence[Changed]) -> list[Changed]:
    """Those of the largest regret: where the reference was surest of another class."""
    return sorted(found, key=lambda each: -each.regret)[:KEPT]


def _top(logits: Array) -> tuple[int, float]:
    """The most probable class and its probability."""
    shifted = logits.astype(np.float64) - logits.max()
    return int(logits.argmax()), float(1.0 / np.exp(shifted).sum())
