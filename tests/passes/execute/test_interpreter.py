"""Tests of the interpreter: runs equal rewritten graphs and separate runs bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.base import apply
from passes.execute.interpreter import Program, run
from passes.execute.shared_prefix import SharedPrefixRun
from passes.graph.edit import insert_constant, remove_dead, replace_input
from passes.rewrite.drop import Drop
from tests.samples import traced

NAMES = ("vit", "hf_bert", "vit_parallel_scaling")


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
    with torch.inference_mode():  # otherwise torch uses other kernels for linear maps, with other rounding
        assert equal(rewritten.module(*model.example.values()), expected)


def dropped(graph, *names):
    variant = graph.fork()
    apply(Drop(names), variant)
    return variant


@settings(max_examples=30, deadline=None)
@given(cases)
def test_forks_equal_separate_runs(case):
    model, graph, sites = traced(case[0])
    skipped = [sites[position].name for position in case[1]]
    kept = [site.name for site in sites if site.name not in skipped]
    main = dropped(graph, *skipped)
    received = {}
    forks = SharedPrefixRun(main, {name: dropped(graph, *skipped, name) for name in kept})
    forks.run(model.example, received.__setitem__)
    assert set(received) == {None, *kept}
    for name, outputs in received.items():
        assert equal(outputs, run(dropped(graph, *skipped, *([name] if name else [])), model.example))


def test_forks_compute_only_changed_nodes(monkeypatch):
    """A variant equal to the main graph costs no nodes, one without its last site costs few."""
    model, graph, sites = traced("vit")
    assert SharedPrefixRun(graph, {"same": graph.fork()}).share == 1.0
    shares = [SharedPrefixRun(graph, {site.name: dropped(graph, site.name)}).share for site in sites]
    assert shares == sorted(shares, reverse=True)
    assert 1.0 < shares[-1] < shares[0] < 2.0
    steps, step = [], Program.step

    def counted(program, node, values):
        steps.append(node)
        return step(program, node, values)

    monkeypatch.setattr(Program, "step", counted)
    SharedPrefixRun(graph, {"last": dropped(graph, sites[-1].name)}).run(model.example, lambda *_: None)
    calls = sum(node.op.startswith("call") for node in steps)
    assert calls == pytest.approx(shares[-1] * sum(node.op.startswith("call") for node in Program(graph).order))


def test_a_variant_may_read_a_value_after_its_last_use_in_the_main_graph():
    """The last add of the variant reads an early trunk state, which the main run must keep."""
    model, graph, sites = traced("vit")
    variant = graph.fork()
    nodes = {node.name: node for node in variant.nodes()}
    last = nodes[sites[-1].add]
    replace_input(variant, last, nodes[sites[-1].branch], nodes[sites[0].trunk])
    remove_dead(variant)
    received = {}
    SharedPrefixRun(graph, {"early": variant}).run(model.example, received.__setitem__)
    assert equal(received["early"], run(variant, model.example))
    assert not equal(received["early"], received[None])


def test_a_constant_of_the_same_name_and_another_value_is_a_change():
    model, graph, sites = traced("vit")
    variants = {}
    for value in (0.0, 1.0):
        variant = graph.fork()
        nodes = {node.name: node for node in variant.nodes()}
        add = nodes[sites[1].add]
        constant = insert_constant(variant, "c", torch.full((sites[1].width,), value), before=add)
        replace_input(variant, add, nodes[sites[1].branch], constant)
        remove_dead(variant)
        variants[value] = variant
    received = {}
    SharedPrefixRun(variants[0.0], {1.0: variants[1.0]}).run(model.example, received.__setitem__)
    assert equal(received[1.0], run(variants[1.0], model.example))
    assert not equal(received[1.0], received[None])


def test_forks_can_be_run_again_on_other_batches():
    model, graph, sites = traced("vit")
    forks = SharedPrefixRun(graph, {site.name: dropped(graph, site.name) for site in sites})
    flipped = {"x": model.example["x"].flip(0)}
    for feeds in (model.example, flipped, model.example):
        received = {}
        forks.run(feeds, received.__setitem__)
        assert equal(received[None], run(graph, feeds))
        assert equal(received[sites[0].name], run(graph, feeds, skip=[sites[0]]))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_skipped_sites_equals_the_model(name):
    model, graph, _ = traced(name)
    with torch.inference_mode():
        expected = model.call(model.module, *model.example.values())
    assert equal(run(graph, model.example), expected)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_freed_after_their_last_reader(name):
    model, graph, sites = traced(name)
    program = Program(graph, sites[:1], keep=[sites[1].trunk])
    values = program.start(model.example)
    peak = 0
    with torch.inference_mode():
        for _ in program.walk(values):
            peak = max(peak, sum(node.op == "call_function" for node in values))
    calls = sum(node.op == "call_function" for node in program.order)
    trunk = {program.stand_in.get(node, node) for node in graph.nodes() if node.name == sites[1].trunk}
    assert {node for node in values if node.op == "call_function"} == {*program.outputs, *trunk}
    assert peak < calls


def test_side_inputs_of_a_skipped_branch_are_not_computed():
    _, graph, sites = traced("vit")
    needed = Program(graph, sites).order
    full = Program(graph).order
    assert len(needed) < len(full)
    assert not {"scaled_dot_product_attention"} & {node.name for node in needed}
