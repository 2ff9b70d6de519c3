"""Where a site stands in a graph that has already been changed, and what a stand-in for its branch may read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.base import PassError
from passes.graph import is_sum, value_of
from passes.sites import CONV_OPS, LINEAR_OPS, aten

if TYPE_CHECKING:
    from torch import fx

    from passes.graph import Graph, Site

SCALINGS = frozenset({aten.mul.Tensor, aten.mul_.Tensor})


@dataclass(frozen=True)
class Place:
    """Names of the nodes around a site, read in the graph as it is now.

    `root` holds the sum behind the site. `normalised` is what the branch's first linear map reads, `previous` the
    branch output last added to the trunk, by the sum `trunk`; where there is none, `refused` says why.
    """

    add: str
    branch: str
    trunk: str
    root: str
    normalised: str | None
    previous: str | None
    refused: Mapping[str, str]

    def source(self, name: str) -> str:
        """The node that a source names."""
        found = {"state": self.trunk, "normalised": self.normalised, "previous": self.previous}[name]
        assert found is not None
        return found

    def names(self) -> set[str]:
        """All nodes whose values a fit needs."""
        return {self.branch, self.trunk, self.root, *filter(None, (self.normalised, self.previous))}


def place_of(graph: Graph, site: Site) -> Place:
    """Find a site of the original graph in the current one.

    Raises:
        PassError: its branch is gone already.
    """
    nodes = {node.name: node for node in graph.nodes()}
    if site.add not in nodes or site.branch not in nodes or nodes[site.branch] not in nodes[site.add].all_input_nodes:
        raise PassError(f"the branch of {site.name} is gone already, so nothing can stand in for it.")
    add, branch = nodes[site.add], nodes[site.branch]
    trunk = nodes[site.trunk] if site.trunk in nodes else _other(add, branch)
    refused: dict[str, str] = {}
    normalised = _read_first(branch, trunk)
    if normalised is None:
        refused["normalised"] = f"{site.name}: its first linear map reads the state itself, or none was found"
    previous = _previous(site, add, branch, trunk)
    if isinstance(previous, str):
        refused["previous"] = previous
    return Place(
        add=add.name,
        branch=branch.name,
        trunk=trunk.name,
        root=site.root if site.root in nodes else add.name,
        normalised=None if normalised is None else normalised.name,
        previous=None if isinstance(previous, str) else previous.name,
        refused=refused,
    )


def _other(add: fx.Node, branch: fx.Node) -> fx.Node:
    others = [node for node in add.all_input_nodes if node is not branch]
    return others[0] if others else branch


def _read_first(branch: fx.Node, trunk: fx.Node) -> fx.Node | None:
    """The input, shaped like the trunk, of the first linear map between trunk and branch output."""
    shape = str(value_of(trunk).shape)
    for node in _between(trunk, branch):
        if node.target in LINEAR_OPS | CONV_OPS:
            (read, *_) = node.all_input_nodes
            fits = read is not trunk and str(getattr(value_of(read), "shape", None)) == shape
            return read if fits else None
    return None


def _between(trunk: fx.Node, branch: fx.Node) -> Iterator[fx.Node]:
    """Nodes computed from the trunk that lead to the branch output, in order."""
    needed, stack = {branch}, [branch]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is not trunk and source not in needed:
                needed.add(source)
                stack.append(source)
    reached = {trunk}
    for node in trunk.graph.nodes:
        if node in needed and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            yield node


def _previous(site: Site, add: fx.Node, branch: fx.Node, trunk: fx.Node) -> fx.Node | str:
    """The branch output that was last added to the trunk, or why a map of it could not be folded anywhere."""
    if not is_sum(trunk):
        return f"{site.name} cannot be folded backwards: its trunk is no sum, {trunk.name} lies between"
    inside = {add, *_between(trunk, branch)}
    if not inside.issuperset(trunk.users):
        return f"{site.name} cannot be folded backwards: the state before it has other readers"
    for operand in trunk.all_input_nodes:
        if len(operand.users) == 1 and projection(operand) is not None:
            return operand
    return f"{site.name} cannot be folded backwards: what is added before it does not end in a linear map"


def projection(node: fx.Node) -> fx.Node | None:
    """The linear map that a value comes from, through per-channel scales (LayerScale) at most."""
    while node.target in SCALINGS and len(node.users) == 1:
        moving = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if len(moving) != 1:
            return None
        (node,) = moving
    return node if node.target in LINEAR_OPS and len(node.users) == 1 else None
