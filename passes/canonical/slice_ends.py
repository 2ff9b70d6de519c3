"""Ends of slices that are counted from the end of an axis, by a size, as places from its start."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.edit import insert_call, set_arguments
from passes.graph.graph import Graph, aten, value_of
from passes.torch_internals import hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SLICE = aten.slice.Tensor
END = 3  # place of the end among the arguments of a slice


@dataclass(frozen=True)
class EndsFromStart:
    """Rewrite pass that counts the end of a slice from the start where a size counts it from the end.

    A module that pads its tokens to a multiple cuts the padding off by ``x[:, :-padding]`` (LED). Without padding, the
    end is 0 and nothing would be left; the graph then takes tokens that need no padding too.

    Before::

        %end = neg(%padding); %y = slice(%x, 1, 0, %end)

    After::

        %end = neg(%padding); %y = slice(%x, 1, 0, sym_size(%x, 1) + %end)
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; return the names of the slices whose end was replaced."""
        changed = []
        for node in filter(ends_before_end, graph.nodes()):
            values, axis, start, end, *step = node.args
            size = insert_call(graph, aten.sym_size.int, values, axis, before=node)
            place = insert_call(graph, operator.add, size, end, before=node)
            set_arguments(graph, node, values, axis, start, place, *step)
            changed.append(node.name)
        return Rewritten(changed=tuple(changed))


def ends_before_end(node: fx.Node) -> bool:
    """Return whether a node is a slice whose end is a size that counts from the end of the axis."""
    end = node.args[END] if node.target is SLICE and len(node.args) > END else None
    value = value_of(end) if isinstance(end, fx.Node) else None
    return isinstance(value, torch.SymInt) and hint(value) is not None and hint(value) < 0
