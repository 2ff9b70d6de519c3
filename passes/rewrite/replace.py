"""Replacement of residual branches by fitted maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from passes.analysis.site_location import SiteNodes, locate_site
from passes.base import PassError, Rewritten
from passes.graph.cache_state import remove_dead_state
from passes.graph.edit import insert_call, insert_constant, remove_dead, replace_all_uses, replace_input
from passes.graph.graph import value_of
from passes.graph.sites import aten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx

    from passes.analysis.least_squares import Map, Replacement
    from passes.graph.graph import Graph, Site


@dataclass(frozen=True, eq=False)
class Replace:
    """Rewrite pass that replaces the branch of one site by a fitted map.

    Before::

        %n = layer_norm(%x, ...); %f = attention(%n); %y = add(%x, %f)

    After, with a linear map of the state (``state``)::

        %f = linear(%x, A, b); %y = add(%x, %f)

    With a per-channel scale (``state``), whose sum with the trunk is again one scale::

        %y = add(mul(%x, 1 + a), b)

    Folded into the previous branch (``previous``), where %x was add(%w, %m)::

        %y = add(%w, linear(%m, A, b))
    """

    site: Site
    stand_in: Replacement

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Replace the branch.

        Raises:
            PassError: the branch is no longer in the graph, the site has no such source, or the feature axis takes no
                linear map.
        """
        location = locate_site(graph, self.site)
        if self.stand_in.source in location.refused:
            raise PassError(f"{location.refused[self.stand_in.source]}.")
        nodes = {node.name: node for node in graph.nodes()}
        writer = _Writer(graph, self.site, self.stand_in.map, value_of(nodes[location.trunk]).dtype)
        if self.stand_in.source == "previous":
            _fold_into_previous(graph, writer, location, nodes)
        else:
            _replace_branch(graph, writer, location, nodes, nodes[location.source(self.stand_in.source)])
        remove_dead_state(graph)
        remove_dead(graph)
        return Rewritten(changed=(self.site.name,))


def _replace_branch(
    graph: Graph, writer: _Writer, location: SiteNodes, nodes: Mapping[str, fx.Node], source: fx.Node
) -> None:
    add, branch, trunk = nodes[location.add], nodes[location.branch], nodes[location.trunk]
    # A parallel branch identifies its site by the trunk node, which then has to stay a term of the sum.
    only_branch = source is trunk and set(add.all_input_nodes) == {trunk, branch} and location.root == location.add
    if only_branch and len(writer.map.factors) == 1 and writer.map.factors[0].ndim == 1:
        replace_all_uses(graph, add, writer.scale(trunk, writer.map.factors[0] + 1.0, before=add))
        return
    replace_input(graph, add, branch, writer.mapped(source, before=add))


def _fold_into_previous(graph: Graph, writer: _Writer, location: SiteNodes, nodes: Mapping[str, fx.Node]) -> None:
    trunk, previous = nodes[location.trunk], nodes[location.source("previous")]
    replace_all_uses(graph, nodes[location.add], trunk)
    replace_input(graph, trunk, previous, writer.mapped(previous, before=trunk))


@dataclass(frozen=True)
class _Writer:
    """Writer of the nodes of a fitted map, with the dtype and the feature axis of the trunk."""

    graph: Graph
    site: Site
    map: Map
    dtype: torch.dtype

    def mapped(self, source: fx.Node, *, before: fx.Node) -> fx.Node:
        """Insert the nodes of A r + b."""
        factors = self.map.factors
        if not factors:
            assert self.map.bias is not None  # a constant map has a bias only
            return self._constant("bias", self._along(source, self.map.bias), before)
        if factors[0].ndim == 1:
            return self.scale(source, factors[0], before=before)
        for number, factor in enumerate(factors, start=1):
            bias = self.map.bias if number == len(factors) else None
            source = self._linear(source, factor, bias, before)
        return source

    def scale(self, source: fx.Node, factor: torch.Tensor, *, before: fx.Node) -> fx.Node:
        """Insert the nodes of a * r + b with one factor per channel."""
        scale = self._constant("scale", self._along(source, factor), before)
        scaled = insert_call(self.graph, aten.mul.Tensor, source, scale, before=before)
        if self.map.bias is None:
            return scaled
        bias = self._constant("bias", self._along(source, self.map.bias), before)
        return insert_call(self.graph, aten.add.Tensor, scaled, bias, before=before)

    def _linear(self, source: fx.Node, matrix: torch.Tensor, bias: torch.Tensor | None, before: fx.Node) -> fx.Node:
        dims = value_of(source).ndim
        last = self.site.channel_dim == dims - 1
        if not last and (self.site.channel_dim, dims) != (1, 4):
            raise PassError(
                f"{self.site.name} has its features on axis {self.site.channel_dim} of {dims}; a linear map needs them "
                "on the last axis or on axis 1 of 4. Drop the site or use a per-channel scale."
            )
        weight = self._constant("weight", matrix if last else matrix[:, :, None, None], before)
        offset = () if bias is None else (self._constant("bias", bias, before),)
        target = aten.linear.default if last else aten.conv2d.default
        return insert_call(self.graph, target, source, weight, *offset, before=before)

    def _along(self, source: fx.Node, vector: torch.Tensor) -> torch.Tensor:
        """Reshape a vector to broadcast along the feature axis."""
        return vector.reshape(-1, *[1] * (value_of(source).ndim - 1 - self.site.channel_dim))

    def _constant(self, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
        return insert_constant(self.graph, f"{self.site.name}.{name}", tensor.to(self.dtype), before=before)
