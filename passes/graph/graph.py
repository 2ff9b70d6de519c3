"""The traced model: an fx graph and how it is read. Edits are in `passes.edit`, sites in `passes.sites`.

A *site* is a residual branch, ``y = x + f(x)``; the *trunk* is the skip path ``x``. Sites are described by names, never
by fx nodes: node references go stale with the first edit.
"""

from __future__ import annotations

import copy
import functools
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.torch_internals import COPYING_CASTS, RUN_TIME_ASSERTIONS, UNSAFE_VIEWS, is_mutable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


aten = torch.ops.aten

ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor, operator.add})
COPIES = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default}
)
VIEWS = frozenset({aten.view.default}) | UNSAFE_VIEWS
DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})
CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}) | COPYING_CASTS
ASSERTIONS = RUN_TIME_ASSERTIONS | {
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


class GraphError(Exception):
    """The graph is unsound, or a site was asked for that it does not have."""


@dataclass(frozen=True)
class Site:
    """One residual branch ``y = x + f(x)``, by names only.

    ``add`` is the node that adds the branch, ``branch`` its operand ``f(x)``, ``trunk`` the skip value ``x`` and
    ``root`` the node that holds the complete sum (equal to ``add`` unless several branches share one trunk).
    ``channel_dim`` is the axis of the trunk that carries the ``width`` features.
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
    """One line of a graph's history: the pass, its options, and the number of nodes before and after."""

    name: str
    options: Mapping[str, str]
    nodes_before: int
    nodes_after: int


@dataclass
class Graph:
    """An fx graph of ATen operators with named inputs and outputs. Mutable on purpose, edited only in `passes.edit`.

    ``prefix`` is the attribute path under which the user's model hangs in the traced module; it is cut from names.
    ``state`` says which output of one call is which input of the next, such as a key-value cache.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prefix: str = ""
    history: list[Applied] = field(default_factory=list)
    state: Mapping[str, str] = field(default_factory=dict)

    def nodes(self) -> list[fx.Node]:
        """All nodes in execution order."""
        return list(self.module.graph.nodes)

    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the order of ``inputs``."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def signature(self) -> tuple[int, int, int, tuple[str, ...]]:
        """Number of nodes, inputs and outputs, and the node names: what an analysis must leave as it was."""
        nodes = self.nodes()
        return len(nodes), len(self.inputs), len(output_values(self)), tuple(node.name for node in nodes)

    def parameter_count(self) -> int:
        """Number of parameters of the traced module, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def fork(self) -> Graph:
        """An independent graph that shares the weights: editing it leaves this one as it is."""
        twin = fx.GraphModule(self.module, copy.deepcopy(self.module.graph))
        twin.meta.update(self.module.meta)
        return Graph(twin, self.inputs, self.outputs, self.prefix, list(self.history), self.state)

    def check(self) -> None:
        """Lint the graph and hold it to its named interface.

        Raises:
            GraphError: dangling nodes, another number of inputs or outputs than named, or dead pure nodes.
        """
        try:
            self.module.graph.lint()
        except RuntimeError as error:
            raise GraphError(f"the graph is unsound after a rewrite: {error}") from error
        found = (len(self.placeholders()), len(output_values(self)))
        if found != (len(self.inputs), len(self.outputs)):
            expected = f"{len(self.inputs)} and {len(self.outputs)}"
            raise GraphError(f"the graph has {found[0]} inputs and {found[1]} outputs, expected {expected}.")
        live = live_nodes(self)
        dead = [node.name for node in self.nodes() if node not in live]
        if dead:
            raise GraphError(f"the graph still holds {len(dead)} dead nodes, the first is {dead[0]}.")


# ---------------------------------------------------------------------------------------------------------- reading


def output_values(graph: Graph) -> list[fx.Node]:
    """The nodes whose values the graph returns, in order."""
    (output,) = [node for node in graph.module.graph.nodes if node.op == "output"]
    flat: list[fx.Node] = []
    fx.node.map_arg(output.args, flat.append)
    return flat


def attribute(graph: Graph, node: fx.Node) -> Any:
    """The parameter, buffer or constant behind a ``get_attr`` node."""
    return functools.reduce(getattr, str(node.target).split("."), graph.module)


def value_of(node: fx.Node) -> Any:
    """The traced (fake) value of a node, or None where tracing left none."""
    return node.meta.get("val")


def is_pure(node: fx.Node) -> bool:
    """Whether a node without users may go.

    Own rule, because fx counts dropout and scaled_dot_product_attention as impure (they draw random numbers), keeps
    them alive after their branch is gone, and so makes parameter counts and timings lie.
    """
    if node.op in ("placeholder", "output"):
        return False
    if node.op != "call_function":
        return True
    return not is_mutable(node.target)


def live_nodes(graph: Graph, resolved: Mapping[fx.Node, fx.Node] | None = None) -> set[fx.Node]:
    """Nodes that the outputs need, with some adds standing for another value (`resolved`, see `resolution`)."""
    return needed_by({node for node in graph.module.graph.nodes if not is_pure(node)}, resolved)


def needed_by(nodes: Collection[fx.Node], resolved: Mapping[fx.Node, fx.Node] | None = None) -> set[fx.Node]:
    """Some nodes and all that their values come from."""
    stand_in = resolved or {}
    seen = set(nodes)
    stack = list(seen)
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            needed = stand_in.get(source, source)
            if needed not in seen:
                seen.add(needed)
                stack.append(needed)
    return seen


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two traced tensors, unscaled."""
    plain = node.op == "call_function" and node.target in ADDS and not node.kwargs.get("alpha")
    return (
        plain and isinstance(value_of(node), torch.Tensor) and sum(isinstance(arg, fx.Node) for arg in node.args) == 2
    )


def resolution(graph: Graph, dropped: Collection[Site]) -> dict[fx.Node, fx.Node]:
    """Which value each add stands for when the given branches count as zero.

    Returns only the adds that change. Operands are read here, at the time of the edit: with two adjacent branches
    gone, the second add must stand for the trunk before the first.
    """
    # A branch is a term of one sum. Of which is read here too: of `add`, or where that went with another branch of the
    # same block (two that are summed before the trunk is added), of the sum that took its terms.
    gone = {site.branch for site in dropped}
    stand_in: dict[fx.Node, fx.Node] = {}
    empty: set[fx.Node] = set()
    for node in graph.nodes():
        if not is_sum(node) or not any(term.name in gone or term in empty for term in node.all_input_nodes):
            continue
        kept = [term for term in node.args if getattr(term, "name", "") not in gone and term not in empty]
        if not kept:
            empty.add(node)
        elif len(kept) == 1 and isinstance(kept[0], fx.Node):
            stand_in[node] = stand_in.get(kept[0], kept[0])
    return stand_in
