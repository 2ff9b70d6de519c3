"""Slices that end before the end of an axis by a size take values where that size is 0, as nothing is cut off then."""

from __future__ import annotations

import torch
from torch import nn

from passes.base import apply
from passes.canonical.clean import Clean
from passes.canonical.slice_ends import EndsFromStart, ends_before_end
from passes.execute.interpreter import run
from passes.graph.graph import Graph

BLOCK = 4


class Padded(nn.Module):
    """Pads tokens [rows, tokens] to blocks, and cuts the padding and one place more off by negative ends."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        padding = (BLOCK - values.shape[1] % BLOCK) % BLOCK
        if padding > 0:
            values = nn.functional.pad(values, (0, padding))
        values = values + values.flatten(1).mean()
        if padding > 0:
            values = values[:, :-padding]
        return values[:, :-1] * 2


def graph_of(module: nn.Module, values: torch.Tensor) -> Graph:
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (values,), dynamic_shapes=dynamic, strict=False)
    graph = Graph(program.module(check_guards=False), ("values",), ("y",))
    apply(Clean(), graph)
    return graph


def test_values_without_padding_are_taken_too() -> None:
    graph = graph_of(Padded(), torch.randn(2, 9))
    found = [node for node in graph.nodes() if ends_before_end(node)]
    assert len(found) == 1
    assert len(apply(EndsFromStart(), graph).changed) == 1
    assert not [node for node in graph.nodes() if ends_before_end(node)]
    for tokens in (5, 8, 11, 12):
        values = torch.randn(3, tokens)
        torch.testing.assert_close(run(graph, {"values": values})[0], Padded()(values))
    assert not apply(EndsFromStart(), graph).changed
