"""A second search without merged tokens: the path of a search that never had them, and the choice between both."""

import dataclasses
import math

import pytest
import torch

from compressor.quality.validation_loss import Loss
from compressor.search import greedy
from compressor.search.decision import Decision
from compressor.search.greedy import merges
from compressor.search.planner import choice_of
from compressor.search.without_merges import sentences, strongest
from compressor.workspace.progress import Steps
from tests.compressor.search.test_greedy import begun
from tests.planted_search import World
from tests.samples import digits

aten = torch.ops.aten


@pytest.mark.parametrize("first", ["merge", "drop"])
def test_the_second_search_is_that_of_a_search_without_merges(monkeypatch, first):
    """It begins before the first merge, and the first search stays as it was."""
    monkeypatch.setattr(greedy, "live_parts", lambda graph: {})
    world, plain = World(count=6, actions=("drop", "merge")), World(count=6, actions=("drop",))
    world.sites = tuple(dataclasses.replace(site, kind="attention") for site in world.sites)
    for name in ("own", "saves"):
        getattr(plain, name).update({key: getattr(world, name)[key] for key in getattr(plain, name)})
    plain.pairs[:] = world.pairs
    world.own |= {key: value * 1e-3 for key, value in world.own.items() if "merge" in key[1]}
    if first == "drop":
        world.own["s2", "drop"] = plain.own["s2", "drop"] = 1e-9
    search, other = world.begin(), plain.begin()
    search.run()
    other.run()
    steps, refused = list(search.steps), dict(search.refused)
    assert merges(steps[0].action) == (first == "merge")
    again = search.without_merges()
    assert again.steps == steps[: next(number for number, step in enumerate(steps) if merges(step.action))]
    assert bool(again.steps) == (first == "drop")
    again.run()
    assert list(again.changes.items()) == list(other.changes.items())
    assert again.graph == other.graph
    assert [step.divergence for step in again.steps] == pytest.approx([step.divergence for step in other.steps])
    assert (search.steps, search.refused) == (steps, refused)
    merged = next(step for step in steps if merges(step.action))
    assert "refused most of the plan with it" in again.refused[merged.unit, merged.action]


class Refusing:
    """Losses on the decision split by what a graph does: merging tokens, and the rest by its number of operators."""

    averages = False

    def __init__(self, merging, others):
        self.merging, self.others, self.split = merging, others, range(40)

    def loss(self, graph, *, limit, with_error=False):
        merged = any(node.target == aten.argmax.default for node in graph.nodes())
        return Loss(self.merging if merged else self.others, len(self.split))


@pytest.fixture(scope="module")
def choice():
    """All changes of a search that begins with a merge and then drops branches too."""
    model, data, graph, sites = digits()
    search = begun(model, graph, sites[:6], data.calibration.head(16), ("drop", "merge"), math.inf)
    search.front.best()
    search._try(sites[0].name, "merge:25%")
    search.run()
    assert merges(search.steps[0].action)
    assert not all(merges(step.action) for step in search.steps)
    return choice_of(search, "m", "auto", {})


@pytest.mark.parametrize(("merging", "others"), [(0.0, 9.0), (9.0, 0.0), (9.0, 9.0)])
def test_the_faster_plan_that_holds_is_taken(choice, merging, others):
    decision = Decision(Refusing(merging, others), 1.0)
    found = strongest(choice, decision, Steps(None))
    told = found.facts.get("without_merges")
    if not merging:  # plans that merge hold, so there is nothing to search for
        assert found.count == choice.count
        assert told is None
        assert not sentences(found.facts)
        return
    kept = not others
    assert told["kept"] == kept
    assert bool(found.plan.changes) == kept
    assert not found.plan.merges
    expected = found.search.whole / found.search.cost_model.cost(found.graph)
    assert found.facts["predicted_speedup"] == pytest.approx(expected)
    assert {trial.loss for trial in decision.trials} == {0.0 if kept else 9.0}
    assert {trial["loss"] for trial in told["trials"]} == {9.0}
    (sentence,) = sentences(found.facts)
    assert ("this plan ships" in sentence) == kept
    assert choice.search.steps[: choice.count] == choice.at(choice.count).search.steps


@pytest.mark.parametrize("held", ["most", "little"])
def test_only_a_plan_of_which_little_holds_is_searched_again(choice, held):
    """The decision refuses the plan of all changes, or all plans but that of the first change."""
    decision = Decision(Refusing(9.0, 9.0), 1.0)
    calls = iter([9.0, 0.0] if held == "most" else [*(9.0 for _ in range(choice.count - 1)), *(0.0 for _ in range(99))])
    decision.losses.loss = lambda graph, *, limit, with_error: Loss(next(calls), 40)
    found = strongest(choice, decision, Steps(None))
    assert ("without_merges" in found.facts) == (held == "little")


def test_a_certificate_and_a_wished_speedup_keep_to_one_search(choice):
    decision = Decision(Refusing(9.0, 0.0), 1.0)
    wished = dataclasses.replace(choice, facts=choice.facts | {"goal": {"speedup": 2.0, "timed": []}})
    assert "without_merges" not in strongest(wished, decision, Steps(None)).facts
