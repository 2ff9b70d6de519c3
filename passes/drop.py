"""Delete residual branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Rewritten
from passes.graph import drop_branches, remove_dead
from passes.sites import find_sites, site_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from passes.graph import Graph


@dataclass(frozen=True)
class Drop:
    """Delete the branches of the named sites, and everything that only they used.

    Before::

        %n = layer_norm(%x, ...); %f = linear(%n, ...); %y = add(%x, %f); return norm(%y)

    After::

        return norm(%x)
    """

    sites: tuple[str, ...]

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph.

        Raises:
            GraphError: a name is not a site of the graph.
        """
        found = find_sites(graph)
        drop_branches(graph, [site_named(found, name) for name in self.sites])
        remove_dead(graph)
        return Rewritten(changed=self.sites)
