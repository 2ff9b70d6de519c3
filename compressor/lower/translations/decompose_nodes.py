"""Replacement of the operators that torch.onnx cannot translate by ones that it can, node by node."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from passes.graph.graph import aten, value_of
from passes.torch_internals import OpOverload, enable_python_dispatcher, fake_mode, is_mutable, make_fx, tree_leaves

Table = dict[Any, Callable[..., Any]]


def decompose_nodes(program: ExportedProgram, kept: Callable[[Any], bool], table: Table) -> bool:
    """Decompose the operators of a program in place, each on its own, with its traced values.

    `ExportedProgram.run_decompositions` traces the whole program again for the same result, which takes most of the
    time of an export.

    Args:
        program: program without operators that write into a tensor.
        kept: whether an operator is left as it is.
        table: decompositions of other operators. Composite operators without an entry are decomposed by torch.

    Returns:
        False if an operator cannot be decomposed on its own; the program then still computes the same.
    """
    nodes = program.graph
    for node in list(nodes.nodes):
        if node.op != "call_function" or (kept(node.target) and not _is_split_by_a_size(node)):
            continue
        if not isinstance(node.target, OpOverload):
            return False
        value = _decomposed(node, kept, table)
        if value is None:
            return False
        if isinstance(value, fx.Node):
            program.graph_signature.replace_all_uses(node.name, value.name)
        _replace(node, value)
    nodes.eliminate_dead_code()
    program.graph_module.recompile()
    return True


def _decomposed(node: fx.Node, kept: Callable[[Any], bool], table: Table) -> Any:
    """Insert the decomposition of a node before it.

    Returns:
        The node that computes its value, or as many as the value has parts; None, and nothing is inserted, if the
        decomposition has an operator that is not kept, or a constant.
    """
    inputs, nodes = node.all_input_nodes, node.graph
    if node.target is aten.reshape.default:
        return _copied_and_viewed(node)
    if _is_split_by_a_size(node):
        return _sliced(node, node.args[1])  # type: ignore[arg-type]
    if _is_chunk_of_a_size(node):
        return _sliced(node, _size_of_chunks(node))

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        if node.target is aten.rsub.Scalar:
            return _subtracted(*args, **kwargs)  # type: ignore[arg-type]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with _mode(node), enable_python_dispatcher():
        part = make_fx(call, decomposition_table=table)(*map(value_of, inputs)).graph
    calls = [each for each in part.nodes if each.op not in ("placeholder", "output")]
    if not all(each.op == "call_function" and kept(each.target) and not is_mutable(each.target) for each in calls):
        return None
    copies = dict(zip(part.find_nodes(op="placeholder"), inputs, strict=True))
    with nodes.inserting_before(node):
        for each in calls:
            copies[each] = nodes.node_copy(each, copies.__getitem__)
            copies[each].meta = {**node.meta, "val": value_of(each)}
    return fx.node.map_arg(part.output_node().args[0], copies.__getitem__)


def _mode(node: fx.Node) -> contextlib.AbstractContextManager[Any]:
    """Return the mode in which an operator without operands that are tensors, such as `eye`, makes a traced value."""
    modes = (fake_mode(each) for each in tree_leaves(value_of(node)))
    return next((mode for mode in modes if mode is not None), contextlib.nullcontext())


def _copied_and_viewed(node: fx.Node) -> fx.Node:
    """Insert a copy and a view of it for a reshape, as recorded strides may be wrong after an edit; ONNX has none."""
    values, shape = node.args
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(aten.clone.default, (values,), {"memory_format": torch.contiguous_format})
        view = node.graph.call_function(aten.view.default, (copy, shape))
    for call in (copy, view):
        args = fx.node.map_arg(call.args, value_of)
        with _mode(node), enable_python_dispatcher():
            call.meta = {**node.meta, "val": call.target(*args, **call.kwargs)}  # type: ignore[operator]
    return view


def _is_split_by_a_size(node: fx.Node) -> bool:
    """Return whether a value is split into parts of a symbolic size, which onnxscript 0.7 fails to optimize."""
    return node.target is aten.split.Tensor and isinstance(node.args[1], fx.Node)


def _is_chunk_of_a_size(node: fx.Node) -> bool:
    """Return whether a value is cut into a number of parts along an axis of a symbolic size, which is such a split."""
    if node.target is not aten.chunk.default:
        return False
    given: tuple[Any, ...] = (*node.args, 0)
    return not isinstance(value_of(given[0]).shape[given[2]], int)


def _size_of_chunks(node: fx.Node) -> fx.Node:
    """Insert the size of the parts of a chunk: that of the axis divided by their number, rounded up."""
    given: tuple[Any, ...] = (*node.args, 0)
    values, count, axis = given[:3]
    size = value_of(values).shape[axis]
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(aten.sym_size.int, (values, axis))
        more = node.graph.call_function(operator.add, (whole, count - 1))
        part = node.graph.call_function(operator.floordiv, (more, count))
    for each, value in ((whole, size), (more, size + count - 1), (part, (size + count - 1) // count)):
        each.meta["val"] = value
    return part


def _sliced(node: fx.Node, size: fx.Node) -> list[fx.Node]:
    """Insert a slice for each part of a split or a chunk."""
    values, _, axis = (*node.args, 0)[:3]
    parts = []
    for number, value in enumerate(value_of(node)):
        with node.graph.inserting_before(node):
            start, end = (_times(size, each) for each in (number, number + 1))
            parts.append(node.graph.call_function(aten.slice.Tensor, (values, axis, start, end)))
        parts[-1].meta = {**node.meta, "val": value}
    return parts


def _times(size: fx.Node, number: int) -> fx.Node | int:
    """Return a multiple of a symbolic size."""
    if number < 2:
        return size if number else 0
    product = size.graph.call_function(operator.mul, (size, number))
    product.meta["val"] = value_of(size) * number
    return product


def _subtracted(values: torch.Tensor, number: float, alpha: float = 1) -> torch.Tensor:
    """Subtract values from a number without an operator whose first operand is a number, which has no promoted type."""
    return aten.add.Tensor(aten.mul.Tensor(values, -alpha), number)  # type: ignore[no-any-return]


def _replace(node: fx.Node, value: Any) -> None:
    """Replace a node, or each part of its value if it has several."""
    if isinstance(value, fx.Node):
        node.replace_all_uses_with(value)
        return
    for reader in list(node.users):
        assert reader.target is operator.getitem
        reader.replace_all_uses_with(value[reader.args[1]])
