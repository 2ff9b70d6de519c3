"""Tests of `apply`: every pass must keep its contract."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from compressor.lower.trace import trace
from passes.analysis.counted_cost import Costs
from passes.analysis.redundancy import Score
from passes.base import PassError, Rewritten, apply
from passes.canonical.clean import Clean
from passes.graph.edit import drop_branches
from passes.graph.graph import GraphError
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.architectures import TIMM

VIT = next(architecture for architecture in TIMM if architecture.name == "vit")


@pytest.fixture(scope="module")
def traced():
    model = VIT.load()
    return model, trace(model)


@dataclass(frozen=True)
class Meddling:
    """Pass that is declared as an analysis but rewrites the graph."""

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def run(self, graph, data):
        return Drop(("blocks.0.mlp",)).run(graph, data)


@dataclass(frozen=True)
class Careless:
    """Rewrite that leaves dead nodes in the graph."""

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    site: int = 0

    def run(self, graph, data):
        drop_branches(graph, [find_sites(graph)[self.site]])
        return Rewritten()


def test_an_analysis_may_not_change_the_graph(traced):
    with pytest.raises(
        PassError, match=r"Meddling is declared as an analysis \(rewrites=False\), but it changed the graph"
    ):
        apply(Meddling(), traced[1].fork())


def test_a_rewrite_may_not_leave_dead_nodes(traced):
    graph = traced[1].fork()
    with pytest.raises(GraphError, match="dead nodes"):
        apply(Careless(), graph)
    assert not [line for line in graph.history if line.name == "Careless"]


def test_missing_calibration_data_is_an_error(traced):
    with pytest.raises(PassError, match="Score needs calibration data and got none"):
        apply(Score(), traced[1])


def test_the_history_holds_the_pass_and_its_options(traced):
    graph = traced[1].fork()
    before = len(graph.nodes())
    apply(Drop(("blocks.1.attn",)), graph)
    line = graph.history[-1]
    assert (line.name, line.options) == ("Drop", {"sites": "('blocks.1.attn',)"})
    assert (line.nodes_before, line.nodes_after) == (before, len(graph.nodes()))
    assert line.nodes_after < before


def test_an_analysis_leaves_nodes_weights_and_inputs_unchanged(traced):
    model, graph = traced
    before = graph.signature(), {name: value.clone() for name, value in graph.module.state_dict().items()}
    inputs = {name: value.clone() for name, value in model.example.items()}
    apply(Score(), graph, [model.example])
    assert graph.signature() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in graph.module.state_dict().items())
    assert all(torch.equal(value, inputs[name]) for name, value in model.example.items())


@pytest.mark.parametrize("step", [Clean(), Drop(())])
def test_rewrites_with_nothing_to_do_change_nothing(traced, step):
    model, graph = traced[0], traced[1].fork()
    nodes, total = len(graph.nodes()), Costs(graph, model.example).total
    assert apply(step, graph).changed == ()
    assert len(graph.nodes()) == nodes
    assert Costs(graph, model.example).total == total
