"""Edits of a graph. No other module changes fx nodes."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.graph.graph import (
    ASSERTIONS,
    VIEWS,
    Graph,
    GraphError,
    aten,
    live_nodes,
    output_values,
    resolve_dropped_adds,
    value_of,
)
from passes.torch_internals import expression, fake_mode, hint, new_symbolic_size, registries

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from passes.graph.graph import Site
    from passes.torch_internals import FakeTensorMode


def drop_branches(graph: Graph, dropped: Collection[Site]) -> None:
    """Rewrite ``y = x + f(x)`` to ``y = x`` for each site; `remove_dead` removes the nodes that only ``f`` needed."""
    for add, value in resolve_dropped_adds(graph, dropped).items():
        add.replace_all_uses_with(value)


def replace_all_uses(graph: Graph, node: fx.Node, value: fx.Node) -> None:
    """Replace `node` by `value` in all of its consumers."""
    node.replace_all_uses_with(value)


def insert_call(
    graph: Graph, target: Callable[..., Any], *args: Any, before: fx.Node, options: Mapping[str, Any] | None = None
) -> fx.Node:
    """Insert a call of an operator before a node, with a traced value derived from those of its inputs.

    Args:
        graph: graph to edit.
        target: ATen operator.
        args: positional arguments; nodes among them must precede `before`.
        before: node that follows the new one, which takes over its module path.
        options: keyword arguments.

    Raises:
        GraphError: the operator rejects the shapes of its inputs.
    """
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.call_function(target, args, dict(options or {}))
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    propagate_fake_value(graph, node)
    return node


def insert_call_of_value(graph: Graph, target: Callable[..., Any], *args: Any, value: Any, before: fx.Node) -> fx.Node:
    """Insert a call of an operator before a node, with a given traced value.

    For operators whose sizes depend on the elements of their inputs: torch can derive no size of such a value.

    Args:
        graph: graph to edit.
        target: ATen operator.
        args: positional arguments; nodes among them must precede `before`.
        value: the traced value, of the mode of the graph.
        before: node that follows the new one, which takes over its module path.
    """
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.call_function(target, args)
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    node.meta["val"] = value
    return node


def insert_input(graph: Graph, name: str, like: fx.Node, sizes: Sequence[Any], dtype: torch.dtype) -> fx.Node:
    """Insert an input after the others, with the given sizes, and add its name to those of the graph.

    Args:
        graph: graph to edit.
        name: name of the input.
        like: node whose device and fake tensor mode its traced value has.
        sizes: numbers or symbolic sizes.
        dtype: type of its elements.
    """
    last = graph.placeholders()[-1]
    with graph.module.graph.inserting_after(last):
        node = graph.module.graph.placeholder(re.sub(r"\W", "_", name))
    node.meta["val"] = empty_like(graph, like, sizes, dtype)
    graph.inputs = (*graph.inputs, name)
    graph.module.graph.set_codegen(fx.graph.CodeGen())  # that of torch.export expects the traced inputs
    return node


def empty_like(graph: Graph, like: fx.Node, sizes: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    """Return a traced (fake) value with the given sizes, on the device of another value."""
    mode = _mode(graph.module.graph)
    assert mode is not None  # the inputs of a traced graph are fake tensors
    with mode:
        return torch.empty(list(sizes), dtype=dtype, device=value_of(like).device)


def insert_output(graph: Graph, name: str, node: fx.Node) -> None:
    """Add an output after the others."""
    (output,) = [each for each in graph.nodes() if each.op == "output"]
    output.args = ((*output_values(graph), node),)
    graph.outputs = (*graph.outputs, name)
    graph.module.graph.set_codegen(fx.graph.CodeGen())


def repeated_outputs(graph: Graph) -> list[int]:
    """Return the places of the outputs that are an input, a stored tensor, or the value of an output before."""
    values = output_values(graph)
    return [
        place for place, node in enumerate(values) if node.op in ("placeholder", "get_attr") or node in values[:place]
    ]


def copy_repeated_outputs(graph: Graph) -> None:
    """Let each output have a value of its own; see `repeated_outputs`.

    Outputs come to be so when branches are dropped: a state that was returned is then the state before it.
    """
    (output,) = [node for node in graph.nodes() if node.op == "output"]
    values = output_values(graph)
    for place in repeated_outputs(graph):
        values[place] = insert_call(graph, aten.clone.default, values[place], before=output)
    output.args = (tuple(values),)


def resize(graph: Graph, node: fx.Node, axis: int, size: Any) -> None:
    """Give an input another symbolic size along one axis; its readers keep their traced values."""
    value = value_of(node)
    sizes = [size if position == axis else each for position, each in enumerate(value.shape)]
    node.meta["val"] = empty_like(graph, node, sizes, value.dtype)


def new_size(graph: Graph, name: str, example: int) -> torch.SymInt:
    """Return a symbolic size with a symbol of its own (see `resymbolize_size`)."""
    mode = _mode(graph.module.graph)
    assert mode is not None
    size: torch.SymInt = new_symbolic_size(mode, example, name)
    return size


def move_before(nodes: Sequence[fx.Node], before: fx.Node) -> None:
    """Move nodes in front of another one, in their order."""
    for node in nodes:
        before.prepend(node)


def insert_constant(graph: Graph, name: str, tensor: torch.Tensor, *, before: fx.Node) -> fx.Node:
    """Register a tensor as a parameter of the module and insert a node that reads it.

    Args:
        graph: graph to edit.
        name: preferred name; made a unique Python identifier.
        tensor: value of the parameter; it is not copied.
        before: node that follows the new one.
    """
    identifier = re.sub(r"\W", "_", f"fitted_{name}")
    path = next(path for path in _numbered_names(identifier) if not hasattr(graph.module, path))
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    graph.module.register_parameter(path, parameter)
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.get_attr(path)
    mode = _mode(graph.module.graph)
    assert mode is not None  # the inputs of a traced graph are fake tensors
    node.meta["val"] = mode.from_tensor(parameter, static_shapes=True)
    return node


def replace_parameter(graph: Graph, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter of one fork, under all of its names; other forks keep the shared one.

    Args:
        graph: fork to edit.
        name: attribute path of the parameter, which is the target of the nodes that read it.
        tensor: new value; it is not copied.

    Raises:
        GraphError: there is no such parameter, or the new value has another shape or type.
    """
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    shared = parameters.get(name)
    if shared is None or (shared.shape, shared.dtype) != (tensor.shape, tensor.dtype):
        current = "no parameter" if shared is None else f"{list(shared.shape)} of {shared.dtype}"
        raise GraphError(f"{name} is {current}; expected {list(tensor.shape)} of {tensor.dtype}.")
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    for path, other in parameters.items():
        if other is shared:  # tied weights stay tied
            owner, _, leaf = path.rpartition(".")
            graph.module.get_submodule(owner).register_parameter(leaf, parameter)


def with_weights(graph: Graph, source: Graph) -> Graph:
    """Return a fork with the parameters of another fork of the same model; those that `source` lacks stay.

    Raises:
        GraphError: a parameter has another shape or type in `source`.
    """
    fork = graph.fork()
    others = dict(source.module.named_parameters(remove_duplicate=False))
    for name, parameter in graph.module.named_parameters():
        if name in others and others[name] is not parameter:
            replace_parameter(fork, name, others[name].detach())
    return fork


def set_inputs_and_outputs(graph: Graph, inputs: Mapping[fx.Node, str], outputs: Mapping[str, fx.Node]) -> None:
    """Remove or rename inputs and outputs of a graph.

    Args:
        graph: graph to edit.
        inputs: name of each placeholder to keep; the others are removed.
        outputs: output node of each name, in the new order.

    Raises:
        GraphError: an input to remove still has a consumer.
    """
    (output,) = [node for node in graph.nodes() if node.op == "output"]
    output.args = (tuple(outputs.values()),)
    remove_dead(graph)
    for node in graph.placeholders():
        if node not in inputs:
            if node.users:
                raise GraphError(f"input {node.name} cannot be removed: {next(iter(node.users)).name} still reads it.")
            graph.module.graph.erase_node(node)
    graph.module.graph.set_codegen(fx.graph.CodeGen())  # that of torch.export expects the traced inputs
    graph.module.recompile()
    graph.inputs, graph.outputs = tuple(inputs[node] for node in graph.placeholders()), tuple(outputs)


def replace_input(graph: Graph, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Replace `old` by `new` in all arguments of one consumer."""
    reader.replace_input_with(old, new)


def set_arguments(graph: Graph, node: fx.Node, *args: Any, options: Mapping[str, Any] | None = None) -> None:
    """Replace the arguments of a node and derive its traced value again; without `options`, keyword arguments stay."""
    node.args = args
    if options is not None:
        node.kwargs = dict(options)
    propagate_fake_value(graph, node)


def propagate_fake_value(graph: Graph, node: fx.Node) -> None:
    """Derive the traced value of a call from those of its inputs.

    Raises:
        GraphError: the operator rejects these inputs.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    assert callable(node.target)
    try:
        node.meta["val"] = graph.values.of(node.target, args, kwargs, _mode(node.graph))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise GraphError(f"{node.name} ({node.target}) rejects its new inputs: {error}") from error


def resymbolize_size(graph: Graph, node: fx.Node) -> None:
    """Replace the expression of a symbolic size by a symbol of its own, as the size of an input has.

    Sizes computed from sizes nest, and torch compares shapes by simplifying the whole expression: five token
    reductions of a text model took six times as long. Equal expressions get one symbol. A plain number stays unchanged,
    and so does a size that depends on the contents of a tensor, which has no example.
    """
    size, mode = value_of(node), _mode(node.graph)
    if isinstance(size, torch.SymInt) and mode is not None and hint(size) is not None:
        node.meta["val"] = graph.values.symbol(size, lambda: new_symbolic_size(mode, hint(size), node.name))


def _mode(graph: fx.Graph) -> FakeTensorMode | None:
    """Return the fake tensor mode of the traced values, or None if no value has one."""
    modes = (fake_mode(value_of(node)) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def _numbered_names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))


def remove_dead(graph: Graph) -> int:
    """Remove nodes that no output needs, then parameters, buffers and modules that no node reads.

    Returns:
        The number of nodes removed.
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


def views_to_reshapes(graph: Graph) -> list[str]:
    """Replace views by reshapes, which return the same values for any strides; return the names of the nodes.

    Tracing records `reshape` as `view` if the strides of the example allow it. They may no longer allow it after a
    copy or a branch before the view was removed.
    """
    views = [node for node in graph.nodes() if node.target in VIEWS]
    for node in views:
        node.target = aten.reshape.default
    return [node.name for node in views]


def name_squeezed_axes(graph: Graph) -> list[str]:
    """Let `squeeze` without axes remove those that have size 1 for every input; return the names of the nodes.

    By itself it would also remove an axis of the batch that has one row.
    """
    squeezes = [node for node in graph.nodes() if node.target is aten.squeeze.default]
    for node in squeezes:
        value = node.args[0]
        assert isinstance(value, fx.Node)
        sizes = value_of(value).shape
        for axis in [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size == 1][::-1]:
            value = insert_call(graph, aten.squeeze.dim, value, axis, before=node)
        replace_all_uses(graph, node, value)
    return [node.name for node in squeezes]


def remove_redundant_expansions(graph: Graph) -> list[str]:
    """Remove each `expand_as` whose users are element-wise operators that broadcast by themselves; return the names.

    `torch.nn.functional.normalize` divides by such a value.
    """
    changed = []
    for node in [each for each in graph.nodes() if each.target is aten.expand_as.default]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if all(_is_broadcast_by(user, node) for user in node.users):
            replace_all_uses(graph, node, source)
            changed.append(node.name)
    return changed


def _is_broadcast_by(user: fx.Node, operand: fx.Node) -> bool:
    """Return whether an element-wise operator has another operand of the size of this one."""
    sizes = [expression(size) for size in value_of(operand).shape]
    others = [value_of(each) for each in user.all_input_nodes if each is not operand]
    same = any(
        isinstance(other, torch.Tensor) and [expression(size) for size in other.shape] == sizes for other in others
    )
    return same and torch.Tag.pointwise in getattr(user.target, "tags", ())


def remove_assertions(graph: Graph) -> list[str]:
    """Remove nodes that only assert properties of traced values; return their names."""
    asserting = [node for node in graph.nodes() if node.target in ASSERTIONS]
    for node in reversed(asserting):
        graph.module.graph.erase_node(node)
    return [node.name for node in asserting]
