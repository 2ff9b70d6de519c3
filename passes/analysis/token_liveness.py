"""Liveness analysis of tokens: the part of each value that later operators read, propagated from the outputs."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from passes.analysis.slicing_rules import NOTHING, AxisRange, Narrowing, narrowing_for, selection, size_of
from passes.graph.sites import ATTENTION_OPS, LINEAR_OPS, PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from passes.graph.graph import Graph

aten = torch.ops.aten

EXPENSIVE = LINEAR_OPS | PRODUCTS | ATTENTION_OPS


def live_parts(graph: Graph) -> dict[str, AxisRange]:
    """Return the part of its value that is read, by name of each node that `NarrowTokens` would narrow.

    The graph is not changed.
    """
    return {node.name: step.part for node, step in profitable_narrowings(graph).items()}


def profitable_narrowings(graph: Graph) -> dict[fx.Node, Narrowing]:
    """Return the narrowing steps worth applying, in graph order.

    A connected group of steps is kept if it contains a linear map, a matrix product or an attention. The plan is
    repeated without the rejected nodes until no group is rejected, because a rejected node reads its whole inputs.
    """
    rejected: set[fx.Node] = set()
    while True:
        steps = _plan(graph, rejected)
        newly_rejected = {node for node in steps if _is_inconsistent_item(node, steps)}
        for group in _groups(steps):
            if not any(node.target in EXPENSIVE for node in group):
                newly_rejected |= group
        if not newly_rejected:
            return {node: steps[node] for node in graph.nodes() if node in steps}
        rejected |= newly_rejected


def _plan(graph: Graph, rejected: Collection[fx.Node]) -> dict[fx.Node, Narrowing]:
    """Propagate the parts that consumers read from the outputs upwards, and narrow each node that has a rule."""
    steps: dict[fx.Node, Narrowing] = {}
    read: dict[fx.Node, AxisRange | None] = {}
    for node in reversed(graph.nodes()):
        if node not in read and node.users:
            continue  # its consumers were narrowed to other inputs
        part = read.get(node)
        step = narrowing_for(node, part) if part and node not in rejected and _shrinks(node, part) else None
        if step:
            steps[node] = step
        asks = step.asks if step else selection(node)
        for source in node.all_input_nodes:
            requested = asks.get(source)
            if requested != NOTHING:
                read[source] = _hull(source, read[source], requested) if source in read else requested
    return steps


def _hull(node: fx.Node, left: AxisRange | None, right: AxisRange | None) -> AxisRange | None:
    """Return the smallest part that covers both; None is the whole value."""
    if left == right or left is None or right is None:
        return left if left == right else None
    if left.axis != right.axis or not isinstance(size_of(node, left.axis), int):
        return None
    return AxisRange(left.axis, min(left.start, right.start), max(left.stop, right.stop))


def _shrinks(node: fx.Node, part: AxisRange) -> bool:
    """Return whether a part is at most half of its axis.

    A part of a symbolic axis must be one entry, because the axis may have fewer entries than a longer part.
    """
    size = size_of(node, part.axis)
    return 2 * part.width <= size if isinstance(size, int) else part.width == 1


def _is_inconsistent_item(node: fx.Node, steps: Mapping[fx.Node, Narrowing]) -> bool:
    """Return whether a node takes an item of a list of results that is not narrowed to the same part.

    A list of results cannot be sliced.
    """
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and (source not in steps or steps[source].part != steps[node].part)


def _groups(steps: Mapping[fx.Node, Narrowing]) -> list[set[fx.Node]]:
    """Return the connected groups of narrowed nodes."""
    groups: list[set[fx.Node]] = []
    for node, step in steps.items():
        joined = {node, *(source for source in step.asks if source in steps)}
        disjoint = [group for group in groups if group.isdisjoint(joined)]
        groups = [*disjoint, joined.union(*(group for group in groups if not group.isdisjoint(joined)))]
    return groups
