"""Attentions of a graph that belong to no site."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from passes.graph.graph import Graph, Site, ancestors_of, unscaled
from passes.graph.sites import ATTENTION_OPS, CALL_NUMBER, PRODUCTS, SOFTMAX_OPS, module_path

STEPS = 4  # operators between the softmax of an attention and the product with its values: casts, a mixing of heads


def attentions(graph: Graph) -> dict[fx.Node, str]:
    """Return each attention with the path of its module: the fused operator, or a softmax before a product."""
    found = {node: module_path(node).removeprefix(graph.prefix) for node in graph.nodes() if _attends(node)}
    return {node: CALL_NUMBER.sub("", path) or node.name for node, path in found.items()}


def outside_of(graph: Graph, sites: Collection[Site]) -> tuple[str, ...]:
    """Return the modules of the attentions that no branch of a site computes, in order.

    It is so if their output is not added to the state that they are computed from: where a gate mixes the two, where
    several states are mixed, where only some tokens get the sum, and in a pooling.
    """
    remaining = attentions(graph)
    nodes = {node.name: node for node in graph.nodes()}
    for site in sites:
        for node in between(unscaled(nodes[site.trunk]), nodes[site.branch]):
            remaining.pop(node, None)
    return tuple(dict.fromkeys(remaining.values()))


def _attends(node: fx.Node) -> bool:
    if node.target in ATTENTION_OPS:
        return True
    return node.target in SOFTMAX_OPS and any(map(_multiplies_activations, _followers(node, STEPS)))


def _followers(node: fx.Node, steps: int) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
        if steps > 1 and user.target not in PRODUCTS:
            yield from _followers(user, steps - 1)


def _multiplies_activations(node: fx.Node) -> bool:
    sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
    return node.target in PRODUCTS and len(sources) > 1


def between(trunk: fx.Node, branch: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes on the paths from a trunk to a branch, in order, without the trunk."""
    needed = ancestors_of([branch])
    reached = {trunk}
    for node in trunk.graph.nodes:
        if node in needed and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            yield node
