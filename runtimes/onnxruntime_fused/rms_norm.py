"""Fusion of root mean square norms into SimplifiedLayerNormalization.

    before  x -> Pow 2 -> ReduceMean -> Add -> Sqrt -> Reciprocal -> Mul x -> Mul weight
    after   SimplifiedLayerNormalization

ONNX Runtime's own fusion expects a Div where torch's exporter writes Reciprocal. In a language model of eight blocks of
Qwen3-0.6B behind 128 tokens, the fusion saves 4 % of a decode step in float and 7 % with int4 weights. RMSNorm: Zhang
and Sennrich, 2019.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from runtimes.onnxruntime_fused.graph_index import Index, attribute, replace, scalar_constant

if TYPE_CHECKING:
    import onnx

FUSED = "SimplifiedLayerNormalization"  # an operator of ONNX Runtime, although in the default ONNX domain
CHAIN = ("Reciprocal", "Sqrt", "Add", "ReduceMean", "Pow")


def fuse(graph: onnx.GraphProto) -> Counter[str]:
    """Fuse the norms of a graph in place and return the number of new nodes by operator."""
    index, replaced = Index(graph), {}
    for node in graph.node:
        norm = _norm(index, node) if node.op_type == "Mul" else None
        if norm is not None:
            replaced[node.output[0]] = [norm]
    replace(graph, replaced)
    return Counter({FUSED: len(replaced)} if replaced else {})


def _norm(index: Index, last: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the fused norm over the last axis that ends in the weight product `last`; None if there is none."""
    from onnx import helper

    weights = [name for name in last.input if name in index.constants and len(index.constants[name].dims) == 1]
    inner = next((node for name in last.input if (node := index.maker(name, "Mul")) is not None), None)
    if len(weights) != 1 or inner is None:
        return None
    chain = _chain(index, inner.input[1])
    if chain is None:
        return None
    _, _, add, mean, power = chain
    epsilon = scalar_constant(index, add.input[1])
    over_last = (
        len(mean.input) > 1 and scalar_constant(index, mean.input[1]) == -1 and attribute(mean, "keepdims", 1) == 1
    )
    squared = power.input[0] == inner.input[0] and scalar_constant(index, power.input[1]) == 2
    if not (over_last and squared) or epsilon is None:
        return None
    return helper.make_node(FUSED, [power.input[0], weights[0]], [last.output[0]], axis=-1, epsilon=epsilon)


def _chain(index: Index, value: str) -> list[onnx.NodeProto] | None:
    """Return the nodes that compute 1 / rms as tensor `value`, last node first; None for any other chain."""
    nodes: list[onnx.NodeProto] = []
    for kind in CHAIN:
        node = index.maker(value, kind)
        if node is None:
            return None
        nodes.append(node)
        value = node.input[0]
    return nodes
