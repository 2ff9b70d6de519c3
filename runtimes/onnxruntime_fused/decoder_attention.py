"""Attention of language models behind a cache, recognised in the ONNX graph that torch's exporter makes.

    Concat(past, new) -> present -> each head of keys several times -> transposed, Mul -> MatMul -> Mul, Tanh, Mul
    -> Add(mask) -> Softmax -> MatMul

Limits of scores, repetition and constant factors may be missing or elsewhere. What looks otherwise is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtimes.onnxruntime.kv_cache_io import LENGTH_AXIS
from runtimes.onnxruntime_fused.graph_index import Index, attribute, number, scaled, transposed

if TYPE_CHECKING:
    import onnx

HIDDEN = -1e30  # a score that leaves no weight


@dataclass(frozen=True)
class State:
    """One input of the graph that grows by new tokens: [rows, heads, tokens, width]."""

    past: str
    new: str
    present: str
    heads: int
    width: int


@dataclass(frozen=True)
class Attention:
    """Attention to everything in a cache."""

    queries: str  # [rows, heads, new tokens, width]
    keys: State
    values: State
    mask: str  # broadcast to [rows, heads, new tokens, all tokens]
    heads: int
    scale: float
    softcap: float  # scores stay within plus and minus this; 0 for no limit
    causal: bool  # whether the mask is known to hide whatever comes after a token
    output: str  # [rows, heads, new tokens, width]


@dataclass(frozen=True)
class _Scores:
    queries: str
    keys: str
    scale: float
    softcap: float


def attentions(graph: onnx.GraphProto, index: Index) -> Iterator[Attention]:
    """Those that are known, each with a cache of its own."""
    states, taken = _states(graph, index), set[str]()
    for node in graph.node:
        attention = _attention(index, states, node) if node.op_type == "MatMul" else None
        if attention is not None and not {attention.keys.present, attention.values.present} & taken:
            taken |= {attention.keys.present, attention.values.present}
            yield attention


def _states(graph: onnx.GraphProto, index: Index) -> dict[str, State]:
    """By the name of what comes out, every input that comes out longer."""
    shapes = {each.name: index.shapes[each.name] for each in graph.input}
    outputs, found = {each.name for each in graph.output}, {}
    for node in graph.node:
        past = node.input[0] if node.op_type == "Concat" and len(node.input) == 2 else ""
        if (
            len(shapes.get(past, ())) == 4
            and node.output[0] in outputs
            and attribute(node, "axis") in (-2, LENGTH_AXIS)
        ):
            _, heads, _, width = shapes[past]
            found[node.output[0]] = State(past, node.input[1], node.output[0], heads, width)
    return found


def _attention(index: Index, states: Mapping[str, State], mixed: onnx.NodeProto) -> Attention | None:
    """The attention whose weights and values this node multiplies."""
    softmax = _softmax(index, mixed.input[0])
    if softmax is None or attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    masked = index.maker(softmax.input[0], "Add")
    scores = _scores(index, masked.input[0]) if masked is not None else None
    if masked is None or scores is None or not _finite(index, masked.input[1]):
        return None
    keys, heads = _repeated(index, states, transposed(index, scores.keys))
    values, same = _repeated(index, states, mixed.input[1])
    if keys is None or values is None or heads != same or (keys.heads, keys.width) != (values.heads, values.width):
        return None
    if keys.present == values.present:
        return None
    if keys.heads == 1 == heads:  # a single one is read by all without being repeated
        heads = [*index.shapes.get(mixed.output[0], ()), 0, 0][1]
    if not heads:
        return None
    mask = masked.input[1]
    return Attention(
        scores.queries, keys, values, mask, heads, scores.scale, scores.softcap, _causal(index, mask), mixed.output[0]
    )


def _softmax(index: Index, weights: str) -> onnx.NodeProto | None:
    """What makes the weights; torch puts 0 where they are no numbers, which finite masks never make them."""
    guard = index.maker(weights, "Where")
    test = index.maker(guard.input[0], "IsNaN") if guard is not None else None
    if (
        guard is not None
        and test is not None
        and test.input[0] == guard.input[2]
        and number(index, guard.input[1]) == 0
    ):
        weights = guard.input[2]
    return index.maker(weights, "Softmax")


def _finite(index: Index, mask: str) -> bool:
    """Whether a mask is one of two finite numbers everywhere."""
    node = index.maker(mask, "Where")
    numbers = [number(index, name) for name in node.input[1:]] if node is not None else [None]
    return all(each is not None and math.isfinite(each) for each in numbers)


def _causal(index: Index, mask: str) -> bool:
    """Whether one of the conditions for being seen is to be no later than oneself."""
    found, chosen = index.maker(mask, "Where"), []
    hidden = number(index, found.input[2]) if found is not None else None
    waiting = [found.input[0]] if found is not None and hidden is not None and hidden <= HIDDEN else []
    while waiting:
        node = index.makers.get(waiting.pop())
        if node is not None and node.op_type in ("And", "Expand"):
            waiting.extend(node.input[: 2 if node.op_type == "And" else 1])
        elif node is not None and node.op_type == "LessOrEqual":
            chosen.append(node)
    return any(_columns(index, node.input[0]) and _rows(index, node.input[1]) for node in chosen)


def _columns(index: Index, value: str) -> bool:
    """Whether a value is 0, 1, 2 ... along the last of four axes: the places of what is attended to."""
    value, axes = _unsqueezed(index, value)
    return axes == [1, 1, 1, 0] and _counts(index, value)


def _rows(index: Index, value: str) -> bool:
    """Whether a value counts on from the length of the past along the axis before: the places of the new tokens."""
    value, axes = _unsqueezed(index, value)
    node = index.maker(value, "Add")
    length = index.maker(node.input[1], "Squeeze") if node is not None else None
    shape = index.maker(length.input[0], "Shape") if length is not None else None
    if node is None or shape is None or not reads_length(shape) or axes != [1, 1, 0, 1]:
        return False
    return len(index.shapes.get(shape.input[0], ())) == 4 and _counts(index, node.input[0])


def _counts(index: Index, value: str) -> bool:
    """Whether a value is 0, 1, 2 ..."""
    node = index.maker(value, "Range")
    return node is not None and number(index, node.input[0]) == 0 and number(index, node.input[2]) == 1


def _unsqueezed(index: Index, value: str) -> tuple[str, list[int]]:
    """What of one axis a value was before it got others, and all of its axes: 0 for that one, 1 for the others."""
    added: list[list[int]] = []
    while (node := index.maker(value, "Unsqueeze")) is not None:
        constant = index.constant(node.input[1])
        added.append([] if constant is None else constant.ravel().tolist())
        value = node.input[0]
    axes = [0]
    for places in reversed(added):
        rank = len(axes) + len(places)
        for place in sorted(place % rank for place in places):
            axes.insert(place, 1)
    return value, axes


def _scores(index: Index, value: str) -> _Scores | None:
    """The scores that a value is: limited or not, and multiplied by constants anywhere."""
    inner, softcap = _multiple(index, value)
    limited = index.maker(inner, "Tanh")
    product, scale = _multiple(index, limited.input[0]) if limited is not None else (inner, 1.0)
    matmul = index.maker(product, "MatMul")
    if matmul is None:
        return None
    (queries, first), (keys, second) = (_multiple(index, name) for name in matmul.input)
    return _Scores(queries, keys, scale * softcap * first * second, softcap if limited is not None else 0.0)


def _multiple(index: Index, value: str) -> tuple[str, float]:
    """What a value is a multiple of, and the factor, however many steps it takes."""
    whole = 1.0
    while True:
        inner, factor = scaled(index, value)
        divided = index.maker(value, "Div")
        divisor = number(index, divided.input[1]) if divided is not None else None
        if divided is not None and divisor:
            inner, factor = divided.input[0], 1.0 / divisor
        if inner == value:
            return value, whole
        value, whole = inner, whole * factor


def reads_length(node: onnx.NodeProto) -> bool:
    """Whether what a shape is asked for is the length, and nothing else."""
    return (attribute(node, "start", 0), attribute(node, "end")) == (LENGTH_AXIS, LENGTH_AXIS + 1)


def _repeated(index: Index, states: Mapping[str, State], value: str) -> tuple[State | None, int]:
    """The state whose heads a value has, each several times in a row or once, and how many heads that makes."""
    if value in states:
        return states[value], states[value].heads
    joined = index.maker(value, "Reshape")
    several = index.maker(joined.input[0], "Expand") if joined is not None else None
    single = index.maker(several.input[0], "Unsqueeze") if several is not None else None
    state = states.get(single.input[0]) if single is not None else None
    if joined is None or several is None or single is None or state is None or number(index, single.input[1]) != 2:
        return None, 0
    five, four = _sizes(index, several.input[1]), _sizes(index, joined.input[1])
    if len(five) != 5 or len(four) != 4 or five[1] not in (1, state.heads) or not five[2]:
        return None, 0
    heads = state.heads * five[2]
    return (state, heads) if four[1] == heads else (None, 0)


def _sizes(index: Index, shape: str) -> list[int | None]:
    """The numbers of a shape, None where they are not constant; the exporter joins one of each axis."""
    node = index.maker(shape, "Concat")
    parts = [index.constant(name) for name in (node.input if node is not None else [shape])]
    return [size for part in parts for size in ([None] if part is None else part.ravel().tolist())]
