"""Dropped branches against edited eager modules, parameter counts of the module tree, and small modules."""

import pytest
import torch
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.base import apply
from passes.canonical.clean import Clean
from passes.execute.interpreter import run
from passes.graph.graph import GraphError
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.samples import traced


class Zero(nn.Module):
    def forward(self, x, *_, **__):
        return torch.zeros_like(x)


class ZeroAttention(nn.Module):
    """Attention module of transformers that returns zeros."""

    def forward(self, hidden_states, *_, **__):
        return torch.zeros_like(hidden_states), None


class Parallel(nn.Module):
    """Two parallel branches, y = x + (a(x) + m(x)), followed by a single one."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.m, self.last, self.head = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        x = self.stem(x)
        n = torch.relu(x)
        x = x + (self.a(n) + self.m(n))
        x = x + self.last(x)
        return self.head(x)


def dropped(graph, *names):
    twin = graph.fork()
    apply(Drop(names), twin)
    return twin


@torch.inference_mode()
def both(model, graph):
    return model.call(model.module, *model.example.values())[0], run(graph, model.example)[0]


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("parts", [["attn"], ["mlp"], ["attn", "mlp"]])
@pytest.mark.parametrize("name", ["vit", "deit3", "beit", "vit_post_norm"])
def test_drop_equals_an_eager_timm_model_with_a_zero_part(name, parts, monkeypatch):
    model, original, _ = traced(name)
    graph = dropped(original, *[f"blocks.1.{part}" for part in parts])
    for part in parts:
        monkeypatch.setitem(model.module.blocks[1]._modules, part, Zero())
        norm = {"attn": "norm1", "mlp": "norm2"}[part]
        if name == "vit_post_norm":  # norm(0) is its bias, which random weights start at zero
            assert not getattr(model.module.blocks[1], norm).bias.any()
    eager, rewritten = both(model, graph)
    assert torch.equal(eager, rewritten)  # x + 0 is x


def test_drop_equals_an_eager_llama_with_zero_attention(monkeypatch):
    model, original, _ = traced("hf_llama")
    graph = dropped(original, "layers.0.self_attn")
    monkeypatch.setitem(model.module.layers[0]._modules, "self_attn", ZeroAttention())
    eager, rewritten = both(model, graph)
    assert torch.equal(eager, rewritten)


def test_parameter_count_equals_the_module_tree():
    """fx treats dropout and fused attention as impure, which must not keep the branch alive."""
    model, graph, _ = traced("vit")
    assert graph.parameter_count() == size(model.module)
    block = model.module.blocks[1]
    rewritten = dropped(graph, "blocks.1.attn")
    assert rewritten.parameter_count() == size(model.module) - size(block.attn) - size(block.norm1)
    rewritten = dropped(graph, "blocks.1.attn", "blocks.1.mlp")
    assert rewritten.parameter_count() == size(model.module) - size(block)
    assert not [node for node in rewritten.nodes() if "blocks.1." in str(node.target)]


def test_shared_weights_stay_until_the_last_user_is_dropped():
    _, graph, sites = traced("hf_albert")
    first = [site.name for site in sites if site.name.endswith("#1")]
    both_runs = [site.name for site in sites]
    assert dropped(graph, *first).parameter_count() == graph.parameter_count()
    assert dropped(graph, *both_runs).parameter_count() < graph.parameter_count()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adjacent_sites_can_be_dropped_in_either_order(order):
    """Node references from before the first edit would reconnect the first branch in the second edit."""
    _, graph, sites = traced("vit")
    at_once = dropped(graph, *[sites[position].name for position in order])
    one_by_one = dropped(dropped(graph, sites[order[0]].name), sites[order[1]].name)
    assert [node.format_node() for node in at_once.nodes()] == [node.format_node() for node in one_by_one.nodes()]
    assert [site.name for site in find_sites(at_once)] == [site.name for site in sites[2:]]


@pytest.mark.parametrize("names", [("a",), ("m",), ("a", "m"), ("last",), ("a", "last"), ("a", "m", "last")])
def test_one_or_both_parallel_branches_can_be_dropped(names):
    torch.manual_seed(0)
    model = models.load(Parallel(), example_inputs=torch.rand(2, 8))
    graph = trace(model)
    assert [site.name for site in find_sites(graph)] == ["a", "m", "last"]
    rewritten = dropped(graph, *names)
    for part in names:
        setattr(model.module, part, Zero())
    eager, result = both(model, rewritten)
    assert torch.equal(eager, result)
    assert [site.name for site in find_sites(rewritten)] == [name for name in ("a", "m", "last") if name not in names]


@pytest.mark.parametrize("order", [("a", "m"), ("m", "a"), ("last", "m", "a")])
def test_sequential_drops_of_parallel_branches_equal_one_drop(order):
    """Sites of the original graph stay valid although dropping one removes the sum of the other."""
    graph = trace(models.load(Parallel(), example_inputs=torch.rand(2, 8)))
    sites = {site.name: site for site in find_sites(graph)}
    one_by_one = graph.fork()
    for name in order:
        apply(Drop((sites[name],)), one_by_one)
    at_once = dropped(graph, *order)
    assert [node.format_node() for node in one_by_one.nodes()] == [node.format_node() for node in at_once.nodes()]


def test_unknown_site_name_does_not_change_the_graph():
    _, graph, _ = traced("vit")
    before = graph.signature()
    with pytest.raises(GraphError, match=r"no site named 'blocks.7.attn'; it has 4"):
        apply(Drop(("blocks.0.attn", "blocks.7.attn")), graph)
    assert graph.signature() == before


def test_fork_shares_weights_and_keeps_the_original():
    model, graph, _ = traced("vit")
    before, count, expected = graph.signature(), graph.parameter_count(), run(graph, model.example)
    twin = dropped(graph, *[site.name for site in find_sites(graph)])
    assert graph.signature() == before
    assert graph.parameter_count() == count
    assert torch.equal(run(graph, model.example)[0], expected[0])
    ours, theirs = dict(graph.module.named_parameters()), dict(twin.module.named_parameters())
    assert 0 < len(theirs) < len(ours)
    assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in theirs)
    assert len(graph.history) + 1 == len(twin.history)


@pytest.mark.parametrize("name", ["hf_bert", "hf_llama"])
def test_batch_and_length_stay_symbolic_after_a_drop(name):
    """All blocks read the same masks and rotary tables, which the remaining blocks must keep."""
    model, graph, sites = traced(name)
    rewritten = dropped(graph, sites[0].name, sites[3].name)
    for rows, length in [(1, 7), (3, 7), (1, 4), (5, 12)]:
        feeds = {key: value[:1, :4].repeat(rows, 3)[:, :length] for key, value in model.example.items()}
        outputs = run(rewritten, feeds)
        assert outputs[0].shape[:2] == (rows, length)
        expected = run(graph, feeds, skip=[sites[0], sites[3]])
        assert torch.equal(outputs[0], expected[0])


def test_cleaning_after_a_drop_removes_nothing():
    graph = dropped(traced("vit")[1], "blocks.0.mlp")
    nodes = len(graph.nodes())
    assert apply(Clean(), graph).changed == ()
    assert len(graph.nodes()) == nodes
