"""Find out whether the answers of a model depend on its samples; a comparison with a constant can show no loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from compressor.quality.heads.base import Head
from compressor.quality.intervals import Array

ROUNDING = 1e-5  # differences of two rows, relative to their largest magnitude, that rounding explains


@dataclass
class AnswerVariation:
    """What the answers of one model have in common over the batches so far.

    Attributes:
        head: how the answers are evaluated.
        rows: number of rows so far.
        varies: whether two rows differ by more than rounding. Rows of batches with another shape are not compared.
        classes: the classes that were predicted; empty for outputs without one class for each row.
    """

    head: Head
    rows: int = 0
    varies: bool = False
    classes: set[int] = field(default_factory=set)
    _first: Array | None = None

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
        if self._first is None or self._first.shape != answer.shape[1:]:
            self._first = np.array(answer[0])
        self.varies = self.varies or any(_differ(self._first, row) for row in answer)


def _differ(one: Array, other: Array) -> bool:
    """Return whether two rows differ by more than rounding; infinities, as of masked values, are compared as such."""
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return True
    one, other = one[finite], other[finite]
    return bool(one.size) and float(np.abs(one - other).max()) > ROUNDING * float(np.abs(one).max())
