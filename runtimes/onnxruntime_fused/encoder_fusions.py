"""Fusions of an ONNX graph into ONNX Runtime's own operators, each applied only where it measured faster.

The measurements (benchmarks/fusion.py) exclude two fusions. The CPU kernel of SkipLayerNormalization takes three times
as long as the LayerNormalization and the Add it replaces. MultiHeadAttention is slower than separate products on the
few tokens of a 224-pixel image. The optimisers of onnxruntime.transformers and onnxscript mostly apply these two.

    before  linear -> Reshape -> Transpose -> 3 x (Slice, Squeeze) -> k transposed -> Mul, Mul -> MatMul -> Softmax
            -> MatMul -> Transpose -> Reshape
    after   linear -> Split -> MultiHeadAttention          many tokens: block by block, scores stay in the CPU cache
            QAttention, including the linear map           int8, few tokens, narrow model: one product per head

    before  (Q, DQ), DQ -> MatMul -> Add                   or Sub of a negated bias, as in a classifier
    after   Q -> MatMulIntegerToFloat with bias            ONNX Runtime alone leaves the Add separate

Any other pattern stays unchanged, such as attention with a mask or bias, or with heads split in another way.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtimes.onnxruntime_fused import group_query_attention as onnxruntime_cache
from runtimes.onnxruntime_fused import rms_norm as onnxruntime_norms
from runtimes.onnxruntime_fused.graph_index import (
    DOMAIN,
    Index,
    attribute,
    replace,
    scalar_constant,
    scaled,
    transposed,
)

if TYPE_CHECKING:
    import onnx

BRANCHES = frozenset({"If", "Loop", "Scan"})
MANY_TOKENS = 512  # in int8, MultiHeadAttention measured slower at 197 tokens and faster at 1370
NARROW = 384  # QAttention measured faster up to this width; at 768 its products per head cost more than they save


def fuse(model: onnx.ModelProto) -> Counter[str]:
    """Fuse operators of the main graph in place and return the number of new nodes by operator.

    Args:
        model: The model with its weights loaded. Input and output names stay the same. A model with If, Loop or Scan
            stays unchanged.
    """
    from onnx import helper

    fused: Counter[str] = Counter()
    # A subgraph reads outer tensors that are not inputs of its node, so no outer tensor is provably unused.
    if any(node.op_type in BRANCHES for node in model.graph.node):
        return fused
    for step in (_fuse_attentions, _fuse_products, onnxruntime_norms.fuse):
        fused.update(step(model.graph))
    fused.update(onnxruntime_cache.fuse(model))
    if fused:
        # It contains removed tensors, and shapes that contradict each other. ONNX Runtime infers shapes again.
        del model.graph.value_info[:]
        if DOMAIN not in {opset.domain for opset in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return fused


@dataclass(frozen=True)
class _Attention:
    """Unmasked attention with queries, keys and values from one packed linear map, each third split into heads."""

    packed: str  # [batch, tokens, 3 * heads * width]
    heads: int
    width: int
    scale: float
    tokens: int  # 0 if dynamic
    output: str  # [batch, tokens, heads * width]


@dataclass(frozen=True)
class _Product:
    """A MatMul of dequantized operands plus a bias, or minus a `negated` one.

    Each operand is (quantized tensor, scale, zero point).
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    bias: str
    output: str
    negated: bool


def _fuse_attentions(graph: onnx.GraphProto) -> Counter[str]:
    index, replaced, fused = Index(graph), {}, Counter[str]()
    for node in graph.node:
        attention = _attention(index, node) if node.op_type == "Softmax" else None
        if attention is not None and (nodes := _attention_nodes(index, attention)):
            replaced[attention.output] = nodes
            fused[nodes[-1].op_type] += 1
    replace(graph, replaced)
    return fused


def _fuse_products(graph: onnx.GraphProto) -> Counter[str]:
    from onnx import helper, numpy_helper

    index, replaced = Index(graph), {}
    for node in list(graph.node):
        product = _product(index, node.output[0]) if node.op_type in ("Add", "Sub") else None
        if product is None:
            continue
        bias = product.bias
        if product.negated:
            bias = f"{product.output}/bias"
            graph.initializer.append(
                numpy_helper.from_array(-numpy_helper.to_array(index.constants[product.bias]), bias)
            )
        operands = [*(part for pair in zip(product.left, product.right, strict=True) for part in pair)]
        replaced[product.output] = [
            helper.make_node("MatMulIntegerToFloat", [*operands, bias], [product.output], domain=DOMAIN)
        ]
    replace(graph, replaced)
    return Counter({"MatMulIntegerToFloat": len(replaced)} if replaced else {})


def _attention_nodes(index: Index, attention: _Attention) -> list[onnx.NodeProto]:
    """Return the fused nodes of an attention; an empty list if fusing it would not be faster."""
    from onnx import helper

    heads = attention.heads
    if attention.tokens >= MANY_TOKENS:
        parts = [f"{attention.output}/{part}" for part in ("queries", "keys", "values")]
        output, scale = [attention.output], attention.scale
        return [
            helper.make_node("Split", [attention.packed], parts, axis=-1, num_outputs=3),
            helper.make_node("MultiHeadAttention", parts, output, domain=DOMAIN, num_heads=heads, scale=scale),
        ]
    product = _product(index, attention.packed)
    if product is None or product.negated or not math.isclose(attention.scale, attention.width**-0.5, rel_tol=1e-5):
        return []  # QAttention supports only this scale
    if index.constants[product.right[0]].dims[0] > NARROW:
        return []
    (left, left_scale, left_zero), (right, right_scale, right_zero) = product.left, product.right
    operands = [left, right, product.bias, left_scale, right_scale, "", left_zero, right_zero]
    return [helper.make_node("QAttention", operands, [attention.output], domain=DOMAIN, num_heads=heads)]


def _attention(index: Index, softmax: onnx.NodeProto) -> _Attention | None:
    scores = index.maker(softmax.input[0], "MatMul")
    product = index.reader(softmax.output[0], "MatMul")
    transpose = index.reader(product.output[0], "Transpose") if product is not None else None
    reshape = index.reader(transpose.output[0], "Reshape") if transpose is not None else None
    if scores is None or product is None or transpose is None or reshape is None:
        return None
    if product.input[0] != softmax.output[0] or attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    if attribute(transpose, "perm") != [0, 2, 1, 3]:
        return None
    (queries, first), (keys, second) = (scaled(index, value) for value in scores.input)
    parts = [_part(index, value) for value in (queries, transposed(index, keys), product.input[1])]
    matched = [part for part in parts if part is not None]
    if [part[0] for part in matched] != [0, 1, 2] or len({part[1] for part in matched}) != 1:
        return None
    _, packed, (_, tokens, _, heads, width) = matched[0]
    shape = index.constant(reshape.input[1])
    if shape is None or shape.size != 3 or shape[2] not in (-1, heads * width):
        return None
    return _Attention(packed, int(heads), int(width), first * second, max(int(tokens), 0), reshape.output[0])


def _part(index: Index, value: str) -> tuple[int, str, npt.NDArray[np.int64]] | None:
    """Match one third of a packed tensor, [batch, heads, tokens, width].

    Return the number of the third (0 to 2), the packed tensor and the shape that splits it.
    """
    squeeze = index.maker(value, "Squeeze")
    cut = index.maker(squeeze.input[0], "Slice") if squeeze is not None else None
    transpose = index.maker(cut.input[0], "Transpose") if cut is not None else None
    split = index.maker(transpose.input[0], "Reshape") if transpose is not None else None
    if cut is None or transpose is None or split is None or attribute(transpose, "perm") != [2, 0, 3, 1, 4]:
        return None
    start, end, axis = (scalar_constant(index, name) for name in cut.input[1:4])
    shape = index.constant(split.input[1])
    if shape is None or shape.size != 5 or shape[2] != 3 or start is None or axis != 0 or end != start + 1:
        return None
    return int(start), str(split.input[0]), shape


def _product(index: Index, value: str) -> _Product | None:
    """Match a MatMul of two dequantized operands plus or minus a constant, whose result is tensor `value`."""
    add = index.maker(value, "Add") or index.maker(value, "Sub")
    names = [name for name in add.input if name not in index.constants] if add is not None else []
    matmul = index.maker(names[0], "MatMul") if len(names) == 1 else None
    if add is None or matmul is None or index.reader(matmul.output[0], add.op_type) is None:
        return None
    if add.op_type == "Sub" and add.input[0] in index.constants:
        return None
    bias = next(name for name in add.input if name in index.constants)
    left, right = (index.maker(operand, "DequantizeLinear") for operand in matmul.input)
    if left is None or right is None or len(left.input) != 3 or len(right.input) != 3:
        return None
    kinds = [index.constants[name].data_type for name in (right.input[0], left.input[2]) if name in index.constants]
    shapes = [tuple(index.constants[name].dims) for name in (*left.input[1:], bias) if name in index.constants]
    weight = index.constant(right.input[0])
    if kinds != [3, 2] or weight is None or weight.ndim != 2 or shapes != [(), (), (weight.shape[1],)]:
        return None  # only int8 weights, uint8 activations with one scale, and one bias entry per column match
    return _Product((*left.input,), (*right.input,), bias, add.output[0], add.op_type == "Sub")
