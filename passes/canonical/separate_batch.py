"""The batch as an axis of its own, where a model joins it with heads or tokens and splits it off again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from passes.analysis.token_axis import RESHAPES, batch_size, is_pointwise, option, sizes_of
from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_all_uses
from passes.graph.graph import DROPOUTS, Graph, aten, value_of
from passes.torch_internals import SOFTMAX, expression

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

RANK = 4  # maximum number of axes of a separated value; attention in windows would have more, and engines take four
SOFTMAXES = SOFTMAX | {aten.softmax.int}


@dataclass(frozen=True)
class SeparateBatch:
    """Rewrite pass that keeps the batch an axis of its own between a reshape that joins it and one that splits it off.

    `torch.nn.MultiheadAttention` joins it with its heads and then with the tokens. Nothing can be said of the tokens of
    such a value, so none could be merged, and engines do not recognise the attention.

    Before::

        %a = reshape(%q, [tokens, batch * heads, features]); %b = transpose(%a, 0, 1)
        %y = reshape(%b, [batch, heads, tokens, features])

    After::

        %a = reshape(%q, [tokens, -1, heads, features]); %y = permute(%a, [1, 2, 0, 3])

    Between the two reshapes there may be permutations, linear maps, pointwise operators, softmax and products of
    matrices (bmm, baddbmm). Values that would have more than `RANK` axes stay joined.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the reshapes that split the batch off, which were replaced."""
        batch = batch_size(graph)
        if batch is None:
            return Rewritten(changed=())
        separation = _Separation(graph, batch)
        changed = [node.name for node in graph.nodes() if separation.visit(node)]
        remove_dead(graph)
        return Rewritten(changed=tuple(changed))


def joins_batch(graph: Graph) -> bool:
    """Return whether a reshape of the graph joins the batch with another axis."""
    batch = batch_size(graph)
    return batch is not None and any(
        node.target in RESHAPES and _joined(sizes_of(node), batch) is not None for node in graph.nodes()
    )


def _joined(sizes: Sequence[Any], batch: Any) -> int | None:
    """Return the axis that joins the batch with another one; None if there is none, or the batch is elsewhere too."""
    axes = [axis for axis, size in enumerate(sizes) if not isinstance(size, int) and batch in size.free_symbols]
    return axes[0] if len(axes) == 1 and sizes[axes[0]] != batch else None


@dataclass(frozen=True)
class _Twin:
    """A value with the batch as an axis of its own; `axis` of the original is `parts` adjacent axes of `node`."""

    node: fx.Node
    axis: int
    parts: int

    def position(self, axis: int) -> int:
        """Return the axis of the twin for another axis than `axis` of the original."""
        return axis if axis < self.axis else axis + self.parts - 1

    def permuted(self, order: Sequence[int]) -> list[int]:
        """Return the permutation of the twin for a permutation of the original."""
        own = range(self.axis, self.axis + self.parts)
        return [each for axis in order for each in (own if axis == self.axis else (self.position(axis),))]


@dataclass
class _Separation:
    """The twins of the values so far, and the nodes that hold a symbolic size."""

    graph: Graph
    batch: Any
    twins: dict[fx.Node, _Twin] = field(default_factory=dict)
    lengths: dict[Any, fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> bool:
        """Give a node a twin if it can have one; return whether it splits the batch off and was replaced."""
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            self.lengths.setdefault(expression(value), node)
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            return False
        if node.target in RESHAPES:
            return self._reshape(node)
        if _joined(sizes_of(node), self.batch) is not None and (twin := self._twin(node)) is not None:
            self.twins[node] = twin
        return False

    def _reshape(self, node: fx.Node) -> bool:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        known, after = self.twins.get(source), sizes_of(node)
        value = source if known is None else known.node
        if _joined(after, self.batch) is not None:
            if (twin := self._split(node, value, after)) is not None:
                self.twins[node] = twin
            return False
        if known is None or self.batch not in after:
            return False
        if sizes_of(value) != after:
            arguments = self._arguments(after)
            if arguments is None:
                return False
            value = insert_call(self.graph, aten.reshape.default, value, arguments, before=node)
        replace_all_uses(self.graph, node, value)
        return True

    def _split(self, node: fx.Node, value: fx.Node, after: Sequence[Any]) -> _Twin | None:
        """Return the twin of a reshape that joins the batch of `value`, which has it as an axis of its own."""
        before, axis = sizes_of(value), _joined(after, self.batch)
        assert axis is not None
        if before.count(self.batch) != 1:
            return None
        lead = _quotient(math.prod(before[: before.index(self.batch)]), math.prod(after[:axis]))
        trail = None if lead is None else _quotient(after[axis], lead * self.batch)
        if trail is None:
            return None
        parts = [size for size in (lead, self.batch, trail) if size != 1]
        sizes = [*after[:axis], *parts, *after[axis + 1 :]]
        arguments = self._arguments(sizes)
        if len(sizes) > RANK or arguments is None:
            return None
        return _Twin(insert_call(self.graph, aten.reshape.default, value, arguments, before=node), axis, len(parts))

    def _arguments(self, sizes: Sequence[Any]) -> list[Any] | None:
        """Return sizes as arguments of a reshape, -1 for the batch; None if the graph holds one of them nowhere."""
        found = [
            -1 if size == self.batch else size if isinstance(size, int) else self.lengths.get(size) for size in sizes
        ]
        return None if None in found else found

    def _twin(self, node: fx.Node) -> _Twin | None:
        """Return the twin of another operator on values with twins; None if it has no rule."""
        tensors = [each for each in node.all_input_nodes if isinstance(value_of(each), torch.Tensor)]
        if not tensors or not any(each in self.twins for each in tensors):
            return None
        if node.target in (aten.bmm.default, aten.baddbmm.default):
            return self._product(node)
        own = self.twins.get(tensors[0])
        if node.target is aten.linear.default and own is not None and own.axis < value_of(tensors[0]).ndim - 1:
            return self._call(node, own, own.node, *node.args[1:])
        if node.target in (aten.permute.default, aten.transpose.int) and own is not None:
            order = _order(node)
            twin = insert_call(self.graph, aten.permute.default, own.node, own.permuted(order), before=node)
            return _Twin(twin, order.index(own.axis), own.parts)
        if node.target in SOFTMAXES and own is not None:
            dim = option(node, "dim") % value_of(node).ndim
            return None if dim == own.axis else self._call(node, own, own.node, own.position(dim), *node.args[2:])
        if is_pointwise(node) or node.target in DROPOUTS:
            return self._pointwise(node, tensors)
        return None

    def _product(self, node: fx.Node) -> _Twin | None:
        """Return the twin of a batch of products of matrices, [batch * heads, m, k] by [batch * heads, k, n]."""
        *added, left, right = (each for each in node.args[:3] if isinstance(each, fx.Node))
        one, other = self.twins.get(left), self.twins.get(right)
        if one is None or other is None or _layout(one) != _layout(other) or one.axis != 0:
            return None
        if any(option(node, name) != 1 for name in ("alpha", "beta") if added):
            return None
        product = insert_call(self.graph, aten.matmul.default, one.node, other.node, before=node)
        twin = _Twin(product, 0, one.parts)
        if not added:
            return twin
        operand = self._operand(added[0], twin, value_of(node).ndim, node)
        if operand is None:
            return None
        return _Twin(insert_call(self.graph, aten.add.Tensor, product, operand, before=node), 0, one.parts)

    def _pointwise(self, node: fx.Node, tensors: Sequence[fx.Node]) -> _Twin | None:
        """Return the twin of an element-wise operator, whose other operands must be broadcast or have such a twin."""
        rank = value_of(node).ndim
        own = next(self.twins[each] for each in tensors if each in self.twins)
        if value_of(next(each for each in tensors if each in self.twins)).ndim != rank:
            return None
        operands = {each: self._operand(each, own, rank, node) for each in tensors}
        if None in operands.values():
            return None
        args = fx.node.map_arg(node.args, lambda each: operands.get(each, each))
        return self._call(node, own, *args)

    def _operand(self, operand: fx.Node, like: _Twin, rank: int, node: fx.Node) -> fx.Node | None:
        """Return an operand as it is broadcast to a twin of a value with `rank` axes; None if it cannot be."""
        twin, sizes = self.twins.get(operand), sizes_of(operand)
        if twin is not None:
            same = len(sizes) == rank and _layout(twin) == _layout(like)
            return twin.node if same else None
        axis = like.axis - (rank - len(sizes))
        if axis < 0:
            return operand
        if sizes[axis] != 1:
            return None
        arguments = self._arguments([*sizes[:axis], *[1] * like.parts, *sizes[axis + 1 :]])
        if arguments is None:
            return None
        return insert_call(self.graph, aten.reshape.default, operand, arguments, before=node)

    def _call(self, node: fx.Node, like: _Twin, *args: Any) -> _Twin:
        assert callable(node.target)
        twin = insert_call(self.graph, node.target, *args, before=node, options=node.kwargs)
        return _Twin(twin, like.axis, like.parts)


def _layout(twin: _Twin) -> tuple[int, list[Any]]:
    """Return where the batch is and what it was joined with."""
    return twin.axis, sizes_of(twin.node)[twin.axis : twin.axis + twin.parts]


def _order(node: fx.Node) -> list[int]:
    """Return the permutation of a permute or a transpose."""
    rank = value_of(node).ndim
    if node.target is aten.permute.default:
        return [dim % rank for dim in option(node, "dims")]
    first, second = option(node, "dim0") % rank, option(node, "dim1") % rank
    return [{first: second, second: first}.get(axis, axis) for axis in range(rank)]


def _quotient(size: Any, divisor: Any) -> Any:
    """Return a size divided by another one; None if that is no whole number for every batch."""
    if isinstance(size, int) and isinstance(divisor, int):
        return None if size % divisor else size // divisor
    ratio = size / divisor
    if ratio.as_numer_denom()[1] != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio
