"""The last exact rewrites of a graph before it is lowered."""

from __future__ import annotations

from passes.base import apply
from passes.graph.graph import Graph
from passes.rewrite.fold_linear import Fuse
from passes.rewrite.narrow_tokens import Unread


def finished(graph: Graph) -> Graph:
    """A fork ready to be lowered: what is linear folded, what nobody reads left out. It computes the same."""
    fork = graph.fork()
    apply(Fuse(), fork)
    apply(Unread(), fork)
    return fork
