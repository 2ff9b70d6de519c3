"""Tracking of the batch and token axes through operators, and detection of leading constant tokens."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from passes.graph.graph import CASTS, COPIES, VIEWS, value_of
from passes.torch_internals import SOFTMAX, arguments, expression

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from passes.graph.graph import Graph

aten = torch.ops.aten

RESHAPES = frozenset({aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, *VIEWS})
SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})
MOVES = RESHAPES | {
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.unbind.int,
    aten.expand.default,
    aten.numpy_T.default,
}
REDUCTIONS = frozenset(
    {
        aten.mean.dim,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.amin.default,
        aten.linalg_vector_norm.default,
        aten.var.correction,
    }
)
SAME_SHAPE = CASTS | COPIES | SOFTMAX | {aten.type_as.default, aten.softmax.int}
SIZES = {aten.reshape.default: 1, aten.expand.default: 1, **dict.fromkeys(VIEWS, 1)}


class UnsupportedOperator(Exception):
    """An operator through which the token axis cannot be tracked; the message states the reason."""


@dataclass(frozen=True)
class Flow:
    """Batch and token axes of a value.

    ``stage`` is the number of token reductions before the value and ``batch`` its batch axis. ``tokens`` holds pairs of
    an axis and the index of its first token; a negative index counts other entries in front of the tokens.
    ``weighted`` is set after a softmax over tokens, which accounts for the token sizes.
    """

    stage: int
    batch: int
    tokens: tuple[tuple[int, int], ...]
    weighted: bool = False


def sizes_of(node: fx.Node) -> list[Any]:
    """Return the sizes of a value, or of the first tensor of a list.

    Symbolic sizes are returned as expressions, whose comparison does not specialize them.
    """
    value = value_of(node)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return [expression(size) for size in getattr(value, "shape", ())]


def batch_size(graph: Graph) -> Any:
    """Return the symbolic size of the first axis of the inputs; None if it is a number."""
    first = next((sizes_of(node)[0] for node in graph.placeholders() if sizes_of(node)), None)
    return None if first is None or isinstance(first, int) else first


def option(node: fx.Node, name: str) -> Any:
    """Return an argument of a call by name, or its default. Raises KeyError if the operator has no such argument."""
    for position, argument in enumerate(arguments(node.target)):
        if argument.name == name:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
            return argument.default_value if value is None else value
    raise KeyError(name)


def is_pointwise(node: fx.Node) -> bool:
    """Return whether an operator is element-wise, with broadcast operands."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def move(node: fx.Node, flow: Flow, before: Sequence[Any], after: Sequence[Any]) -> Flow:
    """Return the flow after an operator that moves, merges or splits axes.

    Raises:
        UnsupportedOperator: the operator merges or splits the batch axis or a token axis.
    """
    output_axis = axes_behind(node, before, after)
    lost = [axis for axis in (flow.batch, *dict(flow.tokens)) if axis not in output_axis]
    if lost:
        name = "batch" if lost[0] == flow.batch else "token"
        raise UnsupportedOperator(f"it merges or splits the {name} axis ({as_text(before)} to {as_text(after)})")
    tokens = tuple(sorted((output_axis[axis], start) for axis, start in flow.tokens))
    return Flow(flow.stage, output_axis[flow.batch], tokens, flow.weighted)


def axes_behind(node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> dict[int, int]:
    """Map each input axis that the operator keeps as one axis to the corresponding output axis."""
    rank = len(before)
    if node.target == aten.permute.default:
        return {dim % rank: position for position, dim in enumerate(option(node, "dims"))}
    if node.target == aten.transpose.int:
        first, second = option(node, "dim0") % rank, option(node, "dim1") % rank
        return {axis: {first: second, second: first}.get(axis, axis) for axis in range(rank)}
    if node.target in (aten.unsqueeze.default, aten.stack.default):
        new = option(node, "dim") % (rank + 1)
        return {axis: axis + (axis >= new) for axis in range(rank)}
    if node.target in (aten.squeeze.dim, aten.select.int, aten.unbind.int):
        return _without(rank, [option(node, "dim")]) if len(after) < rank else _identity(rank)
    if node.target in RESHAPES:
        return _reshaped(before, after)
    if node.target in REDUCTIONS and not option(node, "keepdim"):
        return _without(rank, option(node, "dim") if option(node, "dim") is not None else list(range(rank)))
    return {axis: axis + len(after) - rank for axis in range(rank)}


def _identity(rank: int) -> dict[int, int]:
    return {axis: axis for axis in range(rank)}


def _without(rank: int, dims: Sequence[int]) -> dict[int, int]:
    removed = {dim % rank for dim in dims}
    kept = [axis for axis in range(rank) if axis not in removed]
    return {axis: position for position, axis in enumerate(kept)}


def _reshaped(before: Sequence[Any], after: Sequence[Any]) -> dict[int, int]:
    """Map input axes to output axes of the same size whose preceding sizes have the same product."""
    output_products = [math.prod(after[:position]) for position in range(len(after))]
    output_axis = {}
    for axis, size in enumerate(before):
        input_product = math.prod(before[:axis])
        for position, output_size in enumerate(after):
            if output_products[position] == input_product and output_size == size:
                output_axis[axis] = position
    return output_axis


def as_text(sizes: Sequence[Any]) -> str:
    """Format sizes for an error message; a dynamic one, such as that of the batch, is ``any``."""
    return "[" + ", ".join(str(size) if str(size).isdecimal() else "any" for size in sizes) + "]"


def resized_arguments(node: fx.Node, flow: Flow, lengths: Mapping[int, Any]) -> tuple[Any, ...] | None:
    """Return the arguments of a reshape or expand with new token axis lengths; None for any other operator."""
    if node.target not in SIZES:
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    for axis, _ in flow.tokens:
        if sizes[axis] != -1:
            sizes[axis] = lengths[axis]
    return (node.args[0], sizes, *node.args[2:])


def broadcast_flows(flows: Sequence[tuple[Flow, int]], rank: int) -> Flow:
    """Return the flow of operands, each given with its rank, that are broadcast to `rank` axes.

    Raises:
        UnsupportedOperator: the operands disagree on the batch axis or on the first token of a token axis.
    """
    tokens: dict[int, int] = {}
    batches = set()
    for flow, operand_rank in flows:
        batches.add(flow.batch + rank - operand_rank)
        for axis, start in flow.tokens:
            if tokens.setdefault(axis + rank - operand_rank, start) != start:
                raise UnsupportedOperator("it combines values whose first tokens differ")
    if len(batches) > 1:
        raise UnsupportedOperator("it combines values whose batch axes differ")
    stage = max(flow.stage for flow, _ in flows)
    return Flow(stage, batches.pop(), tuple(sorted(tokens.items())), any(flow.weighted for flow, _ in flows))


def leading_constants(node: fx.Node, axis: int, data: set[fx.Node]) -> int:
    """Return the number of leading entries along an axis that depend on parameters only (class, register tokens).

    Args:
        node: a value ``[samples, tokens, features]``.
        axis: its token axis.
        data: nodes that depend on the values of an input.
    """
    if node not in data:
        sizes = sizes_of(node)
        return int(sizes[axis]) if len(sizes) > axis and isinstance(sizes[axis], int) else 0
    if node.target == aten.cat.default and option(node, "dim") % len(sizes_of(node)) == axis:
        return _leading_of_parts(node.args[0], axis, data)  # type: ignore[arg-type]
    if node.target == aten.slice.Tensor:
        inner = leading_constants(node.args[0], axis, data)  # type: ignore[arg-type]
        if option(node, "dim") != axis:
            return inner
        return max(0, min(inner, _end(node)) - (option(node, "start") or 0))
    passes_on = is_pointwise(node) or node.target in SAME_SHAPE or node.target == aten.layer_norm.default
    source = next((source for source in node.all_input_nodes if source in data), None)
    return leading_constants(source, axis, data) if passes_on and source is not None else 0


def _end(node: fx.Node) -> int:
    end = option(node, "end")
    return end if isinstance(end, int) and end >= 0 else 2**63 - 1


def _leading_of_parts(parts: Sequence[fx.Node], axis: int, data: set[fx.Node]) -> int:
    total = 0
    for part in parts:
        count = leading_constants(part, axis, data)
        total += count
        if count != sizes_of(part)[axis]:
            break
    return total


def data_dependent_nodes(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on the values of an input; shape arithmetic does not count."""
    dependent: set[fx.Node] = set()
    for node in nodes:
        is_size = node.target in (aten.sym_size.int, operator.mul, operator.add, operator.sub, operator.floordiv)
        if node.op == "placeholder" or (not is_size and any(source in dependent for source in node.all_input_nodes)):
            dependent.add(node)
    return dependent
