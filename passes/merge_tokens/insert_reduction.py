"""Insertion of one token reduction: number of removed tokens, and their selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from passes.base import PassError
from passes.graph.edit import resymbolize_size
from passes.graph.graph import value_of
from passes.merge_tokens import matching as arithmetic

if TYPE_CHECKING:
    from torch import fx

    from passes.merge_tokens.matching import Count, Stage
    from passes.merge_tokens.stages import Reduction, Stages

aten = torch.ops.aten
PAIR = 2  # tokens that one reduction needs


class AttentionOperands(NamedTuple):
    """Operands of the preceding attention.

    ``keys`` is ``[B, (H,) N, d]``, or ``[B, (H,) d, N]`` if `turned`. Fused attention sets ``query``, ``mask`` and
    ``scale``; explicit attention sets ``weights``, its softmax. ``real`` ``[B, N]`` is False for padding.
    """

    keys: fx.Node
    turned: bool = False
    query: fx.Node | None = None
    mask: fx.Node | None = None
    scale: float = 1.0
    weights: fx.Node | None = None
    real: fx.Node | None = None


def insert_reduction(
    call: Any, name: str, root: fx.Node, amount: float, attended: AttentionOperands, past: Stages
) -> Stage:
    """Insert the nodes of a token reduction of `root`.

    Args:
        call: function that inserts a node.
        name: name of the trunk in messages.
        root: the trunk ``[B, N, D]`` after an attention.
        amount: number (int) or share (float) of tokens to remove.
        attended: operands of that attention.
        past: the reductions so far.

    Raises:
        PassError: `amount` is a number but the token axis is dynamic, or the keys have an unknown layout.
    """
    size = value_of(root).shape[1]
    original = size if isinstance(size, int) else call(aten.sym_size.int, root, 1)
    old: Count = past.done[-1].count if past.done else original
    sizes = past.done[-1].sizes if past.done else None
    method, protected = past.reduction.method, past.reduction.protected
    by_row = attended.real is not None and not isinstance(old, int) and past.reduction.in_pairs
    removed = _removed(call, name, old, amount, past.reduction, by_row=by_row)
    count, dtype = arithmetic.minus(call, old, removed), value_of(root).dtype
    if not isinstance(count, int):
        resymbolize_size(past.graph, count)
    if method == "attention":
        return arithmetic.keep(call, _received(call, attended, protected), count, protected, sizes, dtype)
    if method in ("evit", "unary") and attended.real is not None:
        raise PassError(f"the method {method} has no rule for padding; use merge.")
    if method == "evit":
        return arithmetic.keep_and_fuse(call, _received(call, attended, protected), count, protected, sizes, dtype)
    if method == "unary":
        score, features = _received(call, attended, protected), _states(call, root)
        new_index = arithmetic.merge_lowest(call, score, features, count, protected)
        return arithmetic.merge(call, new_index, count, sizes, dtype)
    if method == "norm":
        score = call(aten.linalg_vector_norm.default, _mean_keys(call, attended), 2, [-1])
        return arithmetic.keep(call, score, count, protected, sizes, dtype)
    features, links = _links(call, root, attended, past)
    if by_row:
        links = links._replace(share=amount)
    new_index = arithmetic.match(call, features, protected, removed, links)
    return arithmetic.merge(call, new_index, count, sizes, dtype, real=attended.real if by_row else None)


def _links(call: Any, root: fx.Node, attended: AttentionOperands, past: Stages) -> tuple[fx.Node, arithmetic.Links]:
    """Return the features by which tokens are similar, and what links are ranked by, of a merging method."""
    method = past.reduction.method
    if method == "tome":
        return _mean_keys(call, attended), arithmetic.Links(attended.real)
    if method == "atm":
        sizes = past.done[-1].sizes if past.done else None
        return _mean_keys(call, attended), arithmetic.Links(attended.real, sizes=sizes)
    received = _received(call, attended, past.reduction.protected)
    return _states(call, root), arithmetic.Links(attended.real, received=received)


def _states(call: Any, root: fx.Node) -> fx.Node:
    return root if value_of(root).dtype == torch.float32 else call(aten.to.dtype, root, torch.float32)


def _removed(call: Any, name: str, old: Count, amount: float, reduction: Reduction, *, by_row: bool) -> Count:
    """Return the number of removed tokens, limited to the available ones.

    A merge removes less than half of the unprotected tokens. With `by_row` the rows have padding and a dynamic length.

    Raises:
        PassError: `amount` is a number but the token axis is dynamic, or fewer than two tokens may be removed.
    """
    if not isinstance(old, int) and isinstance(amount, int):
        raise PassError(
            f"found {amount} tokens to remove after {name}, which has a dynamic length; expected a share such as 0.25."
        )
    if by_row:
        return arithmetic.removed_in_pairs(call, arithmetic.minus(call, old, reduction.protected), amount)
    removed = arithmetic.removed_tokens(call, old, reduction.protected, amount)
    if not isinstance(old, int):
        return removed
    free = old - reduction.protected
    if free < PAIR:
        raise PassError(
            f"{name} has {old} tokens, of which {reduction.protected} are protected (parameters, or read by "
            "position), so no pair is left to merge; reduce tokens elsewhere."
        )
    return max(0, min(removed, (free - 1) // 2 if reduction.in_pairs else free - 1))


def _mean_keys(call: Any, attended: AttentionOperands) -> fx.Node:
    """Return the keys ``[B, N, d]`` in float32, averaged over heads."""
    keys = attended.keys
    if len(value_of(keys).shape) not in (3, 4):
        shape = tuple(value_of(keys).shape)
        raise PassError(f"the keys {keys.name} have shape {shape}; expected [samples, heads, tokens, features].")
    if len(value_of(keys).shape) == 4:
        keys = call(aten.mean.dim, keys, [1])
    keys = call(aten.transpose.int, keys, 1, 2) if attended.turned else keys
    return keys if value_of(keys).dtype == torch.float32 else call(aten.to.dtype, keys, torch.float32)


def _received(call: Any, attended: AttentionOperands, protected: int) -> fx.Node:
    """Return the attention that each token receives, ``[B, N]`` float32."""
    weights = attended.weights
    if weights is None:
        if attended.query is None:
            raise PassError(
                f"the attention with the keys {attended.keys.name} has no softmax, and no token's share of it is "
                "known; use the method tome or norm."
            )
        weights = arithmetic.attention_weights(
            call, attended.query, attended.keys, attended.mask, attended.scale, protected
        )
    return arithmetic.attention_received(call, weights, protected, attended.real)
