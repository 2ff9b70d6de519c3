"""Translation of ``aten::scaled_dot_product_attention`` to ONNX with as few operators as it needs.

onnxscript's own translation transposes the keys of any number of axes by nine operators, which read their sizes, and
tests the weights of a boolean mask for NaN, of which there are none: a masked score is the lowest finite number. An
engine spends a tenth of its time on both in a small model.

    onnxscript  Shape, 3 x Slice, 2 x Concat, Reshape, Transpose, Reshape, 2 x Mul, MatMul, Softmax, MatMul
    here        Transpose, Mul, MatMul, Softmax, MatMul
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset20

from compressor.internals.onnxscript import grouped_attention
from passes.graph.graph import aten

op: Any = opset20  # its annotations are those of functions that onnxscript compiles
AXES = 4  # batch, heads, tokens, width
TOKENS = 2


def attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Return softmax(scale * query keys^T + mask) values, [batch, heads, queries, width].

    Args:
        query: [batch, heads, queries, width].
        key: [batch, heads, keys, width].
        value: [batch, heads, keys, width of the values].
        attn_mask: added to the scores; a boolean one hides the scores where it is False.
        dropout_p: share of dropped weights; 0 in evaluation mode.
        is_causal: a query reads the keys up to its own position.
        scale: factor of the scores; by default width ** -0.5.
        enable_gqa: keys and values may have fewer heads, which onnxscript's translation repeats.
    """
    assert query.shape is not None
    assert key.shape is not None
    width = query.shape[-1]
    fewer_heads = enable_gqa and query.shape[1] != key.shape[1]
    if fewer_heads or dropout_p or len(query.shape) != AXES or not (scale or isinstance(width, int)):
        return grouped_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    factor = width**-0.5 if scale is None else scale  # type: ignore[operator]
    scores = op.MatMul(op.Mul(query, _number(factor, query)), op.Transpose(key, perm=[0, 1, 3, 2]))
    mask = _causal(query, key) if is_causal else attn_mask
    if mask is not None and (is_causal or mask.dtype == ir.DataType.BOOL):
        mask = _added(mask, query)
    if mask is not None:
        scores = op.Add(scores, mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _added(shown: Any, query: ir.Value) -> Any:
    """Return what a boolean mask adds to the scores: 0 where it is True, and the lowest finite number elsewhere."""
    assert query.dtype is not None
    return op.Where(shown, _number(0.0, query), _number(float(query.dtype.min), query))


def _causal(query: ir.Value, key: ir.Value) -> Any:
    """Return the boolean mask [queries, keys] of the keys up to the position of the query."""
    sizes = [op.Shape(each, start=TOKENS, end=TOKENS + 1) for each in (query, key)]
    ones = op.Expand(op.Constant(value_float=1.0), op.Concat(*sizes, axis=0))
    return op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)


def _number(number: float, like: ir.Value) -> Any:
    assert like.dtype is not None
    return op.Constant(value=ir.tensor(number, dtype=like.dtype))


TRANSLATIONS: dict[Any, Any] = {aten.scaled_dot_product_attention.default: attention}
