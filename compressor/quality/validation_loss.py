"""What a rewritten graph loses on validation data, and as soon as that is too much, no further."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from compressor.data.splits import Split
from compressor.models import Model
from compressor.quality.evaluate import BATCH, EvaluationError, compare, graph_runner, join, judge, loss
from compressor.quality.intervals import Array, Columns
from passes.execute.interpreter import Program
from passes.graph.graph import Graph

ROUNDING = 1e-9  # percent by which a sum of losses may exceed the limit through rounding alone


@dataclass(frozen=True)
class Loss:
    """What a candidate loses, in percent; only a lower bound if `samples` is fewer than the validation split has."""

    percent: float
    samples: int


@dataclass
class Validation:
    """Loss of rewritten graphs on the validation split, by the metric the user is promised.

    A few hundred labels measure a loss of accuracy only to a point or two, and a search that takes the best of many
    candidates takes the luckiest. Accuracy is therefore held to its expected loss as well (`regret` in
    `compressor.evaluate`), and the larger of the two counts. The original's answers are kept for the metrics that
    compare with them. `sweeps` counts passes over the split; one that stops early counts by its share of the samples.
    """

    graph: Graph
    model: Model
    split: Split
    metric: str
    sweeps: float = 0.0
    _originals: list[Array | None] = field(default_factory=list)
    _whole: Columns = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._whole = join(list(self._columns(self.graph, first=True)))
        self._before = judge(self.metric, self._whole)
        if self.metric in ("accuracy", "agreement"):
            self._hardest_first()

    @property
    def evaluations(self) -> float:
        """Passes over the split so far, rounded for the report."""
        return round(self.sweeps, 2)

    def loss(self, graph: Graph, *, limit: float = math.inf) -> Loss:
        """What a rewritten graph loses against the original (see `compressor.evaluate.loss`).

        Stops as soon as the loss is certain to exceed `limit`, whatever the other samples give. Answers that are no
        longer finite are an infinite loss.
        """
        parts: list[Columns] = []
        try:
            for part in self._columns(graph, first=False):
                parts.append(part)
                columns = join(parts)
                certain = self._certain(columns)
                if certain > limit + ROUNDING:
                    return Loss(certain, self._samples(columns))
        except EvaluationError:
            return Loss(math.inf, len(self.split))
        measured = loss(self.metric, self._before, judge(self.metric, columns))
        if self.metric == "accuracy":
            measured = max(measured, self._certain(columns))
        return Loss(measured, self._samples(columns))

    def _hardest_first(self) -> None:
        """Begin with the samples of which the original is least sure: losses show there, so lost checks end soon."""
        answers = np.concatenate([answer for answer in self._originals if answer is not None])
        best = np.sort(answers, axis=-1)[:, -2:]
        order = np.argsort(best[:, -1] - best[:, 0], kind="stable")
        self.split = dataclasses.replace(self.split, indices=tuple(self.split.indices[row] for row in order))
        self._originals = [answers[order[start : start + BATCH]] for start in range(0, len(order), BATCH)]

    def _certain(self, columns: Columns) -> float:
        """A lower bound of the loss, given the first samples: the others may lose nothing, but not win anything."""
        count = len(next(iter(self._whole.values())))
        if self.metric == "accuracy":
            return float(columns["regret"].sum()) / count * 100.0
        if self.metric in ("agreement", "fidelity"):
            return float((1.0 - columns[self.metric]).sum()) / count * 100.0
        if self.metric == "perplexity":  # the others' tokens could at best be foretold with certainty
            padded = {"nll": columns["nll"].sum(keepdims=True), "tokens": self._whole["tokens"].sum(keepdims=True)}
            return loss(self.metric, self._before, judge(self.metric, padded))
        return -math.inf

    def _samples(self, columns: Columns) -> int:
        done = len(next(iter(columns.values())))
        return done * len(self.split) // len(next(iter(self._whole.values())))

    @torch.inference_mode()
    def _columns(self, graph: Graph, *, first: bool) -> Iterator[Columns]:
        answer_of = graph_runner(self.model, Program(graph).run)
        for index, batch in enumerate(self.split.batches(BATCH)):
            answer = answer_of(batch.feeds)
            self.sweeps += len(batch.ids) / len(self.split)
            if first:
                self._originals.append(answer if self.metric in ("accuracy", "agreement", "fidelity") else None)
            yield compare(self.metric, batch, answer, self._originals[index], self.model.name, diverging=False)
