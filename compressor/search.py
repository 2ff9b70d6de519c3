"""``--drop auto``: budgets in, a plan out, by skipping at run time; nothing is rewritten or exported on the way.

Effects of drops do not add up, so each step measures candidates given what is already gone. A candidate's score is
the increase in output divergence per multiply-add saved. As effects mostly grow with every drop, an earlier score is
a lower bound in practice: only the front runners are measured again (lazy greedy; Minoux 1978).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import fx

from compressor.data import Split
from compressor.evaluate import (
    BATCH,
    Array,
    Columns,
    EvaluationError,
    compare,
    divergence,
    graph_runner,
    join,
    judge,
    loss,
    tensor_batches,
)
from compressor.models import Model
from passes.cost import Costs
from passes.graph import Graph, Site
from passes.plan import Decision, Plan, fingerprint
from passes.run import Forks, Program
from passes.score import MASK

FRONT = 6  # candidates measured at a time
PATIENCE = 3  # candidates in a row that may break the budget before the search ends
POSITIONS = 64  # tokens of a text at which the divergence of a language model is measured
ROUNDING = 1e-9  # percent by which a sum of losses may exceed the limit through rounding alone

Progress = Callable[[str], None]


@dataclass
class Effects:
    """Output divergence from the original on a few calibration samples, under any drops.

    The original's answers are kept (for language models at `POSITIONS` tokens of each text), no activations. `sweeps`
    counts forward passes over these samples, by the share of the graph's nodes that were executed.

    Raises:
        EvaluationError: the original itself gives NaN or infinity.
    """

    graph: Graph
    model: Model
    split: Split
    sweeps: float = 0.0
    _originals: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        program = Program(self.graph)
        self._computed = _computed(program.order)
        with torch.inference_mode():
            for feeds in tensor_batches(self.split):
                self._originals.append(self._answer(program.run(feeds)))
        if not all(bool(torch.isfinite(answer).all()) for answer in self._originals):
            raise EvaluationError(f"{self.model.name} gave NaN or infinity on calibration data; check its weights.")
        self.sweeps += 1

    def measure(self, skip: Sequence[Site], candidates: Sequence[Site]) -> tuple[float, dict[Site, float]]:
        """Divergence under `skip`, and under `skip` with each candidate added: mean over the samples' rows.

        Infinite where the answers are no longer finite.
        """
        forks = Forks(self.graph, skip, candidates)
        sums: dict[Site | None, float] = dict.fromkeys([None, *candidates], 0.0)
        rows = 0
        for original, feeds in zip(self._originals, tensor_batches(self.split), strict=True):
            receive = partial(self._add, sums, original, self._mask(feeds, original))
            forks.run(feeds, receive)
            rows += len(original)
        executed = _computed(forks.main.order) + sum(_computed(tail.order[start:]) for _, tail, start, _ in forks.tails)
        self.sweeps += executed / self._computed
        means = {site: total / rows if math.isfinite(total) else math.inf for site, total in sums.items()}
        return means[None], {site: means[site] for site in candidates}

    def of_units(self, units: Sequence[Sequence[Site]]) -> list[float]:
        """Divergence when all sites of a unit are dropped, for each unit on its own."""
        if all(len(unit) == 1 for unit in units):
            _, effects = self.measure((), [unit[0] for unit in units])
            return [effects[unit[0]] for unit in units]
        return [self.measure(list(unit), [])[0] for unit in units]

    def _add(
        self,
        sums: dict[Site | None, float],
        original: torch.Tensor,
        mask: torch.Tensor | None,
        site: Site | None,
        outputs: tuple[torch.Tensor, ...],
    ) -> None:
        sums[site] += float(divergence(self.model.task, self._answer(outputs), original, mask).sum())

    def _answer(self, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._positions(outputs[self.model.outputs.index(self.model.answer)])

    def _mask(self, feeds: Mapping[str, torch.Tensor], original: torch.Tensor) -> torch.Tensor | None:
        mask = feeds.get(MASK)
        return None if mask is None or original.ndim < 3 else self._positions(mask)

    def _positions(self, values: torch.Tensor) -> torch.Tensor:
        if self.model.task == "text-generation" and values.shape[1] > POSITIONS:
            return values[:, torch.linspace(0, values.shape[1] - 1, POSITIONS).long()].clone()
        return values


def _computed(nodes: Sequence[fx.Node]) -> int:
    """Nodes that compute: parameters, which all stand at the front of a traced graph, cost nothing."""
    return sum(node.op.startswith("call") for node in nodes)


@dataclass(frozen=True)
class Loss:
    """What a candidate loses, in percent; only a lower bound if `samples` is fewer than the validation split has."""

    percent: float
    samples: int


@dataclass
class Validation:
    """Loss of the model under any drops on the validation split, by the metric the user is promised.

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
        self._whole = join(list(self._columns((), first=True)))
        self._before = judge(self.metric, self._whole)
        if self.metric in ("accuracy", "agreement"):
            self._hardest_first()

    @property
    def evaluations(self) -> float:
        """Passes over the split so far, rounded for the report."""
        return round(self.sweeps, 2)

    def loss(self, skip: Sequence[Site], *, limit: float = math.inf) -> Loss:
        """What is lost without the branches of `skip` (see `compressor.evaluate.loss`).

        Stops as soon as the loss is certain to exceed `limit`, whatever the other samples give. Answers that are no
        longer finite are an infinite loss.
        """
        parts: list[Columns] = []
        try:
            for part in self._columns(skip, first=False):
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
    def _columns(self, skip: Sequence[Site], *, first: bool) -> Iterator[Columns]:
        answer_of = graph_runner(self.model, Program(self.graph, skip).run)
        for index, batch in enumerate(self.split.batches(BATCH)):
            answer = answer_of(batch.feeds)
            self.sweeps += len(batch.ids) / len(self.split)
            if first:
                self._originals.append(answer if self.metric in ("accuracy", "agreement", "fidelity") else None)
            yield compare(self.metric, batch, answer, self._originals[index], self.model.name)


def search(
    graph: Graph,
    model: Model,
    sites: Sequence[Site],
    costs: Costs,
    effects: Effects,
    validation: Validation,
    *,
    max_loss: float,
    progress: Progress | None = None,
) -> Plan:
    """Drop the cheapest site again and again until the next one would cost more than `max_loss` on validation data.

    Args:
        graph: the traced model; not changed.
        model: for its name.
        sites: all sites of the graph.
        costs: multiply-adds under any drops.
        effects: measures output divergence on calibration samples.
        validation: measures the loss that `max_loss` bounds.
        max_loss: in percent, see `compressor.evaluate.loss`.
        progress: called with a line of text at every step.
    """
    front = _Front(effects, {site: max(costs.saved(site).multiply_adds, 1) for site in sites})
    skip: list[Site] = []
    reasons: dict[Site, str] = {}
    while front.candidates and _broken_in_a_row(reasons, skip) < PATIENCE:
        site, added = front.best(skip)
        lost = validation.loss([*skip, site], limit=max_loss)
        bound = "" if lost.samples == len(validation.split) else f"at least (after {lost.samples} samples) "
        note = f"adds {added:.4f} divergence; validation loss {bound}{lost.percent:.2f} %"
        front.candidates.remove(site)
        if lost.percent <= max_loss + ROUNDING:
            skip.append(site)
            front.stale()
            reasons[site] = f"{note} with {len(skip)} dropped"
        else:
            reasons[site] = f"{note} would exceed {max_loss:g} % after {len(skip)} dropped"
        if progress is not None:
            progress(f"{len(skip)} dropped, {site.name}: {note}")
    return _plan(graph, model, sites, skip, reasons, front, max_loss)


def _broken_in_a_row(reasons: dict[Site, str], skip: Sequence[Site]) -> int:
    """Number of refusals since the last drop."""
    tried = list(reasons)
    last = max((tried.index(site) for site in skip), default=-1)
    return len(tried) - 1 - last


@dataclass
class _Front:
    """Candidates with their last measured increase in divergence, measured again only where it can matter."""

    effects: Effects
    saved: dict[Site, int]
    base: float = 0.0
    added: dict[Site, float] = field(default_factory=dict)
    fresh: set[Site] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.candidates = list(self.saved)

    def best(self, skip: Sequence[Site]) -> tuple[Site, float]:
        """The candidate with the least added divergence per multiply-add saved, and what it adds."""
        if not self.added:
            self._measure(skip, self.candidates)
        while True:
            ranked = sorted(self.candidates, key=self._price)
            if ranked[0] in self.fresh:
                return ranked[0], self.added[ranked[0]]
            self._measure(skip, [site for site in ranked if site not in self.fresh][:FRONT])

    def stale(self) -> None:
        """Forget which measurements hold, after a drop."""
        self.fresh.clear()

    def _price(self, site: Site) -> float:
        return self.added[site] / self.saved[site]

    def _measure(self, skip: Sequence[Site], sites: Sequence[Site]) -> None:
        self.base, found = self.effects.measure(skip, sites)
        self.added.update({site: value - self.base for site, value in found.items()})
        self.fresh.update(sites)


def _plan(
    graph: Graph,
    model: Model,
    sites: Sequence[Site],
    skip: Sequence[Site],
    reasons: dict[Site, str],
    front: _Front,
    max_loss: float,
) -> Plan:
    def decide(site: Site) -> Decision:
        if site in skip:
            return Decision(site.name, "drop", reasons[site])
        untried = f"not tried: added {front.added.get(site, float('nan')):.4f} divergence when last measured"
        return Decision(site.name, "keep", reasons.get(site, untried))

    rule = f"auto, at most {max_loss:g} % loss"
    order = tuple(site.name for site in skip)
    return Plan(model.name, fingerprint(sites), rule, "output", tuple(decide(site) for site in sites), order)
