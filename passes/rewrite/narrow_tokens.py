"""Take out what is computed for tokens that nobody reads: exact, up to the order of floating point sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.analysis.slicing_rules import END, NOTHING, Part, Step, selection
from passes.analysis.token_liveness import aten, worthwhile_steps
from passes.base import Rewritten
from passes.graph.edit import bypass, insert_call, remove_dead, rewire, set_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from passes.graph.graph import Graph


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
        steps = worthwhile_steps(graph)
        names = tuple(node.name for node in steps)
        _Narrowing(graph, steps).run()
        left = {node.name for node in graph.nodes()}
        return Rewritten(changed=tuple(name for name in names if name in left))


# ----------------------------------------------------------------------------------------------- what is worth doing


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
