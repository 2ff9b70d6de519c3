"""The arithmetic of fewer tokens, written into a graph: match, average, keep, spread again.

One reduction is one matrix. ``assign[b, i, j]`` is 1 where old token j becomes (part of) new token i, ``mean`` is the
same with rows that sum to one, so that ``mean @ x`` holds the new tokens. Only comparisons, sums and matrix products
are used: every runtime has them, they need no sorting, ties cannot change the number of tokens, and tokens move by one
product instead of by gathers and scatters.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from passes.graph.graph import value_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    Call = Callable[..., fx.Node]  # insert_call with the graph and the place filled in

aten = torch.ops.aten
LAST = 2**63 - 1
FLOAT = {"dtype": torch.float32}
# Cosines lie in [-1, 1]. Two tokens of padding rank above every real pair, a pair of both kinds below.
PADDING_FIRST, NEVER = 4.0, -2.0

Count = Any  # int, or the node that holds a symbolic number


@dataclass(frozen=True)
class Stage:
    """What one reduction left behind.

    ``count`` tokens are left, an integer or the node of a symbolic one. ``assign`` and ``mean`` are ``[B, new, old]``,
    ``sizes`` ``[B, new]`` is the number of original tokens in each, None where tokens were only dropped.
    """

    count: Count
    assign: fx.Node
    mean: fx.Node
    sizes: fx.Node | None


def minus(call: Call, left: Count, right: Count) -> Count:
    """The difference of two counts: a number where both are, else a node."""
    return left - right if isinstance(left, int) and isinstance(right, int) else call(operator.sub, left, right)


def plus(call: Call, left: Count, right: Count) -> Count:
    """The sum of two counts: a number where both are, else a node."""
    return left + right if isinstance(left, int) and isinstance(right, int) else call(operator.add, left, right)


def removed_tokens(call: Call, count: Count, protected: int, amount: int | float) -> Count:
    """How many tokens an amount takes: itself, or that share of those that are not protected, rounded down."""
    if isinstance(amount, int):
        return amount
    parts = round(amount * 1000)
    if isinstance(count, int):
        return (count - protected) * parts // 1000
    free = minus(call, count, protected)
    return call(operator.floordiv, call(operator.mul, free, parts), 1000)


def match(call: Call, keys: fx.Node, protected: int, removed: Count, real: fx.Node | None) -> fx.Node:
    """The new place of every token: bipartite soft matching (Bolya et al., Token Merging, ICLR 2023, section 3).

    The unprotected tokens are split in turn into sets A and B; each of A is linked to the one of B with the most
    similar key (cosine), the `removed` most similar links are merged into B, all others stay. New order: protected
    tokens, the rest of A by rank, B.

    Args:
        call: writes a node.
        keys: ``[B, N, d]``, one key a token.
        protected: leading tokens that stay as they are.
        removed: number of links to merge.
        real: ``[B, N]`` bool, False for padding, which merges first and only with itself; None where there is none.

    Returns:
        ``[B, N]`` float32, the row of each old token among the new ones.
    """
    norm = call(aten.linalg_vector_norm.default, keys, 2, [-1], True)
    unit = call(aten.div.Tensor, keys, call(aten.clamp_min.default, norm, 1e-6))
    first, second = (call(aten.slice.Tensor, unit, 1, protected + side, LAST, 2) for side in (0, 1))
    scores = call(aten.matmul.default, first, call(aten.transpose.int, second, 1, 2))
    if real is not None:
        scores = _apart(call, scores, real, protected)
    best, partner = call(aten.amax.default, scores, [-1]), call(aten.argmax.default, scores, -1)
    rank = _rank(call, best)
    in_a = _size(call, best)
    kept = minus(call, in_a, removed)
    linked = call(aten.add.Tensor, call(aten.to.dtype, partner, torch.float32), plus(call, kept, protected))
    stays = call(aten.sub.Tensor, rank, minus(call, removed, protected))
    place_a = call(aten.where.self, call(aten.lt.Scalar, rank, removed), linked, stays)
    zero = _zero(call, rank)
    places = [call(aten.add.Tensor, zero, _range(call, protected)), place_a] if protected else [place_a]
    after = call(aten.add.Tensor, _range(call, _size(call, second)), plus(call, kept, protected))
    joined = call(aten.cat.default, [*places, call(aten.add.Tensor, zero, after)], 1)
    return call(aten.index_select.default, joined, 1, _in_turn(call, _size(call, keys), protected, in_a))


def _size(call: Call, node: fx.Node, axis: int = 1) -> Count:
    size = value_of(node).shape[axis]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, axis)


def _range(call: Call, count: Count) -> fx.Node:
    return call(aten.arange.default, count, options=FLOAT)


def _zero(call: Call, vector: fx.Node) -> fx.Node:
    """A column of zeros ``[B, 1]``, to give a row of constants its samples."""
    return call(aten.mul.Tensor, call(aten.amin.default, vector, [1], True), 0.0)


def _apart(call: Call, scores: fx.Node, real: fx.Node, protected: int) -> fx.Node:
    """Let padding merge with padding, first of all, and never with a real token."""
    first, second = (call(aten.slice.Tensor, real, 1, protected + side, LAST, 2) for side in (0, 1))
    rows, columns = call(aten.unsqueeze.default, first, 2), call(aten.unsqueeze.default, second, 1)
    padding = call(aten.to.dtype, call(aten.logical_not.default, columns), torch.float32)
    raised = call(aten.add.Tensor, scores, call(aten.mul.Tensor, padding, PADDING_FIRST))
    same = call(aten.logical_not.default, call(aten.logical_xor.default, rows, columns))
    return call(aten.where.ScalarOther, same, raised, NEVER)


def _rank(call: Call, values: fx.Node) -> fx.Node:
    """Position of each value from the largest down, ties in order: how many others come before it."""
    own, other = call(aten.unsqueeze.default, values, 2), call(aten.unsqueeze.default, values, 1)
    index = _range(call, _size(call, values))
    earlier = call(aten.lt.Tensor, index, call(aten.unsqueeze.default, index, 1))
    ties = call(aten.logical_and.default, call(aten.eq.Tensor, other, own), earlier)
    ahead = call(aten.logical_or.default, call(aten.gt.Tensor, other, own), ties)
    return call(aten.sum.dim_IntList, call(aten.to.dtype, ahead, torch.float32), [-1])


def _in_turn(call: Call, count: Count, protected: int, in_a: Count) -> fx.Node:
    """Where in (protected, A, B) the tokens stand in their old order."""
    free = call(aten.arange.default, minus(call, count, protected))
    half = call(aten.floor_divide.default, free, 2)
    side = call(aten.mul.Tensor, call(aten.remainder.Scalar, free, 2), in_a)
    order = call(aten.add.Tensor, call(aten.add.Tensor, half, side), protected)
    if not protected:
        return order
    return call(aten.cat.default, [call(aten.arange.default, protected), order])


def _assign(call: Call, place: fx.Node, count: Count, dtype: torch.dtype) -> fx.Node:
    row, rows = call(aten.unsqueeze.default, place, 1), call(aten.unsqueeze.default, _range(call, count), 1)
    return call(aten.to.dtype, call(aten.eq.Tensor, row, rows), dtype)


def merge(call: Call, place: fx.Node, count: Count, sizes: fx.Node | None, dtype: torch.dtype) -> Stage:
    """The stage in which tokens of one place become their average, weighted by size (section 3, tracking size)."""
    assign = _assign(call, place, count, dtype)
    weights = assign if sizes is None else call(aten.mul.Tensor, assign, call(aten.unsqueeze.default, sizes, 1))
    total = call(aten.sum.dim_IntList, weights, [-1])
    mean = call(aten.div.Tensor, weights, call(aten.unsqueeze.default, total, 2))
    return Stage(count, assign, mean, total)


def keep(call: Call, score: fx.Node, count: Count, protected: int, sizes: fx.Node | None, dtype: torch.dtype) -> Stage:
    """The stage in which the tokens of highest score stay, beside the protected ones; `score` is ``[B, N]``."""
    free = call(aten.slice.Tensor, score, 1, protected, LAST)
    place = call(aten.add.Tensor, _rank(call, free), float(protected))
    if protected:
        zero = _zero(call, place)
        place = call(aten.cat.default, [call(aten.add.Tensor, zero, _range(call, protected)), place], 1)
    assign = _assign(call, place, count, dtype)
    left = sizes
    if sizes is not None:
        product = call(aten.matmul.default, assign, call(aten.unsqueeze.default, sizes, 2))
        left = call(aten.squeeze.dim, product, 2)
    return Stage(count, assign, assign, left)


def apply_matrix(call: Call, matrix: fx.Node, value: fx.Node, batch: int, axis: int, start: int) -> fx.Node:
    """Multiply one axis of a value by ``matrix`` ``[B, new, old]``, all other axes broadcast.

    Args:
        call: writes a node.
        matrix: the rows are the new tokens.
        value: any rank of at least 2.
        batch: its axis of samples.
        axis: its axis of tokens.
        start: which token the axis starts with; those before are protected, so the rest of the matrix is a block.
    """
    if start:
        matrix = call(aten.slice.Tensor, call(aten.slice.Tensor, matrix, 1, start, LAST), 2, start, LAST)
    if batch:  # samples first, as in the matrix
        moved = call(aten.transpose.int, value, 0, batch)
        result = apply_matrix(call, matrix, moved, 0, batch if axis == 0 else axis, 0)
        return call(aten.transpose.int, result, 0, batch)
    rank = len(value_of(value).shape)
    if rank == 2:
        product = call(aten.matmul.default, matrix, call(aten.unsqueeze.default, value, 2))
        return call(aten.squeeze.dim, product, 2)
    for _ in range(rank - 3):
        matrix = call(aten.unsqueeze.default, matrix, 1)
    if axis == rank - 2:
        return call(aten.matmul.default, matrix, value)
    if axis == rank - 1:
        return call(aten.matmul.default, value, call(aten.transpose.int, matrix, -2, -1))
    moved = call(aten.transpose.int, value, axis, rank - 2)
    return call(aten.transpose.int, call(aten.matmul.default, matrix, moved), axis, rank - 2)


def spread(call: Call, vector: fx.Node, rank: int, batch: int, axis: int) -> fx.Node:
    """A ``[B, N]`` vector with axes of one in between, to broadcast against a value of that rank."""
    if batch > axis:
        vector = call(aten.transpose.int, vector, 0, 1)
    for position in range(rank):
        if position not in (batch, axis):
            vector = call(aten.unsqueeze.default, vector, position)
    return vector


def from_token(call: Call, vector: fx.Node, start: int) -> fx.Node:
    """The entries of ``[B, N]`` from token `start` on; where an axis holds others in front, these count 1."""
    if start > 0:
        return call(aten.slice.Tensor, vector, 1, start, LAST)
    if start == 0:
        return vector
    zero = _zero(call, vector)
    ones = call(aten.expand.default, call(aten.add.Tensor, zero, 1.0), [-1, -start])
    return call(aten.cat.default, [ones, vector], 1)


def attention_received(
    call: Call, query: fx.Node, keys: fx.Node, mask: fx.Node | None, scale: float, protected: int
) -> fx.Node:
    """How much each token is looked at, ``[B, N]``: by the first token where one is protected, else by all on average.

    Args:
        call: writes a node.
        query: ``[B, H, N, d]``.
        keys: ``[B, H, N, d]``.
        mask: what scaled_dot_product_attention takes, or None.
        scale: of the scores.
        protected: number of protected tokens; the first is the class token.
    """
    if protected:
        query = call(aten.slice.Tensor, query, 2, 0, 1)
    scores = call(aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, keys, -2, -1)), scale)
    if mask is not None:
        if protected and value_of(mask).shape[-2] != 1:
            mask = call(aten.slice.Tensor, mask, -2, 0, 1)
        boolean = value_of(mask).dtype == torch.bool
        scores = (
            call(aten.where.ScalarOther, mask, scores, torch.finfo(torch.float32).min)
            if boolean
            else call(aten.add.Tensor, scores, mask)
        )
    return call(aten.mean.dim, call(aten.softmax.int, scores, -1), [1, 2])
