"""Graph arithmetic of token reduction: matching, averaging, selection and unmerging.

A reduction is a matrix. ``assign[b, i, j]`` is 1 if old token j becomes (part of) new token i. ``mean`` is ``assign``
with rows normalised to sum 1, so ``mean @ x`` computes the new tokens. Only comparisons, sums and matrix products are
used, because every runtime supports them. They need no sorting, ties cannot change the number of tokens, and one
product replaces gathers and scatters.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from passes.graph.graph import value_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    Call = Callable[..., fx.Node]  # insert_call with its graph and position bound

aten = torch.ops.aten
LAST = 2**63 - 1
FLOAT = {"dtype": torch.float32}
# Cosines lie in [-1, 1]. Pairs of padding tokens rank above every real pair, mixed pairs below.
PADDING_FIRST, NEVER, LAST_RANK = 4.0, -2.0, -1e9
BEHIND_ALL, STEP = -(2.0**31), 2.0**20  # padding of a row, in order of position; float32 holds these numbers exactly

Count = Any  # int, or the node of a symbolic integer


@dataclass(frozen=True)
class Stage:
    """Result of one reduction.

    ``count`` is the number of remaining tokens, an integer or the node of a symbolic one. ``assign`` and ``mean`` are
    ``[B, new, old]``. ``sizes`` ``[B, new]`` is the number of original tokens in each, or None if tokens were only
    dropped. ``real`` ``[B, new]`` bool is False for padding; None without padding.
    """

    count: Count
    assign: fx.Node
    mean: fx.Node
    sizes: fx.Node | None
    real: fx.Node | None = None


class Links(NamedTuple):
    """What links between tokens are ranked by, beside their similarity.

    ``real`` ``[B, N]`` bool is False for padding, which merges first and only with padding; None without padding.
    ``received`` ``[B, N]`` is the attention that each token receives. ``sizes`` ``[B, N]`` are the sizes of the tokens.
    With ``share``, each row merges this share of its own tokens, as it would without its padding (`removed_in_pairs`).
    """

    real: fx.Node | None = None
    received: fx.Node | None = None
    sizes: fx.Node | None = None
    share: float | None = None


def minus(call: Call, left: Count, right: Count) -> Count:
    """Return the difference of two counts, an integer if both are integers, otherwise a node."""
    return left - right if isinstance(left, int) and isinstance(right, int) else call(operator.sub, left, right)


def removed_tokens(call: Call, count: Count, protected: int, amount: int | float) -> Count:
    """Return the number of removed tokens: an integer `amount`, or a share of the unprotected ones, rounded down."""
    if isinstance(amount, int):
        return amount
    parts = round(amount * 1000)
    if isinstance(count, int):
        return (count - protected) * parts // 1000
    free = minus(call, count, protected)
    return call(operator.floordiv, call(operator.mul, free, parts), 1000)


def removed_in_pairs(call: Call, free: Count, share: float) -> Count:
    """Return the number of removed tokens, a share of the `free` unprotected ones, rounded down.

    An even number of tokens counts as one less, so that the result grows only where set A does. Then a row with padding
    always has as many tokens of padding in A as it has to remove beside its own.
    """
    odd = call(operator.sub, call(operator.mul, call(operator.floordiv, call(operator.add, free, 1), 2), 2), 1)
    return call(operator.floordiv, call(operator.mul, odd, round(share * 1000)), 1000)


def match(call: Call, features: fx.Node, protected: int, removed: Count, links: Links) -> fx.Node:
    """Compute bipartite soft matching (Bolya et al., Token Merging, ICLR 2023, section 3).

    The unprotected tokens alternate between sets A and B. Each token of A is linked to the token of B with the most
    similar features (cosine). The first `removed` links are merged into B. The new order is the protected tokens, the
    rest of A by rank, then B.

    Padding merges first, so that rows of a fixed length lose as few of their own tokens as possible. With
    ``links.share``, a row merges as many of its own tokens as it would without padding behind it, and they are in front
    of its padding afterwards. So its result does not depend on the longest row of the batch.

    Links rank by their cosine c, as in the paper. With ``links.received`` they rank by what merging costs: a (1 - c),
    lowest first, with the attention a that the token of A receives. With ``links.sizes`` the cost of merging tokens of
    sizes n and m is n m / (n + m) (1 - c), which decides on the partner too (Lee and Choi, arXiv 2505.15160).

    Args:
        call: function that inserts a node.
        features: ``[B, N, d]``, one vector per token.
        protected: number of leading tokens that are never merged.
        removed: number of links to merge.
        links: what links are ranked by.

    Returns:
        ``[B, N]`` float32, the index of each old token among the new ones.
    """
    norm = call(aten.linalg_vector_norm.default, features, 2, [-1], True)
    unit = call(aten.div.Tensor, features, call(aten.clamp_min.default, norm, 1e-6))
    first, second = _sides(call, unit, protected)
    scores = call(aten.matmul.default, first, call(aten.transpose.int, second, 1, 2))
    if links.sizes is not None:
        scores = _less_size(call, scores, links.sizes, protected)
    own = None if links.real is None else _sides(call, links.real, protected)
    by_row = links.share is not None
    if own is not None and by_row:  # padding in A is ranked by position below
        scores = call(aten.where.ScalarOther, call(aten.unsqueeze.default, own[1], 1), scores, NEVER)
    elif own is not None:
        scores = _separate_padding(call, scores, own)
    if not isinstance(removed, int):  # a row of one free token has no set B
        scores = call(aten.constant_pad_nd.default, scores, [0, 1], 2 * NEVER)
    best, partner = call(aten.amax.default, scores, [-1]), call(aten.argmax.default, scores, -1)
    if links.received is not None:
        cost = _less_attended(call, best, _sides(call, links.received, protected)[0])
        best = cost if own is None or by_row else _padding_first(call, best, cost)
    if own is None or links.share is None:
        index_a, index_b = _indices(call, _rank(call, best), partner, removed, _size(call, second))
    else:
        behind = call(aten.add.Tensor, call(aten.mul.Tensor, _range(call, _size(call, best)), -STEP), BEHIND_ALL)
        best = call(aten.where.self, own[0], best, behind)
        index_a, index_b = _indices_by_row(call, _rank(call, best), partner, removed, own, links.share)
    by_set = _behind_protected(call, call(aten.cat.default, [index_a, index_b], 1), protected)
    order = _original_order(call, _size(call, features), protected, _size(call, best))
    return call(aten.index_select.default, by_set, 1, order)


def _indices(call: Call, rank: fx.Node, partner: fx.Node, removed: Count, in_b: Count) -> tuple[fx.Node, fx.Node]:
    """Return the new indices of the tokens of A and B, from the first that is not protected.

    Args:
        call: function that inserts a node.
        rank: ``[B, A]``, the rank of the link of each token of A.
        partner: ``[B, A]``, its token of B.
        removed: number of links to merge.
        in_b: number of tokens of B.
    """
    kept = minus(call, _size(call, rank), removed)
    linked = call(aten.add.Tensor, call(aten.to.dtype, partner, torch.float32), kept)
    unmerged = call(aten.sub.Tensor, rank, removed)
    index_a = call(aten.where.self, call(aten.lt.Scalar, rank, removed), linked, unmerged)
    return index_a, call(aten.add.Tensor, _zero(call, rank), call(aten.add.Tensor, _range(call, in_b), kept))


def _indices_by_row(
    call: Call, rank: fx.Node, partner: fx.Node, removed: Count, own: tuple[fx.Node, fx.Node], share: float
) -> tuple[fx.Node, fx.Node]:
    """Return the new indices as `_indices`, where each row merges a share of its own tokens.

    They are, in this order, the row's own tokens of A that are left, its own of B, and its padding of A and of B.
    Padding of A merges with the last token of B. If that is no padding, it has no weight there (`merge`).

    Args:
        call: function that inserts a node.
        rank: ``[B, A]``, the rank of the link of each token of A; padding ranks last.
        partner: ``[B, A]``, its token of B.
        removed: number of links to merge.
        own: ``[B, A]`` and ``[B, B]`` bool, False for padding.
        share: share of the tokens to remove.
    """
    ones = [call(aten.to.dtype, side, torch.float32) for side in own]
    own_a, own_b = (call(aten.sum.dim_IntList, side, [1], True) for side in ones)
    mine = _removed_by_row(call, call(aten.maximum.default, own_a, own_b), share)
    of_padding = call(aten.add.Tensor, call(aten.neg.default, mine), removed)
    merged = call(aten.where.self, own[0], mine, call(aten.add.Tensor, own_a, of_padding))
    behind = call(aten.add.Tensor, call(aten.neg.default, own_b), removed)
    unmerged = call(aten.sub.Tensor, rank, call(aten.where.self, own[0], mine, behind))
    position = _range(call, _size(call, ones[1]))
    until = call(aten.le.Tensor, call(aten.unsqueeze.default, position, 1), position)
    before = call(aten.matmul.default, ones[1], call(aten.to.dtype, until, torch.float32))  # own tokens of B so far
    first = call(aten.add.Tensor, before, call(aten.sub.Tensor, call(aten.sub.Tensor, own_a, mine), 1.0))
    kept = minus(call, _size(call, rank), removed)
    later = call(aten.add.Tensor, call(aten.sub.Tensor, position, before), call(aten.add.Tensor, own_b, kept))
    index_b = call(aten.where.self, own[1], first, later)
    found = call(aten.constant_pad_nd.default, index_b, [0, 1], 0.0)
    last = call(aten.amax.default, found, [1], True)
    linked = call(aten.where.self, own[0], call(aten.gather.default, found, 1, partner), last)
    return call(aten.where.self, call(aten.lt.Tensor, rank, merged), linked, unmerged), index_b


def _removed_by_row(call: Call, half: fx.Node, share: float) -> fx.Node:
    """Compute `removed_in_pairs` of rows with ``half`` ``[B, 1]`` pairs, a token without another as one; in integers.

    A row of padding alone removes none.
    """
    odd = call(aten.sub.Tensor, call(aten.mul.Tensor, half, 2.0), 1.0)
    parts = call(aten.mul.Tensor, call(aten.to.dtype, odd, torch.int64), round(share * 1000))
    found = call(aten.to.dtype, call(aten.floor_divide.default, parts, 1000), torch.float32)
    return call(aten.clamp_min.default, found, 0.0)


def _sides(call: Call, value: fx.Node, protected: int) -> tuple[fx.Node, fx.Node]:
    """Return the entries of the sets A and B on axis 1."""
    first, second = (call(aten.slice.Tensor, value, 1, protected + side, LAST, 2) for side in (0, 1))
    return first, second


def _less_attended(call: Call, best: fx.Node, received: fx.Node) -> fx.Node:
    """Return minus a (1 - c) for each link ``[B, A]``."""
    return call(aten.mul.Tensor, received, call(aten.sub.Tensor, best, 1.0))


def _padding_first(call: Call, best: fx.Node, cost: fx.Node) -> fx.Node:
    """Keep links of padding in front of all others, and links that must not merge behind them."""
    padding_first = call(aten.where.self, call(aten.gt.Scalar, best, 2.0), best, cost)
    return call(aten.where.ScalarOther, call(aten.gt.Scalar, best, NEVER + 0.5), padding_first, LAST_RANK)


def _less_size(call: Call, cosine: fx.Node, sizes: fx.Node, protected: int) -> fx.Node:
    """Return minus n m / (n + m) (1 - c) for each pair ``[B, A, B]``, divided by the sum of all sizes."""
    total = call(aten.sum.dim_IntList, sizes, [-1], True)
    first, second = _sides(call, call(aten.div.Tensor, sizes, total), protected)
    rows, columns = call(aten.unsqueeze.default, first, 2), call(aten.unsqueeze.default, second, 1)
    both = call(aten.div.Tensor, call(aten.mul.Tensor, rows, columns), call(aten.add.Tensor, rows, columns))
    return call(aten.mul.Tensor, both, call(aten.sub.Tensor, cosine, 1.0))


def _size(call: Call, node: fx.Node, axis: int = 1) -> Count:
    size = value_of(node).shape[axis]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, axis)


def _range(call: Call, count: Count) -> fx.Node:
    return call(aten.arange.default, count, options=FLOAT)


def _zero(call: Call, vector: fx.Node) -> fx.Node:
    """Return zeros ``[B, 1]``, which broadcast a row of constants to all samples."""
    return call(aten.mul.Tensor, call(aten.amin.default, vector, [1], True), 0.0)


def _separate_padding(call: Call, scores: fx.Node, own: tuple[fx.Node, fx.Node]) -> fx.Node:
    """Rank pairs of padding tokens first and pairs of a padding and a real token last; `own` is False for padding."""
    rows, columns = call(aten.unsqueeze.default, own[0], 2), call(aten.unsqueeze.default, own[1], 1)
    padding = call(aten.to.dtype, call(aten.logical_not.default, columns), torch.float32)
    raised = call(aten.add.Tensor, scores, call(aten.mul.Tensor, padding, PADDING_FIRST))
    same = call(aten.logical_not.default, call(aten.logical_xor.default, rows, columns))
    return call(aten.where.ScalarOther, same, raised, NEVER)


def _rank(call: Call, values: fx.Node) -> fx.Node:
    """Return the rank of each value ``[B, N]`` in descending order, ties in order of position.

    No value is compared with itself, so that rounding errors of the two sides change no rank where nothing ties.
    """
    own, other = call(aten.unsqueeze.default, values, 2), call(aten.unsqueeze.default, values, 1)
    index = _range(call, _size(call, values))
    column = call(aten.unsqueeze.default, index, 1)
    before = call(aten.logical_and.default, call(aten.ge.Tensor, other, own), call(aten.lt.Tensor, index, column))
    behind = call(aten.logical_and.default, call(aten.gt.Tensor, other, own), call(aten.gt.Tensor, index, column))
    ahead = call(aten.logical_or.default, before, behind)
    return call(aten.sum.dim_IntList, call(aten.to.dtype, ahead, torch.float32), [-1])


def _original_order(call: Call, count: Count, protected: int, in_a: Count) -> fx.Node:
    """Return the indices into (protected, A, B) that restore the original token order."""
    free = call(aten.arange.default, minus(call, count, protected))
    half = call(aten.floor_divide.default, free, 2)
    side = call(aten.mul.Tensor, call(aten.remainder.Scalar, free, 2), in_a)
    order = call(aten.add.Tensor, call(aten.add.Tensor, half, side), protected)
    if not protected:
        return order
    return call(aten.cat.default, [call(aten.arange.default, protected), order])


def _assign(call: Call, new_index: fx.Node, count: Count, dtype: torch.dtype) -> fx.Node:
    """Return the matrix ``[B, new, old]`` that maps each old token to its new index."""
    row, rows = call(aten.unsqueeze.default, new_index, 1), call(aten.unsqueeze.default, _range(call, count), 1)
    return call(aten.to.dtype, call(aten.eq.Tensor, row, rows), dtype)


def merge(
    call: Call,
    new_index: fx.Node,
    count: Count,
    sizes: fx.Node | None,
    dtype: torch.dtype,
    weights: fx.Node | None = None,
    real: fx.Node | None = None,
) -> Stage:
    """Replace tokens with the same new index by their average.

    It is weighted by size (section 3, tracking token size), or else by `weights` ``[B, N]``. Padding, where `real`
    ``[B, N]`` is False, has no weight beside other tokens.
    """
    assign = _assign(call, new_index, count, dtype)
    by_size = assign if sizes is None else call(aten.mul.Tensor, assign, call(aten.unsqueeze.default, sizes, 1))
    if real is not None:
        own = call(aten.mul.Tensor, by_size, call(aten.unsqueeze.default, call(aten.to.dtype, real, dtype), 1))
        has_own = call(aten.gt.Scalar, call(aten.sum.dim_IntList, own, [-1], True), 0.0)
        by_size = call(aten.where.self, has_own, own, by_size)
    total = call(aten.sum.dim_IntList, by_size, [-1])
    if weights is None:
        return Stage(count, assign, call(aten.div.Tensor, by_size, call(aten.unsqueeze.default, total, 2)), total)
    weighted = call(aten.mul.Tensor, assign, call(aten.unsqueeze.default, weights, 1))
    norm = call(aten.sum.dim_IntList, weighted, [-1], True)
    return Stage(count, assign, call(aten.div.Tensor, weighted, norm), total)


def with_padding(call: Call, stage: Stage, real: fx.Node) -> Stage:
    """Return a stage that knows which of its tokens are padding: those of nothing else.

    Args:
        call: function that inserts a node.
        stage: the stage.
        real: ``[B, old]`` bool, False for padding.
    """
    dtype = value_of(stage.assign).dtype
    own = call(aten.unsqueeze.default, call(aten.to.dtype, real, dtype), 2)
    count = call(aten.squeeze.dim, call(aten.matmul.default, stage.assign, own), 2)
    return replace(stage, real=call(aten.gt.Scalar, count, 0.5))


def keep(call: Call, score: fx.Node, count: Count, protected: int, sizes: fx.Node | None, dtype: torch.dtype) -> Stage:
    """Keep the protected tokens and those of highest score; `score` is ``[B, N]``."""
    new_index = _behind_protected(call, _free_rank(call, score, protected), protected)
    assign = _assign(call, new_index, count, dtype)
    kept_sizes = sizes
    if sizes is not None:
        product = call(aten.matmul.default, assign, call(aten.unsqueeze.default, sizes, 2))
        kept_sizes = call(aten.squeeze.dim, product, 2)
    return Stage(count, assign, assign, kept_sizes)


def keep_and_fuse(
    call: Call, score: fx.Node, count: Count, protected: int, sizes: fx.Node | None, dtype: torch.dtype
) -> Stage:
    """Keep the tokens of highest score, and average all others, weighted by score, into one more (EViT).

    See Liang et al., Not All Patches are What You Need, ICLR 2022, section 3.2.
    """
    new_index = _behind_protected(call, _free_rank(call, score, protected), protected)
    last = minus(call, count, 1)
    clamped = call(aten.where.self, call(aten.lt.Scalar, new_index, last), new_index, _constant(call, new_index, last))
    return merge(call, clamped, count, sizes, dtype, weights=score)


def merge_lowest(call: Call, score: fx.Node, features: fx.Node, count: Count, protected: int) -> fx.Node:
    """Assign the tokens of lowest score to the remaining tokens with the most similar features (cosine).

    A score of each token in place of one of each pair is more stable in deep blocks (Yang, arXiv 2604.16745).

    Returns:
        ``[B, N]`` float32, the index of each old token among the new ones.
    """
    rank, kept = _free_rank(call, score, protected), minus(call, count, protected)
    norm = call(aten.linalg_vector_norm.default, features, 2, [-1], True)
    unit = call(aten.div.Tensor, features, call(aten.clamp_min.default, norm, 1e-6))
    free = call(aten.slice.Tensor, unit, 1, protected, LAST)
    scores = call(aten.matmul.default, free, call(aten.transpose.int, free, 1, 2))
    stays = call(aten.lt.Scalar, rank, kept)
    allowed = call(aten.where.ScalarOther, call(aten.unsqueeze.default, stays, 1), scores, NEVER)
    partner = call(aten.gather.default, rank, 1, call(aten.argmax.default, allowed, -1))
    return _behind_protected(call, call(aten.where.self, stays, rank, partner), protected)


def _free_rank(call: Call, score: fx.Node, protected: int) -> fx.Node:
    return _rank(call, call(aten.slice.Tensor, score, 1, protected, LAST))


def _behind_protected(call: Call, free: fx.Node, protected: int) -> fx.Node:
    """Return new indices of all tokens ``[B, N]`` from those of the tokens that are not protected."""
    if not protected:
        return free
    zero = _zero(call, free)
    front = call(aten.add.Tensor, zero, _range(call, protected))
    return call(aten.cat.default, [front, call(aten.add.Tensor, free, float(protected))], 1)


def _constant(call: Call, vector: fx.Node, value: Count) -> fx.Node:
    """Return ``[B, 1]`` filled with a count."""
    return call(aten.add.Tensor, _zero(call, vector), value)


def apply_matrix(call: Call, matrix: fx.Node, value: fx.Node, batch: int, axis: int, start: int) -> fx.Node:
    """Multiply one axis of a value by ``matrix`` ``[B, new, old]``; all other axes are broadcast.

    Args:
        call: function that inserts a node.
        matrix: matrix with one row per new token.
        value: node of rank 2 or higher.
        batch: batch axis of the value.
        axis: token axis of the value.
        start: index of the first token of the axis. Earlier tokens are protected, so the rest of the matrix is a block.
    """
    if start:
        matrix = call(aten.slice.Tensor, call(aten.slice.Tensor, matrix, 1, start, LAST), 2, start, LAST)
    if batch:  # the matrix has its batch on axis 0
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
    """Insert axes of size 1 into a ``[B, N]`` vector so that it broadcasts to a value of `rank` axes."""
    if batch > axis:
        vector = call(aten.transpose.int, vector, 0, 1)
    for position in range(rank):
        if position not in (batch, axis):
            vector = call(aten.unsqueeze.default, vector, position)
    return vector


def from_token(call: Call, vector: fx.Node, start: int) -> fx.Node:
    """Return the sizes ``[B, N]`` from token `start` on; a negative `start` prepends ones for other entries."""
    if start > 0:
        return call(aten.slice.Tensor, vector, 1, start, LAST)
    if start == 0:
        return vector
    zero = _zero(call, vector)
    ones = call(aten.expand.default, call(aten.add.Tensor, zero, 1.0), [-1, -start])
    return call(aten.cat.default, [ones, vector], 1)


def attention_weights(
    call: Call, query: fx.Node, keys: fx.Node, mask: fx.Node | None, scale: float, protected: int
) -> fx.Node:
    """Return attention weights ``[B, H, 1, N]`` of the first token if it is protected, else all ``[B, H, N, N]``.

    Args:
        call: function that inserts a node.
        query: ``[B, H, N, d]``.
        keys: ``[B, H, N, d]``.
        mask: mask of scaled_dot_product_attention, or None.
        scale: scale of the scores.
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
    return call(aten.softmax.int, scores, -1)


def attention_received(call: Call, weights: fx.Node, protected: int, real: fx.Node | None) -> fx.Node:
    """Return the attention that each token receives, ``[B, N]`` float32, averaged over heads.

    It is the attention of the first token if it is protected, otherwise the mean over all tokens; over those that are
    no padding, it is their sum.

    Args:
        call: function that inserts a node.
        weights: ``[B, (H,) N, N]``, or ``[B, H, 1, N]`` of the first token.
        protected: number of protected tokens; the first is the class token.
        real: ``[B, N]`` bool, False for padding; None without padding.
    """
    if len(value_of(weights).shape) == 4:
        weights = call(aten.mean.dim, weights, [1])
    if value_of(weights).dtype != torch.float32:
        weights = call(aten.to.dtype, weights, torch.float32)
    if protected:
        return call(aten.select.int, weights, 1, 0)
    if real is None:
        return call(aten.mean.dim, weights, [1])
    queries = call(aten.unsqueeze.default, call(aten.to.dtype, real, torch.float32), 1)
    return call(aten.squeeze.dim, call(aten.matmul.default, queries, weights), 1)
