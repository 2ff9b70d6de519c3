"""Exact rewrites of a graph before it is lowered."""

from __future__ import annotations

from passes.base import apply
from passes.graph.graph import Graph
from passes.rewrite.fold_linear import FoldLinear
from passes.rewrite.narrow_tokens import NarrowTokens


def fold_graph(graph: Graph) -> Graph:
    """Return a fork of the graph with adjacent linear maps folded and unused tokens skipped; both compute the same."""
    fork = graph.fork()
    apply(FoldLinear(), fork)
    apply(NarrowTokens(), fork)
    return fork
