"""Take out what is computed for tokens that nobody reads: exact, up to the order of floating point sums."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.analysis.slicing_rules import END, NOTHING, Part, Step, selection, size_of, step_for
from passes.base import Rewritten
from passes.graph.edit import bypass, insert_call, remove_dead, rewire, set_arguments
from passes.graph.sites import ATTENTION_OPS, LINEAR_OPS, PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from passes.graph.graph import Graph

aten = torch.ops.aten

EXPENSIVE = LINEAR_OPS | PRODUCTS | ATTENTION_OPS


@dataclass(frozen=True)
class Unread:
    """Compute only what is read where a model reads one token (or few) of its last block.

    A selection moves up through everything that treats the tokens of its axis alike, until it meets what mixes them
    or what somebody else reads in full. In a block that is read at the class token, the attention's query rows, its
    output projection, the norm and the MLP are left with one token; keys and values keep all.

    Before::

        %a = attention(%q, %k, %v); %f = linear(%a, ...); %y = add(%x, %f); %n = layer_norm(%y, ...)
        return select(%n, 1, 0)

    After::

        %q0 = slice(%q, 1, 0, 1); %a = attention(%q0, %k, %v); %f = linear(%a, ...)
        %x0 = slice(%x, 1, 0, 1); %y = add(%x0, %f); %n = layer_norm(%y, ...); return select(%n, 1, 0)

    Run it last: the trunk of a narrowed block is a slice, so its residual branches are no sites any more. A graph
    in which no matrix product would get smaller is left as it is.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; returns the names of the nodes that compute fewer tokens now."""
        steps = _worthwhile(graph)
        names = tuple(node.name for node in steps)
        _Narrowing(graph, steps).run()
        left = {node.name for node in graph.nodes()}
        return Rewritten(changed=tuple(name for name in names if name in left))


def read_parts(graph: Graph) -> dict[str, Part]:
    """Which part of a value is read, by node name, for the nodes that `Unread` would narrow. Changes nothing."""
    return {node.name: step.part for node, step in _worthwhile(graph).items()}


# ----------------------------------------------------------------------------------------------- what is worth doing


def _worthwhile(graph: Graph) -> dict[fx.Node, Step]:
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


# ---------------------------------------------------------------------------------------------------------- the edit


class _Narrowing:
    """The edit itself. Nodes keep their names; slices are shared by all readers of the same part."""

    def __init__(self, graph: Graph, steps: Mapping[fx.Node, Step]) -> None:
        self.graph = graph
        self.steps = steps
        self.asks = {node: selection(node) for node in graph.nodes()}  # read while shapes are the old ones
        self.slices: dict[tuple[fx.Node, Part], fx.Node] = {}
        self.idle: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Narrow all nodes, then take out those that hand on one input."""
        for node in self.graph.nodes():
            if node in self.steps:
                self._narrow(node, self.steps[node])
            else:
                self._select(node, self.asks[node])
        for node, value in reversed(self.idle.items()):  # the value may itself be an idle node that comes earlier
            bypass(self.graph, node, value)
        if self.steps:
            remove_dead(self.graph)

    def _narrow(self, node: fx.Node, step: Step) -> None:
        parts = {source: self._fetch(source, ask, node) for source, ask in step.asks.items() if ask != NOTHING}
        if step.hands_on:
            (value,) = parts.values()
            self._hand_on(node, value)
            return
        for source, value in parts.items():
            rewire(self.graph, node, source, value)
        changed = node.args if step.arguments is None else step.arguments
        set_arguments(self.graph, node, *fx.node.map_arg(changed, lambda source: parts.get(source, source)))

    def _select(self, node: fx.Node, asks: Mapping[fx.Node, Part | None]) -> None:
        """Let a selection from a narrowed value count from where that begins."""
        for source, ask in asks.items():
            if source not in self.steps or ask is None or not _lies_in(ask, self.steps[source].part):
                continue
            if node.target == aten.select.int:
                set_arguments(self.graph, node, source, ask.axis, ask.start - self.steps[source].part.start)
            else:
                self._hand_on(node, self._fetch(source, ask, node))

    def _hand_on(self, node: fx.Node, value: fx.Node) -> None:
        """Make a slice or concatenation one of all that it gets, to be taken out at the end."""
        if node.target == aten.cat.default:
            set_arguments(self.graph, node, [value], *node.args[1:])
        else:
            set_arguments(self.graph, node, value, node.args[1], 0, END)
        self.idle[node] = value

    def _fetch(self, source: fx.Node, part: Part | None, before: fx.Node) -> fx.Node:
        """The node that holds `part` of the original value of `source`, None for all of it."""
        kept = self.steps[source].part if source in self.steps else None
        if part is None or part == kept:
            return source
        if (source, part) not in self.slices:
            start = part.start - kept.start if kept else part.start
            stop = END if start < 0 and not part.stop else start + part.width
            self.slices[source, part] = insert_call(
                self.graph, aten.slice.Tensor, source, part.axis, start, stop, before=before
            )
        return self.slices[source, part]


def _lies_in(part: Part, kept: Part) -> bool:
    """Whether a part is still there; where it is not, nobody reads it any more."""
    return part.axis == kept.axis and kept.start <= part.start and part.stop <= kept.stop
