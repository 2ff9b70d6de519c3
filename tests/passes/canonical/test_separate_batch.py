"""A batch that is joined with heads or tokens gets an axis of its own: equal outputs, and tokens to merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.token_axis import sizes_of
from passes.base import apply
from passes.canonical.clean import Clean
from passes.canonical.separate_batch import SeparateBatch, joins_batch
from passes.execute.interpreter import run
from passes.graph.graph import Graph, aten
from passes.graph.sites import find_sites
from passes.merge_tokens.token_merging import ReduceTokens

TOKENS, WIDTH, HEADS = 6, 16, 4
Call = Callable[["Layer", torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """One residual branch around attention of `torch`, called by a given function."""

    def __init__(self, call: Call, *, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.linear, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.mask = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.call(self, x)
        return self.head(x.mean(1))


def plain(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return layer.attention(x, x, x, need_weights=False)[0]


def with_weights(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return layer.attention(x, x, x)[0]


def masked(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return layer.attention(x, x, x, attn_mask=layer.mask, need_weights=False)[0]


def masked_with_weights(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return layer.attention(x, x, x, attn_mask=layer.mask)[0]


def padded(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    hidden = x[..., 0] > 1.0
    return layer.attention(x, x, x, key_padding_mask=hidden)[0]


def flat_rows(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Compute each token as a row of its own, with a pointwise operator and a term for each row."""
    rows = layer.linear(x.reshape(-1, WIDTH)).relu() + layer.linear.bias
    return (rows + x.reshape(-1, WIDTH) * 2).view(x.shape[0], TOKENS, WIDTH)


def rows_normalised(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Depends on all rows of the batch, which no axis of its own would compute."""
    return x.reshape(-1, WIDTH).softmax(0).view(x.shape[0], TOKENS, WIDTH)


def last_first(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Joins heads, batch and tokens in that order: the batch lies between two others."""
    parts = x.reshape(-1, TOKENS, HEADS, 4).permute(2, 0, 1, 3)
    y = layer.linear.weight[:4, :4] @ parts.reshape(-1, 4).sin().view(HEADS, x.shape[0], TOKENS, 4).mT
    return y.mT.permute(1, 2, 0, 3).reshape(x.shape)


def without_pass(layer: Layer) -> Graph:
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (example(2),), dynamic_shapes=({0: batch},), strict=False)
    graph = Graph(program.run_decompositions({}).module(check_guards=False), ("x",), ("y",))
    apply(Clean(), graph)
    return graph


def example(rows: int) -> torch.Tensor:
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rows))


SEPARATED = {
    plain: 4,  # query, key, value, and the rows of the output
    with_weights: 1,  # the products of matrices are the same call on more axes
    masked: 4,
    masked_with_weights: 1,
    padded: 1,
    flat_rows: 1,
    last_first: 1,
}


@pytest.mark.parametrize("call", SEPARATED, ids=lambda call: call.__name__)
def test_outputs_are_equal_and_no_value_joins_the_batch(call: Call) -> None:
    graph = without_pass(Layer(call))
    assert joins_batch(graph)
    fork = graph.fork()
    found = apply(SeparateBatch(), fork)
    fork.check()
    assert len(found.changed) == SEPARATED[call]
    assert not joins_batch(fork)
    assert not any(node.target in (aten.bmm.default, aten.baddbmm.default) for node in fork.nodes())
    for rows in (2, 3, 5):
        wanted, got = (run(each, {"x": example(rows)})[0] for each in (graph, fork))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_what_mixes_rows_stays_joined() -> None:
    graph = without_pass(Layer(rows_normalised))
    fork = graph.fork()
    assert apply(SeparateBatch(), fork).changed == ()
    assert [node.name for node in fork.nodes()] == [node.name for node in graph.nodes()]


def test_attention_in_windows_stays_joined() -> None:
    """Windows as an axis of their own would give attention five axes, which engines do not take."""

    def windowed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        windows = x.reshape(-1, TOKENS // 2, WIDTH)
        heads = layer.linear(windows).unflatten(-1, (HEADS, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)

    fork = without_pass(Layer(windowed))
    assert apply(SeparateBatch(), fork).changed == ()
    assert {len(sizes_of(node)) for node in fork.nodes() if "attention" in str(node.target)} == {4}


def test_a_batch_of_a_fixed_size_is_left_alone() -> None:
    program = torch.export.export(Layer(plain).eval(), (example(2),), strict=False)
    graph = Graph(program.module(check_guards=False), ("x",), ("y",))
    apply(Clean(), graph)
    assert not joins_batch(graph)
    assert apply(SeparateBatch(), graph).changed == ()


@pytest.mark.parametrize("call", [plain, with_weights])
def test_tokens_behind_attention_of_torch_are_merged(call: Call) -> None:
    """Before, no token could be merged in any model with `nn.MultiheadAttention`, such as torchvision's ViT."""
    graph = trace(models.load(Layer(call), example_inputs=example(2)))
    (site,) = find_sites(graph)
    fork = graph.fork()
    apply(ReduceTokens(((site.name, 0.34),)), fork)
    assert run(fork, {"x": example(3)})[0].shape == (3, 3)
    assert any(4 in sizes_of(node) for node in fork.nodes())


def test_tokens_of_the_vit_of_torchvision_are_merged() -> None:
    """Its class token is protected and read by position."""
    torch.manual_seed(0)
    module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=WIDTH, mlp_dim=32, num_classes=3
    )
    images = torch.randn(2, 3, 32, 32)
    graph = trace(models.load(module.eval(), example_inputs=images))
    first, *others = (site for site in find_sites(graph) if site.kind == "attention")
    assert len(others) == 1
    apply(ReduceTokens(((first.name, 0.25),)), graph)
    assert {13, 17} <= {size for node in graph.nodes() for size in sizes_of(node)[1:2]}
    assert run(graph, {graph.inputs[0]: images})[0].shape == (2, 3)
