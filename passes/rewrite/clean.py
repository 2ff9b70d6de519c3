"""Take out what does nothing at inference time: dropout, copies, casts to the same type, assertions, dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.edit import bypass, loosen_views, remove_dead, remove_effects
from passes.graph.graph import CASTS, COPIES, DROPOUTS, Graph, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Clean:
    """Remove no-ops and dead code, and make views indifferent to strides.

    Before::

        %a = dropout(%x, 0.1, False); %b = to(%a, float32); %dead = linear(%b, %w); return add(%b, 1)

    After::

        return add(%x, 1)
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; returns the names of the no-op nodes taken out."""
        loosen_views(graph)  # first: a view may need the copy before it that goes next
        gone = remove_effects(graph)
        for node in graph.nodes():
            if is_identity(node):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                bypass(graph, node, source)
                gone.append(node.name)
        remove_dead(graph)
        return Rewritten(changed=tuple(gone))


def is_identity(node: fx.Node) -> bool:
    """Whether a node hands on its first input unchanged at inference time."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in COPIES:
        return True
    if node.target in DROPOUTS:
        return not node.args[2] if len(node.args) > 2 else not node.kwargs.get("train", True)
    return node.target in CASTS and _same_type(node, node.args[0])


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    """A cast that changes neither type nor device; one that is asked for a memory format stays."""
    after, before = value_of(node), value_of(source)
    if not isinstance(after, torch.Tensor) or not isinstance(before, torch.Tensor):
        return False
    return (after.dtype, after.device) == (before.dtype, before.device) and "memory_format" not in node.kwargs
