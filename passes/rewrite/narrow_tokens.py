"""Dead token elimination: exact up to the order of floating point sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.analysis.slicing_rules import END, NOTHING, AxisRange, Narrowing, selection
from passes.analysis.token_liveness import profitable_narrowings
from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_all_uses, replace_input, set_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from passes.graph.graph import Graph

aten = torch.ops.aten


@dataclass(frozen=True)
class NarrowTokens:
    """Rewrite pass that removes the computation of tokens that no later operator reads.

    A slice is moved upwards through operators that treat the tokens independently. It stops at an operator that mixes
    tokens and at a value that another consumer reads in full. In a last block that is read at the class token, the
    query rows of the attention, its output projection, the norm and the MLP keep one token. Keys and values keep all.

    Before::

        %a = attention(%q, %k, %v); %f = linear(%a, ...); %y = add(%x, %f); %n = layer_norm(%y, ...)
        return select(%n, 1, 0)

    After::

        %q0 = slice(%q, 1, 0, 1); %a = attention(%q0, %k, %v); %f = linear(%a, ...)
        %x0 = slice(%x, 1, 0, 1); %y = add(%x0, %f); %n = layer_norm(%y, ...); return select(%n, 1, 0)

    Run this pass last: the trunk of a narrowed block is a slice, so its residual branches are no longer sites. The pass
    does not change a graph in which no matrix product gets smaller.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Narrow the graph. Return the names of the remaining nodes that compute fewer tokens."""
        steps = profitable_narrowings(graph)
        names = tuple(node.name for node in steps)
        _Narrowing(graph, steps).run()
        remaining = {node.name for node in graph.nodes()}
        return Rewritten(changed=tuple(name for name in names if name in remaining))


class _Narrowing:
    """Editor that applies narrowing steps. Nodes keep their names; consumers of the same part share one slice."""

    def __init__(self, graph: Graph, steps: Mapping[fx.Node, Narrowing]) -> None:
        self.graph = graph
        self.steps = steps
        self.asks = {node: selection(node) for node in graph.nodes()}  # computed before the edits change shapes
        self.slices: dict[tuple[fx.Node, AxisRange], fx.Node] = {}
        self.identities: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Narrow all nodes, then remove those that became the identity."""
        for node in self.graph.nodes():
            if node in self.steps:
                self._narrow(node, self.steps[node])
            else:
                self._select(node, self.asks[node])
        for node, value in reversed(self.identities.items()):  # `value` may itself be an earlier identity
            replace_all_uses(self.graph, node, value)
        if self.steps:
            remove_dead(self.graph)

    def _narrow(self, node: fx.Node, step: Narrowing) -> None:
        parts = {source: self._fetch(source, part, node) for source, part in step.asks.items() if part != NOTHING}
        if step.is_identity:
            (value,) = parts.values()
            self._make_identity(node, value)
            return
        for source, value in parts.items():
            replace_input(self.graph, node, source, value)
        changed = node.args if step.arguments is None else step.arguments
        set_arguments(self.graph, node, *fx.node.map_arg(changed, lambda source: parts.get(source, source)))

    def _select(self, node: fx.Node, asks: Mapping[fx.Node, AxisRange | None]) -> None:
        """Shift the indices of a selection from a narrowed value to the start of the kept part."""
        for source, part in asks.items():
            if source not in self.steps or part is None or not _lies_in(part, self.steps[source].part):
                continue
            if node.target == aten.select.int:
                set_arguments(self.graph, node, source, part.axis, part.start - self.steps[source].part.start)
            else:
                self._make_identity(node, self._fetch(source, part, node))

    def _make_identity(self, node: fx.Node, value: fx.Node) -> None:
        """Turn a slice or concatenation into the identity of `value`, to be removed at the end."""
        if node.target == aten.cat.default:
            set_arguments(self.graph, node, [value], *node.args[1:])
        else:
            set_arguments(self.graph, node, value, node.args[1], 0, END)
        self.identities[node] = value

    def _fetch(self, source: fx.Node, part: AxisRange | None, before: fx.Node) -> fx.Node:
        """Return the node that holds `part` of the original value of `source`; None is the whole value."""
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


def _lies_in(part: AxisRange, kept: AxisRange) -> bool:
    """Return whether a part lies within the kept part; a part outside it has no consumer left."""
    return part.axis == kept.axis and kept.start <= part.start and part.stop <= kept.stop
