"""Every edit made to a graph: this is the only file that changes fx nodes."""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.graph.graph import ASSERTIONS, VIEWS, Graph, GraphError, aten, live_nodes, resolution, value_of
from passes.torch_internals import enable_python_dispatcher, fake_mode, free_size, hint, registries

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from passes.graph.graph import Site
    from passes.torch_internals import FakeTensorMode


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
    node.meta["val"] = free_size(mode, hint(size), node.name)


def _mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the traced values live in."""
    modes = (fake_mode(value_of(node)) for node in graph.nodes)
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
        for registry in registries(owner):
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
