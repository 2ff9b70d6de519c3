"""Pattern matching of attention with a KV cache in the ONNX graph of a language model exported by torch.

    Concat(past, new) -> present -> repeated key heads -> transpose, Mul -> MatMul -> Mul, Tanh, Mul (softcap)
    -> Add(mask) -> Softmax -> MatMul

Softcap, head repetition and constant factors are optional, and the factors may be at other places. Any other graph does
not match.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtimes.onnxruntime.kv_cache_io import TOKEN_AXIS
from runtimes.onnxruntime_fused.graph_index import Index, attribute, scalar_constant, scaled, transposed

if TYPE_CHECKING:
    import onnx

HIDDEN = -1e30  # mask values up to this one give an attention weight of zero


@dataclass(frozen=True)
class State:
    """One KV cache tensor, the keys or values of one attention: [rows, heads, tokens, width]."""

    past: str
    new: str
    present: str
    heads: int
    width: int


@dataclass(frozen=True)
class Attention:
    """One attention over a KV cache."""

    queries: str  # [rows, heads, new tokens, width]
    keys: State
    values: State
    mask: str  # broadcast to [rows, heads, new tokens, all tokens]
    heads: int
    scale: float
    softcap: float  # bound of the absolute scores; 0 for none
    causal: bool  # whether the mask provably hides all later tokens
    output: str  # [rows, heads, new tokens, width]


@dataclass(frozen=True)
class _Scores:
    queries: str
    keys: str
    scale: float
    softcap: float


def attentions(graph: onnx.GraphProto, index: Index) -> Iterator[Attention]:
    """Yield the attentions of a graph that match the pattern, each with its own cache."""
    states, taken = _states(graph, index), set[str]()
    for node in graph.node:
        attention = _attention(index, states, node) if node.op_type == "MatMul" else None
        if attention is not None and not {attention.keys.present, attention.values.present} & taken:
            taken |= {attention.keys.present, attention.values.present}
            yield attention


def _states(graph: onnx.GraphProto, index: Index) -> dict[str, State]:
    """Return the cache tensors of a graph, by the names of their present outputs."""
    shapes = {value.name: index.shapes[value.name] for value in graph.input}
    outputs, states = {value.name for value in graph.output}, {}
    for node in graph.node:
        past = node.input[0] if node.op_type == "Concat" and len(node.input) == 2 else ""
        if len(shapes.get(past, ())) == 4 and node.output[0] in outputs and attribute(node, "axis") in (-2, TOKEN_AXIS):
            _, heads, _, width = shapes[past]
            states[node.output[0]] = State(past, node.input[1], node.output[0], heads, width)
    return states


def _attention(index: Index, states: Mapping[str, State], product: onnx.NodeProto) -> Attention | None:
    """Return the attention whose weights and values the MatMul node `product` multiplies."""
    softmax = _softmax(index, product.input[0])
    if softmax is None or attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    masked = index.maker(softmax.input[0], "Add")
    scores = _scores(index, masked.input[0]) if masked is not None else None
    if masked is None or scores is None or not _finite(index, masked.input[1]):
        return None
    keys, heads = _repeated(index, states, transposed(index, scores.keys))
    values, value_heads = _repeated(index, states, product.input[1])
    if (
        keys is None
        or values is None
        or heads != value_heads
        or (keys.heads, keys.width) != (values.heads, values.width)
    ):
        return None
    if keys.present == values.present:
        return None
    if keys.heads == 1 == heads:  # MatMul broadcasts a single key head to all query heads
        heads = [*index.shapes.get(product.output[0], ()), 0, 0][1]
    if not heads:
        return None
    mask = masked.input[1]
    return Attention(
        scores.queries, keys, values, mask, heads, scores.scale, scores.softcap, _causal(index, mask), product.output[0]
    )


def _softmax(index: Index, weights: str) -> onnx.NodeProto | None:
    """Return the Softmax node that produces the attention weights.

    torch wraps it in Where(IsNaN(weights), 0, weights), which has no effect with a finite mask.
    """
    guard = index.maker(weights, "Where")
    test = index.maker(guard.input[0], "IsNaN") if guard is not None else None
    if (
        guard is not None
        and test is not None
        and test.input[0] == guard.input[2]
        and scalar_constant(index, guard.input[1]) == 0
    ):
        weights = guard.input[2]
    return index.maker(weights, "Softmax")


def _finite(index: Index, mask: str) -> bool:
    """Return whether a mask is a Where of two finite constants."""
    node = index.maker(mask, "Where")
    numbers = [scalar_constant(index, name) for name in node.input[1:]] if node is not None else [None]
    return all(entry is not None and math.isfinite(entry) for entry in numbers)


def _causal(index: Index, mask: str) -> bool:
    """Return whether one condition of the mask is column <= row, so that no token attends to later ones."""
    where, comparisons = index.maker(mask, "Where"), []
    hidden = scalar_constant(index, where.input[2]) if where is not None else None
    pending = [where.input[0]] if where is not None and hidden is not None and hidden <= HIDDEN else []
    while pending:
        node = index.makers.get(pending.pop())
        if node is not None and node.op_type in ("And", "Expand"):
            pending.extend(node.input[: 2 if node.op_type == "And" else 1])
        elif node is not None and node.op_type == "LessOrEqual":
            comparisons.append(node)
    return any(_columns(index, node.input[0]) and _rows(index, node.input[1]) for node in comparisons)


def _columns(index: Index, value: str) -> bool:
    """Return whether a tensor is 0, 1, 2 ... along axis 3 of four: the positions of the keys."""
    value, axes = _unsqueezed(index, value)
    return axes == [1, 1, 1, 0] and _counts(index, value)


def _rows(index: Index, value: str) -> bool:
    """Return whether a tensor is past length + 0, 1, 2 ... along axis 2 of four: the positions of the queries."""
    value, axes = _unsqueezed(index, value)
    node = index.maker(value, "Add")
    length = index.maker(node.input[1], "Squeeze") if node is not None else None
    shape = index.maker(length.input[0], "Shape") if length is not None else None
    if node is None or shape is None or not reads_length(shape) or axes != [1, 1, 0, 1]:
        return False
    return len(index.shapes.get(shape.input[0], ())) == 4 and _counts(index, node.input[0])


def _counts(index: Index, value: str) -> bool:
    """Return whether a tensor is 0, 1, 2 ..."""
    node = index.maker(value, "Range")
    return (
        node is not None and scalar_constant(index, node.input[0]) == 0 and scalar_constant(index, node.input[2]) == 1
    )


def _unsqueezed(index: Index, value: str) -> tuple[str, list[int]]:
    """Return the one-axis tensor before a chain of Unsqueeze nodes, and a list with one entry per final axis.

    The entry is 0 for the tensor's own axis and 1 for an added axis.
    """
    added: list[list[int]] = []
    while (node := index.maker(value, "Unsqueeze")) is not None:
        constant = index.constant(node.input[1])
        added.append([] if constant is None else constant.ravel().tolist())
        value = node.input[0]
    axes = [0]
    for positions in reversed(added):
        rank = len(axes) + len(positions)
        for position in sorted(position % rank for position in positions):
            axes.insert(position, 1)
    return value, axes


def _scores(index: Index, value: str) -> _Scores | None:
    """Match scaled attention scores, with or without a softcap; constant factors may be anywhere."""
    inner, softcap = _multiple(index, value)
    limited = index.maker(inner, "Tanh")
    product, scale = _multiple(index, limited.input[0]) if limited is not None else (inner, 1.0)
    matmul = index.maker(product, "MatMul")
    if matmul is None:
        return None
    (queries, first), (keys, second) = (_multiple(index, name) for name in matmul.input)
    return _Scores(queries, keys, scale * softcap * first * second, softcap if limited is not None else 0.0)


def _multiple(index: Index, value: str) -> tuple[str, float]:
    """Return (x, factor) for a tensor computed from x by any number of Mul and Div nodes with constants."""
    total = 1.0
    while True:
        inner, factor = scaled(index, value)
        divided = index.maker(value, "Div")
        divisor = scalar_constant(index, divided.input[1]) if divided is not None else None
        if divided is not None and divisor:
            inner, factor = divided.input[0], 1.0 / divisor
        if inner == value:
            return value, total
        value, total = inner, total * factor


def reads_length(node: onnx.NodeProto) -> bool:
    """Return whether a Shape node returns the size of the token axis alone."""
    return (attribute(node, "start", 0), attribute(node, "end")) == (TOKEN_AXIS, TOKEN_AXIS + 1)


def _repeated(index: Index, states: Mapping[str, State], value: str) -> tuple[State | None, int]:
    """Return the cache tensor whose heads `value` repeats (or has once), and the number of heads; (None, 0) if none."""
    if value in states:
        return states[value], states[value].heads
    reshape = index.maker(value, "Reshape")
    expand = index.maker(reshape.input[0], "Expand") if reshape is not None else None
    unsqueeze = index.maker(expand.input[0], "Unsqueeze") if expand is not None else None
    state = states.get(unsqueeze.input[0]) if unsqueeze is not None else None
    if reshape is None or expand is None or unsqueeze is None or state is None:
        return None, 0
    if scalar_constant(index, unsqueeze.input[1]) != 2:
        return None, 0
    five, four = _sizes(index, expand.input[1]), _sizes(index, reshape.input[1])
    if len(five) != 5 or len(four) != 4 or five[1] not in (1, state.heads) or not five[2]:
        return None, 0
    heads = state.heads * five[2]
    return (state, heads) if four[1] == heads else (None, 0)


def _sizes(index: Index, shape: str) -> list[int | None]:
    """Return the entries of a shape tensor, None for computed ones; the exporter concatenates one entry per axis."""
    node = index.maker(shape, "Concat")
    parts = [index.constant(name) for name in (node.input if node is not None else [shape])]
    return [size for part in parts for size in ([None] if part is None else part.ravel().tolist())]
