"""Values that are filled slice by slice become a concatenation; others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from passes.base import apply
from passes.canonical.clean import Clean
from passes.canonical.join_slices import SCATTER, JoinSlices
from passes.execute.interpreter import run
from passes.graph.graph import Graph, aten

Fill = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Filling(nn.Module):
    def __init__(self, fill: Fill) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fill(x, y) * 2


def expanded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Fill the keys of DeepSeek: a part of each head, and a part that all heads share."""
    keys = x.new_empty(*x.shape[:-1], 12)
    keys[..., :8].copy_(x)
    keys[..., 8:].copy_(y)
    return keys


def assigned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keys = x.new_zeros(x.shape[0], 3, x.shape[2], 12)
    keys[..., 0:8] = x
    keys[..., 8:10] = y[..., :2]
    keys[..., 10:12] = y[..., 2:]
    return keys


def with_gap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keys = x.new_zeros(x.shape[0], 3, x.shape[2], 13)
    keys[..., :8] = x
    keys[..., 9:] = y
    return keys


def overlapping(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keys = x.new_zeros(x.shape[0], 3, x.shape[2], 11)
    keys[..., :8] = x
    keys[..., 7:] = y
    return keys


def with_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keys = x.new_zeros(x.shape[0], 3, x.shape[2], 16)
    keys[..., ::2] = x
    keys[..., 12:] = y
    return keys


def other_axes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keys = x.new_zeros(x.shape[0], 3, x.shape[2], 8)
    keys[:, :1] = x[:, :1]
    keys[..., 4:] = y
    return keys


def dynamic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    keys = x.new_zeros(x.shape[0], 3, x.shape[2] * 2, 8)
    keys[:, :, : x.shape[2]] = x
    keys[:, :, x.shape[2] :] = x * 3
    return keys + y.sum()


def traced(fill: Fill) -> Graph:
    feeds, rows, tokens = inputs(2, 5), torch.export.Dim("rows", max=64), torch.export.Dim("tokens", min=2, max=64)
    shapes = ({0: rows, 2: tokens}, {0: rows, 2: tokens})
    program = torch.export.export(Filling(fill).eval(), tuple(feeds.values()), dynamic_shapes=shapes)
    graph = Graph(program.run_decompositions({}).module(check_guards=False), ("x", "y"), ("z",))
    apply(Clean(), graph)
    return graph


def inputs(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.rand(rows, 3, tokens, 8, generator=generator),
        "y": torch.rand(rows, 1, tokens, 4, generator=generator),
    }


@pytest.mark.parametrize(
    ("fill", "joins"),
    [(expanded, 1), (assigned, 1), (with_gap, 0), (overlapping, 0), (with_step, 0), (other_axes, 0), (dynamic, 0)],
)
def test_slices_that_fill_a_value_are_joined(fill: Fill, joins: int) -> None:
    graph = traced(fill)
    assert any(node.target is SCATTER for node in graph.nodes())
    assert len(apply(JoinSlices(), graph).changed) == joins
    assert sum(node.target is aten.cat.default for node in graph.nodes()) == joins
    assert any(node.target is SCATTER for node in graph.nodes()) == (not joins)
    for feeds in (inputs(2, 5), inputs(3, 9)):
        assert torch.equal(run(graph, feeds)[0], fill(**feeds) * 2)
