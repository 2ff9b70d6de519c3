"""Find out whether the answers of a model depend on its samples; a comparison with a constant can show no loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from compressor.quality.heads.base import Head
from compressor.quality.intervals import Array

ROUNDING = 1e-5  # differences of two rows, relative to their largest magnitude, that rounding explains
KEPT = 2**20  # values of a row that are kept to compare batches by; a row of logits of tokens can have 1,000 times more


@dataclass
class AnswerVariation:
    """What the answers of one model have in common over the batches so far.

    Attributes:
        head: how the answers are evaluated.
        rows: number of rows so far.
        varies: whether two rows differ by more than rounding. Rows of batches with another shape are not compared; of
            batches that were added by `join`, at most `KEPT` evenly spaced values of the first rows are.
        classes: the classes that were predicted; empty for outputs without one class for each row.
    """

    head: Head
    rows: int = 0
    varies: bool = False
    classes: set[int] = field(default_factory=set)
    _first: Array | None = None
    _shape: tuple[int, ...] = ()

    @staticmethod
    def of(head: Head, answer: Array) -> AnswerVariation:
        """Return that of one batch, to be added to others by `join`; it is small."""
        found = AnswerVariation(head)
        found.add(answer)
        if found.varies:  # so does every sum
            found._first = None
        elif found._first is not None:
            values = found._first.reshape(-1)
            found._first = values[:: math.ceil(values.size / KEPT)].copy() if values.size > KEPT else values
        return found

    @property
    def constant(self) -> bool:
        """Whether all rows have one answer; a single row does not tell."""
        return self.rows > 1 and not self.varies

    @property
    def only_class(self) -> int | None:
        """The class of all rows; None if there are several, or no classes."""
        return next(iter(self.classes)) if self.rows > 1 and len(self.classes) == 1 else None

    @property
    def settled(self) -> bool:
        """Whether further batches cannot change `constant` and `only_class`."""
        return self.varies and len(self.classes) != 1

    def add(self, answer: Array) -> None:
        """Take in the answers of a batch, [rows, ...]."""
        self.rows += len(answer)
        if answer.ndim == 2 and (classes := self.head.decisions(answer)) is not None and classes.ndim == 1:
            self.classes.update(np.unique(classes).tolist())
        if self._first is None or self._shape != answer.shape[1:]:
            self._first, self._shape = np.array(answer[0]), answer.shape[1:]
        self.varies = self.varies or any(_differ(self._first, row) for row in answer)

    def join(self, batch: AnswerVariation) -> None:
        """Take in a further batch, as `of` returns it."""
        self.rows += batch.rows
        self.classes |= batch.classes
        self.varies = self.varies or batch.varies
        if self.varies or batch._first is None:
            return
        if self._first is None or self._shape != batch._shape:
            self._first, self._shape = batch._first, batch._shape
        self.varies = _differ(self._first, batch._first)


def _differ(one: Array, other: Array) -> bool:
    """Return whether two rows differ by more than rounding; infinities, as of masked values, are compared as such."""
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return True
    one, other = one[finite], other[finite]
    return bool(one.size) and float(np.abs(one - other).max()) > ROUNDING * float(np.abs(one).max())
