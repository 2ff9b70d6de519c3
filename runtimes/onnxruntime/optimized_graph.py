"""What ONNX Runtime makes of a model: the graph that it runs after its optimisations, which it can write to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.base.layer_counts import counted
from runtimes.base.protocols import Layers

if TYPE_CHECKING:
    import onnx

ATTENTIONS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "QAttention"})
# They return indices, whatever they read.
INDICES = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin"})


def summary(path: Path) -> Layers:
    """Return the counts of an optimised graph."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    types = _types(graph)
    rows = [
        (node.op_type, [types[name] for name in node.input if name in types])
        for node in graph.node
        if node.op_type != "Constant"
    ]
    kinds = {kind for kind, _ in rows}
    fused = bool(kinds & ATTENTIONS)
    return counted(rows, fused_attention=fused or (False if "Softmax" in kinds else None))


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the type of every value by name; the file tells few, and no inference knows ONNX Runtime's own operators.

    So a node returns what its kind is known to, or else the first type of floats that it reads.
    """
    found = {tensor.name: _named(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        found[value.name] = _named(value.type.tensor_type.elem_type)
    for node in graph.node:
        made = _made(node, [found.get(name, "") for name in node.input])
        for name in node.output:
            found.setdefault(name, made)
    return found


def _made(node: onnx.NodeProto, read: list[str]) -> str:
    """Return the type of what a node returns, given the types of what it reads."""
    if node.op_type in INDICES:
        return "int64"
    if node.op_type == "Cast":
        return _named(next(each.i for each in node.attribute if each.name == "to"))
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return read[2] if len(read) > 2 else "uint8"
    if node.op_type == "DequantizeLinear":
        return read[1]
    if node.op_type.startswith("QLinear"):
        return read[0]
    return next((kind for kind in read if "float" in kind), read[0] if read else "")


def _named(kind: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(kind)).lower()
