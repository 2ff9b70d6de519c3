"""Attention of language models behind a cache, as the one operator of ONNX Runtime that can write the cache in place.

    before  Concat(past, new) -> present -> each head of keys repeated -> transposed, Mul -> MatMul -> Mul, Tanh, Mul
            -> Add(mask) -> Softmax -> MatMul -> Transpose -> Reshape
    after   GroupQueryAttention, the graph's own mask as its bias; it makes `present` too

The mask stays the graph's own: padding, sliding windows and whatever else it holds are added to the scores as before.
The operator's own, which hides what comes later, is on where the graph's is seen to hide that too: it saves a twelfth
of the time. Rotary positions stay outside, because the operator's own take no padding into account.

Where past and present are one buffer, as long as the text may ever get, the operator writes the new tokens into it and
copies nothing; the buffer's length is then not that of the past, so everything that asked for it is told by the mask.
The file says so in its metadata (`shared`). A file that does not, for an attention looks like none known, is right too.

ONNX Runtime refuses several new tokens behind a cache for several rows at once; the engine gives it one row at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.onnxruntime.kv_cache_io import FACT, LENGTH_AXIS, MASK, TOKENS
from runtimes.onnxruntime_fused.decoder_attention import Attention, attentions, reads_length
from runtimes.onnxruntime_fused.graph_index import DOMAIN, Index, attribute, fixed, replace

if TYPE_CHECKING:
    import onnx

FUSED = "GroupQueryAttention"
HEADS_FIRST = [0, 2, 1, 3]  # the transposition between [rows, tokens, heads, width] and [rows, heads, tokens, width]
WIDTHS = 8  # the operator takes heads whose width is a multiple of it


def fuse(model: onnx.ModelProto) -> Counter[str]:
    """Rewrite the main graph in place and return how many of each operator were put in; note what may share a buffer.

    A graph that is no language model with the inputs of transformers has nothing that is looked for.
    """
    graph = model.graph
    index, ends = Index(graph), {each.name for each in graph.input}
    known = attentions(graph, index) if {TOKENS, MASK} <= ends else ()
    found = [each for each in known if each.keys.width % WIDTHS == 0]
    if not found:
        return Counter()
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for attention in found:
        replaced |= {attention.keys.present: [], attention.values.present: []}
        replaced |= {attention.output: list(_nodes(index, attention))}
    _prepend(graph, found)
    replace(graph, replaced)
    pairs = {state.present: state.past for each in found for state in (each.keys, each.values)}
    if not _sharable(graph, pairs):
        pairs = {}
    _tell_lengths(graph, set(pairs.values()))
    fact = model.metadata_props.add()
    fact.key, fact.value = FACT, json.dumps(pairs)
    return Counter({FUSED: len(found)})


# ------------------------------------------------------------------------------------------------- what takes its place


def _name(part: str) -> str:
    """A name that no exporter gives."""
    return f"cache/{part}"


ONES, SHAPE, TOTAL, NEW, COUNT, LAST = map(_name, ("ones", "shape", "total", "new", "count", "last"))


def _prepend(graph: onnx.GraphProto, found: list[Attention]) -> None:
    """Put first what all attentions read: how many tokens there are, in the forms that the operators want."""
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
    sizes = {each.heads * each.keys.width for each in found} | {each.keys.heads * each.keys.width for each in found}
    constants = {ONES: np.array([1, 1]), one: np.array([1], np.int32)}
    constants |= {_name(f"joined_{size}"): np.array([0, 0, size]) for size in sizes}
    constants |= {_name(f"split_{each.heads}"): np.array([0, 0, each.heads, -1]) for each in found}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes.extend(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)


def _nodes(index: Index, found: Attention) -> Iterator[onnx.NodeProto]:
    """The operator with what brings its inputs into its form, and its answer into that of the graph.

    It wants heads behind tokens, as linear maps give them: where the graph has only just put them first it takes what
    was there before. A reshaping reads only the order of numbers, so what joins the heads again may stay.
    """
    from onnx import helper

    queries, keys, values, mask, answer = (
        f"{found.output}/{part}" for part in ("queries", "keys", "values", "mask", "answer")
    )
    few = found.keys.heads * found.keys.width
    yield from _joined(index, found.queries, queries, found.heads * found.keys.width)
    yield from _joined(index, found.keys.new, keys, few)
    yield from _joined(index, found.values.new, values, few)
    yield helper.make_node("Expand", [found.mask, SHAPE], [mask])  # it may have fewer axes, and one column for all
    inputs = [queries, keys, values, found.keys.past, found.values.past, LAST, COUNT, "", "", "", mask]
    yield helper.make_node(
        FUSED,
        inputs,
        [answer, found.keys.present, found.values.present],
        domain=DOMAIN,
        num_heads=found.heads,
        kv_num_heads=found.keys.heads,
        scale=found.scale,
        softcap=found.softcap,
        causal=None if found.causal else 0,
    )
    split = f"{answer}/split"
    yield helper.make_node("Reshape", [answer, _name(f"split_{found.heads}")], [split])
    yield helper.make_node("Transpose", [split], [found.output], perm=HEADS_FIRST)


def _joined(index: Index, value: str, output: str, size: int) -> Iterator[onnx.NodeProto]:
    """From [rows, heads, tokens, width] to [rows, tokens, heads * width]."""
    from onnx import helper

    before = index.maker(value, "Transpose")
    if before is not None and attribute(before, "perm") == HEADS_FIRST:
        source = before.input[0]
    else:
        source = f"{output}/turned"
        yield helper.make_node("Transpose", [value], [source], perm=HEADS_FIRST)
    yield helper.make_node("Reshape", [source, _name(f"joined_{size}")], [output])


# -------------------------------------------------------------------------------------------------- a buffer for both


def _sharable(graph: onnx.GraphProto, pairs: Mapping[str, str]) -> bool:
    """Whether all caches of the graph are these, and all that is read of them is read by the operator, or a size."""
    caches = {each.name for each in graph.input if len(fixed(each)) == 4}
    for node in graph.node:
        if node.op_type == FUSED or (node.op_type == "Shape" and _reads_none(node)):
            continue
        told = pairs.keys() if node.op_type == "Shape" and reads_length(node) else {*pairs, *pairs.values()}
        if told & set(node.input):
            return False
    return caches == set(pairs.values())


def _reads_none(node: onnx.NodeProto) -> bool:
    """Whether what a shape is asked for ends before the length."""
    return bool(attribute(node, "start", 0) >= 0 and 0 <= attribute(node, "end", -1) <= LENGTH_AXIS)


def _tell_lengths(graph: onnx.GraphProto, pasts: set[str]) -> None:
    """Tell how long the past is from the mask, in place of the length of a buffer."""
    from onnx import helper

    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in pasts and reads_length(node):
            node.CopyFrom(helper.make_node("Sub", [TOTAL, NEW], list(node.output), name=node.name))
