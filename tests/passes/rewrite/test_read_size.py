"""Sizes behind an output are read off that output."""

import torch
from torch import nn

from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.graph import Graph, aten, output_values
from passes.rewrite.read_size import ReadSize


class Halving(nn.Module):
    """Keeps every second row, and repeats the count of those that are left behind the output."""

    def forward(self, x):
        hidden = x[:, ::2].contiguous()
        return hidden, (hidden * 2).reshape(-1, hidden.shape[1] * 3)


def traced():
    rows = torch.export.Dim("rows", min=4, max=64)
    program = torch.export.export(Halving().eval(), (torch.rand(2, 10, 3),), dynamic_shapes=({1: rows},))
    return Graph(program.module(check_guards=False), ("x",), ("hidden", "y"))


def behind(graph, node):
    """The sizes of the input that nodes behind a node read."""
    nodes = graph.nodes()
    later = set(nodes[nodes.index(node) + 1 :])
    sizes = [each for each in nodes if each.target is aten.sym_size.int and each.args[0].op == "placeholder"]
    return {reader for each in sizes for reader in graph_readers(each)} & later


def graph_readers(node, seen=()):
    """All nodes that are computed from a size without a tensor in between."""
    found = set()
    for reader in node.users:
        found.add(reader)
        if isinstance(reader.meta.get("val"), torch.SymInt):
            found |= graph_readers(reader)
    return found


def test_what_follows_an_output_reads_its_size_and_not_that_of_the_input():
    graph = traced()
    inputs = {"x": torch.rand(2, 14, 3)}
    expected = run(graph, inputs)
    assert behind(graph, output_values(graph)[0]), "nothing reads the input's size, so the test shows nothing"
    changed = apply(ReadSize("hidden"), graph)
    assert changed.changed
    assert not behind(graph, output_values(graph)[0])
    assert all(map(torch.equal, run(graph, inputs), expected))


def test_a_fixed_size_stays():
    program = torch.export.export(Halving().eval(), (torch.rand(2, 10, 3),))
    graph = Graph(program.module(check_guards=False), ("x",), ("hidden", "y"))
    assert not apply(ReadSize("hidden"), graph).changed
