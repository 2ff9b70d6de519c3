"""Cost models: counted multiply-adds, and planted costs recovered from timings."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.lower.fold_graph import fold_graph
from compressor.measure.workload import Call
from compressor.search.cost_model import designs_by_kind, fit_latency_cost_model, multiply_add_cost_model
from passes.analysis.counted_cost import Costs
from passes.analysis.symbolic_cost import Counter, Work
from passes.base import apply
from passes.rewrite.drop import Drop
from passes.rewrite.narrow_tokens import NarrowTokens
from tests.samples import small, spread, traced

# Relative tolerance of a float64 solution with columns scaled to 1 but nearly collinear.
SOLVED = 1e-6
PLANTED = np.array([0.5, 2e-6, 5e-6, 3e-7, 4e-3])  # ms: constant, per multiply-add, attention, element and operator


def features(work):
    return np.array([1.0, work.products, work.attention, work.elements, work.operators])


def calls_of(model, batch=1):
    return {"run": Call.alone({name: np.zeros((batch, *value.shape[1:])) for name, value in model.example.items()})}


def clock_of(graph, calls, weights=PLANTED, noise=0.0, seed=0):
    """Return a clock whose milliseconds are linear in the work, up to noise, and the graphs that it timed.

    The weights of the n-th call are n times `weights`.
    """
    rng, seen = np.random.default_rng(seed), {}
    counters = {name: Counter(graph, call.shapes) for name, call in calls.items()}

    def milliseconds(number, name, design):
        exact = float(features(counters[name].count(design)) @ weights) * (number + 1)
        return exact * float(1.0 + noise * rng.standard_normal())

    def clock(graphs):
        seen.update(graphs)
        return {
            name: {call: milliseconds(number, call, design) for number, call in enumerate(calls)}
            for name, design in graphs.items()
        }

    return clock, seen


def designs(graph, sites):
    return {name: fold_graph(design) for name, design in designs_by_kind(graph, sites).items()}


def without(graph, sites):
    fork = graph.fork()
    apply(Drop(tuple(sites)), fork)
    return fork


# ------------------------------------------------------------------------------------------------------ multiply-adds


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["vit", "hf_bert", "hf_llama"])
def test_counted_costs_are_the_multiply_adds_that_run(name, batch):
    model, graph, sites = traced(name)
    feeds = {key: value[:1].repeat(batch, *[1] * (value.ndim - 1)) for key, value in model.example.items()}
    prices = multiply_add_cost_model(graph, calls_of(model, batch))
    assert prices.unit == "multiply-adds"
    assert prices.error == 0.0
    assert not prices.timings
    for skip in ((), sites[:1], sites[1:3]):
        left = without(graph, skip)
        narrowed = left.fork()
        apply(NarrowTokens(), narrowed)
        assert prices.cost(left) == Costs(narrowed, feeds).total.multiply_adds * batch


def test_elements_and_operators_are_free_in_multiply_adds():
    _, graph, _ = traced("vit")
    assert multiply_add_cost_model(graph, calls_of(traced("vit")[0])).of((Work(7, 5, 1000, 1000),)) == 12.0


# ------------------------------------------------------------------------------------------------------ milliseconds


@pytest.mark.parametrize("name", ["vit", "hf_bert", "hf_llama", "convnext"])
def test_timings_linear_in_the_work_are_predicted_exactly(name):
    model, graph, sites = traced(name)
    calls = calls_of(model)
    clock, seen = clock_of(graph, calls)
    prices = fit_latency_cost_model(graph, calls, designs(graph, sites), clock)
    assert prices.unit == "ms"
    assert list(prices.timings) == list(seen) == list(prices.calls["run"].fitted)
    assert prices.error < SOLVED
    for design, graph_timed in seen.items():
        assert prices.cost(graph_timed) == pytest.approx(prices.timings[design], rel=SOLVED)
        assert prices.calls["run"].fitted[design] == pytest.approx(prices.timings[design], rel=SOLVED)


def test_planted_weights_are_recovered():
    """The engines determine all five weights, so the cost of any other graph is predicted too."""
    model, graph, sites = small(spread(), depth=3)[:3]
    calls = calls_of(model)
    others = {f"without {site.name}": without(graph, [site]) for site in sites}
    clock, seen = clock_of(graph, calls)
    prices = fit_latency_cost_model(graph, calls, designs(graph, sites) | others, clock)
    assert set(others) < set(seen)
    rows = np.array([features(prices.calls["run"].counter.count(each)) for each in seen.values()])
    assert np.linalg.matrix_rank(rows / rows.max(0)) == 5
    np.testing.assert_allclose(prices.calls["run"].weights, PLANTED, rtol=SOLVED)
    left = without(graph, sites[1:4])
    assert prices.cost(left) == pytest.approx(
        float(features(prices.calls["run"].counter.count(left)) @ PLANTED), rel=SOLVED
    )


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.3), st.sets(st.integers(0, 4), max_size=3))
def test_weights_are_not_negative_with_noise(seed, noise, free):
    model, graph, sites = traced("vit")
    calls, weights = calls_of(model), PLANTED.copy()
    weights[list(free - {0})] = 0.0
    prices = fit_latency_cost_model(
        graph, calls, designs(graph, sites), clock_of(graph, calls, weights, noise, seed)[0]
    )
    assert (prices.calls["run"].weights >= 0.0).all()
    assert np.isfinite(prices.calls["run"].weights).all()
    assert prices.cost(without(graph, sites[:1])) <= prices.cost(graph) + 1e-12


def test_each_kind_of_call_has_its_own_weights_and_the_costs_add_up():
    """The cost of a decode step per unit of work differs from that of prefill."""
    model, graph, sites = small(spread(), depth=3)[:3]
    calls = {"prompt": calls_of(model, 4)["run"], "token": dataclasses.replace(calls_of(model)["run"], times=7)}
    clock, seen = clock_of(graph, calls)
    prices = fit_latency_cost_model(graph, calls, designs(graph, sites), clock)
    timings = clock(seen)
    for design, timed_graph in seen.items():
        expected = timings[design]["prompt"] + 7 * timings[design]["token"]
        assert prices.cost(timed_graph) == pytest.approx(expected, rel=SOLVED)
        assert prices.timings[design] == pytest.approx(expected, rel=SOLVED)
    first, second = prices.count(graph)
    assert prices.multiply_adds((first, second)) == first.multiply_adds + 7 * second.multiply_adds


def test_the_error_is_the_largest_relative_one():
    model, graph, sites = traced("vit")
    calls = calls_of(model)
    prices = fit_latency_cost_model(graph, calls, designs(graph, sites), clock_of(graph, calls, noise=0.1)[0])
    errors = [abs(prices.calls["run"].fitted[name] - time) / time for name, time in prices.timings.items()]
    assert prices.error == pytest.approx(max(errors), rel=1e-9)
    assert prices.error > 0.0


def test_the_timed_graphs_are_ready_to_be_lowered():
    """They are the original, and graphs with branches dropped or replaced by linear maps."""
    model, graph, sites = traced("vit")
    calls = calls_of(model)
    before = graph.signature()
    clock, seen = clock_of(graph, calls)
    fit_latency_cost_model(graph, calls, designs(graph, sites), clock)
    assert next(iter(seen)) == "as it is"
    assert {"without attention", "without mlp"} <= set(seen)
    for design in seen.values():
        assert fold_graph(design).signature() == design.signature()
    counter = Counter(graph, calls["run"].shapes)
    assert counter.count(seen["without attention"]).attention < counter.count(seen["as it is"]).attention
    linear = [design for name, design in seen.items() if "linear" in name]
    assert linear
    for design in linear:
        assert counter.count(design).products < counter.count(seen["as it is"]).products
    assert graph.signature() == before


def test_a_model_with_one_kind_of_site_has_a_cost_model():
    """The model has no attention and a single kind of branch."""
    model, graph, sites = traced("convnext")
    assert len({site.kind for site in sites}) == 1
    calls = calls_of(model)
    clock, seen = clock_of(graph, calls)
    prices = fit_latency_cost_model(graph, calls, designs(graph, sites), clock)
    assert not any("attention" in name for name in seen)
    assert prices.cost(without(graph, sites)) < prices.cost(graph)
