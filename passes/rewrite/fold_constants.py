"""Values that depend on weights alone, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.execute.offloaded_weights import is_offloaded
from passes.graph.edit import insert_constant, remove_dead, replace_all_uses
from passes.graph.graph import Graph, ancestors_of, attribute, is_pure
from passes.graph.random_operators import is_random
from passes.torch_internals import is_known

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class FoldConstants:
    """Rewrite pass that computes what depends on weights alone, such as the parts into which a weight is split.

    Engines compute such values once as well, but quantizers take only weights that are stored in the file: those of
    cross-attention of `torch.nn.MultiheadAttention`, and weights under weight norm, stayed in float.

    Before::

        %w = split_with_sizes(%weight, [32, 64]); %q = getitem(%w, 0); %y = linear(%x, %q)

    After::

        %y = linear(%x, %weight_of_q)

    A value that is larger than the weights it is computed from stays computed, and so does what is computed from a
    weight that is read elsewhere as it is, or that is on disk.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the replaced nodes."""
        folded, known = foldable(graph), dict[fx.Node, Any]()
        for node in folded:
            name = f"{_weights_of(graph, node)[0].target}.{node.name}"
            replace_all_uses(graph, node, insert_constant(graph, name, _value(graph, node, known), before=node))
        if folded:
            remove_dead(graph)
        return Rewritten(changed=tuple(node.name for node in folded))


def foldable(graph: Graph) -> list[fx.Node]:
    """Return the nodes that depend on weights alone and are read by nodes that do not."""
    constant: set[fx.Node] = set()
    for node in graph.nodes():
        if _is_constant(graph, node, constant):
            constant.add(node)
    read_elsewhere = [node for node in graph.nodes() if node.op == "get_attr" and not constant.issuperset(node.users)]
    shared = {attribute(graph, node) for node in read_elsewhere}  # one weight may have several names
    return [
        node
        for node in graph.nodes()
        if node in constant
        and node.op != "get_attr"
        and not constant.issuperset(node.users)
        and _is_worth_storing(graph, node, shared)
    ]


def _is_constant(graph: Graph, node: fx.Node, constant: set[fx.Node]) -> bool:
    """Return whether a node is a weight in memory, or computed from the constants before it alone."""
    if node.op == "get_attr":
        value = attribute(graph, node)
        return isinstance(value, torch.Tensor) and not is_offloaded(value)
    sources = node.all_input_nodes
    computed = node.op == "call_function" and is_pure(node) and not is_random(node)
    return computed and bool(sources) and constant.issuperset(sources)


def _is_worth_storing(graph: Graph, node: fx.Node, shared: set[Any]) -> bool:
    """Return whether a value may replace its weights: it is a tensor, is not larger, and none of them is read.

    The number of values may depend on those of a weight, as of ``repeat_interleave``; if it has no bound, the value is
    not stored.
    """
    value, weights = node.meta.get("val"), [attribute(graph, each) for each in _weights_of(graph, node)]
    if not isinstance(value, torch.Tensor) or any(weight in shared for weight in weights):
        return False
    return is_known(value.numel() <= sum(weight.numel() for weight in dict.fromkeys(weights)))


def _weights_of(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """Return the nodes of the weights that a value is computed from, in the order of the graph."""
    ancestors = ancestors_of([node])
    return [each for each in graph.nodes() if each.op == "get_attr" and each in ancestors]


def _value(graph: Graph, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """Compute a value from its weights."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        known[node] = attribute(graph, node).detach()
    else:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: _value(graph, each, known))
        assert callable(node.target)
        known[node] = node.target(*args, **kwargs)
    return known[node]
