"""Tests of graph edits: inserted nodes compute, have a traced shape, and do not change the graph a fork came from."""

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.execute.interpreter import run
from passes.graph.edit import insert_call, insert_constant, propagate_fake_value, remove_dead, replace_input
from passes.graph.graph import GraphError, value_of
from passes.graph.sites import find_sites

aten = torch.ops.aten


def derive_again(graph):
    for node in graph.nodes():
        if node.op == "call_function":
            propagate_fake_value(graph, node)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.outer(self.inner(self.norm(x)).relu())


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return trace(models.load(Residual().eval(), example_inputs=torch.randn(2, 5, 6)))


def named(graph):
    return {node.name: node for node in graph.nodes()}


def test_an_inserted_linear_map_replaces_a_branch(graph):
    (site,) = find_sites(graph)
    edited, weight = graph.fork(), torch.randn(6, 6)
    nodes = named(edited)
    add, trunk = nodes[site.add], nodes[site.trunk]
    constant = insert_constant(edited, "a.b", weight, before=add)
    call = insert_call(edited, aten.linear.default, trunk, constant, before=add)
    replace_input(edited, add, nodes[site.branch], call)
    remove_dead(edited)
    edited.check()
    x = torch.randn(3, 5, 6)
    (output,) = run(edited, {edited.inputs[0]: x})
    torch.testing.assert_close(output, x + x @ weight.T)  # default float32 tolerance: the order of summation differs
    assert str(value_of(call).shape) == str(value_of(trunk).shape)  # the batch axis is still dynamic
    assert edited.parameter_count() == 36
    assert not any("fitted" in name for name, _ in graph.module.named_parameters())


def test_constants_of_the_same_name_get_unique_names(graph):
    before = graph.nodes()[-1]
    constants = [insert_constant(graph, "w", torch.full((1,), float(value)), before=before) for value in range(3)]
    assert [float(getattr(graph.module, node.target)) for node in constants] == [0.0, 1.0, 2.0]


def test_an_error_names_the_operator_that_rejects_its_inputs(graph):
    (site,) = find_sites(graph)
    nodes = named(graph)
    constant = insert_constant(graph, "w", torch.zeros(4, 7), before=nodes[site.add])
    with pytest.raises(GraphError, match=r"aten\.linear\.default"):
        insert_call(graph, aten.linear.default, nodes[site.trunk], constant, before=nodes[site.add])


def test_values_derived_again_have_the_traced_shapes():
    graph = trace(models.load("deit_tiny_patch16_224", random_weights=True))
    traced = {node.name: str(getattr(value_of(node), "shape", None)) for node in graph.nodes()}
    derive_again(graph)
    assert {node.name: str(getattr(value_of(node), "shape", None)) for node in graph.nodes()} == traced


def test_a_new_shape_reaches_the_consumers(graph):
    nodes = named(graph)
    (first, *_) = [node for node in graph.nodes() if node.target == aten.layer_norm.default]
    x = nodes[find_sites(graph)[0].trunk]
    shorter = insert_call(graph, aten.slice.Tensor, x, 1, 0, 2, before=first)
    for reader in [node for node in x.users if node is not shorter]:
        replace_input(graph, reader, x, shorter)
    derive_again(graph)
    assert value_of(graph.nodes()[-1].all_input_nodes[0]).shape[1] == 2
