"""Ranking of image tokens, and the indices of the tokens that remain."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from passes.analysis.token_axis import option
from passes.graph.graph import value_of

if TYPE_CHECKING:
    from torch import fx

    from passes.image_tokens.subset import Call

aten = torch.ops.aten
LAST = 2**63 - 1
PARTS = 100_000  # shares are rounded to these parts
PRIME = 2**31 - 1  # squares of smaller numbers fit into int64
FIRST = {torch.float32: 3.0e38, torch.int64: 2**62}  # ranks the tokens of text above every image token


def removed_tokens(call: Call, image: fx.Node, share: float) -> fx.Node:
    """Return the number of image tokens that go, of the row that loses the fewest, as a tensor without axes.

    A row keeps ``floor(share * image tokens)``. Rows of one batch lose the same number, so that they stay as long as
    each other.

    Args:
        call: function that inserts a node.
        image: ``[B, S]`` int64, 1 for image tokens.
        share: share of the image tokens of a row that is kept.
    """
    total = call(aten.sum.dim_IntList, image, [1])
    kept = call(aten.floor_divide.default, call(aten.mul.Tensor, total, round(share * PARTS)), PARTS)
    return call(aten.amin.default, call(aten.sub.Tensor, total, kept), [0])


def attention_received(call: Call, fused: fx.Node, query: fx.Node, keys: fx.Node, mask: fx.Node | None) -> fx.Node:
    """Return the attention of one token to each token of the call, averaged over heads, ``[B, S]`` float32.

    Args:
        call: function that inserts a node.
        fused: the scaled_dot_product_attention, for its scale.
        query: ``[B, H, 1, d]``.
        keys: ``[B, kv heads, S, d]``.
        mask: ``[B, 1 or H, 1, S]``, boolean or added to scores; None for no mask.
    """
    _, heads, _, width = value_of(query).shape
    groups = value_of(keys).shape[1]
    query = call(aten.reshape.default, query, [-1, groups, heads // groups, width])
    scale = option(fused, "scale")
    scores = call(aten.matmul.default, query, call(aten.transpose.int, keys, 2, 3))
    scores = call(aten.mul.Tensor, scores, width**-0.5 if scale is None else scale)
    scores = call(aten.reshape.default, scores, [-1, heads, 1, _length(call, keys, 2)])
    scores = scores if value_of(scores).dtype == torch.float32 else call(aten.to.dtype, scores, torch.float32)
    if mask is not None and value_of(mask).dtype == torch.bool:
        scores = call(aten.where.ScalarOther, mask, scores, torch.finfo(torch.float32).min)
    elif mask is not None:
        scores = call(aten.add.Tensor, scores, mask)
    return call(aten.mean.dim, call(aten.softmax.int, scores, -1), [1, 2])


def low_norm(call: Call, keys: fx.Node) -> fx.Node:
    """Return minus the norm of each key, averaged over heads, ``[B, S]``.

    Keys of low norm receive much attention (Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression, EMNLP 2024).
    """
    norm = call(aten.linalg_vector_norm.default, keys, 2, [-1])
    norm = norm if value_of(norm).dtype == torch.float32 else call(aten.to.dtype, norm, torch.float32)
    return call(aten.neg.default, call(aten.mean.dim, norm, [1]))


def random_scores(call: Call, image: fx.Node, seed: int) -> fx.Node:
    """Return pseudo-random integers, a different one for each position, ``[1, S]`` int64.

    They are ``(p + offset) ** 5`` modulo a prime: a permutation, because 5 has no factor in common with the prime minus
    1. Integers are the same in every runtime.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(PRIME // 4, PRIME // 2, (), generator=generator))
    options = {"dtype": torch.int64, "device": value_of(image).device}
    position = call(aten.add.Tensor, call(aten.arange.default, _length(call, image, 1), options=options), offset)
    result = position
    for _ in range(2):
        result = call(aten.remainder.Scalar, call(aten.mul.Tensor, result, result), PRIME)
    result = call(aten.remainder.Scalar, call(aten.mul.Tensor, result, position), PRIME)
    return call(aten.unsqueeze.default, result, 0)


def text_first(call: Call, score: fx.Node, image: fx.Node) -> fx.Node:
    """Return the indices of all tokens, the tokens of text first, then image tokens by falling score, ``[B, S]``."""
    first = FIRST[value_of(score).dtype]
    is_image = call(aten.ne.Scalar, image, 0)
    ranked = call(aten.where.ScalarOther, is_image, score, first)
    return call(operator.getitem, call(aten.sort.default, ranked, 1, True), 1)


def ascending(call: Call, indices: fx.Node) -> fx.Node:
    """Return the indices of each row in ascending order, ``[B, n]``."""
    return call(operator.getitem, call(aten.sort.default, indices, 1), 0)


def last_token(call: Call, mask: fx.Node | None, tokens: fx.Node, count: Any) -> fx.Node:
    """Return the index of the last token of each row that is no padding, ``[B, 1]`` int64.

    Args:
        call: function that inserts a node.
        mask: ``[B, tokens so far]``, 0 for padding; None if nothing is padded.
        tokens: a value ``[B, S, ...]`` of the call.
        count: number of tokens of the call, S.
    """
    options = {"dtype": torch.int64, "device": value_of(tokens).device}
    positions = call(aten.unsqueeze.default, call(aten.arange.default, count, options=options), 0)
    rows = call(aten.sym_size.int, tokens, 0)
    positions = call(aten.expand.default, positions, [rows, -1])
    if mask is not None:
        before = call(operator.sub, call(aten.sym_size.int, mask, 1), count)
        own = call(aten.slice.Tensor, mask, 1, before, LAST)
        positions = call(aten.mul.Tensor, positions, call(aten.to.dtype, own, torch.int64))
    return call(aten.amax.default, positions, [1], True)


def _length(call: Call, node: fx.Node, axis: int) -> Any:
    size = value_of(node).shape[axis]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, axis)
