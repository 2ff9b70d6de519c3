"""Loss of rewritten graphs on a split, with early stopping once the loss is certain to exceed a limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import length_hint

import numpy as np
import torch

from compressor.choices import ACCURACY, DIVERGENCE
from compressor.data.splits import Batch, Split
from compressor.executor.base import Executor, InProcess
from compressor.models import Model
from compressor.models.base import EvaluatedOutput
from compressor.quality.budget import Budget, BudgetError
from compressor.quality.evaluate import (
    BATCH,
    EvaluationError,
    graph_runner,
    join,
    metric_value,
    sample_columns,
)
from compressor.quality.heads.base import Head
from compressor.quality.heads.registry import head_for
from compressor.quality.intervals import Array, Columns
from compressor.quality.metrics import METRICS
from passes.execute.interpreter import Program
from passes.graph.graph import Graph

KEPT = 2**30  # bytes of outputs of the original, such as the logits of all pixels; beyond them it runs again
ROUNDING = 1e-9  # percent by which rounding alone may raise a sum of losses above the limit


@dataclass(frozen=True)
class Loss:
    """Loss of a candidate in percent; a lower bound if `samples` is smaller than the split.

    `error` is its standard error in percent, where that was asked for (see `Budget.standard_error`).
    """

    percent: float
    samples: int
    error: float = 0.0


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
    executor: Executor = field(default_factory=InProcess)
    sweeps: float = 0.0
    _originals: list[Array | None] = field(default_factory=list)
    _whole: Columns = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.head = head_for(self.model.task, self.model.problem_type)
        self.bounded = Budget(self.head, self.metric, self.budget)
        compares, diverging = self.bounded.compares, self.budget == DIVERGENCE
        output, name = self.model.evaluated_output, self.model.name
        self._measured = _Measured(self.head, self.metric, compares, diverging, output, name)
        self._program = self.executor.share(Program(self.graph))
        self._batches = self.executor.share_each(lambda: self.split.bounded_batches(BATCH))
        self._whole = join(list(self._whole_columns()))
        self._before = metric_value(self.metric, self._whole)
        self._hardest_first()
        self._answers = self.executor.share_each(lambda: self._originals)

    @property
    def evaluations(self) -> float:
        """Number of passes over the split so far, rounded for the report."""
        return round(self.sweeps, 2)

    @property
    def averages(self) -> bool:
        """Whether the loss is a mean of losses between 0 and 1 per sample."""
        return self.bounded.sample_losses(self._whole) is not None

    def check_certifiable(self, fresh: Split | None) -> None:
        """Check that a confidence bound of the loss on fresh samples can be computed.

        Raises:
            BudgetError: there are no samples that the search does not see, or the loss is no mean over samples.
        """
        if fresh is None:
            raise BudgetError("--confidence needs samples that the search does not see; give at least 4 samples")
        if not self.averages:
            judged = self.bounded.judged
            name = METRICS[judged].label if judged in METRICS else judged
            raise BudgetError(
                f"--confidence bounds a mean of losses between 0 and 1 per sample, which {name} is not; leave out "
                "--confidence, or give another --budget"
            )

    def loss(self, graph: Graph, *, limit: float = math.inf, with_error: bool = False) -> Loss:
        """Measure the loss of a rewritten graph against the original, with its standard error if asked for.

        The pass stops as soon as the lower bound of the loss exceeds `limit`. The loss is infinite if an output is not
        finite.
        """
        parts: list[Columns] = []
        try:
            for part in self._columns(graph):
                parts.append(part)
                columns = join(parts)
                bound = self.bounded.lower_bound(columns, self._whole, self._before)
                if bound > limit + ROUNDING:
                    return Loss(bound, self._samples(columns))
        except EvaluationError:
            return Loss(math.inf, len(self.split))
        error = self.bounded.standard_error(self._whole, columns) if with_error else 0.0
        return Loss(self.bounded.loss(self._whole, columns), self._samples(columns), error)

    def sample_losses(self, graph: Graph) -> Array | None:
        """Return the loss of each sample as a share of 1, see `Budget.sample_losses`; all ones for NaN or infinity."""
        try:
            return self.bounded.sample_losses(join(list(self._columns(graph))))
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
        self._batches = self.executor.share_each(lambda: self.split.bounded_batches(BATCH))

    def _samples(self, columns: Columns) -> int:
        done = len(next(iter(columns.values())))
        return done * len(self.split) // len(next(iter(self._whole.values())))

    def _whole_columns(self) -> Iterator[Columns]:
        """Run the original on all batches, and keep its outputs if the metric compares with them."""
        calls = ((self._program, batch) for batch in self._batches)
        for columns, answer in self.executor.run(self._measured.original, calls, length_hint(self._batches)):
            self._keep(answer)
            yield columns
        self.sweeps += 1

    def _columns(self, graph: Graph) -> Iterator[Columns]:
        program = self.executor.share(Program(graph))
        batches = zip(self._batches, self._answers, strict=True)
        calls = ((program, self._program, *batch) for batch in batches)
        for samples, columns in self.executor.run(self._measured.changed, calls, length_hint(self._batches)):
            self.sweeps += samples / len(self.split)
            yield columns

    def _keep(self, answer: Array | None) -> None:
        """Keep an output of the original if the outputs so far fit in `KEPT` bytes."""
        kept = sum(original.nbytes for original in self._originals if original is not None)
        self._originals.append(answer if answer is not None and kept + answer.nbytes <= KEPT else None)


@dataclass(frozen=True)
class _Measured:
    """The columns of one batch that a loss is computed from.

    Attributes:
        head: how outputs are evaluated.
        metric: the metric.
        compares: whether the loss compares with the outputs of the original.
        diverging: whether it needs the divergence from them.
        output: the output that is evaluated.
        model: name of the model.
    """

    head: Head
    metric: str
    compares: bool
    diverging: bool
    output: EvaluatedOutput
    model: str

    @torch.inference_mode()
    def original(self, program: Program, batch: Batch) -> tuple[Columns, Array | None]:
        """Return the columns of the original, and its output if losses compare with it."""
        answer = graph_runner(self.output, program.run)(batch.feeds)
        return self._columns(batch, answer, answer), answer if self.compares else None

    @torch.inference_mode()
    def changed(self, program: Program, before: Program, batch: Batch, original: Array | None) -> tuple[int, Columns]:
        """Return the number of samples that ran and the columns of a rewritten graph.

        The original, `before`, runs again if its output was not kept.
        """
        runs = 1
        if original is None and self.compares:
            original, runs = graph_runner(self.output, before.run)(batch.feeds), 2
        answer = graph_runner(self.output, program.run)(batch.feeds)
        return runs * len(batch.ids), self._columns(batch, answer, original)

    def _columns(self, batch: Batch, answer: Array, original: Array | None) -> Columns:
        return sample_columns(self.head, self.metric, batch, answer, original, self.model, diverging=self.diverging)
