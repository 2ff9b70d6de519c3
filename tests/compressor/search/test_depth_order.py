"""Maps fitted again in order of depth: the graph is that of the replayed plan, and is kept only if it is better."""

import dataclasses
import itertools

import torch

from compressor.quality.evaluate import tensor_batches
from compressor.search.depth_order import in_depth_order, refitted, sentences
from compressor.search.greedy import Step
from compressor.search.planner import Choice
from compressor.search.rewriter import Rewriter
from compressor.workspace.progress import Steps
from passes.execute.interpreter import run
from tests.compressor.search.test_greedy import begun, on_digits, once
from tests.samples import digits

CHANGES = {"blocks.6.mlp": "linear", "blocks.3.mlp": "linear", "blocks.1.mlp": "scale"}  # from the last to the first


def choice_with(loss):
    """Return a plan of the trained sample whose maps were fitted from the last to the first."""
    model, data, graph, sites = digits()
    search = begun(
        model, graph, sites, data.calibration, ("linear", "scale"), metric="accuracy", held_out=data.validation
    )
    search.steps = [Step(unit, action, 0.0, 0.0, loss, 1.0, 1) for unit, action in CHANGES.items()]
    plan, start = search.plan("m", "auto"), search.rewriter.apply_changes(CHANGES)
    return Choice(plan, start, search.rewriter, {"chosen": len(CHANGES)}, search)


def test_better_maps_are_kept_and_the_plan_replays_them():
    backwards = choice_with(loss=100.0)
    found = refitted(backwards, Steps(None))
    told, search = found.facts["refitted"], backwards.search
    assert told["kept"]
    assert found.plan.changes == backwards.plan.changes
    assert list(found.plan.changes) == sorted(
        found.plan.changes, key=[site.name for site in search.rewriter.sites].index
    )
    again = Rewriter(search.rewriter.original, search.rewriter.sites, search.rewriter.split).rewritten(
        found.plan.changes
    )
    for feeds in tensor_batches(search.effects.split):
        for left, right in zip(run(found.reduced(), feeds), run(again, feeds), strict=True):
            assert torch.equal(left, right)
    _, measured = search.effects.measure(search.rewriter.original, {"before": backwards.reduced(), "now": again})
    assert told["divergence"] == [measured["before"], measured["now"]]
    assert measured["now"] < measured["before"]
    assert told["loss"] == [100.0, search.validation.loss(again).percent]
    (sentence,) = sentences(found.facts)
    assert "in order of depth and kept: divergence" in sentence
    search.graphs[1:] = [backwards.graph] * len(CHANGES)
    assert "refitted" not in found.at(1).facts  # a plan with fewer changes was not fitted again


def test_maps_that_lose_more_are_not_kept():
    choice = choice_with(loss=-1.0)
    found = refitted(choice, Steps(None))
    assert not found.facts["refitted"]["kept"]
    assert (found.plan, found.graph) == (choice.plan, choice.graph)
    assert "and not kept: divergence" in sentences(found.facts)[0]


def test_a_plan_without_maps_stays_as_it_is():
    search, _, _ = once(on_digits)
    plan = search.plan("m", "auto")
    for order in itertools.islice(itertools.permutations(plan.order), 3):
        choice = Choice(dataclasses.replace(plan, order=order), search.graph, search.rewriter, {}, search)
        assert refitted(choice, Steps(None)) is choice
    assert sentences({}) == []


def test_maps_in_order_are_not_fitted_again():
    backwards = choice_with(loss=100.0)
    changes = in_depth_order(backwards.plan.changes, [site.name for site in backwards.search.rewriter.sites])
    choice = dataclasses.replace(backwards, plan=dataclasses.replace(backwards.plan, order=tuple(changes)))
    assert refitted(choice, Steps(None)) is choice
