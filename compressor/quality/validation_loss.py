"""Loss of rewritten graphs on a split, with early stopping once the loss is certain to exceed a limit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from compressor.choices import ACCURACY, DIVERGENCE
from compressor.data.splits import Batch, Split
from compressor.models import Model
from compressor.quality.budget import Budget
from compressor.quality.evaluate import (
    BATCH,
    EvaluationError,
    Runner,
    graph_runner,
    join,
    metric_value,
    sample_columns,
)
from compressor.quality.heads.registry import head_for
from compressor.quality.intervals import Array, Columns
from passes.execute.interpreter import Program
from passes.graph.graph import Graph

KEPT = 2**30  # bytes of outputs of the original, such as the logits of all pixels; beyond them it runs again
ROUNDING = 1e-9  # percent by which rounding alone may raise a sum of losses above the limit


@dataclass(frozen=True)
class Loss:
    """Loss of a candidate in percent; a lower bound if `samples` is smaller than the validation split."""

    percent: float
    samples: int


@dataclass
class ValidationLoss:
    """Loss of rewritten graphs on the validation or the decision split, by the metric that a budget bounds.

    The loss is that of `compressor.quality.budget.Budget`, of the kind `budget`. The outputs of the original are kept
    for losses that compare with them, up to `KEPT` bytes. `sweeps` counts passes over the split; one that stops early
    counts by its share of the samples.
    """

    graph: Graph
    model: Model
    split: Split
    metric: str
    budget: str = ACCURACY
    sweeps: float = 0.0
    _originals: list[Array | None] = field(default_factory=list)
    _whole: Columns = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.head = head_for(self.model.task, self.model.problem_type)
        self.bounded = Budget(self.head, self.metric, self.budget)
        self._whole = join(list(self._columns(self.graph, first=True)))
        self._before = metric_value(self.metric, self._whole)
        self._hardest_first()

    @property
    def evaluations(self) -> float:
        """Number of passes over the split so far, rounded for the report."""
        return round(self.sweeps, 2)

    @property
    def averages(self) -> bool:
        """Whether the loss is a mean of losses between 0 and 1 per sample."""
        return self.bounded.sample_losses(self._whole) is not None

    def loss(self, graph: Graph, *, limit: float = math.inf) -> Loss:
        """Measure the loss of a rewritten graph against the original.

        The pass stops as soon as the lower bound of the loss exceeds `limit`. The loss is infinite if an output is not
        finite.
        """
        parts: list[Columns] = []
        try:
            for part in self._columns(graph, first=False):
                parts.append(part)
                columns = join(parts)
                bound = self.bounded.lower_bound(columns, self._whole, self._before)
                if bound > limit + ROUNDING:
                    return Loss(bound, self._samples(columns))
        except EvaluationError:
            return Loss(math.inf, len(self.split))
        return Loss(self.bounded.loss(self._whole, columns), self._samples(columns))

    def sample_losses(self, graph: Graph) -> Array | None:
        """Return the loss of each sample as a share of 1, see `Budget.sample_losses`; all ones for NaN or infinity."""
        try:
            return self.bounded.sample_losses(join(list(self._columns(graph, first=False))))
        except EvaluationError:
            return np.ones(len(self.split))

    def _hardest_first(self) -> None:
        """Sort the samples by the margin of the original, smallest first, so that failing checks stop early."""
        kept = [answer for answer in self._originals if answer is not None]
        margins = [self.head.margin(answer) for answer in kept]
        found = [margin for margin in margins if margin is not None]
        if len(found) < len(self._originals):
            return
        order, answers = np.argsort(np.concatenate(found), kind="stable"), np.concatenate(kept)
        self.split = dataclasses.replace(self.split, indices=tuple(self.split.indices[row] for row in order))
        ends = np.cumsum([len(group) for group in self.split.bounded_groups(BATCH)])
        self._originals = list(np.split(answers[order], ends[:-1]))
        self._whole = {name: column[order] for name, column in self._whole.items()}

    def _samples(self, columns: Columns) -> int:
        done = len(next(iter(columns.values())))
        return done * len(self.split) // len(next(iter(self._whole.values())))

    @torch.inference_mode()
    def _columns(self, graph: Graph, *, first: bool) -> Iterator[Columns]:
        answer_of, diverging = graph_runner(self.model, Program(graph).run), self.budget == DIVERGENCE
        for index, batch in enumerate(self.split.bounded_batches(BATCH)):
            answer = answer_of(batch.feeds)
            self.sweeps += len(batch.ids) / len(self.split)
            if first:
                self._keep(answer)
            original = answer if first else self._original(index, batch)
            yield sample_columns(self.head, self.metric, batch, answer, original, self.model.name, diverging=diverging)

    def _keep(self, answer: Array) -> None:
        """Keep an output of the original if the metric compares with it and the outputs so far fit in `KEPT` bytes."""
        kept = sum(original.nbytes for original in self._originals if original is not None)
        fits = self.bounded.compares and kept + answer.nbytes <= KEPT
        self._originals.append(answer if fits else None)

    def _original(self, index: int, batch: Batch) -> Array | None:
        """Return the output of the original for a batch, computed again if it was not kept."""
        if self._originals[index] is not None or not self.bounded.compares:
            return self._originals[index]
        self.sweeps += len(batch.ids) / len(self.split)
        return self._run_original(batch.feeds)

    @functools.cached_property
    def _run_original(self) -> Runner:
        return graph_runner(self.model, Program(self.graph).run)
