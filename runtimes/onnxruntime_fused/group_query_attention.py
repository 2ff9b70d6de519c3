"""Fusion of attention with a KV cache into GroupQueryAttention, which can update the cache in place.

    before  Concat(past, new) -> present -> repeated key heads -> transpose, Mul -> MatMul -> Mul, Tanh, Mul (softcap)
            -> Add(mask) -> Softmax -> MatMul -> Transpose -> Reshape
    after   GroupQueryAttention, with the graph's mask as attention bias; it also produces `present`

The graph's mask, with padding and sliding windows, is added to the scores as before. The causal mask of the operator is
enabled only if the graph's mask is provably causal; this saves a twelfth of the time. Rotary embeddings stay outside,
because those of the operator ignore padding.

If past and present share one buffer of maximum length, the operator writes the new tokens into it and copies nothing.
The size of the buffer is then not the length of the past, so nodes that read this length compute it from the mask. The
metadata of the file lists the shared buffers (see kv_cache_io.shared). A file with an attention of another form shares
none and also computes correct results.

ONNX Runtime does not support several new tokens behind a cache for several rows; the engine then runs row by row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.onnxruntime.kv_cache_io import MASK, SHARED_BUFFERS_KEY, TOKEN_AXIS, TOKENS
from runtimes.onnxruntime_fused.decoder_attention import Attention, attentions, reads_length
from runtimes.onnxruntime_fused.graph_index import DOMAIN, Index, attribute, fixed, replace

if TYPE_CHECKING:
    import onnx

FUSED = "GroupQueryAttention"
HEADS_FIRST = [0, 2, 1, 3]  # permutation between [rows, tokens, heads, width] and [rows, heads, tokens, width]
WIDTHS = 8  # the operator requires a head width that is a multiple of this


def fuse(model: onnx.ModelProto) -> Counter[str]:
    """Fuse the attentions of the main graph in place and return the number of new nodes by operator.

    The metadata of the model records which cache buffers may be shared. A graph without the inputs of a transformers
    language model stays unchanged.
    """
    graph = model.graph
    index, inputs = Index(graph), {value.name for value in graph.input}
    matches = attentions(graph, index) if {TOKENS, MASK} <= inputs else ()
    fusable = [attention for attention in matches if attention.keys.width % WIDTHS == 0]
    if not fusable:
        return Counter()
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for attention in fusable:
        replaced |= {attention.keys.present: [], attention.values.present: []}
        replaced |= {attention.output: list(_nodes(index, attention))}
    _prepend(graph, fusable)
    replace(graph, replaced)
    pairs = {state.present: state.past for attention in fusable for state in (attention.keys, attention.values)}
    if not _sharable(graph, pairs):
        pairs = {}
    _read_lengths_from_mask(graph, set(pairs.values()))
    fact = model.metadata_props.add()
    fact.key, fact.value = SHARED_BUFFERS_KEY, json.dumps(pairs)
    return Counter({FUSED: len(fusable)})


# ----------------------------------------------------------------------------------------------------- the new nodes


def _name(part: str) -> str:
    """Return a tensor name that no exporter uses."""
    return f"cache/{part}"


ONES, SHAPE, TOTAL, NEW, COUNT, LAST = map(_name, ("ones", "shape", "total", "new", "count", "last"))


def _prepend(graph: onnx.GraphProto, fusable: list[Attention]) -> None:
    """Prepend the nodes and constants that all attentions share: token counts in the forms that the operator reads."""
    from onnx import TensorProto, helper, numpy_helper

    one, rows, before = map(_name, ("one", "rows", "before"))
    nodes = [
        helper.make_node("Shape", [MASK], [TOTAL], start=1, end=2),
        helper.make_node("Shape", [TOKENS], [NEW], start=1, end=2),
        helper.make_node("Shape", [TOKENS], [rows], start=0, end=1),
        helper.make_node("Concat", [ONES, NEW, TOTAL], [SHAPE], axis=0),
        helper.make_node("Cast", [TOTAL], [COUNT], to=TensorProto.INT32),
        helper.make_node("Sub", [COUNT, one], [before]),
        helper.make_node("Expand", [before, rows], [LAST]),
    ]
    query_sizes = {part.heads * part.keys.width for part in fusable}
    sizes = query_sizes | {part.keys.heads * part.keys.width for part in fusable}
    constants = {ONES: np.array([1, 1]), one: np.array([1], np.int32)}
    constants |= {_name(f"joined_{size}"): np.array([0, 0, size]) for size in sizes}
    constants |= {_name(f"split_{part.heads}"): np.array([0, 0, part.heads, -1]) for part in fusable}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def _nodes(index: Index, attention: Attention) -> Iterator[onnx.NodeProto]:
    """Yield GroupQueryAttention with the nodes that convert the layouts of its inputs and output.

    The operator reads [rows, tokens, heads * width], the layout of a linear map's output. If the graph transposes that
    layout to [rows, heads, tokens, width], the nodes read the tensor before the Transpose. The graph's own Transpose
    and Reshape after the attention stay in place.
    """
    from onnx import helper

    queries, keys, values, mask, answer = (
        f"{attention.output}/{part}" for part in ("queries", "keys", "values", "mask", "answer")
    )
    size, cache_size = attention.heads * attention.keys.width, attention.keys.heads * attention.keys.width
    yield from _joined(index, attention.queries, queries, size)
    yield from _joined(index, attention.keys.new, keys, cache_size)
    yield from _joined(index, attention.values.new, values, cache_size)
    yield helper.make_node("Expand", [attention.mask, SHAPE], [mask])  # the mask may rely on broadcasting
    inputs = [queries, keys, values, attention.keys.past, attention.values.past, LAST, COUNT, "", "", "", mask]
    yield helper.make_node(
        FUSED,
        inputs,
        [answer, attention.keys.present, attention.values.present],
        domain=DOMAIN,
        num_heads=attention.heads,
        kv_num_heads=attention.keys.heads,
        scale=attention.scale,
        softcap=attention.softcap,
        causal=None if attention.causal else 0,
    )
    split = f"{answer}/split"
    yield helper.make_node("Reshape", [answer, _name(f"split_{attention.heads}")], [split])
    yield helper.make_node("Transpose", [split], [attention.output], perm=HEADS_FIRST)


def _joined(index: Index, value: str, output: str, size: int) -> Iterator[onnx.NodeProto]:
    """Yield the nodes from `value`, [rows, heads, tokens, width], to `output`, [rows, tokens, heads * width]."""
    from onnx import helper

    before = index.maker(value, "Transpose")
    if before is not None and attribute(before, "perm") == HEADS_FIRST:
        source = before.input[0]
    else:
        source = f"{output}/turned"
        yield helper.make_node("Transpose", [value], [source], perm=HEADS_FIRST)
    yield helper.make_node("Reshape", [source, _name(f"joined_{size}")], [output])


# ---------------------------------------------------------------------------------------------------- shared buffers


def _sharable(graph: onnx.GraphProto, pairs: Mapping[str, str]) -> bool:
    """Return whether `pairs` covers all caches, and nodes other than the operator read only sizes of them."""
    caches = {value.name for value in graph.input if len(fixed(value)) == 4}
    for node in graph.node:
        if node.op_type == FUSED or (node.op_type == "Shape" and _ends_before_length(node)):
            continue
        # _read_lengths_from_mask() replaces the length of a past, but not that of a present.
        forbidden = pairs.keys() if node.op_type == "Shape" and reads_length(node) else {*pairs, *pairs.values()}
        if forbidden & set(node.input):
            return False
    return caches == set(pairs.values())


def _ends_before_length(node: onnx.NodeProto) -> bool:
    """Return whether a Shape node returns only sizes of axes before the token axis."""
    return bool(attribute(node, "start", 0) >= 0 and 0 <= attribute(node, "end", -1) <= TOKEN_AXIS)


def _read_lengths_from_mask(graph: onnx.GraphProto, pasts: set[str]) -> None:
    """Compute the length of the past from the attention mask instead of the size of the cache buffer."""
    from onnx import helper

    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in pasts and reads_length(node):
            node.CopyFrom(helper.make_node("Sub", [TOTAL, NEW], list(node.output), name=node.name))
