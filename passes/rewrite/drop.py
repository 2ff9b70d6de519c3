"""Removal of residual branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import Rewritten
from passes.graph.cache_state import remove_dead_state
from passes.graph.edit import drop_branches, remove_dead
from passes.graph.sites import find_sites, site_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from passes.graph.graph import Graph, Site


@dataclass(frozen=True)
class Drop:
    """Rewrite pass that removes the branches of sites and all nodes that only these branches use.

    A name is looked up in the current graph. A `Site` may come from the graph that this one was forked from; the
    lookup by name can fail after other branches were replaced.

    Before::

        %n = layer_norm(%x, ...); %f = linear(%n, ...); %y = add(%x, %f); return norm(%y)

    After::

        return norm(%x)
    """

    sites: tuple[str | Site, ...]

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Remove the branches. Return the names of the sites.

        Raises:
            GraphError: a name is not a site of the graph.
        """
        current = find_sites(graph) if any(isinstance(site, str) for site in self.sites) else ()
        dropped = [site_named(current, site) if isinstance(site, str) else site for site in self.sites]
        drop_branches(graph, dropped)
        remove_dead_state(graph)
        remove_dead(graph)
        return Rewritten(changed=tuple(site.name for site in dropped))
