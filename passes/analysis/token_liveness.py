"""Dead tokens: which part of each value is used by what follows, found from the outputs up."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

from passes.analysis.slicing_rules import NOTHING, Part, Step, selection, size_of, step_for
from passes.graph.sites import ATTENTION_OPS, LINEAR_OPS, PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from passes.graph.graph import Graph


aten = torch.ops.aten


EXPENSIVE = LINEAR_OPS | PRODUCTS | ATTENTION_OPS


def read_parts(graph: Graph) -> dict[str, Part]:
    """Which part of a value is read, by node name, for the nodes that `Unread` would narrow. Changes nothing."""
    return {node.name: step.part for node, step in worthwhile_steps(graph).items()}


def worthwhile_steps(graph: Graph) -> dict[fx.Node, Step]:
    """The nodes to narrow, in order: connected groups of them that hold a matrix product.

    Groups are planned again from the start without those found to be of no use, because what one of them does not
    read is another's reason to be narrowed.
    """
    banned: set[fx.Node] = set()
    while True:
        steps = _plan(graph, banned)
        useless = {node for node in steps if _is_cut_off(node, steps)}
        for group in _groups(steps):
            if not any(node.target in EXPENSIVE for node in group):
                useless |= group
        if not useless:
            return {node: steps[node] for node in graph.nodes() if node in steps}
        banned |= useless


def _plan(graph: Graph, banned: Collection[fx.Node]) -> dict[fx.Node, Step]:
    """From the outputs up: what each node's readers want of it, and whether it can be made to compute no more."""
    steps: dict[fx.Node, Step] = {}
    wanted: dict[fx.Node, Part | None] = {}
    for node in reversed(graph.nodes()):
        if node not in wanted and node.users:
            continue  # its only readers were narrowed to something else
        part = wanted.get(node)
        step = step_for(node, part) if part and node not in banned and _shrinks(node, part) else None
        if step:
            steps[node] = step
        asks = step.asks if step else selection(node)
        for source in node.all_input_nodes:
            ask = asks.get(source)
            if ask != NOTHING:
                wanted[source] = _hull(source, wanted[source], ask) if source in wanted else ask
    return steps


def _hull(node: fx.Node, left: Part | None, right: Part | None) -> Part | None:
    """What covers both, None for everything."""
    if left == right or left is None or right is None:
        return left if left == right else None
    if left.axis != right.axis or not isinstance(size_of(node, left.axis), int):
        return None
    return Part(left.axis, min(left.start, right.start), max(left.stop, right.stop))


def _shrinks(node: fx.Node, part: Part) -> bool:
    """At least by half. Of an axis without a fixed size one token only: several may be fewer at run time."""
    size = size_of(node, part.axis)
    return 2 * part.width <= size if isinstance(size, int) else part.width == 1


def _is_cut_off(node: fx.Node, steps: Mapping[fx.Node, Step]) -> bool:
    """Whether a node takes one of several results that are not narrowed alike: lists cannot be sliced."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and (source not in steps or steps[source].part != steps[node].part)


def _groups(steps: Mapping[fx.Node, Step]) -> list[set[fx.Node]]:
    """Narrowed nodes that read each other."""
    groups: list[set[fx.Node]] = []
    for node, step in steps.items():
        joined = {node, *(source for source in step.asks if source in steps)}
        apart = [group for group in groups if group.isdisjoint(joined)]
        groups = [*apart, joined.union(*(group for group in groups if not group.isdisjoint(joined)))]
    return groups
