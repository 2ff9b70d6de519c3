"""fp16 arithmetic of a GPU, computed by ONNX Runtime on a CPU.

ONNX Runtime's CPU kernels for fp16 compute in float32 and drop the casts between them, so they hide every overflow. A
GPU reads and writes fp16 in each operator and accumulates products in float32. The file written here has the same
semantics with float32 kernels: the output of each fp16 operator is rounded to fp16, to infinity beyond 65,504. ONNX
Runtime keeps these casts, because they change the value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from compressor.quantize.intermediate_values import load_typed
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, save

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

EXACT = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze"),
        *("Transpose", "Unsqueeze", "Where", "DequantizeLinear"),
    }
)
"""Operators whose output needs no rounding: they select values, or are part of an int8 product, which sums integers."""


def has_fp16(path: Path) -> bool:
    """Return whether any weight or cast of an ONNX file is fp16."""
    graph = onnx.load(str(path), load_external_data=False).graph
    half = onnx.TensorProto.FLOAT16
    casts = (entry.i for node in graph.node if node.op_type == "Cast" for entry in node.attribute if entry.name == "to")
    return any(tensor.data_type == half for tensor in graph.initializer) or half in casts


def write_rounded(source: Path, destination: Path) -> None:
    """Write a float32 file that computes as a GPU computes an fp16 file.

    Int8 weights are dequantized: a product of integers below 128 and fp16 scales is exact in float32, whereas ONNX
    Runtime's int8 kernels may saturate (see `compressor.target.saturation`).

    Args:
        source: an ONNX file with fp16 values, whose inputs and outputs are float32.
        destination: output path.
    """
    model = load_typed(source)
    graph = model.graph
    for weight in graph.initializers.values():
        if weight.dtype == HALF and weight.const_value is not None:
            weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name=weight.name)
            weight.dtype = FLOAT
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            _dequantize(graph, node)
            continue
        for value in node.outputs:
            if value.dtype == HALF and node.op_type not in EXACT:
                _round(graph, node, value)
    written = ir.to_proto(model)
    del written.graph.value_info[:]
    save(written, destination, EXTERNAL_ABOVE)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Insert casts to fp16 and back behind a value; a cast to fp16 only needs the way back."""
    uses = list(value.uses())
    last = node
    for dtype in (FLOAT,) if node.op_type == "Cast" else (HALF, FLOAT):
        cast = ir.node("Cast", [last.outputs[0] if last is not node else value], {"to": dtype})
        cast.outputs[0].name = f"{value.name}/{'rounded' if dtype == HALF else 'float32'}"
        graph.insert_after(last, cast)
        last = cast
    for use in uses:
        use.node.replace_input_with(use.idx, last.outputs[0])


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the DequantizeLinear of a weight, which is symmetric, by the float32 weight."""
    stored, scale = (value.const_value.numpy() for value in node.inputs[:2] if value is not None and value.const_value)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [1] * stored.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    old = node.outputs[0]
    tensor = ir.tensor(stored.astype(np.float32) * scale.astype(np.float32).reshape(shape), name=f"{old.name}/weight")
    weight = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(FLOAT))
    graph.register_initializer(weight)
    ir.convenience.replace_all_uses_with(old, weight)
    graph.remove(node, safe=True)
