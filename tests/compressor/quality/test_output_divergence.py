"""Tests of the output divergence against one rewritten graph per candidate and a float64 KL."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from compressor.lower.trace import trace
from compressor.quality.evaluate import EvaluationError, tensor_batches
from compressor.quality.heads.base import SCALES
from compressor.quality.output_divergence import POSITIONS, OutputDivergence, subsample_tokens
from passes.base import apply
from passes.execute.interpreter import Program, run
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.samples import BY_NAME, Tensors, small, spread

SUMS = 1e-6  # divergences are float32 terms of size 1


def dropped(graph, sites):
    fork = graph.fork()
    apply(Drop(tuple(site.name for site in sites)), fork)
    return fork


def divergences(graph, other, split, scales):
    """Compute the mean KL between the logits of two graphs in float64, for each scale of the second's logits."""
    totals = np.zeros(len(scales))
    for feeds in tensor_batches(split):
        original, answer = (run(side, feeds)[0].double() for side in (graph, other))
        p = original.softmax(-1)
        for index, scale in enumerate(scales):
            totals[index] += float((p * (p.log() - (answer * scale).log_softmax(-1))).sum())
    return totals / len(split)


@pytest.mark.parametrize("most", [32, 7])
def test_divergence_is_measured_at_the_best_scale_on_top_of_earlier_drops(most):
    """All samples share one scale: the result is the minimum of the means, not the mean of the minima."""
    model, graph, sites, split = small(spread())
    split.most = most
    effects = OutputDivergence(graph, model, split)
    best, seen, batches = set(), [], len(list(tensor_batches(split)))
    effects.progress = lambda *counts: seen.append(counts)
    for skip in ([], [sites[0]], [sites[1], sites[2]]):
        main = dropped(graph, skip)
        variants = {site.name: dropped(graph, [*skip, site]) for site in sites if site not in skip}
        base, measured = effects.measure(main, variants)
        assert base == pytest.approx(divergences(graph, main, split, SCALES).min(), abs=SUMS)
        assert list(measured) == list(variants)
        assert seen[-batches:] == [(done, batches, len(variants)) for done in range(1, batches + 1)]
        for name, variant in variants.items():
            expected = divergences(graph, variant, split, SCALES)
            best.add(SCALES[expected.argmin()])
            assert measured[name] == pytest.approx(expected.min(), abs=SUMS)
    assert len(best) > 1  # with one best scale, the test would not show that the scale matters
    assert effects.measure(graph, {}) == (0.0, {})


def test_only_classifiers_are_scaled():
    """The output of a language model is its probabilities, and features are compared by direction."""
    model, graph, _, split = small()
    assert OutputDivergence(graph, model, split).scales == SCALES
    assert SCALES[0] == 1.0
    for task in ("text-generation", "image-feature-extraction"):
        assert OutputDivergence(graph, dataclasses.replace(model, task=task), split).scales == (1.0,)


def test_graph_that_only_scales_its_logits_has_no_divergence():
    """Its predictions are unchanged; a scale outside `SCALES` leaves a divergence."""
    model, graph, _, split = small(spread())
    effects = OutputDivergence(graph, model, split)
    shrunk, odd = ((small(shrinking(factor)))[1] for factor in (1 / 1.6, 1 / 1.4))
    _, measured = effects.measure(graph, {"shrunk": shrunk, "odd": odd})
    assert measured["shrunk"] == pytest.approx(0.0, abs=SUMS)
    assert measured["odd"] > 1e-4


def shrinking(factor):
    def change(module):
        spread()(module)
        module.head.weight.mul_(factor)
        module.head.bias.mul_(factor)

    return change


def test_divergence_of_a_unit_drops_all_its_sites():
    model, graph, sites, split = small(spread())
    effects = OutputDivergence(graph, model, split)
    blocks = [sites[:2], sites[2:]]
    assert effects.of_units(blocks) == [effects.measure(dropped(graph, block), {})[0] for block in blocks]
    alone = effects.measure(graph, {site.name: dropped(graph, [site]) for site in sites})[1]
    assert effects.of_units([[site] for site in sites]) == list(alone.values())


def test_sweeps_count_executed_nodes(monkeypatch):
    model, graph, sites, split = small()
    effects = OutputDivergence(graph, model, split)
    assert effects.sweeps == 1.0
    executed = []
    step = Program.step
    monkeypatch.setattr(Program, "step", lambda self, node, values: executed.append(node) or step(self, node, values))

    def computed():
        count = sum(node.op == "call_function" for node in executed)
        executed.clear()
        return count

    main = dropped(graph, [sites[1]])
    run(main, next(tensor_batches(split)))
    one = computed()
    effects.measure(main, {site: dropped(graph, [sites[1], site]) for site in (sites[0], *sites[2:])})
    assert effects.sweeps - 1 == pytest.approx(computed() / one, abs=1e-12)
    assert effects.sweeps - 1 < 4  # variants share the nodes before their first difference


def test_padding_is_excluded_from_the_divergence():
    model = BY_NAME["hf_bert"].load()
    with torch.no_grad():
        for parameter in model.module.encoder.parameters():
            parameter.mul_(
                8.0 if parameter.ndim > 1 else 1.0
            )  # the initial weights are too small for a visible divergence
    graph = trace(model)
    sites = find_sites(graph)
    feeds = {name: value.numpy() for name, value in model.example.items()}
    short = {name: value[1:, :5] for name, value in feeds.items()}  # the second row, whose last two tokens are padding
    padded = {name: value[1:] for name, value in feeds.items()}
    measured = [
        OutputDivergence(graph, model, Tensors(rows)).of_units([[site] for site in sites]) for rows in (short, padded)
    ]
    assert measured[0] == pytest.approx(measured[1], abs=SUMS)  # 1 - cosine in float32
    assert min(measured[0]) > 1e-4


def test_long_texts_are_compared_at_evenly_spaced_positions():
    """The positions are evenly spaced from the first token to the last."""
    rows = torch.arange(200).repeat(2, 1)
    taken = subsample_tokens(rows)
    assert taken.shape == (2, POSITIONS)
    assert (taken[0, 0], taken[0, -1]) == (0, 199)
    assert set(taken[0].diff().tolist()) <= {3, 4}
    assert torch.equal(subsample_tokens(rows[:, :POSITIONS]), rows[:, :POSITIONS])


def test_non_finite_output_has_infinite_divergence():
    model, graph, _, split = small()
    broken = small(lambda module: module.blocks[1].mlp.fc2.weight.fill_(math.nan))[1]
    base, measured = OutputDivergence(graph, model, split).measure(graph, {"broken": broken})
    assert (base, measured) == (0.0, {"broken": math.inf})


def test_original_with_nan_raises():
    model, graph, _, split = small(lambda module: module.head.weight.fill_(math.nan))
    with pytest.raises(EvaluationError, match=r"24 of 24 samples in a batch of calibration data; check its weights\."):
        OutputDivergence(graph, model, split)


def test_one_sample_with_nan_is_no_fault_of_the_weights():
    model, graph, _, split = small()
    images = split.feeds["x"].copy()
    images[3] = math.nan
    with pytest.raises(EvaluationError, match=r"for 1 of 24 samples in a batch of .*; check these samples\."):
        OutputDivergence(graph, model, Tensors({"x": images}))
