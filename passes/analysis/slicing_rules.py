"""Which part of each input an operator needs to compute only a part of its value: one rule per operator family."""

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

aten = torch.ops.aten

END = 2**63 - 1  # how a traced slice says "up to the end"


@dataclass(frozen=True)
class Part:
    """A range of one axis of a value. Counted from the end, ``-1`` to ``0``, where the axis has no fixed size."""

    axis: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many there are."""
        return self.stop - self.start

    def at(self, axis: int, *, shift: int = 0) -> Part:
        """The same range of another axis, or `shift` further on."""
        return Part(axis, self.start + shift, self.stop + shift)


NOTHING = Part(0, 0, 0)
Asked = list[tuple[fx.Node, "Part | None"]]


@dataclass(frozen=True)
class Step:
    """How a node computes only `part` of its value: what it asks of its inputs, and arguments that change.

    Inputs that are not named, or named with None, are asked for in full. `hands_on` says that the part is no more than
    what the node gets from one input.
    """

    part: Part
    asks: dict[fx.Node, Part | None]
    arguments: tuple[Any, ...] | None = None
    hands_on: bool = False


# --------------------------------------------------------------------------------------------------------- selections


def selection(node: fx.Node) -> dict[fx.Node, Part | None]:
    """The part that a `select` or `slice` reads of its input; empty for anything else, for the batch and for all."""
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return {}
    source = _input(node)
    part = _range(node, source)
    return {source: part} if part and part.axis and part.width > 0 and part.width != size_of(source, part.axis) else {}


def _range(node: fx.Node, source: fx.Node) -> Part | None:
    """The range of a selection, None where it is not known while tracing; without a fixed size never an empty one."""
    axis = _axis(source, _argument(node, 1, 0))
    size = size_of(source, axis)
    if node.target == aten.select.int:
        start = node.args[2]
        if not isinstance(start, int):
            return None
        start = start % size if isinstance(size, int) else start
        return Part(axis, start, start + 1)
    first, last, step = _argument(node, 2, None), _argument(node, 3, None), _argument(node, 4, 1)
    if step != 1 or not isinstance(first, int | None) or not isinstance(last, int | None):
        return None
    if isinstance(size, int):
        return Part(axis, *slice(first, last).indices(size)[:2])
    start, to_end = (0 if first is None else first), last is None or last == END
    stop = 0 if to_end else last
    return Part(axis, start, stop) if stop is not None and start < stop and (start >= 0) == (stop > 0) else None


def _is_all(node: fx.Node) -> bool:
    """Whether a slice is of everything."""
    first, last = _argument(node, 2, None), _argument(node, 3, None)
    size = size_of(_input(node), _axis(_input(node), _argument(node, 1, 0)))
    return first in (None, 0) and (
        last in (None, END) or (isinstance(size, int) and isinstance(last, int) and last >= size)
    )


# -------------------------------------------------------------------------------------- rules, one per operator family


def step_for(node: fx.Node, part: Part) -> Step | None:
    """How to compute only `part` of a node, None where its operator mixes the tokens of that axis or is not known."""
    rule = _rule(node)
    return rule(node, part) if rule else None


def _rule(node: fx.Node) -> Callable[[fx.Node, Part], Step | None] | None:
    for targets, rule in RULES:
        if node.target in targets:
            return rule
    tags = getattr(node.target, "tags", ())
    return _elementwise if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags else None


def _made(part: Part, asked: Asked, arguments: tuple[Any, ...] | None = None, *, hands_on: bool = False) -> Step | None:
    """The step, unless it wants two different things of one input."""
    asks = dict(asked)
    agree = all(asks[source] == ask for source, ask in asked)
    return Step(part, asks, arguments, hands_on) if agree else None


def _elementwise(node: fx.Node, part: Part) -> Step | None:
    """Operands are aligned at their last axis; one that is broadcast along the axis is read in full."""
    return _made(part, [(source, _aligned(source, _rank(node), part)) for source in node.all_input_nodes])


def _aligned(source: fx.Node, rank: int, part: Part) -> Part | None:
    """The part of an operand that broadcasting to `rank` axes puts beside `part` of the result."""
    axis = part.axis - rank + _rank(source)
    return None if axis < 0 or _is_one(size_of(source, axis)) else part.at(axis)


def _first_alone(node: fx.Node, part: Part) -> Step | None:
    """Casts and the like: what else they read is no data."""
    return _made(part, [(source, part if source is node.args[0] else None) for source in node.all_input_nodes])


def _rows(node: fx.Node, part: Part) -> Step | None:
    """A linear map of the last axis."""
    if node.target == aten.addmm.default:
        return _made(part, [(_input(node, 1), part), (_input(node, 2), None)]) if _is_row(node, part) else None
    return _first_alone(node, part) if part.axis < _rank(node) - 1 else None


def _is_row(node: fx.Node, part: Part) -> bool:
    return part.axis == 0 and _rank(_input(node)) == 1


def _norm(node: fx.Node, part: Part) -> Step | None:
    """Normalised are as many last axes as are named."""
    sizes = node.args[1]
    assert isinstance(sizes, Sequence)
    return _first_alone(node, part) if part.axis < _rank(node) - len(sizes) else None


def _softmax(node: fx.Node, part: Part) -> Step | None:
    return _first_alone(node, part) if part.axis != _axis(node, node.args[1]) else None


def _product(node: fx.Node, part: Part) -> Step | None:
    """Rows of the left matrix or columns of the right one; other axes are broadcast as element-wise ones are."""
    left, right = _input(node), _input(node, 1)
    rank = _rank(node)
    if min(_rank(left), _rank(right)) < 2:
        return None
    if part.axis == rank - 2:
        return _made(part, [(left, part.at(_rank(left) - 2)), (right, None)])
    if part.axis == rank - 1:
        return _made(part, [(left, None), (right, part.at(_rank(right) - 1))])
    return _made(part, [(left, _aligned(left, rank, part)), (right, _aligned(right, rank, part))])


def _attention(node: fx.Node, part: Part) -> Step | None:
    """Queries are independent of each other. A causal mask that is only a flag counts them from the first: refused."""
    query, key, value = (_input(node, position) for position in range(3))
    mask = _argument(node, 3, node.kwargs.get("attn_mask"))
    if part.axis != _rank(node) - 2 or _argument(node, 5, node.kwargs.get("is_causal", False)):
        return None
    masked: Asked = [(mask, _aligned(mask, _rank(node), part))] if isinstance(mask, fx.Node) else []
    return _made(part, [(query, part.at(_rank(query) - 2)), (key, None), (value, None), *masked])


def _permuted(node: fx.Node, part: Part) -> Step | None:
    order = list(range(_rank(node)))
    if node.target == aten.permute.default:
        order = [_axis(node, dim) for dim in node.args[1]]  # type: ignore[union-attr]
    else:
        first, second = (_axis(node, dim) for dim in node.args[1:3])
        order[first], order[second] = second, first
    return _made(part, [(_input(node), part.at(order[part.axis]))])


def _reshaped(node: fx.Node, part: Part) -> Step | None:
    """Axes may be split and merged on either side of an axis that stays."""
    source = _input(node)
    before, after = value_of(source).shape, value_of(node).shape
    same = [
        axis
        for axis in range(len(before))
        if _product_of(before[:axis]) == _product_of(after[: part.axis]) and str(before[axis]) == str(after[part.axis])
    ]
    return _made(part, [(source, part.at(same[0]))], _resized(node, part)) if same else None


def _resized(node: fx.Node, part: Part) -> tuple[Any, ...] | None:
    """The arguments of a reshape or expand with the size of the part; those of other operators name none."""
    if node.target not in RESHAPES | EXPANDS:
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[part.axis] = part.width
    return (node.args[0], sizes, *node.args[2:])


def _product_of(sizes: Sequence[Any]) -> str:
    """As text, because comparing symbolic sizes would fix them."""
    return str(math.prod(sizes))


def _expanded(node: fx.Node, part: Part) -> Step | None:
    source = _input(node)
    return _made(part, [(source, _aligned(source, _rank(node), part))], _resized(node, part))


def _joined(node: fx.Node, part: Part) -> Step | None:
    """A concatenation along another axis, or the one of its parts in which the range lies."""
    sources = node.all_input_nodes
    if part.axis != _axis(node, _argument(node, 1, 0)):
        return _made(part, [(source, part) for source in sources])
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
            others: Asked = [(other, NOTHING) for other in sources if other is not source]
            return _made(part, [(source, inside), *others], hands_on=True)
        begin += size
    return None


def _stacked(node: fx.Node, part: Part) -> Step | None:
    new = _axis(node, _argument(node, 1, 0))
    inside = part.at(part.axis - (part.axis > new))
    return _made(part, [(source, inside) for source in node.all_input_nodes]) if part.axis != new else None


def _split(node: fx.Node, part: Part) -> Step | None:
    """A list of results, of which all are narrowed alike."""
    source = _input(node)
    if node.target == aten.unbind.int:
        return _made(part, [(source, part.at(_with_axis(part.axis, _axis(source, _argument(node, 1, 0)))))])
    return _made(part, [(source, part)]) if part.axis != _axis(source, _argument(node, 2, 0)) else None


def _selected(node: fx.Node, part: Part) -> Step | None:
    """A selection in another axis stays; a slice in the same one may begin further on."""
    source = _input(node)
    axis = _axis(source, _argument(node, 1, 0))
    if node.target == aten.select.int:
        return _made(part, [(source, part.at(_with_axis(part.axis, axis)))])
    if part.axis != axis or _is_all(node):
        return _made(part, [(source, part)])
    found = _range(node, source)
    if found is None or found.start < 0 or part.start < 0:
        return None
    return _made(part, [(source, part.at(axis, shift=found.start))], hands_on=True)


def _with_axis(axis: int, extra: int) -> int:
    """Where an axis lies in a value that has one more, `extra`."""
    return axis + (axis >= extra)


def _reduced(node: fx.Node, part: Part) -> Step | None:
    """A sum or mean over other axes."""
    source, dims = _input(node), _argument(node, 1, None)
    if not isinstance(dims, Sequence) or not dims:
        return None
    gone = {_axis(source, dim) for dim in dims}
    kept = [axis for axis in range(_rank(source)) if axis not in gone or _argument(node, 2, False)]
    axis = kept[part.axis]
    return _made(part, [(source, part.at(axis))]) if axis not in gone else None


def _taken(node: fx.Node, part: Part) -> Step | None:
    """One result of several."""
    return _made(part, [(_input(node), part)])


RESHAPES = VIEWS | {aten.reshape.default}
EXPANDS = frozenset({aten.expand.default})
SPLITS = frozenset({aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})
RULES: tuple[tuple[frozenset[Any], Callable[[fx.Node, Part], Step | None]], ...] = (
    (LINEAR_OPS - {aten.mm.default}, _rows),
    (NORM_OPS, _norm),
    (SOFTMAX_OPS, _softmax),
    (frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default}), _product),
    (ATTENTION_OPS, _attention),
    (frozenset({aten.permute.default, aten.transpose.int}), _permuted),
    (RESHAPES | {aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim}, _reshaped),
    (EXPANDS, _expanded),
    (frozenset({aten.cat.default}), _joined),
    (frozenset({aten.stack.default}), _stacked),
    (SPLITS, _split),
    (frozenset({operator.getitem}), _taken),
    (frozenset({aten.select.int, aten.slice.Tensor}), _selected),
    (frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}), _reduced),
    (CASTS | COPIES | DROPOUTS | {aten.type_as.default}, _first_alone),
)


# ------------------------------------------------------------------------------------------------- reading arguments


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _input(node: fx.Node, position: int = 0) -> fx.Node:
    source = node.args[position]
    assert isinstance(source, fx.Node), f"{node.name} has no tensor at {position}"
    return source


def _shape(node: fx.Node) -> Sequence[Any]:
    """Sizes, of the first of several results; none for what is no tensor."""
    value = value_of(node)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return getattr(value, "shape", ())


def _rank(node: fx.Node) -> int:
    return len(_shape(node))


def size_of(node: fx.Node, axis: int) -> Any:
    """The size of an axis, a symbol where it is not fixed."""
    return _shape(node)[axis]


def _axis(node: fx.Node, dim: Any) -> int:
    """An axis counted from the front."""
    return int(dim) % max(_rank(node), 1)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
