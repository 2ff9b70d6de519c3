"""The search: against a greedy one that measures everything, with planted effects, and on real models."""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.measure.workload import Call
from compressor.quality.evaluate import evaluate, graph_runner, metric_for, tensor_batches
from compressor.quality.output_divergence import Effects
from compressor.quality.validation_loss import Loss, Validation
from compressor.search import greedy
from compressor.search.cost_model import counted
from compressor.search.greedy import FRONT, PATIENCE, SOFTENED, Search
from compressor.search.planner import _shared_out
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.journal import Journal
from passes.base import PassError
from passes.execute.interpreter import run
from passes.graph.graph import Site
from passes.plan.plan import Plan, merged_tokens
from tests.samples import digits, small, spread

# -------------------------------------------------------------------------------------------------- planted effects


class World:
    """Sites with planted effects, costs and losses; a graph is the set of changes made to it.

    Effects only ever grow with what else was changed, no stand-in is better than the search expects and none saves
    more than the drop: the case for which lazy greedy is exact (Minoux 1978). It plays all parts that a search needs.
    """

    def __init__(self, seed=0, count=8, actions=("drop", "linear", "scale"), refused=(), slope=0.0):
        rng = np.random.default_rng(seed)
        self.sites = tuple(
            Site(f"s{n}", "mlp", f"b{n}", n, 8, 2, f"a{n}", f"f{n}", f"t{n}", f"a{n}") for n in range(count)
        )
        self.actions, self.refused, self.slope = actions, dict(refused), slope
        self.original, self.split = frozenset(), range(40)
        self.own, self.saves = {}, {}
        for site in self.sites:
            drop, saved = rng.random(), int(rng.integers(10, 1000))
            for share in (0.12, 0.25, 0.37):
                self.own[site.name, f"merge:{share:.0%}"], self.saves[site.name, f"merge:{share:.0%}"] = (
                    share**2,
                    500 * share,
                )
            for action in dict.fromkeys(("drop", *actions)):
                least = SOFTENED.get(action, 1.0)
                self.own[site.name, action] = drop * (1.0 if action == "drop" else rng.uniform(least, 1.1))
                self.saves[site.name, action] = saved if action == "drop" else int(saved * rng.uniform(0.3, 1.0))
        self.pairs = rng.random((count, count)) * 0.2
        self.whole = 2 * sum(self.saves[site.name, "drop"] for site in self.sites)
        self.measured, self.tried, self.losses = [], [], 0

    def begin(self, limit=100.0, **options):
        effects = SimpleNamespace(split=self.split[:16])
        effects.measure = lambda main, variants: self.measure(main, variants)  # noqa: PLW0108 - looked up when called
        return Search(self, effects, self, self, self.actions, limit, self.split[16:32], **options)

    def changed(self, graph, name, action, fits=None):
        assert fits is None or fits.graph == graph  # fitted on another graph they would repair what is not there
        self.tried.append((name, action))
        where = "measured" if fits is not None or action == "drop" else "carried out"
        if self.refused.get((name, action)) in (where, "always"):
            raise PassError(f"{name} cannot be {where}.")
        return graph | {(name, action)}

    @property
    def units(self):
        return {site.name: (site,) for site in self.sites}

    def of_sites(self, changes):
        return changes

    def carried_out(self, changes):
        """Tokens are merged last, see `Rewriter.reduced`."""
        return frozenset(change for change in changes.items() if merged_tokens(change[1]) is None)

    def reduced(self, graph, changes):
        return graph | {change for change in changes.items() if merged_tokens(change[1]) is not None}

    def fits(self, graph, names, split):
        return {name: SimpleNamespace(graph=graph) for name in names}

    def divergence(self, graph):
        places = sorted(int(name[1:]) for name, _ in graph)
        together = sum(self.pairs[pair] for pair in itertools.combinations(places, 2))
        return sum(self.own[change] for change in graph) + float(together)

    def measure(self, graph, variants):
        self.measured.extend(variants)
        return self.divergence(graph), {key: self.divergence(variant) for key, variant in variants.items()}

    def loss(self, graph, *, limit):
        self.losses += 1
        return Loss(self.slope * self.divergence(graph), len(self.split))

    def count(self, graph):
        return self.whole - sum(self.saves[change] for change in graph)

    def multiply_adds(self, work):
        return work

    def of(self, work):
        return float(work)

    def cost(self, graph):
        return self.of(self.count(graph))

    def greedy(self, count):
        """Measures everything again at each step."""
        graph, order = frozenset(), []
        rest = {(site.name, action) for site in self.sites for action in self.actions}
        while len(order) < count:
            now = self.divergence(graph)
            best = min(rest, key=lambda change: (self.divergence(graph | {change}) - now) / self.saves[change])
            graph, rest = graph | {best}, {change for change in rest if change[0] != best[0]}
            order.append(best)
        return order


@pytest.fixture
def nothing_unread(monkeypatch):
    """Planted graphs have no nodes."""
    monkeypatch.setattr(greedy, "read_parts", lambda graph: {})


@pytest.mark.usefixtures("nothing_unread")
@pytest.mark.parametrize("actions", [("drop",), ("drop", "linear", "scale"), ("low-rank:4", "linear")])
@pytest.mark.parametrize("front", [1, 2, FRONT])
@pytest.mark.parametrize("seed", range(3))
def test_laziness_is_exact_where_effects_only_grow(front, seed, actions, monkeypatch):
    monkeypatch.setattr(greedy, "FRONT", front)
    world = World(seed, count=12, actions=actions)
    search = world.begin()
    search.run()
    assert list(search.changes.items()) == world.greedy(12)
    every = sum(len(actions) * left for left in range(1, 13))
    assert len(world.measured) < every


@pytest.mark.usefixtures("nothing_unread")
def test_steps_state_what_they_led_to():
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
def test_a_run_ends_as_soon_as_it_is_fast_enough(seed, first, second):
    """And a later run for more goes on where it ended, as if it had been asked for more at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "read_parts", lambda graph: {})
        search, whole = World(seed).begin(), World(seed).begin()
        whole.run()
        costs = [whole.whole, *(step.cost for step in whole.steps)]
        for enough in (first, max(first, second)):
            search.run(enough)
            needed = next((made for made, cost in enumerate(costs) if whole.whole / cost >= enough), len(whole.steps))
            assert search.steps == whole.steps[:needed]


@pytest.mark.usefixtures("nothing_unread")
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
    assert Plan.from_json(plan.to_json()) == plan
    plan.check(world.sites)


@pytest.mark.usefixtures("nothing_unread")
def test_shorter_plans_are_the_first_steps():
    world = World()
    search = world.begin()
    search.run()
    for count in range(len(search.steps) + 1):
        plan = search.plan("m", "sweep", count)
        assert list(plan.changes.items()) == list(search.changes.items())[:count]
        assert all(decision.reason for decision in plan.decisions)
    assert search.plan("m", "sweep", len(search.steps)) == search.plan("m", "sweep")


@pytest.mark.usefixtures("nothing_unread")
@pytest.mark.parametrize("limit", [0.0, 10.0, 40.0])
def test_so_many_in_a_row_break_the_limit_and_it_ends(limit):
    world, lines = World(slope=30.0, count=12), []
    search = world.begin(limit=limit, progress=lines.append)
    search.run()
    counts = [int(line.split()[0]) for line in lines]
    broke = [later == earlier for earlier, later in zip([0, *counts], counts, strict=False)]
    assert broke[-PATIENCE:] == [True] * PATIENCE
    assert all(not all(broke[place : place + PATIENCE]) for place in range(len(broke) - PATIENCE))
    assert world.losses == len(lines)
    assert all(step.loss <= limit for step in search.steps)
    refused = [reason for reason in search.refused.values() if f"would exceed {limit:g} %" in reason]
    assert len(refused) == sum(broke)


@pytest.mark.usefixtures("nothing_unread")
def test_only_breaks_in_a_row_end_it():
    """Between two changes that hold, fewer than `PATIENCE` do not."""
    world = World(count=3 * PATIENCE, actions=("drop",))
    world.own = {(site.name, "drop"): 1.0 + site.order for site in world.sites}
    world.saves, world.pairs[:] = dict.fromkeys(world.saves, 1), 0.0
    good = {site.name for site in world.sites[::PATIENCE]}
    world.loss = lambda graph, *, limit: Loss(0.0 if {name for name, _ in graph} <= good else 9.0, len(world.split))
    search = world.begin(limit=1.0)
    search.run()
    assert set(search.changes) == good


@pytest.mark.usefixtures("nothing_unread")
@pytest.mark.parametrize("where", ["measured", "carried out", "always"])
def test_what_cannot_be_done_is_told_and_never_tried_again(where):
    refused = {(f"s{number}", "linear"): where for number in range(0, 8, 2)}
    world = World(actions=("drop", "linear"), refused=refused)
    world.own |= dict.fromkeys(refused, 0.0)  # the search would like each of them best
    world.pairs[:] = 0.0
    search = world.begin()
    search.run()
    place = "carried out" if where == "carried out" else "measured"
    for change in refused:
        assert search.refused[change] == f"linear refused: {change[0]} cannot be {place}."
        assert world.tried.count(change) <= 1 + (where == "carried out" and world.measured.count(change))
        assert search.changes[change[0]] == "drop"


@pytest.mark.usefixtures("nothing_unread")
def test_where_nothing_can_be_done_the_reasons_say_so():
    world = World(count=3, actions=("linear",), refused={(f"s{number}", "linear"): "always" for number in range(3)})
    search = world.begin()
    search.run()
    assert not search.steps
    reasons = [decision.reason for decision in search.plan("m", "auto").decisions]
    assert reasons == [f"linear refused: s{number} cannot be measured." for number in range(3)]


@pytest.mark.usefixtures("nothing_unread")
def test_what_saves_nothing_is_not_tried():
    world = World(count=4, actions=("drop", "linear"))
    world.saves |= {("s1", "linear"): 0, ("s2", "linear"): -50}
    world.own |= {(f"s{number}", "linear"): 0.0 for number in range(4)}  # all for nothing
    world.pairs[:] = 0.0
    search = world.begin()
    search.run()
    assert search.changes["s1"] == search.changes["s2"] == "drop"
    assert search.changes["s0"] == search.changes["s3"] == "linear"


@pytest.mark.usefixtures("nothing_unread")
def test_what_is_no_longer_finite_is_left_alone():
    world = World(count=4, actions=("drop",))
    world.own["s2", "drop"] = math.inf
    search = world.begin()
    search.run()
    assert set(search.changes) == {"s0", "s1", "s3"}
    assert "not tried: drop added inf divergence" in reason(search.plan("m", "auto"), "s2")


@pytest.mark.usefixtures("nothing_unread")
def test_what_was_asked_for_stays_and_comes_first():
    world = World()
    search = world.begin(given={"s5": "drop", "s2": "merge:25%"})
    assert search.speedup == world.whole / world.cost({("s5", "drop"), ("s2", "merge:25%")})
    search.run()
    assert list(search.changes)[:2] == ["s5", "s2"]
    assert set(search.changes) == {site.name for site in world.sites}
    plan = search.plan("m", "auto")
    assert plan.changes == search.changes
    assert reason(plan, "s5") == reason(plan, "s2") == "asked for"
    assert not {"s5", "s2"} & {name for name, _ in world.measured}


@pytest.mark.usefixtures("nothing_unread")
def test_more_tokens_are_merged_step_by_step():
    """Only behind attentions; where tokens were merged the branch stays, and the plan holds the last share."""
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
        last = max(place for place, step in enumerate(search.steps) if step.unit == name)
        number = len({step.unit for step in search.steps[: last + 1]})
        assert reason(search.plan("m", "auto"), name).endswith(f"% with {number} changed")
        assert search.changes[name] == search.plan("m", "auto").changes[name] == "merge:37%"
    assert {search.changes[site.name] for site in world.sites[2:]} == {"drop"}
    for count in range(len(search.steps) + 1):
        made = search.plan("m", "sweep", count).changes
        cost = world.cost(world.reduced(world.carried_out(made), made))
        assert cost == ([world.whole] + [step.cost for step in search.steps])[count]


@pytest.mark.usefixtures("nothing_unread")
def test_tokens_are_merged_early_behind_an_attention_that_must_stay():
    """That dropping it would be fatal says nothing about the tokens behind it."""
    world = World(actions=("drop", "merge"))
    world.sites = tuple(
        dataclasses.replace(site, kind="attention" if site.order == 3 else "mlp") for site in world.sites
    )
    world.own |= {(site.name, "drop"): 500.0 if site.order == 3 else 1.0 for site in world.sites}
    search = world.begin()
    search.run()
    assert (search.steps[0].unit, search.steps[0].action) == ("s3", "merge:12%")
    assert {step.unit for step in search.steps[:3]} == {"s3"}


@pytest.mark.usefixtures("nothing_unread")
def test_maps_are_measured_on_other_samples_than_they_are_fitted_on():
    world = World(actions=("linear",))
    asked = []
    fits = world.fits
    world.fits = lambda graph, names, split: asked.append(split) or fits(graph, names, split)
    search = world.begin()
    search.run()
    assert asked
    assert all(set(split) == set(search.fitting) for split in asked)
    assert not set(search.fitting) & set(search.effects.split)


@pytest.mark.parametrize(
    ("asked", "apart"), [("linear", True), ("drop,scale", True), ("drop", False), ("drop,merge", False)]
)
def test_samples_are_shared_out_where_maps_are_fitted(asked, apart):
    calibration = digits()[1].calibration
    for count in (8, 10_000):
        measured, fitted = _shared_out(calibration, Settings(actions=asked, search_samples=count))
        assert len(fitted) <= count
        assert set(measured.indices).isdisjoint(fitted.indices) == apart
        assert abs(len(measured) - len(fitted)) <= 1


@pytest.mark.usefixtures("nothing_unread")
def test_what_a_merge_has_done_is_not_asked_of_the_next_larger_one_again():
    """Its last measurement was of both together; left as it was, it would hide what little is still to be done."""
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


@pytest.mark.usefixtures("nothing_unread")
def test_of_changes_that_bring_the_output_closer_the_one_that_saves_more_comes_first():
    world = World(count=3, actions=("drop",))
    world.pairs[:] = 0.0
    for site, added, saved in zip(world.sites, (-0.1, -0.1, 0.001), (100, 900, 100_000), strict=True):
        world.own[site.name, "drop"], world.saves[site.name, "drop"] = added, saved
    search = world.begin()
    search.run()
    assert list(search.changes) == ["s1", "s0", "s2"]


# ------------------------------------------------------------------------------------------------------- interrupts


def journaled(path, **options):
    world = World(slope=20.0, count=10, refused={("s1", "linear"): "measured", ("s4", "scale"): "carried out"})
    return world, world.begin(limit=70.0, journal=Journal("s", path), **options)


@pytest.mark.usefixtures("nothing_unread")
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


@pytest.mark.usefixtures("nothing_unread")
@pytest.mark.parametrize("after", range(1, 10))
@pytest.mark.parametrize("part", ["progress", "measure", "loss"])
def test_an_interrupted_search_goes_on_as_if_nothing_had_been(tmp_path, part, after):
    whole, uninterrupted = journaled(tmp_path / "whole")
    uninterrupted.run()
    count = itertools.count(1)

    def interrupted(function, *arguments, **options):
        if next(count) == after:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    first, search = journaled(tmp_path / "j")
    if part == "progress":
        search.progress = functools.partial(interrupted, lambda line: None)
    else:
        setattr(first, part, functools.partial(interrupted, getattr(first, part)))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    second, resumed = journaled(tmp_path / "j")
    resumed.run()
    assert resumed.steps == uninterrupted.steps
    assert resumed.refused == uninterrupted.refused
    assert resumed.plan("m", "auto") == uninterrupted.plan("m", "auto")
    assert first.losses + second.losses == whole.losses
    assert sorted(first.measured + second.measured) == sorted(whole.measured)


# ------------------------------------------------------------------------------------------------------- real models


def begun(model, graph, sites, split, actions, limit=100.0, *, metric="agreement", held_out=None, **options):
    return Search(
        Rewriter(graph, sites, split),
        Effects(graph, model, split),
        Validation(graph, model, split if held_out is None else held_out, metric),
        counted(graph, {"run": Call.alone({name: value[:1].numpy() for name, value in model.example.items()})}),
        actions,
        limit,
        split,
        **options,
    )


def on_digits(limit=1.0):
    """A third of its sites; 40 samples to validate, so that one wrong answer is 2.5 points."""
    model, data, graph, every = digits()
    sites = every[::3]
    metric, split = metric_for(model.task, data.label_kind), data.calibration.head(16)
    search = begun(model, graph, sites, split, DROPS, limit, metric=metric, held_out=data.validation)
    search.run()
    return search, data.test, search.validation.sweeps


def on_a_small_model(limit=40.0):
    model, graph, sites, split = small(spread(0.1))
    parts = dataclasses.replace(split, most=8)  # several batches, so that stand-ins are judged on held-out ones
    search = begun(model, graph, sites, parts, ALL, limit, held_out=split)
    search.run()
    return search, split, search.validation.sweeps


once = functools.cache(lambda begin: begin())
DROPS, ALL = ("drop",), ("drop", "constant", "scale", "low-rank:4", "linear", "fuse")


@pytest.mark.parametrize("begin", [on_digits, on_a_small_model])
def test_a_plan_carried_out_anew_gives_the_graph_of_the_search(begin):
    """Bit for bit: the same sums over the same batches."""
    search, rows, _ = once(begin)
    made = search.rewriter
    plan = Plan.from_json(search.plan("m", "auto").to_json())
    again = Rewriter(made.original, made.sites, made.split).rewritten(plan.changes)
    for feeds in tensor_batches(rows):
        for left, right in zip(run(search.reduced, feeds), run(again, feeds), strict=True):
            assert torch.equal(left, right)
    assert search.steps
    assert search.steps[-1].loss == search.validation.loss(again).percent <= search.limit + 1e-9
    assert search.steps[-1].cost == search.prices.cost(again)
    if begin is on_a_small_model:
        assert len(set(plan.changes.values())) > 1


def test_the_budget_is_kept_as_the_user_will_measure_it():
    search = once(on_digits)[0]
    model, data, graph, _ = digits()
    runners = {
        "before": graph_runner(model, functools.partial(run, graph)),
        "after": graph_runner(model, functools.partial(run, search.reduced)),
    }
    found = evaluate(data.validation, runners, metric="accuracy", reference="before")
    regret = float(found.columns["after"]["regret"].mean()) * 100
    lost = max(found.loss_value("before", "after"), regret)
    assert lost <= 1.0
    assert search.steps[-1].loss == pytest.approx(lost, abs=1e-6)  # rounding in other batches


def test_the_search_is_deterministic():
    again, first = on_a_small_model()[0], once(on_a_small_model)[0]
    assert again.plan("m", "auto") == first.plan("m", "auto")
    assert again.steps == first.steps


def test_stopping_early_changes_no_decision(monkeypatch):
    """A candidate that is certain to break the budget need not be run to the end; with the end the plan is the same."""
    search, _, sweeps = once(on_digits)
    bounded, tried = Validation.loss, []

    def unbounded(validation, graph, *, limit):
        assert limit == 1.0
        tried.append(graph)
        return bounded(validation, graph)

    monkeypatch.setattr(Validation, "loss", unbounded)
    patient, _, full = on_digits()
    assert patient.changes == search.changes
    assert full == pytest.approx(1 + len(tried))
    assert sweeps < full


@pytest.mark.parametrize("seed", range(2))
def test_drops_alone_equal_a_greedy_that_measures_everything_again(seed):
    model, graph, sites, split = small(spread(seed=seed))
    search = begun(model, graph, sites, split, DROPS)
    search.run()
    rewriter, effects, prices, order, now = search.rewriter, search.effects, search.prices, [], graph
    while len(order) < len(sites):
        forks = {site.name: rewriter.changed(now, site.name, "drop") for site in sites if site.name not in order}
        base, found = effects.measure(now, forks)
        saved = {name: prices.cost(now) - prices.cost(fork) for name, fork in forks.items()}
        order.append(min(found, key=lambda name: (found[name] - base) / saved[name]))
        now = forks[order[-1]]
    assert list(search.changes) == order


@pytest.mark.parametrize("empty", [("blocks.0.mlp",), ("blocks.1.attn", "blocks.0.mlp")])
def test_branches_that_do_next_to_nothing_go_first(empty):
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
    """A linear map hidden in three layers, as costly as an MLP."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(16, 256), torch.nn.Linear(256, 16)

    def forward(self, x):
        return self.fc2(self.fc1(x))


@pytest.mark.parametrize("action", ["linear", "low-rank:8"])
def test_a_branch_that_is_linear_is_replaced_and_not_kept(action):
    """Dropping it loses what the limit forbids; its map does not, and saves most of its multiply-adds."""

    def plant(module):
        spread(0.3)(module)
        block = module.blocks[0]
        block.mlp, block.norm2 = Straight(), torch.nn.Identity()
        if action == "low-rank:8":
            block.mlp.fc2.weight[8:] = 0.0
            block.mlp.fc2.bias[:] = 0.0

    model, graph, sites, split = small(plant, rows=64)
    search = begun(model, graph, sites, split, ("drop", action), 1.0, metric="fidelity")
    search.run()
    linear = next(site.name for site in sites if site.name.startswith("blocks.0.mlp"))
    assert search.changes[linear] == action
    assert next(step for step in search.steps if step.unit == linear).added == pytest.approx(0.0, abs=1e-4)


def test_savings_are_priced_again_when_fewer_tokens_are_read(monkeypatch):
    """Without the last attention, the block before is needed for the class token alone: its attention saves more."""
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
        assert after[name, action] == search.cost - search.prices.cost(fork)
    assert after[middle, "drop"] > before[middle, "drop"]


def reason(plan, name):
    return next(decision.reason for decision in plan.decisions if decision.site == name)
