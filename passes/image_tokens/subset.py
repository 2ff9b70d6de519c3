"""Values of a graph at a subset of its tokens.

In the graph of a language model, the number of new tokens and the number of tokens in the cache are symbols, so the
axes that hold tokens are told by their sizes. No operator needs rules of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.analysis.token_axis import is_pointwise, sizes_of
from passes.base import PassError
from passes.graph.graph import value_of
from passes.torch_internals import expression

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    Call = Callable[..., fx.Node]  # insert_call with its graph and position bound

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Sizes:
    """Expressions of the sizes of a language model's axes: rows, new tokens and tokens in the cache."""

    rows: Any
    tokens: Any
    past: Any

    def stale(self, size: Any) -> bool:
        """Return whether a size depends on the number of new tokens or of those in the cache."""
        own = {symbol for each in (self.tokens, self.past) for symbol in getattr(each, "free_symbols", ())}
        return bool(own.intersection(getattr(size, "free_symbols", ())))


@dataclass
class Subset:
    """Some of the tokens of a call, and the values of the graph at them.

    Attributes:
        call: function that inserts a node.
        first: sizes of the graph before any token was dropped.
        sizes: sizes of the trunk that the subset is taken from.
        original: ``[B, n]``, indices of the tokens among those of the call.
        relative: ``[B, n]``, indices of the tokens among those of the trunk.
        columns: ``[B, past + n]``, indices of the tokens in the cache and of those of the call among all tokens so
            far; None for a subset that has no table of all tokens.
        count: number of tokens, a node or an integer.
        past: number of tokens in the cache of the layers behind, a node; None where `columns` is.
        origin: values from before any token was dropped, by the value at a subset.
        representative: one node for each value that several nodes compute in the same way.
    """

    call: Call
    first: Sizes
    sizes: Sizes
    original: fx.Node
    relative: fx.Node
    columns: fx.Node | None
    count: Any
    past: fx.Node | None
    origin: dict[fx.Node, fx.Node]
    representative: Mapping[fx.Node, fx.Node]
    mapped: dict[fx.Node, fx.Node] = field(default_factory=dict)
    known: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    total: fx.Node | None = None

    def arguments(self, node: fx.Node, region: Collection[fx.Node]) -> tuple[Any, Any]:
        """Return the arguments of a node at the subset.

        Args:
            node: a node that is computed from the trunk.
            region: all such nodes. Those that `mapped` does not hold are taken to be at the subset already.

        Raises:
            PassError: an argument has the tokens in a form that is not known.
        """

        def at_subset(source: fx.Node) -> Any:
            if source in self.mapped:
                return self.mapped[source]
            if source in region:
                return source
            value = value_of(source)
            if isinstance(value, torch.SymInt):
                return self._size(node, source)
            return self.at(node, source) if isinstance(value, torch.Tensor) else source

        arguments: tuple[Any, Any] = fx.node.map_arg((node.args, node.kwargs), at_subset)
        return arguments

    def _size(self, reader: fx.Node, source: fx.Node) -> Any:
        size = expression(value_of(source))
        for sizes in (self.first, self.sizes):
            if size == sizes.tokens:
                return self.count
            if size == sizes.past and self.past is not None:
                return self.past
            if size == sizes.tokens + sizes.past and self.columns is not None:
                if self.total is None:
                    self.total = self.call(aten.sym_size.int, self.columns, 1)
                return self.total
            if sizes.stale(size):
                raise _unknown(reader, source, size)
        return source

    def at(self, reader: fx.Node, source: fx.Node) -> fx.Node:
        """Return a value from outside the region at the subset; it is broadcast to the rank of its reader."""
        value = self.representative.get(source, source)
        value = self.origin.get(value, value)
        if not any(sizes.stale(size) for sizes in (self.first, self.sizes) for size in sizes_of(value)):
            return source
        rank = self._rank(reader, value)
        key = (value, rank)
        if key not in self.known:
            self.known[key] = self._restricted(reader, value, rank)
            if self._is_original(value):
                self.origin[self.known[key]] = value
        return self.known[key]

    def _is_original(self, value: fx.Node) -> bool:
        return not any(self.sizes.stale(size) and not self.first.stale(size) for size in sizes_of(value))

    def _rank(self, reader: fx.Node, value: fx.Node) -> int:
        """Return the number of axes that a value is broadcast to, so that its first axis is that of the rows."""
        sizes = sizes_of(value)
        if sizes[0] == self.first.rows:
            return len(sizes)
        broadcasts = is_pointwise(reader) or reader.target == ATTENTION
        rank = len(sizes_of(reader)) if broadcasts else len(sizes)
        if len(sizes) == rank and sizes[0] != 1:
            raise _unknown(reader, value, sizes)
        return rank

    def _restricted(self, reader: fx.Node, value: fx.Node, rank: int) -> fx.Node:
        result = value
        while len(sizes_of(result)) < rank:
            result = self.call(aten.unsqueeze.default, result, 0)
        if sizes_of(result)[0] == 1 and self.first.rows != 1:
            rows = self.call(aten.sym_size.int, self.original, 0)
            result = self.call(aten.expand.default, result, [rows, *[-1] * (rank - 1)])
        for axis, size in enumerate(sizes_of(result)):
            index = self._index(size)
            if index is not None:
                result = take(self.call, result, axis, index)
            elif any(sizes.stale(size) for sizes in (self.first, self.sizes)):
                raise _unknown(reader, value, size)
        return result

    def _index(self, size: Any) -> fx.Node | None:
        if size == self.first.tokens:
            return self.original
        if size == self.sizes.tokens:
            return self.relative
        return self.columns if size == self.first.tokens + self.first.past else None


def _unknown(reader: fx.Node, source: fx.Node, size: Any) -> PassError:
    return PassError(
        f"image tokens cannot be dropped: {reader.name} ({reader.target}) reads {source.name} of size {size}; expected "
        "the rows, the new tokens, or all tokens so far on axes of their own."
    )


def take(call: Call, value: fx.Node, axis: int, index: fx.Node) -> fx.Node:
    """Take entries of each row along an axis.

    Args:
        call: function that inserts a node.
        value: ``[B, ..., N, ...]``.
        axis: the axis of the N entries, 1 or higher.
        index: ``[B, n]`` int64.

    Returns:
        ``[B, ..., n, ...]``.
    """
    sizes = value_of(value).shape
    if axis < len(sizes) - 1:
        if all(isinstance(size, int) and size == 1 for size in sizes[1:axis]):
            return _take_rows(call, value, axis, index)
        taken = _take_rows(call, call(aten.transpose.int, value, 1, axis), 1, index)
        return call(aten.transpose.int, taken, 1, axis)
    between = index
    for position in range(1, len(sizes)):
        if position != axis:
            between = call(aten.unsqueeze.default, between, position)
    spread = [-1 if position == axis else _size(call, value, position) for position in range(len(sizes))]
    return call(aten.gather.default, value, axis, call(aten.expand.default, between, spread))


def _take_rows(call: Call, value: fx.Node, axis: int, index: fx.Node) -> fx.Node:
    """Take whole vectors: one copy of memory for each, where `gather` reads an index for each element."""
    rest = [_size(call, value, position) for position in range(axis + 1, len(value_of(value).shape))]
    rows = call(aten.sym_size.int, value, 0) if isinstance(value_of(value).shape[0], torch.SymInt) else None
    count = value_of(value).shape[0] if rows is None else rows
    options = {"dtype": torch.int64, "device": value_of(index).device}
    starts = call(aten.arange.default, count, options=options)
    starts = call(aten.mul.Tensor, call(aten.unsqueeze.default, starts, 1), _size(call, value, axis))
    flat = call(aten.reshape.default, call(aten.add.Tensor, index, starts), [-1])
    vectors = call(aten.reshape.default, value, [-1, *rest])
    taken = call(aten.index_select.default, vectors, 0, flat)
    return call(aten.reshape.default, taken, [count, *[1] * (axis - 1), _size(call, index, 1), *rest])


def _size(call: Call, node: fx.Node, axis: int) -> Any:
    size = value_of(node).shape[axis]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, axis)


def representatives(nodes: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Map each node to the first one that computes the same: each layer unsqueezes the same rotary tables."""
    first: dict[Any, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            found[node] = node
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: found.get(source, source))
        key = repr((node.target, args, sorted(kwargs.items())))  # nodes have unique names
        found[node] = first.setdefault(key, node)
    return found
