"""Complex numbers are computed as pairs of real ones."""

import torch
from torch import nn

from passes.base import apply
from passes.canonical.real_arithmetic import RealArithmetic, is_complex
from passes.execute.interpreter import run
from passes.graph.graph import Graph


class Rotation(nn.Module):
    """Rotates pairs of features by angles, as Llama 4 does."""

    def forward(self, x, angles):
        turns = torch.polar(torch.ones_like(angles), angles) * 1.5
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        turned = pairs * turns[:, :, None, :] * angles[:, :, None]
        return torch.view_as_real(turned).flatten(3), torch.view_as_real(turns.unsqueeze(-2) * pairs)


class Magnitude(nn.Module):
    def forward(self, x, angles):
        return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)).abs() * angles[:, :, None], x


def traced(module, x, angles):
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module.eval(), (x, angles), dynamic_shapes=({1: tokens}, {1: tokens}))
    return Graph(program.module(check_guards=False), ("x", "angles"), ("y", "z"))


def inputs(tokens):
    generator = torch.Generator().manual_seed(tokens)
    return {
        "x": torch.randn(2, tokens, 3, 8, generator=generator),
        "angles": torch.randn(2, tokens, 4, generator=generator),
    }


def test_rotations_are_the_same_without_complex_numbers():
    graph = traced(Rotation(), **inputs(5))
    assert any(map(is_complex, graph.nodes()))
    assert apply(RealArithmetic(), graph).changed
    assert not any(map(is_complex, graph.nodes()))
    for tokens in (5, 9):
        for found, expected in zip(run(graph, inputs(tokens)), Rotation()(**inputs(tokens)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # products are summed in another order


def test_a_graph_with_another_operator_stays():
    graph = traced(Magnitude(), **inputs(5))
    before = graph.signature()
    assert not apply(RealArithmetic(), graph).changed
    assert graph.signature() == before
