"""Sizes that are read off a given value, so that what follows it can be cut off the rest of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_input
from passes.graph.graph import Graph, aten, output_values, value_of
from passes.torch_internals import expression

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx


@dataclass(frozen=True)
class ReadSize:
    """Rewrite pass that reads a size off an output of the graph wherever it is needed behind that output.

    The decoder of a speech model needs the number of the encoder's states, which torch.export computes from the number
    of frames of the input.

    Before::

        %n = sym_size(%features, 1); %m = floordiv(%n - 1, 4) + 1  # the size of axis 1 of %hidden
        %y = reshape(%keys_of_hidden, [-1, %m, 8])

    After::

        %m = sym_size(%hidden, 1)
        %y = reshape(%keys_of_hidden, [-1, %m, 8])

    Attributes:
        output: name of the output.
        axis: its axis.
    """

    output: str
    axis: int = 1

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the nodes whose size is read off the output now."""
        hidden = output_values(graph)[graph.outputs.index(self.output)]
        size = value_of(hidden).shape[self.axis]
        if not isinstance(size, torch.SymInt):
            return Rewritten(changed=())
        nodes = graph.nodes()
        place = {node: number for number, node in enumerate(nodes)}
        readers = [
            (reader, node)
            for node in nodes
            if _is_size(node, size)
            for reader in node.users
            if place.get(reader, len(nodes)) > place[hidden]
        ]
        if readers:
            read = insert_call(graph, aten.sym_size.int, hidden, self.axis, before=hidden.next)
            for reader, node in readers:
                replace_input(graph, reader, node, read)
            remove_dead(graph)
        return Rewritten(changed=tuple(dict.fromkeys(node.name for _, node in readers)))


def _is_size(node: fx.Node, size: torch.SymInt) -> bool:
    """Return whether a node computes a size that is equal to a given one for every input."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and expression(value) == expression(size)
