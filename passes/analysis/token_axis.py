"""Follow the token axis of a value through operators: where it goes, where its length is written, where it is lost."""

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


class Unfollowed(Exception):
    """An operator does not keep the tokens apart; the message says why."""


@dataclass(frozen=True)
class Flow:
    """Where the tokens are in a value.

    ``stage`` is the number of reductions behind it, ``batch`` its axis of samples, ``tokens`` pairs of an axis and the
    token it starts with (negative: so many other entries stand in front). ``weighted`` is set behind a softmax over
    tokens, which knows their sizes.
    """

    stage: int
    batch: int
    tokens: tuple[tuple[int, int], ...]
    weighted: bool = False


def sizes_of(node: fx.Node) -> list[Any]:
    """Sizes as integers and expressions, which compare without fixing symbolic ones; of the first of several parts."""
    value = value_of(node)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return [expression(size) for size in getattr(value, "shape", ())]


def option(node: fx.Node, name: str) -> Any:
    """An argument of a call by its name, its default where it is not given."""
    for position, argument in enumerate(arguments(node.target)):
        if argument.name == name:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name, argument.default_value)
            return argument.default_value if given is None else given
    raise KeyError(name)


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator works on each entry alone, operands broadcast."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def move(node: fx.Node, flow: Flow, before: Sequence[Any], after: Sequence[Any]) -> Flow:
    """The flow behind an operator that moves, joins or splits axes.

    Raises:
        Unfollowed: the axis of samples or tokens is not one axis any more.
    """
    where = axes_behind(node, before, after)
    lost = [axis for axis in (flow.batch, *dict(flow.tokens)) if axis not in where]
    if lost:
        what = "samples" if lost[0] == flow.batch else "tokens"
        raise Unfollowed(f"it joins or splits the axis of {what} ({as_text(before)} to {as_text(after)})")
    tokens = tuple(sorted((where[axis], start) for axis, start in flow.tokens))
    return Flow(flow.stage, where[flow.batch], tokens, flow.weighted)


def axes_behind(node: fx.Node, before: Sequence[Any], after: Sequence[Any]) -> dict[int, int]:
    """For each axis of the input that is one axis of the output too, which."""
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
        return _without(rank, [option(node, "dim")]) if len(after) < rank else _straight(rank)
    if node.target in RESHAPES:
        return _reshaped(before, after)
    if node.target in REDUCTIONS and not option(node, "keepdim"):
        return _without(rank, option(node, "dim") if option(node, "dim") is not None else list(range(rank)))
    return {axis: axis + len(after) - rank for axis in range(rank)}


def _straight(rank: int) -> dict[int, int]:
    return {axis: axis for axis in range(rank)}


def _without(rank: int, dims: Sequence[int]) -> dict[int, int]:
    gone = {dim % rank for dim in dims}
    left = [axis for axis in range(rank) if axis not in gone]
    return {axis: position for position, axis in enumerate(left)}


def _reshaped(before: Sequence[Any], after: Sequence[Any]) -> dict[int, int]:
    """Axes of the same size with as many entries before them."""
    ahead = [math.prod(after[:position]) for position in range(len(after))]
    found = {}
    for axis, size in enumerate(before):
        front = math.prod(before[:axis])
        for position, other in enumerate(after):
            if ahead[position] == front and other == size:
                found[axis] = position
    return found


def as_text(sizes: Sequence[Any]) -> str:
    """Sizes as they are written in messages."""
    return "[" + ", ".join(map(str, sizes)) + "]"


def baked_sizes(node: fx.Node, flow: Flow, lengths: Mapping[int, Any]) -> tuple[Any, ...] | None:
    """The arguments of a reshape or expand with other lengths on its token axes; None where they hold none."""
    if node.target not in SIZES:
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    for axis, _ in flow.tokens:
        if sizes[axis] != -1:
            sizes[axis] = lengths[axis]
    return (node.args[0], sizes, *node.args[2:])


def together(flows: Sequence[tuple[Flow, int]], rank: int) -> Flow:
    """The flow of operands, each with its rank, broadcast to a value of `rank` axes.

    Raises:
        Unfollowed: they disagree on where samples or tokens are.
    """
    tokens: dict[int, int] = {}
    batches = set()
    for flow, own in flows:
        batches.add(flow.batch + rank - own)
        for axis, start in flow.tokens:
            if tokens.setdefault(axis + rank - own, start) != start:
                raise Unfollowed("it joins values that start with different tokens")
    if len(batches) > 1:
        raise Unfollowed("it joins values with the samples on different axes")
    stage = max(flow.stage for flow, _ in flows)
    return Flow(stage, batches.pop(), tuple(sorted(tokens.items())), any(flow.weighted for flow, _ in flows))


def leading_constants(node: fx.Node, axis: int, data: set[fx.Node]) -> int:
    """Number of leading entries along an axis that come from parameters alone: class and register tokens.

    Args:
        node: a value ``[samples, tokens, features]``.
        axis: its axis of tokens.
        data: nodes computed from the inputs' values.
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
        found = leading_constants(part, axis, data)
        total += found
        if found != sizes_of(part)[axis]:
            break
    return total


def from_data(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose values depend on the values of an input; sizes are no data."""
    found: set[fx.Node] = set()
    for node in nodes:
        number = node.target in (aten.sym_size.int, operator.mul, operator.add, operator.sub, operator.floordiv)
        if node.op == "placeholder" or (not number and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found
