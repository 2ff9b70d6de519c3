"""Take out what does nothing at inference time: dropout, copies, casts to the same type, assertions, dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph import Graph, bypass, is_identity, loosen_views, remove_dead, remove_effects

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
