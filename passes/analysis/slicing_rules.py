"""Slice propagation rules: the part of each input that an operator needs to compute a part of its output.

There is one rule per operator family. A rule returns None for an operator that mixes entries along the sliced axis.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graph.graph import CASTS, COPIES, DROPOUTS, VIEWS, value_of
from passes.graph.sites import ATTENTION_OPS, LINEAR_OPS, NORM_OPS, SOFTMAX_OPS
from passes.torch_internals import may_differ

aten = torch.ops.aten

END = 2**63 - 1  # the `end` of an open-ended slice in a traced graph


@dataclass(frozen=True)
class AxisRange:
    """Range of one axis of a value.

    On an axis of symbolic size, a range at the end has negative indices, with ``stop`` 0 for the end.
    """

    axis: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of entries."""
        return self.stop - self.start

    def at(self, axis: int, *, shift: int = 0) -> AxisRange:
        """Return the range on another axis, shifted by `shift` entries."""
        return AxisRange(axis, self.start + shift, self.stop + shift)


NOTHING = AxisRange(0, 0, 0)
Requests = list[tuple[fx.Node, "AxisRange | None"]]


@dataclass(frozen=True)
class Narrowing:
    """Narrowing of a node to `part` of its value.

    `asks` maps an input to the part that the node then needs; None, or no entry, is the whole input. `arguments`
    replaces the arguments of the node unless it is None. `is_identity` is set if the part equals a part of one input.
    """

    part: AxisRange
    asks: dict[fx.Node, AxisRange | None]
    arguments: tuple[Any, ...] | None = None
    is_identity: bool = False


# --------------------------------------------------------------------------------------------------------- selections


def selection(node: fx.Node) -> dict[fx.Node, AxisRange | None]:
    """Return the part of its input that a `select` or `slice` reads.

    The result is empty for other operators, for the batch axis and for a selection of the whole axis.
    """
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return {}
    source = _input(node)
    part = _range(node, source)
    if part is None or not part.axis or part.width <= 0:
        return {}
    return {source: part} if may_differ(part.width, size_of(source, part.axis)) else {}


def _range(node: fx.Node, source: fx.Node) -> AxisRange | None:
    """Return the range of a selection; None if its bounds are dynamic, or if it may be empty on a symbolic axis."""
    axis = _axis(source, _argument(node, 1, 0))
    size = size_of(source, axis)
    if node.target == aten.select.int:
        start = node.args[2]
        if not isinstance(start, int):
            return None
        start = start % size if isinstance(size, int) else start
        return AxisRange(axis, start, start + 1)
    first, last, step = _argument(node, 2, None), _argument(node, 3, None), _argument(node, 4, 1)
    if step != 1 or not isinstance(first, int | None) or not isinstance(last, int | None):
        return None
    if isinstance(size, int):
        return AxisRange(axis, *slice(first, last).indices(size)[:2])
    start, to_end = (0 if first is None else first), last is None or last == END
    stop = 0 if to_end else last
    return AxisRange(axis, start, stop) if stop is not None and start < stop and (start >= 0) == (stop > 0) else None


def _is_all(node: fx.Node) -> bool:
    """Return whether a slice covers the whole axis."""
    first, last = _argument(node, 2, None), _argument(node, 3, None)
    size = size_of(_input(node), _axis(_input(node), _argument(node, 1, 0)))
    return first in (None, 0) and (
        last in (None, END) or (isinstance(size, int) and isinstance(last, int) and last >= size)
    )


# -------------------------------------------------------------------------------------- rules, one per operator family


def narrowing_for(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Return the narrowing of a node to `part`; None if the operator mixes entries of that axis or has no rule."""
    rule = _rule(node)
    return rule(node, part) if rule else None


def _rule(node: fx.Node) -> Callable[[fx.Node, AxisRange], Narrowing | None] | None:
    for targets, rule in RULES:
        if node.target in targets:
            return rule
    tags = getattr(node.target, "tags", ())
    return _elementwise if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags else None


def _step(
    part: AxisRange, requests: Requests, arguments: tuple[Any, ...] | None = None, *, is_identity: bool = False
) -> Narrowing | None:
    """Return the step; None if it requests two different parts of one input."""
    asks = dict(requests)
    agree = all(asks[source] == request for source, request in requests)
    return Narrowing(part, asks, arguments, is_identity) if agree else None


def _elementwise(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice each operand, aligned at the last axis; an operand that is broadcast along the axis is read in full."""
    return _step(part, [(source, _aligned(source, _rank(node), part)) for source in node.all_input_nodes])


def _aligned(source: fx.Node, rank: int, part: AxisRange) -> AxisRange | None:
    """Return the part of an operand that contributes to `part` of a result of `rank` axes under broadcasting."""
    axis = part.axis - rank + _rank(source)
    return None if axis < 0 or _is_one(size_of(source, axis)) else part.at(axis)


def _first_input(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice the first input only; other inputs carry no data along the axis."""
    return _step(part, [(source, part if source is node.args[0] else None) for source in node.all_input_nodes])


def _linear(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice a linear map along any axis but the last."""
    if node.target == aten.addmm.default:
        return _step(part, [(_input(node, 1), part), (_input(node, 2), None)]) if _is_row(node, part) else None
    return _first_input(node, part) if part.axis < _rank(node) - 1 else None


def _is_row(node: fx.Node, part: AxisRange) -> bool:
    return part.axis == 0 and _rank(_input(node)) == 1


def _norm(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice a norm along an axis that is not normalised; the normalised ones are the last `len(sizes)`."""
    sizes = node.args[1]
    assert isinstance(sizes, Sequence)
    return _first_input(node, part) if part.axis < _rank(node) - len(sizes) else None


def _softmax(node: fx.Node, part: AxisRange) -> Narrowing | None:
    return _first_input(node, part) if part.axis != _axis(node, node.args[1]) else None


def _product(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice rows of the left matrix, columns of the right one, or a broadcast batch axis of both."""
    left, right = _input(node), _input(node, 1)
    rank = _rank(node)
    if min(_rank(left), _rank(right)) < 2:
        return None
    if part.axis == rank - 2:
        return _step(part, [(left, part.at(_rank(left) - 2)), (right, None)])
    if part.axis == rank - 1:
        return _step(part, [(left, None), (right, part.at(_rank(right) - 1))])
    return _step(part, [(left, _aligned(left, rank, part)), (right, _aligned(right, rank, part))])


def _attention(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice the queries, which are independent of each other.

    ``is_causal`` is refused, because it numbers the queries from the first one.
    """
    query, key, value = (_input(node, position) for position in range(3))
    mask = _argument(node, 3, node.kwargs.get("attn_mask"))
    if part.axis != _rank(node) - 2 or _argument(node, 5, node.kwargs.get("is_causal", False)):
        return None
    mask_request: Requests = [(mask, _aligned(mask, _rank(node), part))] if isinstance(mask, fx.Node) else []
    return _step(part, [(query, part.at(_rank(query) - 2)), (key, None), (value, None), *mask_request])


def _permute(node: fx.Node, part: AxisRange) -> Narrowing | None:
    order = list(range(_rank(node)))
    if node.target == aten.permute.default:
        order = [_axis(node, dim) for dim in node.args[1]]  # type: ignore[union-attr]
    else:
        first, second = (_axis(node, dim) for dim in node.args[1:3])
        order[first], order[second] = second, first
    return _step(part, [(_input(node), part.at(order[part.axis]))])


def _reshape(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice along an axis that a reshape keeps; axes on either side may be split or merged."""
    source = _input(node)
    before, after = value_of(source).shape, value_of(node).shape
    same = [
        axis
        for axis in range(len(before))
        if _product_of(before[:axis]) == _product_of(after[: part.axis]) and str(before[axis]) == str(after[part.axis])
    ]
    return _step(part, [(source, part.at(same[0]))], _resized(node, part)) if same else None


def _resized(node: fx.Node, part: AxisRange) -> tuple[Any, ...] | None:
    """Return the arguments of a reshape or expand with the size of the part; None for an operator without sizes."""
    if node.target not in RESHAPES | EXPANDS:
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[part.axis] = part.width
    return (node.args[0], sizes, *node.args[2:])


def _product_of(sizes: Sequence[Any]) -> str:
    """Return the product as text, because comparing symbolic sizes would specialize them."""
    return str(math.prod(sizes))


def _expand(node: fx.Node, part: AxisRange) -> Narrowing | None:
    source = _input(node)
    return _step(part, [(source, _aligned(source, _rank(node), part))], _resized(node, part))


def _concatenation(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice a concatenation along another axis, or replace it by the one input that contains the range."""
    sources = node.all_input_nodes
    if part.axis != _axis(node, _argument(node, 1, 0)):
        return _step(part, [(source, part) for source in sources])
    begin = 0
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    for source in parts:
        assert isinstance(source, fx.Node)
        size = size_of(source, part.axis)
        if not isinstance(size, int):
            return None
        if begin <= part.start and part.stop <= begin + size:
            inside = part.at(part.axis, shift=-begin) if part.width < size else None
            others: Requests = [(other, NOTHING) for other in sources if other is not source]
            return _step(part, [(source, inside), *others], is_identity=True)
        begin += size
    return None


def _stack(node: fx.Node, part: AxisRange) -> Narrowing | None:
    new_axis = _axis(node, _argument(node, 1, 0))
    inside = part.at(part.axis - (part.axis > new_axis))
    return _step(part, [(source, inside) for source in node.all_input_nodes]) if part.axis != new_axis else None


def _split(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice an operator with a list of results; all results are narrowed alike."""
    source = _input(node)
    if node.target == aten.unbind.int:
        return _step(part, [(source, part.at(_with_axis(part.axis, _axis(source, _argument(node, 1, 0)))))])
    return _step(part, [(source, part)]) if part.axis != _axis(source, _argument(node, 2, 0)) else None


def _select(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Keep a selection on another axis; shift the range through a slice on the same axis."""
    source = _input(node)
    axis = _axis(source, _argument(node, 1, 0))
    if node.target == aten.select.int:
        return _step(part, [(source, part.at(_with_axis(part.axis, axis)))])
    if part.axis != axis or _is_all(node):
        return _step(part, [(source, part)])
    selected = _range(node, source)
    if selected is None or selected.start < 0 or part.start < 0:
        return None
    return _step(part, [(source, part.at(axis, shift=selected.start))], is_identity=True)


def _with_axis(axis: int, extra: int) -> int:
    """Return the index of an axis after an axis is inserted at `extra`."""
    return axis + (axis >= extra)


def _reduction(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice a reduction over other axes."""
    source, dims = _input(node), _argument(node, 1, None)
    if not isinstance(dims, Sequence) or not dims:
        return None
    reduced = {_axis(source, dim) for dim in dims}
    kept = [axis for axis in range(_rank(source)) if axis not in reduced or _argument(node, 2, False)]
    axis = kept[part.axis]
    return _step(part, [(source, part.at(axis))]) if axis not in reduced else None


def _item(node: fx.Node, part: AxisRange) -> Narrowing | None:
    """Slice one item of a list of results."""
    return _step(part, [(_input(node), part)])


RESHAPES = VIEWS | {aten.reshape.default}
EXPANDS = frozenset({aten.expand.default})
SPLITS = frozenset({aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})
RULES: tuple[tuple[frozenset[Any], Callable[[fx.Node, AxisRange], Narrowing | None]], ...] = (
    (LINEAR_OPS - {aten.mm.default}, _linear),
    (NORM_OPS, _norm),
    (SOFTMAX_OPS, _softmax),
    (frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default}), _product),
    (ATTENTION_OPS, _attention),
    (frozenset({aten.permute.default, aten.transpose.int}), _permute),
    (RESHAPES | {aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim}, _reshape),
    (EXPANDS, _expand),
    (frozenset({aten.cat.default}), _concatenation),
    (frozenset({aten.stack.default}), _stack),
    (SPLITS, _split),
    (frozenset({operator.getitem}), _item),
    (frozenset({aten.select.int, aten.slice.Tensor}), _select),
    (frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}), _reduction),
    (CASTS | COPIES | DROPOUTS | {aten.type_as.default}, _first_input),
)


# ------------------------------------------------------------------------------------------------- reading arguments


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _input(node: fx.Node, position: int = 0) -> fx.Node:
    source = node.args[position]
    assert isinstance(source, fx.Node), f"argument {position} of {node.name} is not a node"
    return source


def _shape(node: fx.Node) -> Sequence[Any]:
    """Return the sizes of a value, or of the first of several results; empty if it is not a tensor."""
    value = value_of(node)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return getattr(value, "shape", ())


def _rank(node: fx.Node) -> int:
    return len(_shape(node))


def size_of(node: fx.Node, axis: int) -> Any:
    """Return the size of an axis, an integer or a symbol."""
    return _shape(node)[axis]


def _axis(node: fx.Node, dim: Any) -> int:
    """Return an axis as a non-negative index."""
    return int(dim) % max(_rank(node), 1)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
