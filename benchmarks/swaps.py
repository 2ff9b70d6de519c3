"""Swaps: a local improvement of the plan of a greedy search, at no higher predicted cost.

A greedy search takes nothing back, although effects do not add up: a change that was the best one first can be a bad
one beside those that came later. A swap makes one change milder or takes it back, and makes one or two others, or
makes them stronger, so that the predicted cost is no higher. It is the level switch of EvoPress (Sieberling et al.,
2024, arXiv 2410.14649), in the order of the expected divergence instead of at random: the divergence of the plan with
one change less is measured, and what the other changes add is what the search measured last. The best of them are
measured on growing subsets of the calibration samples: on few, and where they stay the best, on all.

A swap that saves more than the plan is compared at equal cost: what it saves more counts at the price that the search
paid last, in divergence per cost. A swap is made if the divergence falls, and if it falls at equal cost by more than
`NOISE` standard errors of the difference over the samples. On DeiT-Tiny swaps did not help beyond the noise (see
benchmarks/README.md), so no command makes them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from passes.base import PassError
from passes.plan.plan import PUBLISHED, form_and_rank, merged_tokens

if TYPE_CHECKING:
    from compressor.quality.output_divergence import Array, OutputDivergence
    from compressor.search.greedy import Candidate, Search
    from passes.analysis.least_squares import Fits
    from passes.graph.graph import Graph

KEEP = "keep"  # the action of a change that is taken back
ROUNDING = 1e-7  # nats by which rounding alone may change a divergence
TINY = 1e-9  # least saving of the last change, in the unit of the cost
TRIED = 24  # swaps that are measured on few samples
FINALISTS = 3  # swaps that are measured on all samples
NOISE = 2.0  # standard errors by which the divergence has to fall

Changes = dict[str, str]  # action by unit, in the order in which they are applied


@dataclass(frozen=True)
class Swap:
    """A plan that is as cheap as the present one.

    Attributes:
        made: the changes that the swap makes; the action is ``keep`` for one that is taken back.
        expected: divergence in nats, measured or estimated.
        worth: divergence in nats that the search would pay for what the swap saves.
    """

    made: tuple[Candidate, ...]
    expected: float
    worth: float = 0.0

    @property
    def score(self) -> float:
        """Return the divergence at equal cost."""
        return self.expected - self.worth


@dataclass
class SwapRound:
    """One search for a swap.

    Attributes:
        search: the search, whose plan is improved.
        plan: its changes, without those of ``--tokens``.
    """

    search: Search
    plan: Changes = field(init=False)
    _graphs: dict[tuple[Candidate, ...], Graph] = field(default_factory=dict)  # by changes, without merged tokens
    _swapped: dict[tuple[Candidate, ...], tuple[Graph, Graph]] = field(default_factory=dict)
    _fits: dict[tuple[Candidate, ...], dict[str, Fits]] = field(default_factory=dict)
    _wanted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.plan = {step.unit: step.action for step in self.search.steps}
        self._graphs[()] = self.search.graphs[0]
        *_, before, last = (self.search.whole, *(step.cost for step in self.search.steps))
        self.price = max(self.search.steps[-1].added, 0.0) / max(before - last, TINY)

    @property
    def _few(self) -> OutputDivergence:
        return self.search.effects if self.search.preview is None else self.search.preview

    def best(self) -> Swap | None:
        """Return the best swap, measured on all samples, or None if none is better beyond the noise."""
        likely = self._refilled(self._eased())[: 2 * TRIED]
        self._wanted = {unit for swap in likely for unit, action in swap.made if action != KEEP and _fitted(action)}
        few = self._on_few(list(itertools.islice(self._affordable(likely), TRIED)))
        return self._beyond_noise(self._better(few)[:FINALISTS])

    def _eased(self) -> list[tuple[Swap, float]]:
        """Return the plans with one change taken back or milder, by divergence on few samples, and their cost."""
        ways = [(unit, left) for unit, action in self.plan.items() for left in (KEEP, *self._milder(unit, action))]
        swaps = [Swap((way,), math.nan) for way in ways]
        return [(swap, self._cost(swap)) for swap in self._on_few([swap for swap in swaps if self._possible(swap)])]

    def _milder(self, unit: str, action: str) -> Iterator[str]:
        """Yield the allowed actions on a unit that merge fewer tokens than the present one."""
        share = merged_tokens(action)
        for name, other in self.search.front.added:
            fewer = merged_tokens(other)
            if name == unit and share is not None and fewer is not None and fewer < share:
                yield other

    def _refilled(self, eased: Sequence[tuple[Swap, float]]) -> list[Swap]:
        """Return the swaps that are expected to cost no more than the plan, those of the least divergence first."""
        stronger = {change: self._difference(change) for change in self.search.front.added if self._stronger(change)}
        found = []
        for swap, cost in eased:
            ((unit, _),) = swap.made
            others = {change: both for change, both in stronger.items() if change[0] != unit}
            enough = {change for change, (_, saved) in others.items() if cost - saved <= self.search.cost}
            pairs = itertools.combinations([change for change in others if change not in enough], 2)
            for changes in (*((change,) for change in enough), *pairs):
                added, saved = (sum(others[change][index] for change in changes) for index in (0, 1))
                if cost - saved <= self.search.cost and len({unit for unit, _ in changes}) == len(changes):
                    found.append(Swap((*swap.made, *changes), swap.expected + added))
        return sorted(found, key=lambda swap: (swap.expected, swap.made))

    def _better(self, swaps: Sequence[Swap]) -> list[Swap]:
        """Return the swaps that lower the divergence on few samples, the best at equal cost first."""
        now = float(self._measured([], self._few)[0].mean())
        return sorted((swap for swap in swaps if swap.expected < now), key=lambda swap: (swap.score, swap.made))

    def _worth(self, cost: float) -> float:
        """Return the divergence that the search would pay to reduce the cost of the plan to `cost`."""
        return self.price * (self.search.cost - cost)

    def _stronger(self, change: Candidate) -> bool:
        """Return whether a change can be made in addition: to an unchanged unit, or as a stronger one to a changed."""
        unit, action = change
        if " refused: " in self.search.refused.get(change, ""):
            return False
        now, share = self.plan.get(unit), merged_tokens(action)
        if now is None:
            return True
        merged = merged_tokens(now)
        if merged is not None:
            return share is not None and share > merged
        return action == "drop" != now

    def _difference(self, change: Candidate) -> tuple[float, float]:
        """Return the divergence that a change is expected to add to the plan, and the cost that it is to save."""
        front, now = self.search.front, (change[0], self.plan.get(change[0], KEEP))
        added, saved = front.added[change], front.saved[change]
        if change[1] == "drop" and now in front.added:  # instead of a map; larger merges are differences already
            return max(added - front.added[now], 0.0), saved - front.saved[now]
        return added, saved

    def _affordable(self, swaps: Iterable[Swap]) -> Iterator[Swap]:
        """Yield the swaps that can be made and whose predicted cost is no higher than that of the plan."""
        for swap in swaps:
            if self._possible(swap) and self._cost(swap) <= self.search.cost:
                yield swap

    def _on_few(self, swaps: Sequence[Swap]) -> list[Swap]:
        """Return the swaps with their divergence on few samples."""
        _, rows = self._measured(swaps, self._few)
        means = [float(found.mean()) for found in rows]
        return [Swap(swap.made, mean, self._worth(self._cost(swap))) for swap, mean in zip(swaps, means, strict=True)]

    def _beyond_noise(self, swaps: Sequence[Swap]) -> Swap | None:
        """Return the swap of the least divergence at equal cost on all samples, if it is better beyond the noise."""
        now, rows = self._measured(swaps, self.search.effects)
        better = [
            replace(swap, expected=float(found.mean()))
            for swap, found in zip(swaps, rows, strict=True)
            if found.mean() < now.mean() and falls(now, found - swap.worth)
        ]
        return min(better, key=lambda swap: swap.score, default=None)

    def _measured(self, swaps: Sequence[Swap], effects: OutputDivergence) -> tuple[Array, list[Array]]:
        """Return the divergence of the plan and of each swap by sample, from the journal where it has them."""
        journal, size = self.search.journal, len(effects.split)
        keys = [f"swap on {size}: {_text(self.plan)}; {_text(dict(swap.made))}" for swap in swaps]
        base = f"swap on {size}: {_text(self.plan)}"
        if not all(map(journal.knows, (base, *keys))):
            graphs = {key: self.graph(swap)[1] for key, swap in zip(keys, swaps, strict=True)}
            now, rows = effects.by_row(self.search.reduced, graphs)
            journal.note(base, now.tolist())
            for key, found in rows.items():
                journal.note(key, found.tolist())
        values = [np.array(journal.recall(key, list)) for key in (base, *keys)]
        return values[0], values[1:]

    def graph(self, swap: Swap) -> tuple[Graph, Graph]:
        """Return the graph after a swap, before and after tokens are merged; maps are fitted on `Search.fitting`.

        Raises:
            PassError: an action cannot be applied to its unit after the others.
        """
        if swap.made not in self._swapped:
            changes = after(self.plan, swap.made)
            key: tuple[Candidate, ...] = ()
            for unit, action in changes.items():
                if merged_tokens(action) is None:
                    before, key = key, (*key, (unit, action))
                    if key not in self._graphs:
                        self._graphs[key] = self._changed(before, unit, action)
            search, graph = self.search, self._graphs[key]
            merged = search.rewriter.reduced(graph, {**search.given, **search.rewriter.of_sites(changes)})
            self._swapped[swap.made] = graph, merged
        return self._swapped[swap.made]

    def _changed(self, before: tuple[Candidate, ...], unit: str, action: str) -> Graph:
        """Return the graph after the changes `before` and one more; all maps that may be needed there are fitted."""
        rewriter, graph, fits = self.search.rewriter, self._graphs[before], None
        if _fitted(action):
            found = self._fits.setdefault(before, {})
            if unit not in found:
                names = {unit, *self._wanted} - {name for name, _ in before}
                found |= rewriter.fits(graph, sorted(names), self.search.fitting)
            fits = found.get(unit)
        return rewriter.changed(graph, unit, action, fits)

    def _possible(self, swap: Swap) -> bool:
        try:
            self.graph(swap)
        except PassError:
            return False
        return True

    def _cost(self, swap: Swap) -> float:
        return self.search.cost_model.cost(self.graph(swap)[1])


@dataclass(frozen=True)
class Swapped:
    """The plan after a swap.

    Attributes:
        swap: the swap, measured on all samples.
        changes: the changes of the plan by site, in order.
        graph: the graph with tokens merged; its maps are fitted on all calibration samples.
        loss: loss on validation data in percent; a lower bound if it exceeds the limit of the search.
    """

    swap: Swap
    changes: Changes
    graph: Graph
    loss: float


def swapped(search: Search) -> Swapped | None:
    """Return the plan after the best swap of a search that has ended; None if none is better beyond the noise."""
    swap = SwapRound(search).best() if search.steps else None
    if swap is None:
        return None
    plan = {step.unit: step.action for step in search.steps}
    changes = {**search.given, **search.rewriter.of_sites(after(plan, swap.made))}
    graph = search.rewriter.reduced(search.rewriter.apply_changes(changes), changes)
    loss = search.journal.recall(
        f"loss of {_text(changes)}", lambda: search.validation.loss(graph, limit=search.limit).percent
    )
    return Swapped(swap, changes, graph, loss)


def after(plan: Mapping[str, str], made: Iterable[Candidate]) -> Changes:
    """Return a plan after some changes; ``keep`` takes a change back.

    >>> after({"a": "drop", "b": "merge:25%"}, [("a", "keep"), ("b", "merge:37%"), ("c", "drop")])
    {'b': 'merge:37%', 'c': 'drop'}
    """
    changes = {**plan, **dict(made)}
    return {unit: action for unit, action in changes.items() if action != KEEP}


def falls(before: Array, now: Array) -> bool:
    """Return whether the mean of paired values falls by more than `NOISE` standard errors of the differences.

    >>> falls(np.array([1.0, 2.0, 3.0]), np.array([0.9, 1.8, 2.9]))
    True
    >>> falls(np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.3, 3.1]))
    False
    """
    difference = now - before
    if len(difference) < 2 or not np.isfinite(difference).all():
        return False
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return float(difference.mean()) < -max(NOISE * error, ROUNDING)


def _fitted(action: str) -> bool:
    return form_and_rank(action)[0] not in ("drop", "merge", *PUBLISHED)


def _text(changes: Mapping[str, str]) -> str:
    return ", ".join(f"{unit}={action}" for unit, action in changes.items())
