"""The graph of a traced model and functions that read it.

Edits are in `passes.graph.edit`, the search for sites is in `passes.graph.sites`. A *site* is a residual branch,
``y = x + f(x)``; the *trunk* is the skip path ``x``. Sites hold names of nodes instead of fx nodes, because node
references become stale with the first edit.
"""

from __future__ import annotations

import copy
import functools
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.graph.fake_values import FakeValues
from passes.torch_internals import COPYING_CASTS, RUN_TIME_ASSERTIONS, UNSAFE_VIEWS, is_mutable, lazy_graph_module

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


aten = torch.ops.aten

ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor, operator.add})
COPIES = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default}
)
VIEWS = frozenset({aten.view.default}) | UNSAFE_VIEWS
DIVISIONS = frozenset({aten.div.Tensor, aten.div_.Tensor})
SCALINGS = DIVISIONS | {aten.mul.Tensor, aten.mul_.Tensor, aten.neg.default}
DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})
CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}) | COPYING_CASTS
ASSERTIONS = RUN_TIME_ASSERTIONS | {
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


class GraphError(Exception):
    """Error of an invalid graph, an edit that does not fit it, or a site that it does not have."""


@dataclass(frozen=True)
class Site:
    """One residual branch ``y = x + f(x)``, described by the names of its nodes.

    ``add`` is the node that adds the branch, ``branch`` its operand ``f(x)``, ``trunk`` the skip value ``x`` (in
    ``2 x + f(x)`` the scaled one) and ``root`` the node that holds the complete sum (equal to ``add`` unless several
    branches share one trunk). ``channel_dim`` is the axis of the trunk that carries the ``width`` features.
    """

    name: str
    kind: str
    block: str
    order: int
    width: int
    channel_dim: int
    add: str
    branch: str
    trunk: str
    root: str


@dataclass(frozen=True)
class Applied:
    """Entry in the history of a graph: the pass, its options and the number of nodes before and after."""

    name: str
    options: Mapping[str, str]
    nodes_before: int
    nodes_after: int


@dataclass
class Graph:
    """An fx graph of ATen operators with named inputs and outputs, edited in place by `passes.graph.edit` only.

    ``prefix`` is the attribute path of the user's model in the traced module; it is removed from the names of sites.
    ``state`` maps the name of an output to the name of the input that it becomes in the next call, such as a KV cache.
    The cache of a cross-attention, which is computed once, is no input of the graph.
    ``values`` holds the traced values that edits derived; forks share it.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prefix: str = ""
    history: list[Applied] = field(default_factory=list)
    state: Mapping[str, str] = field(default_factory=dict)
    values: FakeValues = field(default_factory=FakeValues, repr=False, compare=False)

    def nodes(self) -> list[fx.Node]:
        """Return all nodes in execution order."""
        return list(self.module.graph.nodes)

    def placeholders(self) -> list[fx.Node]:
        """Return the input nodes in the order of ``inputs``."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def signature(self) -> tuple[int, int, int, tuple[str, ...]]:
        """Return the number of nodes, inputs and outputs, and the node names, none of which an analysis may change."""
        nodes = self.nodes()
        return len(nodes), len(self.inputs), len(output_values(self)), tuple(node.name for node in nodes)

    def parameter_count(self) -> int:
        """Return the number of parameters of the traced module; shared ones count once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def fork(self) -> Graph:
        """Return a copy of the graph that shares the weights; editing it does not change this one."""
        twin = lazy_graph_module(self.module, copy.deepcopy(self.module.graph))
        twin.meta.update(self.module.meta)
        return Graph(twin, self.inputs, self.outputs, self.prefix, list(self.history), self.state, self.values)

    def check(self) -> None:
        """Check that the graph is valid, has its named inputs and outputs and holds no dead nodes.

        Raises:
            GraphError: `fx.Graph.lint` fails, the number of inputs or outputs differs from that of their names, or a
                pure node has no path to an output.
        """
        try:
            self.module.graph.lint()
        except RuntimeError as error:
            raise GraphError(f"the graph is invalid after a rewrite: {error}") from error
        counts = (len(self.placeholders()), len(output_values(self)))
        if counts != (len(self.inputs), len(self.outputs)):
            expected = f"{len(self.inputs)} and {len(self.outputs)}"
            raise GraphError(f"the graph has {counts[0]} inputs and {counts[1]} outputs, expected {expected}.")
        live = live_nodes(self)
        dead = [node.name for node in self.nodes() if node not in live]
        if dead:
            raise GraphError(f"the graph still holds {len(dead)} dead nodes, the first is {dead[0]}; call remove_dead.")


# ---------------------------------------------------------------------------------------------------------- reading


def output_values(graph: Graph) -> list[fx.Node]:
    """Return the nodes whose values the graph returns, in order."""
    (output,) = [node for node in graph.module.graph.nodes if node.op == "output"]
    flat: list[fx.Node] = []
    fx.node.map_arg(output.args, flat.append)
    return flat


def attribute(graph: Graph, node: fx.Node) -> Any:
    """Return the parameter, buffer or constant of a ``get_attr`` node."""
    return functools.reduce(getattr, str(node.target).split("."), graph.module)


def value_of(node: fx.Node) -> Any:
    """Return the traced (fake) value of a node, or None if tracing recorded none."""
    return node.meta.get("val")


def is_pure(node: fx.Node) -> bool:
    """Return whether a node without consumers may be removed.

    `fx.Node.is_impure` is no substitute: it holds for dropout and scaled_dot_product_attention, which draw random
    numbers. They would stay after their branch was dropped and falsify parameter counts and latencies.
    """
    if node.op in ("placeholder", "output"):
        return False
    if node.op != "call_function":
        return True
    return not is_mutable(node.target)


def live_nodes(graph: Graph, resolved: Mapping[fx.Node, fx.Node] | None = None) -> set[fx.Node]:
    """Return the nodes that the outputs need, with adds replaced as in `resolved` (see `resolve_dropped_adds`)."""
    return ancestors_of({node for node in graph.module.graph.nodes if not is_pure(node)}, resolved)


def ancestors_of(nodes: Collection[fx.Node], resolved: Mapping[fx.Node, fx.Node] | None = None) -> set[fx.Node]:
    """Return nodes and all nodes that their values are computed from, with adds replaced as in `resolved`."""
    replaced_by = resolved or {}
    seen = set(nodes)
    stack = list(seen)
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            needed = replaced_by.get(source, source)
            if needed not in seen:
                seen.add(needed)
                stack.append(needed)
    return seen


def is_sum(node: fx.Node) -> bool:
    """Return whether a node adds two traced tensors without a scale (`alpha`)."""
    plain = node.op == "call_function" and node.target in ADDS and not node.kwargs.get("alpha")
    return (
        plain and isinstance(value_of(node), torch.Tensor) and sum(isinstance(arg, fx.Node) for arg in node.args) == 2
    )


def unscaled(node: fx.Node) -> fx.Node:
    """Return the value that constants scale to a node, x of ``2 * x`` and ``-x``, or the node itself.

    A constant is a number, or a number for each feature. A table of numbers for each token and feature scales nothing:
    rotary positions are the sum of two such products.
    """
    while node.target in SCALINGS:
        variable = [source for source in node.all_input_nodes if not _is_constant(source)]
        divides = node.target in DIVISIONS and node.args[0] not in variable  # 2 / x is no scaled x
        if len(variable) != 1 or divides or str(_shape(variable[0])) != str(_shape(node)):
            break
        if any(_is_table(source) for source in node.all_input_nodes if source is not variable[0]):
            break
        (node,) = variable
    return node


def _is_constant(node: fx.Node) -> bool:
    """Return whether no input of the graph reaches a value."""
    seen, stack = {node}, [node]
    while stack:
        each = stack.pop()
        if each.op == "placeholder":
            return False
        unseen = [source for source in each.all_input_nodes if source not in seen]
        seen.update(unseen)
        stack.extend(unseen)
    return True


def _is_table(node: fx.Node) -> bool:
    """Return whether a value varies along more than one axis."""
    return sum(str(size) != "1" for size in _shape(node) or ()) > 1


def _shape(node: fx.Node) -> Any:
    return getattr(value_of(node), "shape", None)


def dependents_of(graph: Graph, inputs: Collection[str]) -> frozenset[str]:
    """Return the names of all nodes whose values are computed from some of the named inputs; of none, no nodes."""
    named = zip(graph.inputs, graph.placeholders(), strict=True)
    stack = [node for name, node in named if name in inputs]
    seen = set(stack)
    while stack:
        for reader in stack.pop().users:
            if reader not in seen:
                seen.add(reader)
                stack.append(reader)
    return frozenset(node.name for node in seen)


def resolve_dropped_adds(graph: Graph, dropped: Collection[Site]) -> dict[fx.Node, fx.Node]:
    """Map each add to the value that replaces it if the branches of `dropped` are zero.

    Adds that do not change are left out. Operands are read from the graph as it is now: if two adjacent branches are
    dropped, the second add maps to the trunk before the first.
    """
    # A branch is a term of one sum. That sum is read from the graph too, because it need not be `site.add`: if two
    # branches are summed before the trunk is added and one is already dropped, the outer sum holds the other.
    branches = {site.branch for site in dropped}
    replaced_by: dict[fx.Node, fx.Node] = {}
    empty: set[fx.Node] = set()
    for node in graph.nodes():
        if not is_sum(node) or not any(term.name in branches or term in empty for term in node.all_input_nodes):
            continue
        kept = [term for term in node.args if getattr(term, "name", "") not in branches and term not in empty]
        if not kept:
            empty.add(node)
        elif len(kept) == 1 and isinstance(kept[0], fx.Node):
            replaced_by[node] = replaced_by.get(kept[0], kept[0])
    return replaced_by
