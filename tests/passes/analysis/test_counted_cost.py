"""Parameters and multiply-adds, exactly equal to closed formulas and to the cost of the graph after a drop."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.analysis import counted_cost
from passes.analysis.counted_cost import Cost, Costs
from passes.base import apply
from passes.rewrite.drop import Drop
from tests import samples

DEPTH, WIDTH, PATCH, CLASSES = 2, 16, 16, 5  # tests.architectures.VIT
TOKENS = (32 // PATCH) ** 2 + 1


@functools.cache
def traced(name):
    model, graph, sites = samples.traced(name)
    return model, graph, sites, Costs(graph, model.example)


def attention(d=WIDTH, n=TOKENS):
    """Query, key, value and projection with biases, and the norm; QK^T and the weighted sum are n*n*d each."""
    return Cost(4 * d * d + 4 * d + 2 * d, 4 * n * d * d + 2 * n * n * d)


def mlp(d=WIDTH, n=TOKENS):
    return Cost(8 * d * d + 5 * d + 2 * d, 8 * n * d * d)


def test_vit_equals_the_closed_formula():
    _, _, sites, costs = traced("vit")
    for site in sites:
        assert costs.saved(site) == (attention() if site.kind == "attention" else mlp())
    stem = 3 * PATCH * PATCH * WIDTH
    head = WIDTH * CLASSES
    around = Cost(
        stem + WIDTH + (TOKENS + 1) * WIDTH + 2 * WIDTH + head + CLASSES,  # class token, positions, last norm
        stem * (TOKENS - 1) + head,
    )
    assert costs.total.parameters == around.parameters + DEPTH * (attention().parameters + mlp().parameters)
    assert costs.total.multiply_adds == around.multiply_adds + DEPTH * (attention().multiply_adds + mlp().multiply_adds)
    assert costs.total - around == costs.total - costs.under(sites)


def test_block_costs_twelve_d_squared_per_token():
    attn, rest = attention(), mlp()
    assert attn.multiply_adds + rest.multiply_adds == TOKENS * 12 * WIDTH**2 + 2 * TOKENS**2 * WIDTH


def test_costs_are_per_sample():
    model, graph, _, costs = traced("vit")
    bigger = {name: value.repeat(3, 1, 1, 1) for name, value in model.example.items()}
    assert Costs(graph, bigger).total == costs.total


@settings(max_examples=16, deadline=None)
@given(st.sampled_from(["vit", "hf_bert", "vit_parallel_scaling", "hf_albert"]), st.sets(st.integers(0, 3)))
def test_cost_with_skipped_sites_equals_cost_of_the_rewritten_graph(name, positions):
    model, graph, sites, costs = traced(name)
    skip = [sites[position] for position in positions]
    dropped = graph.fork()
    apply(Drop(tuple(site.name for site in skip)), dropped)
    assert costs.under(skip) == Costs(dropped, model.example).total
    assert costs.under(skip).parameters == dropped.parameter_count()


@pytest.mark.parametrize("name", ["vit", "hf_bert"])
def test_savings_add_up_without_shared_weights(name):
    _, _, sites, costs = traced(name)
    together = costs.total - costs.under(sites)
    assert sum(costs.saved(site).multiply_adds for site in sites) == together.multiply_adds
    assert sum(costs.saved(site).parameters for site in sites) == together.parameters


def test_shared_projection_is_saved_with_its_last_consumer():
    """Parallel attention and MLP share one norm and one projection, which dropping one of them does not save."""
    _, _, sites, costs = traced("vit_parallel_scaling")
    alone = [costs.saved(site) for site in sites[:2]]
    together = costs.total - costs.under(sites[:2])
    assert sum(saved.multiply_adds for saved in alone) < together.multiply_adds
    assert sum(saved.parameters for saved in alone) < together.parameters


def test_shared_weights_count_once_until_the_last_consumer_is_dropped():
    model, graph, sites, costs = traced("hf_albert")
    assert costs.total.parameters == graph.parameter_count()
    assert costs.total.parameters == sum(parameter.numel() for parameter in graph.module.parameters())
    first = [site for site in sites if site.name.endswith("#1")]
    assert costs.under(first).parameters == costs.total.parameters
    assert costs.under(first).multiply_adds < costs.total.multiply_adds
    assert costs.under(sites).parameters < costs.total.parameters
    assert model.module.config.num_hidden_layers == 2


def test_counting_does_not_change_the_graph():
    model, graph, _, costs = traced("vit")
    before = graph.signature()
    assert Costs(graph, model.example).total == costs.total
    assert graph.signature() == before
    assert not torch.is_inference_mode_enabled()


def test_images_are_counted_by_shapes_alone_as_a_run_counts_them(monkeypatch):
    model, graph, _, costs = traced("vit")
    program = counted_cost.Program(graph)
    assert counted_cost._counted(program, program.start(model.example)) == costs.by_node
    kinds = set()
    step = counted_cost.Program.step

    def recorded(self, node, values):
        value = step(self, node, values)
        kinds.add(type(value))
        return value

    monkeypatch.setattr(counted_cost.Program, "step", recorded)
    assert Costs(graph, model.example).by_node == costs.by_node
    assert torch.Tensor not in kinds
