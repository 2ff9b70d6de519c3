"""Layer counts of the optimised graph that ONNX Runtime writes to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.base.layer_counts import count_layers
from runtimes.base.protocols import LayerCounts

if TYPE_CHECKING:
    import onnx

ATTENTIONS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "QAttention"})
# These operators return indices for inputs of any type.
INDICES = frozenset({"Shape", "Size", "NonZero", "ArgMax", "ArgMin"})


def summary(path: Path) -> LayerCounts:
    """Return the layer counts of the optimised graph at `path`."""
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
    return count_layers(rows, fused_attention=fused or (False if "Softmax" in kinds else None))


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the data type of every tensor by name.

    The file states few of them, and ONNX's type inference does not know ONNX Runtime's own operators. The output type
    of a node therefore follows from its operator, or else is the first float type among its inputs.
    """
    types = {tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = _type_name(value.type.tensor_type.elem_type)
    for node in graph.node:
        output_type = _output_type(node, [types.get(name, "") for name in node.input])
        for name in node.output:
            types.setdefault(name, output_type)
    return types


def _output_type(node: onnx.NodeProto, inputs: list[str]) -> str:
    """Return the data type of a node's outputs, from the data types of its inputs."""
    if node.op_type in INDICES:
        return "int64"
    if node.op_type == "Cast":
        return _type_name(next(attribute.i for attribute in node.attribute if attribute.name == "to"))
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return inputs[2] if len(inputs) > 2 else "uint8"
    if node.op_type == "DequantizeLinear":
        return inputs[1]
    if node.op_type.startswith("QLinear"):
        return inputs[0]
    return next((kind for kind in inputs if "float" in kind), inputs[0] if inputs else "")


def _type_name(kind: int) -> str:
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(kind)).lower()
