"""Running with branches skipped, against the rewritten graph and against separate runs: bit for bit, no tolerance."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.trace import trace
from passes.base import apply
from passes.drop import Drop
from passes.run import Forks, Program, run
from passes.sites import find_sites
from tests.architectures import TIMM, TRANSFORMERS

NAMES = ("vit", "hf_bert", "vit_parallel_scaling")
BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}


@functools.cache
def traced(name):
    model = BY_NAME[name].load()
    graph = trace(model)
    return model, graph, find_sites(graph)


subsets = st.sets(st.integers(0, 3), max_size=4)  # each of the three models has four sites
cases = st.tuples(st.sampled_from(NAMES), subsets)


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@settings(max_examples=40, deadline=None)
@given(cases)
def test_skip_equals_the_rewritten_graph(case):
    model, graph, sites = traced(case[0])
    skip = [sites[position] for position in case[1]]
    rewritten = graph.fork()
    apply(Drop(tuple(site.name for site in skip)), rewritten)
    expected = run(graph, model.example, skip=skip)
    assert equal(run(rewritten, model.example), expected)
    with torch.inference_mode():  # outside of it torch picks other kernels for linear maps, whose last bits differ
        assert equal(rewritten.module(*model.example.values()), expected)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_forks_equal_separate_runs(case):
    model, graph, sites = traced(case[0])
    skip = [sites[position] for position in case[1]]
    rest = [site for site in sites if site not in skip]
    received = []
    forks = Forks(graph, skip, rest)
    forks.run(model.example, lambda site, outputs: received.append((site, outputs)))
    assert [site for site, _ in received] == [*rest_in_order(graph, rest), None]
    for site, outputs in received:
        assert equal(outputs, run(graph, model.example, skip=[*skip, *([site] if site else [])]))


def rest_in_order(graph, sites):
    position = {node.name: index for index, node in enumerate(graph.nodes())}
    return sorted(sites, key=lambda site: position[site.add])


def test_forks_can_be_run_again_on_other_batches():
    model, graph, sites = traced("vit")
    forks = Forks(graph, [], sites)
    flipped = {"x": model.example["x"].flip(0)}
    for feeds in (model.example, flipped, model.example):
        received = []
        forks.run(feeds, lambda _, outputs, received=received: received.append(outputs))
        assert equal(received[-1], run(graph, feeds))
        assert equal(received[0], run(graph, feeds, skip=[sites[0]]))


@pytest.mark.parametrize("name", NAMES)
def test_without_skip_it_is_the_model(name):
    model, graph, _ = traced(name)
    with torch.inference_mode():
        expected = model.call(model.module, *model.example.values())
    assert equal(run(graph, model.example), expected)  # the same kernels in the same order


@pytest.mark.parametrize("name", NAMES)
def test_values_are_freed_after_their_last_reader(name):
    model, graph, sites = traced(name)
    program = Program(graph, sites[:1], keep=[sites[1].trunk])
    values = program.start(model.example)
    held = 0
    with torch.inference_mode():
        for _ in program.walk(values):
            held = max(held, sum(node.op == "call_function" for node in values))
    calls = sum(node.op == "call_function" for node in program.order)
    trunk = {program.stand_in.get(node, node) for node in graph.nodes() if node.name == sites[1].trunk}
    assert {node for node in values if node.op == "call_function"} == {*program.outputs, *trunk}
    assert held < calls


def test_side_inputs_of_a_skipped_branch_are_not_computed():
    _, graph, sites = traced("vit")
    needed = Program(graph, sites).order
    full = Program(graph).order
    assert len(needed) < len(full)
    assert not {"scaled_dot_product_attention"} & {node.name for node in needed}
