"""Location of a site in an edited graph, and the values that a replacement of its branch may read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from passes.base import PassError
from passes.graph.graph import is_sum, unscaled, value_of
from passes.graph.sites import CONV_OPS, LINEAR_OPS, aten

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph, Site

SCALINGS = frozenset({aten.mul.Tensor, aten.mul_.Tensor})


@dataclass(frozen=True)
class SiteNodes:
    """Names of the nodes of a site in the current graph.

    `root` is the complete sum after the site. `normalised` is the input of the branch's first linear map. `previous` is
    the branch output that the sum `trunk` added last. If either is None, `refused` maps its name to the reason.
    """

    add: str
    branch: str
    trunk: str
    root: str
    normalised: str | None
    previous: str | None
    refused: Mapping[str, str]

    def source(self, name: str) -> str:
        """Return the name of the node of a source."""
        node = {"state": self.trunk, "normalised": self.normalised, "previous": self.previous}[name]
        assert node is not None
        return node

    def names(self) -> set[str]:
        """Return the names of all nodes whose values a fit needs."""
        return {self.branch, self.trunk, self.root, *filter(None, (self.normalised, self.previous))}


def locate_site(graph: Graph, site: Site) -> SiteNodes:
    """Locate a site of the original graph in the current one.

    Raises:
        PassError: the graph no longer holds the branch of the site, or the trunk before it.
    """
    nodes = {node.name: node for node in graph.nodes()}
    add, branch = _sum_of(nodes, site)
    root = nodes.get(site.root) or _root(add, site)
    trunk = nodes.get(site.trunk) or _trunk(root, branch)
    if trunk is None:
        raise PassError(
            f"the trunk before {site.name} is no longer in the graph: the map of a parallel branch replaced it."
        )
    refused: dict[str, str] = {}
    normalised = _read_first(branch, unscaled(trunk))
    if normalised is None:
        refused["normalised"] = (
            f"{site.name} has no normalised source: its first linear map reads the trunk itself or a value of another "
            "shape, or the branch has no linear map"
        )
    previous = _previous(site, add, branch, trunk)
    if isinstance(previous, str):
        refused["previous"] = previous
    return SiteNodes(
        add=add.name,
        branch=branch.name,
        trunk=trunk.name,
        root=root.name,
        normalised=None if normalised is None else normalised.name,
        previous=None if isinstance(previous, str) else previous.name,
        refused=refused,
    )


def _sum_of(nodes: Mapping[str, fx.Node], site: Site) -> tuple[fx.Node, fx.Node]:
    """Return the sum that adds the branch in the current graph, and the branch.

    After a parallel branch was dropped, this is not the original sum.
    """
    branch = nodes.get(site.branch)
    if branch is None:
        raise PassError(f"the branch of {site.name} is no longer in the graph, so it cannot be replaced.")
    add, *others = branch.users
    if others or not is_sum(add):
        raise PassError(f"the branch of {site.name} is no longer a term of a sum: a map was inserted after it.")
    return add, branch


def _root(add: fx.Node, site: Site) -> fx.Node:
    """Return the complete sum after the original one was removed together with one of its terms."""
    while site.add != site.root and len(add.users) == 1 and is_sum(reader := next(iter(add.users))):
        if any(term.op == "get_attr" for term in reader.all_input_nodes):
            break  # the constant that replaces a later branch
        add = reader
    return add


def _trunk(root: fx.Node, branch: fx.Node) -> fx.Node | None:
    """Return the last term of the sum that the branch depends on, after the original trunk node was removed."""
    order = {node: position for position, node in enumerate(root.graph.nodes)}
    ancestors = _ancestors(branch)
    return max((term for term in _terms(root) if term in ancestors), key=order.__getitem__, default=None)


def _terms(root: fx.Node) -> Iterator[fx.Node]:
    for operand in root.all_input_nodes:
        if is_sum(operand) and len(operand.users) == 1:
            yield from _terms(operand)
        else:
            yield operand


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        unseen = set(stack.pop().all_input_nodes) - seen
        seen |= unseen
        stack.extend(unseen)
    return seen - {node}


def _read_first(branch: fx.Node, trunk: fx.Node) -> fx.Node | None:
    """Return the input of the first linear map between trunk and branch output, if it has the shape of the trunk."""
    shape = str(value_of(trunk).shape)
    for node in _between(trunk, branch):
        if node.target in LINEAR_OPS | CONV_OPS:
            (read, *_) = node.all_input_nodes
            fits = read is not trunk and str(getattr(value_of(read), "shape", None)) == shape
            return read if fits else None
    return None


def _between(trunk: fx.Node, branch: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes on the paths from the trunk to the branch output, in graph order."""
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
    """Return the branch output that was last added to the trunk, or the reason why no map can be folded into it."""
    refusal = f"{site.name} cannot be folded into the previous branch"
    if not is_sum(trunk):
        return f"{refusal}: its trunk is the output of {trunk.name}, not a sum"
    inside = {add, *_between(trunk, branch)}
    consumers = {user for node in (trunk, *inside - {add}) for user in node.users if _is_tensor(user)}
    if not inside.issuperset(consumers):
        return f"{refusal}: its trunk, or a value computed from it, has other consumers"
    for operand in trunk.all_input_nodes:
        if len(operand.users) == 1 and trunk.args.count(operand) == 1 and projection(operand) is not None:
            return operand
    return f"{refusal}: that branch does not end in a linear map"


def _is_tensor(node: fx.Node) -> bool:
    """Return whether a node computes a tensor; sizes do not change when a map is folded."""
    return node.op == "output" or isinstance(value_of(node), (torch.Tensor, list, tuple))


def projection(node: fx.Node) -> fx.Node | None:
    """Return the linear map that computes a value, directly or through per-channel scales (LayerScale)."""
    while node.target in SCALINGS and len(node.users) == 1:
        operands = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if len(operands) != 1:
            return None
        (node,) = operands
    return node if node.target in LINEAR_OPS and len(node.users) == 1 else None
