"""Swaps: compared with an exhaustive search on planted effects, and replayed on a real model."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.quality.evaluate import tensor_batches
from compressor.search import greedy
from compressor.search.rewriter import Rewriter
from compressor.search.swaps import SwapRound, improve
from compressor.workspace.journal import Journal
from passes.execute.interpreter import run
from passes.graph.graph import Site
from passes.plan.plan import Plan
from tests.compressor.search.test_greedy import begun
from tests.planted_search import World
from tests.samples import small, spread

DROP = "drop"


@pytest.fixture
def without_liveness(monkeypatch):
    """Replace the liveness analysis, as planted graphs have no nodes."""
    monkeypatch.setattr(greedy, "live_parts", lambda graph: {})


def misleading():
    """The best first change conflicts with the two that are best together; the limit allows two changes."""
    world = World(count=6, actions=(DROP,), slope=1.0)
    world.pairs[:] = 0.0
    for other in (1, 2):
        world.pairs[0, other] = 0.5
    world.own |= {(f"s{number}", DROP): 0.1 + 0.01 * number for number in range(3)}
    world.own |= {(f"s{number}", DROP): 0.9 for number in range(3, 6)}
    world.saves = dict.fromkeys(world.saves, 10)
    world.whole = 100
    return world


def cheapest(world, limit, cost):
    """Return the least divergence of all plans of drops within the limit that cost no more than `cost`."""
    names = [(site.name, DROP) for site in world.sites]
    plans = (frozenset(plan) for size in range(len(names) + 1) for plan in itertools.combinations(names, size))
    allowed = [plan for plan in plans if world.cost(plan) <= cost and world.loss(plan, limit=limit).percent <= limit]
    return min(map(world.divergence, allowed))


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("racing", [False, True])
def test_a_swap_finds_the_plan_that_the_greedy_path_misses(racing):
    world = misleading()
    search = world.begin(limit=0.8, racing=racing)
    search.run()
    assert search.changes == {"s0": DROP, "s1": DROP}
    cost = search.cost
    improve(search)
    assert search.changes == {"s1": DROP, "s2": DROP}
    assert search.cost == cost
    assert world.divergence(search.graph) == pytest.approx(cheapest(world, 0.8, cost)) == search.steps[-1].divergence
    assert search.graph == {(name, DROP) for name in search.changes}


@pytest.mark.usefixtures("without_liveness")
def test_one_change_can_be_replaced_by_two_and_by_a_milder_one():
    world = misleading()
    world.sites = tuple(
        Site(f"s{n}", "attention", f"b{n}", n, 8, 2, f"a{n}", f"f{n}", f"t{n}", f"a{n}") for n in range(6)
    )
    world.actions = ("merge",)
    world.own |= {(f"s{n}", "merge:37%"): 9.0 for n in range(6)} | {(f"s{n}", "merge:25%"): 0.4 for n in range(6)}
    world.own |= {(f"s{n}", "merge:12%"): 0.1 for n in range(6)}
    world.saves |= {(f"s{n}", f"merge:{share}%"): share for n in range(6) for share in (12, 25, 37)}
    world.pairs[:] = 0.0
    search = world.begin(limit=100.0)
    search.run(1.6)  # mergers of 12 % at each site first, so plant a plan with a strong one instead
    strong = {"s0": "merge:25%", "s1": "merge:12%"}
    search = world.begin(limit=100.0)
    search.front.best()
    for unit, action in strong.items():
        search.front._measure([(unit, action)])
        search._try(unit, action)
    swap = SwapRound(search).best()
    divergence = swap.expected
    assert ("s0", "keep") in swap.made or ("s0", "merge:12%") in swap.made
    assert divergence == pytest.approx(0.4)  # 37 % of savings take four merges of 12 %
    assert search.swap(swap.made, divergence)
    assert search.cost <= world.whole - 37
    assert world.divergence(search.reduced) == pytest.approx(divergence)


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("noise", [0.0, 50.0])
def test_a_swap_within_the_noise_is_not_made(noise):
    """The divergence falls by 0.48; its standard error over the 16 samples is a quarter of `noise`."""
    world = misleading()
    world.noise = noise
    search = world.begin(limit=0.8)
    search.run()
    improve(search)
    assert bool(search.steps[-1].swapped) == (noise == 0.0)


@pytest.mark.usefixtures("without_liveness")
def test_a_swap_that_exceeds_the_limit_on_validation_data_is_not_made():
    world, lines = misleading(), []
    search = world.begin(limit=0.8, progress=lines.append)
    search.run()
    before, true = search.changes, world.loss
    world.loss = lambda graph, *, limit: true(graph | {("s5", DROP)}, limit=limit)
    improve(search)
    assert search.changes == before
    assert lines[-1].startswith("swap not made: s0 keep, s2 drop")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 100), st.floats(1.0, 6.0))
def test_swaps_never_make_a_plan_worse(seed, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "live_parts", lambda graph: {})
        world = World(seed, slope=1.0)
        world.pairs *= 5.0
        search = world.begin(limit=limit)
        search.run()
        cost, count = search.cost, len(search.steps)
        improve(search)
        for before, step in zip(search.steps[count - 1 :], search.steps[count:], strict=False):
            assert step.cost <= before.cost
            assert step.loss <= limit + 1e-9
            assert not step.swapped or step.divergence < before.divergence
        assert search.cost <= cost
        assert search.graph == set(search.changes.items())
        for number in range(len(search.steps) + 1):
            plan = search.plan("m", "auto", number)
            assert set(plan.changes.items()) == search.graphs[number]
            assert all(decision.reason for decision in plan.decisions)
            assert Plan.from_dict(json.loads(plan.to_json())) == plan


@pytest.mark.usefixtures("without_liveness")
def test_with_the_same_journal_no_swap_is_measured_again(tmp_path):
    plans = []
    for resumed in (False, True):
        world = misleading()
        search = world.begin(limit=0.8, journal=Journal("s", tmp_path / "j"))
        search.run()
        improve(search)
        plans.append(search.plan("m", "auto"))
        assert bool(world.compared) != resumed
        assert bool(world.losses) != resumed
    assert plans[0] == plans[1]


def test_a_replayed_plan_with_a_swap_gives_the_graph_of_the_search():
    """The map behind the swap is fitted again, on the graph that it leaves; outputs are bit-identical."""
    model, graph, sites, split = small(spread(0.1), depth=3)
    search = begun(model, graph, sites, split, (DROP, "linear"))
    attentions = [site.name for site in sites if site.kind == "attention"]
    first = next(site.name for site in sites if site.kind == "mlp")
    search.front.best()
    for change in ((attentions[1], DROP), (first, "linear")):
        search.front._measure([change])
        search._try(*change)
    stale = search.graph
    assert search.swap(((attentions[1], "keep"), (attentions[0], DROP)), 0.5)
    assert search.changes == {first: "linear", attentions[0]: DROP}
    plan = Plan.from_dict(json.loads(search.plan("m", "auto").to_json()))
    again = Rewriter(graph, sites, split).rewritten(plan.changes)
    feeds = next(tensor_batches(split))
    assert torch.equal(run(search.reduced, feeds)[0], run(again, feeds)[0])
    assert not torch.equal(run(search.reduced, feeds)[0], run(stale, feeds)[0])
    assert search.steps[-1].loss == search.validation.loss(again).percent
    search.run()  # what was taken back is a candidate again
    assert attentions[1] in search.changes
