"""The traced model: an fx graph, how it is read, and every edit made to it (its sites are found in `passes.sites`).

This is the only file that changes fx nodes. A *site* is a residual branch, ``y = x + f(x)``; the *trunk* is the skip
path ``x``. Sites are described by names, never by fx nodes: node references go stale with the first edit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import operator
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten

ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor, operator.add})
COPIES = frozenset(
    {aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default}
)
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})
CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default})
ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


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
    """An fx graph of ATen operators with named inputs and outputs. Mutable on purpose, edited only in this file.

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
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable


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


# ------------------------------------------------------------------------------------------------------------ edits


def resolution(graph: Graph, dropped: Collection[Site]) -> dict[fx.Node, fx.Node]:
    """Which value each add stands for when the given branches count as zero.

    Returns only the adds that change. Operands are read here, at the time of the edit: with two adjacent branches
    gone, the second add must stand for the trunk before the first.
    """
    gone = {(site.add, site.branch) for site in dropped}
    names = {site.add for site in dropped} | {site.root for site in dropped}
    stand_in: dict[fx.Node, fx.Node] = {}
    empty: set[fx.Node] = set()
    for node in graph.nodes():
        if not is_sum(node) or not (node.name in names or empty.intersection(node.all_input_nodes)):
            continue
        kept = [term for term in node.args if (node.name, getattr(term, "name", "")) not in gone and term not in empty]
        if not kept:
            empty.add(node)
        elif len(kept) == 1 and isinstance(kept[0], fx.Node):
            stand_in[node] = stand_in.get(kept[0], kept[0])
    return stand_in


def drop_branches(graph: Graph, dropped: Collection[Site]) -> None:
    """Rewrite ``y = x + f(x)`` to ``y = x`` for each site; `remove_dead` then takes out what only f needed."""
    for add, value in resolution(graph, dropped).items():
        add.replace_all_uses_with(value)


def bypass(graph: Graph, node: fx.Node, value: fx.Node) -> None:
    """Let every reader of `node` read `value` instead."""
    node.replace_all_uses_with(value)


def insert_call(
    graph: Graph, target: Callable[..., Any], *args: Any, before: fx.Node, options: Mapping[str, Any] | None = None
) -> fx.Node:
    """A new node ahead of `before` that calls an operator; its traced value is derived from those of its inputs.

    Args:
        graph: what is edited.
        target: an ATen operator.
        args: its arguments; nodes among them must stand ahead of `before`.
        before: the node it is put in front of, whose place in the module tree it takes over.
        options: its keyword arguments.

    Raises:
        GraphError: the operator refuses the shapes of these inputs.
    """
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.call_function(target, args, dict(options or {}))
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    derive(node)
    return node


def insert_constant(graph: Graph, name: str, tensor: torch.Tensor, *, before: fx.Node) -> fx.Node:
    """A new node ahead of `before` that reads `tensor`, which becomes a parameter of the module.

    Args:
        graph: what is edited.
        name: wanted name; made unique, with underscores for what Python does not allow.
        tensor: the value; it is not copied.
        before: the node it is put in front of.
    """
    free = re.sub(r"\W", "_", f"fitted_{name}")
    path = next(path for path in _numbered_names(free) if not hasattr(graph.module, path))
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    graph.module.register_parameter(path, parameter)
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.get_attr(path)
    mode = _mode(graph.module.graph)
    assert mode is not None  # every input of a traced graph has one
    node.meta["val"] = mode.from_tensor(parameter, static_shapes=True)
    return node


def own(graph: Graph, name: str, tensor: torch.Tensor) -> None:
    """Give a fork a parameter of its own under every name of the shared one; other forks keep theirs.

    Args:
        graph: what is edited.
        name: attribute path of the parameter, the target of the nodes that read it.
        tensor: the new value; it is not copied.

    Raises:
        GraphError: there is no such parameter, or the new value has another shape or type.
    """
    known = dict(graph.module.named_parameters(remove_duplicate=False))
    shared = known.get(name)
    if shared is None or (shared.shape, shared.dtype) != (tensor.shape, tensor.dtype):
        found = "no parameter" if shared is None else f"{list(shared.shape)} of {shared.dtype}"
        raise GraphError(f"{name} is {found}; expected {list(tensor.shape)} of {tensor.dtype}.")
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    for path, other in known.items():
        if other is shared:  # tied weights stay tied
            owner, _, leaf = path.rpartition(".")
            graph.module.get_submodule(owner).register_parameter(leaf, parameter)


def set_ends(graph: Graph, inputs: Mapping[fx.Node, str], outputs: Mapping[str, fx.Node]) -> None:
    """Give a graph fewer inputs or outputs, or other names for them.

    Args:
        graph: what is edited.
        inputs: placeholder to name; one that is left out goes.
        outputs: name to the node of its value, in the order they are to have.

    Raises:
        GraphError: an input that should go is still read.
    """
    (output,) = [node for node in graph.nodes() if node.op == "output"]
    output.args = (tuple(outputs.values()),)
    remove_dead(graph)
    for node in graph.placeholders():
        if node not in inputs:
            if node.users:
                raise GraphError(f"{node.name} cannot go, {next(iter(node.users)).name} still reads it.")
            graph.module.graph.erase_node(node)
    graph.module.graph.set_codegen(fx.graph.CodeGen())  # the traced one insists on the arguments that were traced
    graph.module.recompile()
    graph.inputs, graph.outputs = tuple(inputs[node] for node in graph.placeholders()), tuple(outputs)


def rewire(graph: Graph, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Let one reader of `old` read `new` instead, wherever it does so."""
    reader.replace_input_with(old, new)


def set_arguments(graph: Graph, node: fx.Node, *args: Any) -> None:
    """Give a node other positional arguments, and derive its traced value again."""
    node.args = args
    derive(node)


def derive(node: fx.Node) -> None:
    """Derive a call's traced value from those of its inputs.

    Raises:
        GraphError: the operator refuses them.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    assert callable(node.target)
    mode = _mode(node.graph) or contextlib.nullcontext()  # without it, arange makes a real tensor
    try:
        with enable_python_dispatcher(), mode:  # addcmul broadcasts only under the former
            node.meta["val"] = node.target(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise GraphError(f"{node.name} ({node.target}) does not take its new inputs: {error}") from error


def name_size(node: fx.Node) -> None:
    """Let a symbolic size stand for itself, as that of an input does, and no longer for how it was computed.

    Sizes computed from sizes nest, and shapes behind them are compared by simplifying the whole expression: five
    reductions of a text took six times as long to write down. A number stays what it is.
    """
    size, mode = value_of(node), _mode(node.graph)
    if not isinstance(size, torch.SymInt) or mode is None:
        return
    hint: Any = size.node.hint  # the size in the example that was traced
    example = torch.empty(hint, device="meta")
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    node.meta["val"] = mode.from_tensor(example, symbolic_context=dynamic, source=ConstantSource(node.name)).shape[0]


def _mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the traced values live in."""
    modes = (getattr(value_of(node), "fake_mode", None) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def _numbered_names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))


def remove_dead(graph: Graph) -> int:
    """Remove nodes that no output needs, then parameters, buffers and modules that no node reads.

    Returns:
        Number of nodes removed.
    """
    live = live_nodes(graph)
    dead = [node for node in reversed(graph.nodes()) if node not in live]
    for node in dead:
        graph.module.graph.erase_node(node)
    _remove_unread_attributes(graph.module)
    graph.module.recompile()
    return len(dead)


def _remove_unread_attributes(module: fx.GraphModule) -> None:
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for path, owner in list(module.named_modules()):
        for registry in (owner._parameters, owner._buffers):
            for name in list(registry):
                full = f"{path}.{name}" if path else name
                if full not in read and not any(full.startswith(target + ".") for target in read):
                    del registry[name]
    module.delete_all_unused_submodules()


def loosen_views(graph: Graph) -> list[str]:
    """Turn views into reshapes, which give the same values and ask nothing of the strides; returns their names.

    Tracing writes `reshape` as `view` where the strides it saw allow it. They need not allow it any more once a copy
    or a branch before it is gone.
    """
    views = [node for node in graph.nodes() if node.target in VIEWS]
    for node in views:
        node.target = aten.reshape.default
    return [node.name for node in views]


def remove_effects(graph: Graph) -> list[str]:
    """Remove nodes that only assert something about traced values; returns their names."""
    asserting = [node for node in graph.nodes() if node.target in ASSERTIONS]
    for node in reversed(asserting):
        graph.module.graph.erase_node(node)
    return [node.name for node in asserting]
