"""Rewrites of an ONNX graph into operators that only ONNX Runtime has, each where it was measured to be quicker.

What was measured (benchmarks/fusion.py) decides what is here, and what is not: SkipLayerNormalization, whose CPU kernel
takes three times as long as the LayerNormalization and the addition it replaces, and MultiHeadAttention on the few
tokens of a 224-pixel image, where it is slower than the products it replaces. What the shipped optimisers of
onnxruntime.transformers and onnxscript find in these graphs is mostly these two.

    before  linear -> Reshape -> Transpose -> 3 x (Slice, Squeeze) -> k transposed -> Mul, Mul -> MatMul -> Softmax
            -> MatMul -> Transpose -> Reshape
    after   linear -> Split -> MultiHeadAttention          many tokens: scores stay in the cache, block by block
            QAttention, the linear map included            int8, few tokens, narrow: head by head, as it is read

    before  (Q, DQ), DQ -> MatMul -> Add
    after   Q -> MatMulIntegerToFloat with its bias        ONNX Runtime adds it apart, and dequantizes a head's weights
                                                           in every run, because it takes the addition for a Gemm

Everything that does not look exactly like that stays as it is: masked or biased attention, other ways to split heads.
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
from runtimes.onnxruntime_fused.graph_index import DOMAIN, Index, attribute, number, replace, scaled, transposed

if TYPE_CHECKING:
    import onnx

BRANCHES = frozenset({"If", "Loop", "Scan"})
MANY_TOKENS = 512  # between the 197 at which MultiHeadAttention lost and the 1370 at which it won in int8
NARROW = 384  # up to here QAttention won; at 768 its products, one for each head, lose more than the layout costs


def fuse(model: onnx.ModelProto) -> Counter[str]:
    """Rewrite the main graph in place and return how many of each operator were put in.

    Args:
        model: With its weights loaded. Names of inputs and outputs stay. One with branches stays as it is.
    """
    from onnx import helper

    made: Counter[str] = Counter()
    # A body reads values of the graph around it without its node naming them: nothing around it is known to be unread.
    if any(node.op_type in BRANCHES for node in model.graph.node):
        return made
    for step in (_fuse_attentions, _fuse_products, onnxruntime_norms.fuse):
        made.update(step(model.graph))
    made.update(onnxruntime_cache.fuse(model))
    if made:
        # Shapes of values that are gone, and some that contradict themselves: ONNX Runtime infers them again.
        del model.graph.value_info[:]
        if DOMAIN not in {each.domain for each in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return made


@dataclass(frozen=True)
class _Attention:
    """Attention without mask whose queries, keys and values come out of one linear map, heads inside each third."""

    packed: str  # [batch, tokens, 3 * heads * width]
    heads: int
    width: int
    scale: float
    tokens: int  # 0 where it is not constant
    output: str  # [batch, tokens, heads * width]


@dataclass(frozen=True)
class _Product:
    """A matrix product of quantized values; the nodes' inputs are value, scale and zero point."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    bias: str
    output: str


def _fuse_attentions(graph: onnx.GraphProto) -> Counter[str]:
    index, replaced, made = Index(graph), {}, Counter[str]()
    for node in graph.node:
        attention = _attention(index, node) if node.op_type == "Softmax" else None
        if attention is not None and (nodes := _attention_nodes(index, attention)):
            replaced[attention.output] = nodes
            made[nodes[-1].op_type] += 1
    replace(graph, replaced)
    return made


def _fuse_products(graph: onnx.GraphProto) -> Counter[str]:
    from onnx import helper

    index, replaced = Index(graph), {}
    for node in graph.node:
        product = _product(index, node.output[0]) if node.op_type == "Add" else None
        if product is not None:
            operands = [*(part for pair in zip(product.left, product.right, strict=True) for part in pair)]
            replaced[product.output] = [
                helper.make_node("MatMulIntegerToFloat", [*operands, product.bias], [product.output], domain=DOMAIN)
            ]
    replace(graph, replaced)
    return Counter({"MatMulIntegerToFloat": len(replaced)} if replaced else {})


def _attention_nodes(index: Index, found: _Attention) -> list[onnx.NodeProto]:
    """The fused form; none where the plain one is as quick."""
    from onnx import helper

    if found.tokens >= MANY_TOKENS:
        parts = [f"{found.output}/{part}" for part in ("queries", "keys", "values")]
        output = [found.output]
        return [
            helper.make_node("Split", [found.packed], parts, axis=-1, num_outputs=3),
            helper.make_node(
                "MultiHeadAttention", parts, output, domain=DOMAIN, num_heads=found.heads, scale=found.scale
            ),
        ]
    product = _product(index, found.packed)
    if product is None or not math.isclose(found.scale, found.width**-0.5, rel_tol=1e-5):
        return []  # QAttention knows this scale only
    if index.constants[product.right[0]].dims[0] > NARROW:
        return []
    (left, left_scale, left_zero), (right, right_scale, right_zero) = product.left, product.right
    operands = [left, right, product.bias, left_scale, right_scale, "", left_zero, right_zero]
    return [helper.make_node("QAttention", operands, [found.output], domain=DOMAIN, num_heads=found.heads)]


def _attention(index: Index, softmax: onnx.NodeProto) -> _Attention | None:
    scores = index.maker(softmax.input[0], "MatMul")
    mixed = index.reader(softmax.output[0], "MatMul")
    turned = index.reader(mixed.output[0], "Transpose") if mixed is not None else None
    joined = index.reader(turned.output[0], "Reshape") if turned is not None else None
    if scores is None or mixed is None or turned is None or joined is None or mixed.input[0] != softmax.output[0]:
        return None
    if attribute(softmax, "axis", -1) not in (-1, 3) or attribute(turned, "perm") != [0, 2, 1, 3]:
        return None
    (queries, first), (keys, second) = (scaled(index, value) for value in scores.input)
    parts = [_part(index, value) for value in (queries, transposed(index, keys), mixed.input[1])]
    known = [part for part in parts if part is not None]
    if [part[0] for part in known] != [0, 1, 2] or len({part[1] for part in known}) != 1:
        return None
    _, packed, (_, tokens, _, heads, width) = known[0]
    shape = index.constant(joined.input[1])
    if shape is None or shape.size != 3 or shape[2] not in (-1, heads * width):
        return None
    return _Attention(packed, int(heads), int(width), first * second, max(int(tokens), 0), joined.output[0])


def _part(index: Index, value: str) -> tuple[int, str, npt.NDArray[np.int64]] | None:
    """Which third of a packed value this is, [batch, heads, tokens, width], the packed value, and how it was split."""
    squeeze = index.maker(value, "Squeeze")
    cut = index.maker(squeeze.input[0], "Slice") if squeeze is not None else None
    turned = index.maker(cut.input[0], "Transpose") if cut is not None else None
    split = index.maker(turned.input[0], "Reshape") if turned is not None else None
    if cut is None or turned is None or split is None or attribute(turned, "perm") != [2, 0, 3, 1, 4]:
        return None
    start, end, axis = (number(index, name) for name in cut.input[1:4])
    shape = index.constant(split.input[1])
    if shape is None or shape.size != 5 or shape[2] != 3 or start is None or axis != 0 or end != start + 1:
        return None
    return int(start), str(split.input[0]), shape


def _product(index: Index, value: str) -> _Product | None:
    """The product of dequantized values, plus a constant bias, that a value is."""
    add = index.maker(value, "Add")
    names = [name for name in add.input if name not in index.constants] if add is not None else []
    matmul = index.maker(names[0], "MatMul") if len(names) == 1 else None
    if add is None or matmul is None or index.reader(matmul.output[0], "Add") is None:
        return None
    bias = next(name for name in add.input if name in index.constants)
    left, right = (index.maker(operand, "DequantizeLinear") for operand in matmul.input)
    if left is None or right is None or len(left.input) != 3 or len(right.input) != 3:
        return None
    kinds = [index.constants[name].data_type for name in (right.input[0], left.input[2]) if name in index.constants]
    shapes = [tuple(index.constants[name].dims) for name in (*left.input[1:], bias) if name in index.constants]
    weight = index.constant(right.input[0])
    if kinds != [3, 2] or weight is None or weight.ndim != 2 or shapes != [(), (), (weight.shape[1],)]:
        return None  # anything but int8 weights, uint8 activations with one scale, and a bias per column
    return _Product((*left.input,), (*right.input,), bias, add.output[0])
