"""Part `knapsack` of benchmarks/corrections.py: plans of an integer program over single effects, against the search.

Each candidate is measured alone, as in the first step of the search. The program takes at most one action a site, so
that the sum of the effects is least and the sum of the savings reaches a budget. Neither adds up: where the plan costs
more than that of the search, more is asked for until it does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from ablation import MAPS, begin
from paired import Bench, Variant
from scipy.optimize import Bounds, LinearConstraint, milp

from compressor.search.depth_order import has_maps, in_depth_order
from compressor.search.greedy import Candidate, Search
from compressor.search.rewriter import Rewriter
from compressor.workspace.journal import Journal
from passes.analysis.least_squares import Fits
from passes.base import PassError
from passes.graph.graph import Graph
from passes.plan.plan import merged_tokens

ACTIONS = {"knapsack": f"{MAPS},merge", "knapsack without tokens": MAPS}
BUDGETS = tuple(number / 12 for number in range(1, 7))  # shares of the multiply-adds that are to be saved
REFITTED = "search, fitted in order of depth"
ATTEMPTS = 60  # programs solved for one budget
STEP = 0.002  # share of the cost by which a saving that was missed is asked for again, beside what is missing
Effects = Mapping[Candidate, tuple[float, float]]  # divergence added in nats, and cost saved


class NoPlanError(Exception):
    """No plan of the candidates is as cheap as asked for."""


def solved(
    effects: Effects, saving: float, conflicts: Sequence[tuple[Candidate, Candidate]] = (), accuracy: float = 1e-6
) -> dict[str, str]:
    """Return the action of each changed site with the least sum of effects, in the order of `effects`.

    Args:
        effects: divergence that each candidate adds alone, and cost that it saves alone.
        saving: least sum of the cost saved.
        conflicts: pairs of candidates that exclude each other; a pair of the same one excludes it.
        accuracy: relative distance from the optimum at which the program may stop.

    Raises:
        NoPlanError: all candidates together save too little.
    """
    names = list(effects)
    added, saved = (np.array([effects[name][part] for name in names]) for part in (0, 1))
    sites = dict.fromkeys(name for name, _ in names)
    rows = [[float(name == site) for name, _ in names] for site in sites]
    rows += [[float(pair.count(name)) for name in names] for pair in conflicts]
    scale = max(saving, 1e-30)
    limits = [LinearConstraint(np.array(rows), -np.inf, 1.0), LinearConstraint(saved[None] / scale, saving / scale)]
    found = milp(
        added,
        integrality=np.ones(len(names)),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": accuracy},
    )
    if found.x is None:
        raise NoPlanError(f"no plan saves {saving:.4g}; the program ended with: {found.message}")
    chosen: npt.NDArray[np.bool_] = found.x > 0.5
    return {name: action for (name, action), taken in zip(names, chosen, strict=True) if taken}


@dataclass(frozen=True)
class Alone:
    """Measurements of each candidate alone.

    Attributes:
        effects: divergence that a candidate adds and cost that it saves, in the order of the sites.
        fits: regressions of each site on the original graph.
        refused: pairs of candidates that exclude each other; grows as plans are tried.
    """

    effects: Effects
    fits: Mapping[str, Fits]
    refused: list[tuple[Candidate, Candidate]] = field(default_factory=list)

    @classmethod
    def measured(cls, search: Search) -> Alone:
        """Measure all candidates of a search that has not begun, on all samples of the search."""
        front = search.front
        front._begin()
        front._measure(list(front.candidates))
        order = {site.name: site.order for site in search.rewriter.sites}
        names = sorted(filter(front.saves, front.candidates), key=lambda name: order[name[0]])
        return cls({name: (front.added[name], front.saved[name]) for name in names}, dict(front.fits))

    def plan(self, search: Search, most: float) -> tuple[dict[str, str], int]:
        """Return the plan of the program that costs at most `most`, and the number of programs solved.

        Raises:
            NoPlanError: no such plan was found.
        """
        saving = search.whole - most
        for attempt in range(1, ATTEMPTS + 1):
            changes = in_depth_order(solved(self.effects, saving, self.refused), search.rewriter.units)
            graph = self._applied(search.rewriter, changes)
            if graph is None:
                continue
            cost = search.cost_model.cost(graph)
            if cost <= most * (1 + 1e-9):
                return changes, attempt
            saving += cost - most + STEP * search.whole
        raise NoPlanError(f"no plan of {ATTEMPTS} costs at most {most:.4g}")

    def _applied(self, rewriter: Rewriter, changes: Mapping[str, str]) -> Graph | None:
        """Return the graph after the changes, with maps fitted to the original; None if two exclude each other."""
        graph, order = rewriter.original, list(changes.items())
        for number, (name, action) in enumerate(order):
            if merged_tokens(action) is not None:
                continue
            try:
                graph = rewriter.changed(graph, name, action, self.fits.get(name))
            except PassError:
                self.refused.append((order[max(number - 1, 0)], order[number]))
                return None
        return rewriter.reduced(graph, changes)


def knapsack(bench: Bench, actions: str) -> dict[str, Any]:
    """Compare the plans of the program with those of the search at equal cost, on test data."""
    clock = time.perf_counter
    search = begin(bench.subject, replace(bench.settings, actions=actions), Journal())
    start = clock()
    alone = Alone.measured(search)
    seconds = {"effects": clock() - start}
    search.limit, start = math.inf, clock()
    search.run(1.0 / (1.0 - BUDGETS[-1]))
    seconds |= {"search": clock() - start, "programs": 0.0}
    variants: dict[str, Variant] = {}
    for number in points(search):
        changes = search.rewriter.of_sites({step.unit: step.action for step in search.steps[:number]})
        graph = search.rewriter.reduced(search.graphs[number], changes)
        name, base = f"search {number}", [f"search {number}"]
        variants[name] = Variant(graph, (), {"method": "search"} | told(search, changes, graph))
        ordered = in_depth_order(changes, search.rewriter.units)
        if has_maps(changes) and list(changes) != list(ordered):
            changes, graph = ordered, search.rewriter.rewritten(ordered)
            further = {"method": REFITTED} | told(search, changes, graph)
            base.append(f"{name}, {REFITTED}")
            variants[base[-1]] = Variant(graph, (name,), further)
        start = clock()
        changes, programs = alone.plan(search, search.steps[number - 1].cost)
        seconds["programs"] += clock() - start
        graph = search.rewriter.rewritten(changes)
        further = {"method": "knapsack", "programs": programs} | told(search, changes, graph)
        variants[f"knapsack {number}"] = Variant(graph, base, further)
    return {"candidates": len(alone.effects), "seconds": seconds, "rows": bench.judged(variants)}


def points(search: Search) -> list[int]:
    """Return the numbers of changes with which a search first reaches each of `BUDGETS`, without repetition."""
    costs = [step.cost for step in search.steps]
    most = [(1.0 - budget) * search.whole for budget in BUDGETS]
    return sorted({sum(cost > each for cost in costs) + 1 for each in most if costs and min(costs) <= each})


def told(search: Search, changes: Mapping[str, str], graph: Graph) -> dict[str, Any]:
    """Return the changes of a plan, and its divergence and loss on the data of the search."""
    _, found = search.effects.measure(search.rewriter.original, {"plan": graph})
    loss = search.validation.loss(graph).percent
    return {"changes": dict(changes), "search_divergence": found["plan"], "validation_loss": loss}
