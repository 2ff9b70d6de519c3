"""Where a site stands in a graph that has already been changed, and what a stand-in for its branch may read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from passes.base import PassError
from passes.graph.graph import is_sum, value_of
from passes.graph.sites import CONV_OPS, LINEAR_OPS, aten

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph, Site

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
        PassError: its branch is gone already, or the state that it is computed from.
    """
    nodes = {node.name: node for node in graph.nodes()}
    add, branch = _sum_of(nodes, site)
    root = nodes.get(site.root) or _root(add, site)
    trunk = nodes.get(site.trunk) or _trunk(root, branch)
    if trunk is None:
        raise PassError(f"the state before {site.name} is gone: what was put beside it has taken its place.")
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
        root=root.name,
        normalised=None if normalised is None else normalised.name,
        previous=None if isinstance(previous, str) else previous.name,
        refused=refused,
    )


def _sum_of(nodes: Mapping[str, fx.Node], site: Site) -> tuple[fx.Node, fx.Node]:
    """The sum that adds a branch now, and the branch; another one than at first where a branch beside it is gone."""
    branch = nodes.get(site.branch)
    if branch is None:
        raise PassError(f"the branch of {site.name} is gone already, so nothing can stand in for it.")
    add, *others = branch.users
    if others or not is_sum(add):
        raise PassError(f"the branch of {site.name} is no term of a sum any more: a map was put behind it.")
    return add, branch


def _root(add: fx.Node, site: Site) -> fx.Node:
    """The complete sum, where the one that was complete at first is gone with one of its terms."""
    while site.add != site.root and len(add.users) == 1 and is_sum(reader := next(iter(add.users))):
        if any(term.op == "get_attr" for term in reader.all_input_nodes):
            break  # a constant that stands for a later branch
        add = reader
    return add


def _trunk(root: fx.Node, branch: fx.Node) -> fx.Node | None:
    """The term of a sum that the branch is computed from, where the one it had at first is gone: the earliest."""
    order = {node: position for position, node in enumerate(root.graph.nodes)}
    above = _ancestors(branch)
    return min((term for term in _terms(root) if term in above), key=order.__getitem__, default=None)


def _terms(root: fx.Node) -> Iterator[fx.Node]:
    for operand in root.all_input_nodes:
        if is_sum(operand) and len(operand.users) == 1:
            yield from _terms(operand)
        else:
            yield operand


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        fresh = set(stack.pop().all_input_nodes) - seen
        seen |= fresh
        stack.extend(fresh)
    return seen - {node}


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
    readers = {reader for node in (trunk, *inside - {add}) for reader in node.users if _is_tensor(reader)}
    if not inside.issuperset(readers):
        return f"{site.name} cannot be folded backwards: the state before it, or what is made of it, has other readers"
    for operand in trunk.all_input_nodes:
        if len(operand.users) == 1 and trunk.args.count(operand) == 1 and projection(operand) is not None:
            return operand
    return f"{site.name} cannot be folded backwards: what is added before it does not end in a linear map"


def _is_tensor(node: fx.Node) -> bool:
    """Whether a reader sees values; a size is the same whatever is folded."""
    return node.op == "output" or isinstance(value_of(node), (torch.Tensor, list, tuple))


def projection(node: fx.Node) -> fx.Node | None:
    """The linear map that a value comes from, through per-channel scales (LayerScale) at most."""
    while node.target in SCALINGS and len(node.users) == 1:
        moving = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if len(moving) != 1:
            return None
        (node,) = moving
    return node if node.target in LINEAR_OPS and len(node.users) == 1 else None
