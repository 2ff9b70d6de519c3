"""Greedy search: compared with an exhaustive greedy search, on planted effects and on real models."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure.workload import Call
from compressor.quality.evaluate import evaluate, graph_runner, tensor_batches
from compressor.quality.heads.registry import head_for
from compressor.quality.output_divergence import OutputDivergence
from compressor.quality.validation_loss import Loss, ValidationLoss
from compressor.search import greedy, planner
from compressor.search.cost_model import multiply_add_cost_model
from compressor.search.greedy import MEASURED_AT_ONCE, MERGE, PATIENCE, Search
from compressor.search.planner import _split_calibration
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.base import PassError
from passes.execute.interpreter import run
from passes.plan.plan import Plan, merged_tokens
from tests.planted_search import World
from tests.samples import digits, small, spread

# -------------------------------------------------------------------------------------------------- planted effects


@pytest.fixture
def without_liveness(monkeypatch):
    """Replace the liveness analysis, as planted graphs have no nodes."""
    monkeypatch.setattr(greedy, "live_parts", lambda graph: {})


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("actions", [("drop",), ("drop", "linear", "scale"), ("low-rank:4", "linear")])
@pytest.mark.parametrize("front", [1, 2, MEASURED_AT_ONCE])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("racing", [False, True])
def test_lazy_search_is_exact_if_effects_only_grow(racing, front, seed, actions, monkeypatch):
    monkeypatch.setattr(greedy, "MEASURED_AT_ONCE", front)
    world = World(seed, count=12, actions=actions)
    search = world.begin(racing=racing)
    search.run()
    assert list(search.changes.items()) == world.greedy(12)
    every = sum(len(actions) * left for left in range(1, 13))
    assert len(world.measured) + len(world.previewed) < every + len(search.steps) * greedy.FINALISTS
    assert bool(world.previewed) == racing


@pytest.mark.usefixtures("without_liveness")
def test_few_samples_choose_who_is_measured_on_all_of_them():
    """On few samples one change looks best that is the worst; it is measured on all, and another one is made."""
    world = World(count=6, actions=("drop",))
    world.pairs[:] = 0.0
    world.saves, world.whole = dict.fromkeys(world.saves, 10), 100
    world.own |= {(f"s{number}", "drop"): 1.0 + number for number in range(6)}
    true = world.estimated
    world.estimated = lambda graph, variants: (
        true(graph, variants)[0],
        {key: 0.0 if key[0] == "s5" else value for key, value in true(graph, variants)[1].items()},
    )
    search = world.begin(racing=True)
    search.run(1.05)
    assert list(search.changes) == ["s0"]
    assert ("s5", "drop") in world.measured
    assert len(set(world.measured)) <= 4 < len(set(world.previewed)) == 6
    assert search.steps[0].divergence == world.divergence(search.graph)


@pytest.mark.usefixtures("without_liveness")
def test_steps_record_the_state_after_the_change():
    world = World(slope=3.0)
    search = world.begin()
    search.run()
    graph = frozenset()
    for step in search.steps:
        before, graph = graph, graph | {(step.unit, step.action)}
        assert step.divergence == pytest.approx(world.divergence(graph), abs=1e-12)
        assert step.added == pytest.approx(world.divergence(graph) - world.divergence(before), abs=1e-12)
        assert step.loss == pytest.approx(3.0 * world.divergence(graph), abs=1e-12)
        assert step.cost == step.multiply_adds == world.cost(graph)
    assert search.graph == graph
    assert search.speedup == world.whole / world.cost(graph)
    assert len(search.steps) == len(world.sites)  # each site once


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_a_run_ends_at_the_required_speedup(seed, first, second):
    """A second run with a higher goal continues, and gives the result of one run with that goal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "live_parts", lambda graph: {})
        search, whole = World(seed).begin(), World(seed).begin()
        whole.run()
        costs = [whole.whole, *(step.cost for step in whole.steps)]
        for enough in (first, max(first, second)):
            search.run(enough)
            needed = next((count for count, cost in enumerate(costs) if whole.whole / cost >= enough), len(whole.steps))
            assert search.steps == whole.steps[:needed]


def coarse():
    """One change saves twice what is missing, at ten times the effect of two others that save enough together."""
    world = World(count=4, actions=("drop",))
    world.pairs[:] = 0.0
    world.own = {("s0", "drop"): 0.5, ("s1", "drop"): 2.0, ("s2", "drop"): 0.1, ("s3", "drop"): 0.2}
    world.saves, world.whole, world.slope = dict.fromkeys(world.own, 1), 100, 1.0
    world.saves |= {("s0", "drop"): 20, ("s1", "drop"): 60, ("s2", "drop"): 3, ("s3", "drop"): 6}
    world.own |= {("s2", "drop"): 0.15, ("s3", "drop"): 0.3}
    return world


@pytest.mark.usefixtures("without_liveness")
def test_a_plan_that_saves_more_than_needed_is_replaced_by_a_milder_one():
    world = coarse()
    search = world.begin()
    search.run(1.4)
    assert list(search.changes) == ["s0", "s1"]
    search.milder(1.4)
    assert search.changes == {"s0": "drop", "s2": "drop", "s3": "drop"}
    assert search.speedup >= 1.4
    assert search.graph == {(name, "drop") for name in search.changes}
    assert search.cost == search.steps[-1].cost == world.cost(search.graph)
    assert len(search.graphs) == len(search.steps) + 1 == len(search.fronts) + 1
    search.milder(1.2)  # the first change alone is fast enough
    assert list(search.changes) == ["s2", "s3"] or search.speedup >= 1.2
    search.run()  # nothing that was undone is lost
    assert set(search.changes) == {site.name for site in world.sites}
    assert search.ended == "no remaining change saves anything or can be made"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.floats(1.05, 2.5))
def test_a_milder_plan_reaches_the_speedup_with_no_more_divergence(seed, enough):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "live_parts", lambda graph: {})
        world = World(seed, slope=1.0)
        search = world.begin()
        search.run(enough)
        before = search.steps[-1]
        reached = search.speedup >= enough
        search.milder(enough)
        last = search.steps[-1]
        assert (search.speedup >= enough) == reached
        assert last.divergence <= before.divergence
        assert last.loss <= before.loss + 1e-9
        assert search.cost == world.cost(search.graph) == last.cost
        assert last.divergence == pytest.approx(world.divergence(search.graph))
        assert search.plan("m", "auto").changes == search.changes


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.3, 3.0])
def test_a_wish_is_reached_with_as_little_excess_as_the_steps_allow(factor):
    """Engines are `factor` times as fast as predicted; a later correction steps back from one that was too strong."""
    world = World(1, count=30, actions=("drop",), slope=1.0)
    world.saves = dict.fromkeys(world.saves, 20)
    world.whole = 1000
    search, goal = world.begin(), 1.5
    measured = []
    measure = lambda: measured.append(1.0 + (search.speedup - 1.0) * factor) or measured[-1]  # noqa: E731
    timed = planner.reach(search, goal, measure, Steps(None))
    assert [entry["measured"] for entry in timed] == measured
    possible = [1.0 + (1000 / (1000 - 20 * n) - 1.0) * factor for n in range(31)]
    reachable = [value for value in possible if value >= goal]
    final = 1.0 + (search.speedup - 1.0) * factor
    assert goal <= final <= max(planner.EXCESS * goal, min(reachable) + 1e-9)
    assert len(timed) <= planner.CORRECTIONS


@pytest.mark.usefixtures("without_liveness")
def test_an_early_plan_that_was_fast_enough_is_kept_over_a_later_one_that_was_not():
    """Measurements scatter; the result is the mildest plan that was measured to be fast enough."""
    world = World(1, count=30, actions=("drop",), slope=1.0)
    world.saves, world.whole = dict.fromkeys(world.saves, 20), 1000
    search = world.begin()
    answers = iter([1.2, 2.6, 1.4, 1.45, 1.48])
    timed = planner.reach(search, 1.5, lambda: next(answers), Steps(None))
    assert len(search.steps) == next(entry["changes"] for entry in timed if entry["measured"] == 2.6)


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("enough", [0.5, 1.0, 1.2, math.inf])
def test_every_site_has_a_reason(enough):
    world = World(slope=30.0, refused={("s3", action): "always" for action in ("linear", "scale")})
    search = world.begin(limit=60.0)
    search.run(enough)
    plan = search.plan("m", "auto")
    assert [decision.site for decision in plan.decisions] == [site.name for site in world.sites]
    for decision in plan.decisions:
        if decision.action != "keep":
            number = plan.order.index(decision.site) + 1
            assert decision.reason.startswith("adds ")
            assert decision.reason.endswith(f"% with {number} changed")
        else:
            assert decision.reason.split()[0] in ("not", "drop", "linear", "scale")
        assert "nan" not in decision.reason
    assert plan.changes == search.changes
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    plan.check(world.sites)


@pytest.mark.usefixtures("without_liveness")
def test_shorter_plans_are_the_first_steps():
    world = World()
    search = world.begin()
    search.run()
    for count in range(len(search.steps) + 1):
        plan = search.plan("m", "sweep", count)
        assert list(plan.changes.items()) == list(search.changes.items())[:count]
        assert all(decision.reason for decision in plan.decisions)
    assert search.plan("m", "sweep", len(search.steps)) == search.plan("m", "sweep")


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("limit", [0.0, 10.0, 40.0])
def test_the_search_ends_when_no_remaining_candidate_can_gain(limit):
    """Every candidate left has at least the effect of a failed one of its site, or of failed ones at several sites.

    Or its effect, taken as half of what it is, exceeds the limit: the loss of these sites is 30 times the divergence.
    """
    world, lines = World(slope=30.0, count=12), []
    search = world.begin(limit=limit, progress=lines.append)
    search.run()
    counts = [int(line.split()[0]) for line in lines]
    rejected = [later == earlier for earlier, later in zip([0, *counts], counts, strict=False)]
    failed = search.validated[counts.index(max(counts)) + (max(counts) > 0) :]
    now = world.divergence(search.graph)
    effects = {}
    for unit, action in failed:
        added = world.divergence(search.graph | {(unit, action)}) - now
        effects[unit] = min(added, effects.get(unit, math.inf))
    assert effects or search.failures
    level = sorted(effects.values())[PATIENCE - 1] if len(effects) >= PATIENCE else math.inf
    assert search.front.candidates
    for unit, action in search.front.candidates:
        added = world.divergence(search.graph | {(unit, action)}) - now
        assert added >= min(effects.get(unit, math.inf), level) - 1e-12 or 30.0 * (now + added / 2) > limit - 1e-9
    assert "expected to exceed the limit" in search.ended
    assert world.losses == len(lines)
    assert all(step.loss <= limit for step in search.steps)
    reasons = [reason for reason in search.refused.values() if f"would exceed {limit:g} %" in reason]
    assert len(reasons) == sum(rejected)


@pytest.mark.usefixtures("without_liveness")
def test_failures_at_one_site_do_not_end_the_search():
    """Every action at one site fails; the changes of the other sites, which cost more for their saving, still come."""
    world = World(count=6, actions=("drop", "linear", "scale", "constant", "low-rank:4", "fuse"))
    world.pairs[:] = 0.0
    world.own = {key: 1.0 if key[0] == "s0" else 50.0 for key in world.own}
    world.own |= {("s0", action): 1.0 - 0.1 * number for number, action in enumerate(world.actions)}
    world.saves = {key: 100 if key[0] == "s0" else 1 for key in world.saves}
    world.loss = lambda graph, *, limit: Loss(9.0 if "s0" in {name for name, _ in graph} else 0.0, len(world.split))
    search = world.begin(limit=1.0)
    search.run()
    assert set(search.changes) == {site.name for site in world.sites[1:]}
    assert len([unit for unit, _ in search.validated if unit == "s0"]) > 1


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("smallest", [9.0, 0.0])
def test_a_small_effect_is_tried_after_failures_of_larger_ones(smallest):
    """`PATIENCE` sites of better prices fail; a site that moves the output less still can gain, a stronger one not."""
    world = World(count=PATIENCE + 2, actions=("drop",))
    world.pairs[:] = 0.0
    sites = [site.name for site in world.sites]
    world.own = {(name, "drop"): 1.0 + number for number, name in enumerate(sites)}
    world.own[sites[-2], "drop"], world.own[sites[-1], "drop"] = 0.5, 99.0
    world.saves = {(name, "drop"): 1000 for name in sites} | {(sites[-2], "drop"): 1}
    world.whole = 10_000
    world.loss = lambda graph, *, limit: Loss(9.0 if world.divergence(graph) > 0.9 else smallest, 40)
    search = world.begin(limit=1.0)
    search.run()
    assert (sites[-2], "drop") in search.validated
    assert list(search.changes) == ([] if smallest else [sites[-2]])
    assert (sites[-1], "drop") not in search.validated


@pytest.mark.usefixtures("without_liveness")
def test_a_larger_merge_is_not_tried_after_a_smaller_one_exceeded_the_limit():
    world = World(count=2, actions=("merge",), slope=1e9)
    world.sites = tuple(dataclasses.replace(site, kind="attention") for site in world.sites)
    search = world.begin(limit=1.0)
    search.run()
    assert sorted(search.validated) == [("s0", "merge:12%"), ("s1", "merge:12%")]
    assert not search.changes


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("merging", [True, False])
def test_failures_of_one_kind_do_not_end_the_search_for_the_other(merging):
    """Every merge exceeds the limit at a small effect, and drops lose nothing at larger ones; and the reverse."""
    world = World(count=PATIENCE + 2, actions=("drop", "merge"))
    world.sites = tuple(dataclasses.replace(site, kind="attention") for site in world.sites)
    world.pairs[:] = 0.0
    bad = {(name, action) for name, action in world.own if (action != "drop") == merging}
    world.own = {key: 0.01 if key in bad else 0.1 for key in world.own}
    world.loss = lambda graph, *, limit: Loss(9.0 if graph & bad else 0.0, len(world.split))
    search = world.begin(limit=1.0)
    search.run()
    assert len({unit for unit, action in search.validated if (unit, action) in bad}) >= PATIENCE  # they were tried
    assert set(search.changes) == {site.name for site in world.sites}
    assert not {(unit, action) for unit, action in search.changes.items()} & bad


@pytest.mark.usefixtures("without_liveness")
def test_a_search_says_why_it_ended():
    world = World()
    search = world.begin()
    search.run(1.0001)
    assert search.ended == "the predicted speed-up is reached"
    search.run()
    assert search.ended == "no remaining change saves anything or can be made"


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("stage", ["measured", "carried out", "always"])
def test_a_refused_candidate_has_a_reason_and_is_not_tried_again(stage):
    refused = {(f"s{number}", "linear"): stage for number in range(0, 8, 2)}
    world = World(actions=("drop", "linear"), refused=refused)
    world.own |= dict.fromkeys(refused, 0.0)  # the candidates with the least effect
    world.pairs[:] = 0.0
    search = world.begin()
    search.run()
    failed = "carried out" if stage == "carried out" else "measured"
    for change in refused:
        assert search.refused[change] == f"linear refused: {change[0]} cannot be {failed}."
        assert world.tried.count(change) <= 1 + (stage == "carried out" and world.measured.count(change))
        assert search.changes[change[0]] == "drop"


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("actions", [("drop", "linear", "scale"), ("linear", "scale")])
def test_maps_are_tried_where_the_drop_is_refused(actions):
    """Nothing is known of such a unit to estimate its maps by, so they are measured."""
    world = World(actions=actions, refused={("s1", "drop"): "always"})
    search = world.begin()
    search.run()
    assert search.refused["s1", "drop"] == "drop refused: s1 cannot be measured."
    assert {("s1", "linear"), ("s1", "scale")} <= set(world.measured)
    assert search.changes["s1"] in ("linear", "scale")


@pytest.mark.usefixtures("without_liveness")
def test_the_plan_has_the_reasons_if_every_candidate_is_refused():
    world = World(count=3, actions=("linear",), refused={(f"s{number}", "linear"): "always" for number in range(3)})
    search = world.begin()
    search.run()
    assert not search.steps
    reasons = [decision.reason for decision in search.plan("m", "auto").decisions]
    assert reasons == [f"linear refused: s{number} cannot be measured." for number in range(3)]


@pytest.mark.usefixtures("without_liveness")
def test_a_candidate_that_saves_nothing_is_not_tried():
    world = World(count=4, actions=("drop", "linear"))
    world.saves |= {("s1", "linear"): 0, ("s2", "linear"): -50}
    world.own |= {(f"s{number}", "linear"): 0.0 for number in range(4)}  # without any effect on the output
    world.pairs[:] = 0.0
    search = world.begin()
    search.run()
    assert search.changes["s1"] == search.changes["s2"] == "drop"
    assert search.changes["s0"] == search.changes["s3"] == "linear"


@pytest.mark.usefixtures("without_liveness")
def test_a_change_with_infinite_divergence_is_not_made():
    world = World(count=4, actions=("drop",))
    world.own["s2", "drop"] = math.inf
    search = world.begin()
    search.run()
    assert set(search.changes) == {"s0", "s1", "s3"}
    assert "not tried: drop added inf divergence" in reason(search.plan("m", "auto"), "s2")


@pytest.mark.usefixtures("without_liveness")
def test_fixed_changes_are_kept_and_come_first():
    world = World()
    search = world.begin(given={"s5": "drop", "s2": "merge:25%"})
    assert search.speedup == world.whole / world.cost({("s5", "drop"), ("s2", "merge:25%")})
    search.run()
    assert list(search.changes)[:2] == ["s5", "s2"]
    assert set(search.changes) == {site.name for site in world.sites}
    plan = search.plan("m", "auto")
    assert plan.changes == search.changes
    assert reason(plan, "s5") == reason(plan, "s2") == "set by --tokens"
    assert not {"s5", "s2"} & {name for name, _ in world.measured}


@pytest.mark.usefixtures("without_liveness")
def test_more_tokens_are_merged_step_by_step():
    """Tokens are merged after attentions only; a site with merges keeps its branch, and the plan has the last share."""
    world = World(actions=("drop", "merge"))
    world.sites = tuple(
        dataclasses.replace(site, kind="attention" if site.order < 2 else "mlp") for site in world.sites
    )
    world.own |= {(name, "drop"): 50.0 for name in ("s0", "s1")}
    search = world.begin()
    search.run()
    for name in ("s0", "s1"):
        shares = [merged_tokens(step.action) for step in search.steps if step.unit == name]
        assert shares == sorted(shares)
        last = max(index for index, step in enumerate(search.steps) if step.unit == name)
        number = len({step.unit for step in search.steps[: last + 1]})
        assert reason(search.plan("m", "auto"), name).endswith(f"% with {number} changed")
        assert search.changes[name] == search.plan("m", "auto").changes[name] == "merge:37%"
    assert {search.changes[site.name] for site in world.sites[2:]} == {"drop"}
    for count in range(len(search.steps) + 1):
        changes = search.plan("m", "sweep", count).changes
        cost = world.cost(world.reduced(world.apply_changes(changes), changes))
        assert cost == ([world.whole] + [step.cost for step in search.steps])[count]


@pytest.mark.usefixtures("without_liveness")
def test_tokens_are_merged_early_after_an_attention_that_must_stay():
    """The large effect of dropping the attention does not predict the effect of merging the tokens after it."""
    world = World(actions=("drop", "merge"))
    world.sites = tuple(
        dataclasses.replace(site, kind="attention" if site.order == 3 else "mlp") for site in world.sites
    )
    world.own |= {(site.name, "drop"): 500.0 if site.order == 3 else 1.0 for site in world.sites}
    search = world.begin()
    search.run()
    assert (search.steps[0].unit, search.steps[0].action) == ("s3", "merge:12%")
    assert {step.unit for step in search.steps[:3]} == {"s3"}


@pytest.mark.usefixtures("without_liveness")
def test_maps_are_measured_on_other_samples_than_they_are_fitted_on():
    world = World(actions=("linear",))
    splits = []
    fits = world.fits
    world.fits = lambda graph, names, split: splits.append(split) or fits(graph, names, split)
    search = world.begin()
    search.run()
    assert splits
    assert all(set(split) == set(search.fitting) for split in splits)
    assert not set(search.fitting) & set(search.effects.split)


@pytest.mark.parametrize(
    ("actions", "disjoint"), [("linear", True), ("drop,scale", True), ("drop", False), ("drop,merge", False)]
)
def test_samples_are_split_if_maps_are_fitted(actions, disjoint):
    calibration = digits()[1].calibration
    for count in (8, 10_000):
        measured, fitted = _split_calibration(calibration, Settings(actions=actions, search_samples=count))
        assert len(fitted) <= count
        assert set(measured.indices).isdisjoint(fitted.indices) == disjoint
        assert abs(len(measured) - len(fitted)) <= 1


@pytest.mark.usefixtures("without_liveness")
def test_a_larger_merge_adds_and_saves_the_difference_to_an_accepted_one():
    """The last measurement of the larger merge includes the accepted one, so it would overstate the further effect."""
    world = World(count=3, actions=("merge",))
    world.sites = tuple(dataclasses.replace(site, kind="attention") for site in world.sites)
    world.pairs[:] = 0.0
    search = world.begin()
    front = search.front
    front._begin()
    front._measure([("s0", "merge:12%"), ("s0", "merge:25%")])
    added, saved = dict(front.added), dict(front.saved)
    search._try("s0", "merge:12%")
    assert front.added["s0", "merge:25%"] == added["s0", "merge:25%"] - added["s0", "merge:12%"] > 0.0
    assert front.saved["s0", "merge:25%"] == saved["s0", "merge:25%"] - saved["s0", "merge:12%"] > 0.0
    assert front.added["s1", "merge:25%"] == added["s1", "merge:25%"]
    assert ("s0", "merge:25%") not in front.fresh


@pytest.mark.usefixtures("without_liveness")
def test_among_changes_that_reduce_the_divergence_the_largest_saving_comes_first():
    world = World(count=3, actions=("drop",))
    world.pairs[:] = 0.0
    for site, added, saved in zip(world.sites, (-0.1, -0.1, 0.001), (100, 900, 100_000), strict=True):
        world.own[site.name, "drop"], world.saves[site.name, "drop"] = added, saved
    search = world.begin()
    search.run()
    assert list(search.changes) == ["s1", "s0", "s2"]


# ------------------------------------------------------------------------------------------------------- interrupts


def journaled(path, **options):
    options |= {"racing": path.name.endswith("racing")}
    world = World(slope=20.0, count=10, refused={("s1", "linear"): "measured", ("s4", "scale"): "carried out"})
    return world, world.begin(limit=150.0, journal=Journal("s", path), **options)


@pytest.mark.usefixtures("without_liveness")
def test_with_the_same_journal_nothing_is_measured_again(tmp_path):
    first, search = journaled(tmp_path / "j")
    search.run()
    second, again = journaled(tmp_path / "j")
    again.run()
    assert first.measured
    assert first.losses
    assert (second.measured, second.losses) == ([], 0)
    assert again.plan("m", "auto") == search.plan("m", "auto")
    assert again.steps == search.steps
    assert (search.journal.found, again.journal.found) == (0, len(again.journal))


@pytest.mark.usefixtures("without_liveness")
@pytest.mark.parametrize("after", range(1, 10))
@pytest.mark.parametrize("part", ["progress", "measure", "loss"])
@pytest.mark.parametrize("name", ["plain", "racing"])
def test_an_interrupted_search_resumes_without_a_difference(tmp_path, part, after, name):
    whole, uninterrupted = journaled(tmp_path / f"whole {name}")
    uninterrupted.run()
    count = itertools.count(1)

    def interrupted(function, *arguments, **options):
        if next(count) == after:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    first, search = journaled(tmp_path / name)
    if part == "progress":
        search.progress = functools.partial(interrupted, lambda line: None)
    else:
        setattr(first, part, functools.partial(interrupted, getattr(first, part)))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    second, resumed = journaled(tmp_path / name)
    resumed.run()
    assert resumed.steps == uninterrupted.steps
    assert resumed.refused == uninterrupted.refused
    assert resumed.plan("m", "auto") == uninterrupted.plan("m", "auto")
    assert first.losses + second.losses == whole.losses
    assert sorted(first.measured + second.measured) == sorted(whole.measured)
    assert sorted(first.previewed + second.previewed) == sorted(whole.previewed)


@pytest.mark.usefixtures("without_liveness")
def test_an_interrupt_before_the_first_change_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(greedy, "RECORDED_AT_ONCE", 4)
    first, search = journaled(tmp_path / "plain")
    measure, calls = first.measure, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    first.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert [name for name, _ in first.measured] == [f"s{number}" for number in range(8)]
    second, resumed = journaled(tmp_path / "plain")
    resumed.run()
    whole, uninterrupted = journaled(tmp_path / "whole plain")
    uninterrupted.run()
    assert sorted(first.measured + second.measured) == sorted(whole.measured)


# ------------------------------------------------------------------------------------------------------- real models


def begun(model, graph, sites, split, actions, limit=100.0, *, metric="agreement", held_out=None, **options):
    return Search(
        Rewriter(graph, sites, split),
        OutputDivergence(graph, model, split),
        ValidationLoss(graph, model, split if held_out is None else held_out, metric),
        multiply_add_cost_model(
            graph, {"run": Call.alone({name: value[:1].numpy() for name, value in model.example.items()})}
        ),
        actions,
        limit,
        split,
        **options,
    )


def on_digits(limit=1.0):
    """Search on a third of the sites of the sample, with 40 validation samples: one wrong answer is 2.5 points."""
    model, data, graph, every = digits()
    sites = every[::3]
    metric, split = head_for(model.task).metric(data.label_kind), data.calibration.head(16)
    search = begun(model, graph, sites, split, DROPS, limit, metric=metric, held_out=data.validation)
    search.run()
    return search, data.test, search.validation.sweeps


def on_a_small_model(limit=40.0):
    model, graph, sites, split = small(spread(0.1))
    parts = dataclasses.replace(split, most=8)  # several batches, so that maps are evaluated on held-out ones
    search = begun(model, graph, sites, parts, ALL, limit, held_out=split)
    search.run()
    return search, split, search.validation.sweeps


once = functools.cache(lambda begin: begin())


class Recorded(Steps):
    """Steps that record what their progress bars show."""

    @contextlib.contextmanager
    def step(self, name):
        self.shown = []
        yield lambda done=None, total=None, text="": self.shown.append((done, total, text))


def test_a_search_shows_how_far_a_measurement_is():
    model, graph, sites, split = small(spread(0.1))
    steps = Recorded(None)
    search = begun(model, graph, sites, dataclasses.replace(split, most=8), DROPS, 40.0)
    planner.run_search(search, steps)
    measured = [(done, total) for done, total, text in steps.shown if "measuring the effects" in text]
    assert measured[:3] == [(1, 3), (2, 3), (3, 3)]  # 24 samples in batches of 8
    assert steps.shown[0][2] == f"0 changed, measuring the effects of {len(sites)} changes"
    assert any("validation loss" in text for done, _, text in steps.shown if done is None)


DROPS, ALL = ("drop",), ("drop", "constant", "scale", "low-rank:4", "linear", "fuse")


@pytest.mark.parametrize("begin", [on_digits, on_a_small_model])
def test_a_replayed_plan_gives_the_graph_of_the_search(begin):
    """The outputs are bit-identical, as the fits sum over the same batches."""
    search, rows, _ = once(begin)
    first = search.rewriter
    plan = Plan.from_dict(json.loads(search.plan("m", "auto").to_json()))
    again = Rewriter(first.original, first.sites, first.split).rewritten(plan.changes)
    for feeds in tensor_batches(rows):
        for left, right in zip(run(search.reduced, feeds), run(again, feeds), strict=True):
            assert torch.equal(left, right)
    assert search.steps
    assert search.steps[-1].loss == search.validation.loss(again).percent <= search.limit + 1e-9
    assert search.steps[-1].cost == search.cost_model.cost(again)
    if begin is on_a_small_model:
        assert len(set(plan.changes.values())) > 1


def test_the_limit_holds_for_the_evaluation_of_the_report():
    search = once(on_digits)[0]
    model, data, graph, _ = digits()
    runners = {
        "before": graph_runner(model, functools.partial(run, graph)),
        "after": graph_runner(model, functools.partial(run, search.reduced)),
    }
    evaluation = evaluate(
        data.validation, runners, head=head_for("image-classification"), metric="accuracy", reference="before"
    )
    regret = float(evaluation.columns["after"]["regret"].mean()) * 100
    lost = max(evaluation.loss_value("before", "after"), regret)
    assert lost <= 1.0
    assert search.steps[-1].loss == pytest.approx(lost, abs=1e-6)  # rounding in other batches


def test_the_search_is_deterministic():
    again, first = on_a_small_model()[0], once(on_a_small_model)[0]
    assert again.plan("m", "auto") == first.plan("m", "auto")
    assert again.steps == first.steps


def test_stopping_early_changes_no_decision(monkeypatch):
    """A check stops once the loss is certain to exceed the limit; complete checks give the same plan."""
    search, _, sweeps = once(on_digits)
    bounded, tried = ValidationLoss.loss, []

    def unbounded(validation, graph, *, limit):
        assert limit == 1.0
        tried.append(graph)
        return bounded(validation, graph)

    monkeypatch.setattr(ValidationLoss, "loss", unbounded)
    patient, _, full = on_digits()
    assert patient.changes == search.changes
    assert full == pytest.approx(1 + len(tried))
    assert sweeps < full


@pytest.mark.parametrize("seed", range(2))
def test_drops_alone_equal_an_exhaustive_greedy_search(seed):
    model, graph, sites, split = small(spread(seed=seed))
    search = begun(model, graph, sites, split, DROPS)
    search.run()
    rewriter, effects, prices, order, now = search.rewriter, search.effects, search.cost_model, [], graph
    while len(order) < len(sites):
        forks = {site.name: rewriter.changed(now, site.name, "drop") for site in sites if site.name not in order}
        base, divergences = effects.measure(now, forks)
        saved = {name: prices.cost(now) - prices.cost(fork) for name, fork in forks.items()}
        order.append(min(divergences, key=lambda name: (divergences[name] - base) / saved[name]))
        now = forks[order[-1]]
    assert list(search.changes) == order


@pytest.mark.parametrize("empty", [("blocks.0.mlp",), ("blocks.1.attn", "blocks.0.mlp")])
def test_branches_with_little_effect_are_dropped_first(empty):
    def plant(module):
        spread()(module)
        for name in empty:
            branch = module.get_submodule(name)
            last = branch.proj if name.endswith("attn") else branch.fc2
            last.weight.mul_(1e-6)
            last.bias.mul_(1e-6)

    search = begun(*small(plant), ("drop", "low-rank:4", "linear"), 0.0)
    search.run()
    first = list(search.changes.items())[: len(empty)]
    assert {name for name, _ in first} == set(empty)
    assert {action for _, action in first} == {"drop"}
    for step in search.steps[: len(empty)]:
        assert (step.added, step.loss) == (pytest.approx(0.0, abs=1e-5), pytest.approx(0.0, abs=1e-9))


class Straight(torch.nn.Module):
    """Two linear layers without an activation: one linear map at the cost of an MLP."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(16, 256), torch.nn.Linear(256, 16)

    def forward(self, x):
        return self.fc2(self.fc1(x))


@pytest.mark.parametrize("action", ["linear", "low-rank:8"])
def test_a_linear_branch_is_replaced_by_its_map(action):
    """Dropping the branch exceeds the limit; the map loses nothing and saves most of the multiply-adds."""

    def plant(module):
        spread(0.3)(module)
        block = module.blocks[0]
        block.mlp, block.norm2 = Straight(), torch.nn.Identity()
        if action == "low-rank:8":
            block.mlp.fc2.weight[8:] = 0.0
            block.mlp.fc2.bias[:] = 0.0

    model, graph, sites, split = small(plant, rows=64)
    model = dataclasses.replace(model, task="feature-extraction")
    search = begun(model, graph, sites, split, ("drop", action), 1.0, metric="fidelity")
    search.run()
    linear = next(site.name for site in sites if site.name.startswith("blocks.0.mlp"))
    assert search.changes[linear] == action
    assert next(step for step in search.steps if step.unit == linear).added == pytest.approx(0.0, abs=1e-4)


def test_savings_are_updated_when_fewer_tokens_are_read(monkeypatch):
    """Without the last attention, only the class token of the block before is needed, so its attention saves more."""
    model, graph, sites, split = small(spread(), depth=3)
    search = begun(model, graph, sites, split, DROPS)
    search.front.best()
    before = dict(search.front.saved)
    _, middle, last = (site.name for site in sites if site.kind == "attention")
    monkeypatch.setattr(search.front, "best", iter([(last, "drop"), None]).__next__)
    search.run()
    assert list(search.changes) == [last]
    after = search.front.saved
    for name, action in search.front.candidates:
        fork = search.rewriter.changed(search.graph, name, action)
        assert after[name, action] == search.cost - search.cost_model.cost(fork)
    assert after[middle, "drop"] > before[middle, "drop"]


def test_the_last_block_is_refused_when_the_others_are_gone():
    """Fewer tokens are needed after the first removal, so savings are computed again, of a block that must stay too."""
    model, graph, sites, split = small(spread(), depth=2)
    search = begun(model, graph, sites, split, DROPS, limit=math.inf)
    search.rewriter = Rewriter(graph, sites, split, whole=True)
    search.run()
    (step,) = search.steps
    (kept,) = set(search.rewriter.units) - {step.unit}
    assert search.refused[kept, "drop"].startswith("drop refused: no block would be left of the 2 that can be dropped")


def reason(plan, name):
    return next(decision.reason for decision in plan.decisions if decision.site == name)


@pytest.mark.parametrize(
    "action",
    ["drop", "linear", *(pytest.param(each, marks=pytest.mark.slow) for each in ("scale", "fuse", "low-rank:2"))],
)
def test_a_branch_is_changed_in_the_graph_whose_tokens_are_merged_already(action):
    """It computes and costs the same as merging the tokens again after the change."""
    model, graph, sites, split = small(spread(0.1), depth=4)
    attentions = [site.name for site in sites if site.kind == "attention"]
    search = begun(model, graph, sites, split, ("drop", "merge"), math.inf, given=dict.fromkeys(attentions[:2], MERGE))
    others = [site.name for site in sites if site.name not in attentions[:2]]
    every = {} if action == "drop" else search.rewriter.fits(graph, others)
    fast = 0
    for name in others:
        try:
            _, merged = search.with_change(name, action, every.get(name))
        except PassError:
            with pytest.raises(PassError):
                search.candidate(name, action, every.get(name))
            continue
        changed = search.candidate(name, action, every.get(name))
        fast += changed.history[-1].name != "ReduceTokens"
        assert search.cost_model.count(changed) == search.cost_model.count(merged)
        for feeds in tensor_batches(split):
            for ours, expected in zip(run(changed, feeds), run(merged, feeds), strict=True):
                torch.testing.assert_close(ours, expected)
    assert fast >= len(others) - 2  # a map after the merge of its tokens is inserted before it
