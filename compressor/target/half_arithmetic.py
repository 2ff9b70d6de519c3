"""fp16 and bf16 arithmetic of a GPU, computed by ONNX Runtime on a CPU.

ONNX Runtime's CPU kernels for fp16 compute in float32 and drop the casts between them, so they hide every overflow; for
bf16 it has none. A GPU reads and writes 16 bits in each operator and accumulates products in float32. The file written
here has the same semantics with float32 kernels: the output of each such operator is rounded to its type, in fp16 to
infinity beyond 65,504. ONNX Runtime keeps these casts, because they change the value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from compressor.quantize.intermediate_values import load_typed
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, save

FLOAT, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
HALVES = (FP16, BF16)

EXACT = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze"),
        *("Transpose", "Unsqueeze", "Where", "DequantizeLinear"),
    }
)
"""Operators whose output needs no rounding: they select values, or are part of an int8 product, which sums integers."""


def half_types(path: Path) -> frozenset[ir.DataType]:
    """Return which of fp16 and bf16 the weights and casts of an ONNX file have."""
    graph = onnx.load(str(path), load_external_data=False).graph
    casts = (entry.i for node in graph.node if node.op_type == "Cast" for entry in node.attribute if entry.name == "to")
    found = {*casts, *(tensor.data_type for tensor in graph.initializer)}
    return frozenset(each for each in HALVES if each in found)


def write_float32(source: Path, destination: Path, *, rounded: bool) -> None:
    """Write a float32 file that computes as a GPU computes an fp16 or bf16 file.

    Quantized weights are dequantized. A product of integers below 128 and fp16 scales is exact in float32, whereas ONNX
    Runtime's int8 kernels may saturate (see `compressor.target.saturation`). int4 weights alone are dequantized to the
    16-bit type before the product, so they are rounded to it; ONNX Runtime would also round activations to int8.

    Args:
        source: an ONNX file with fp16 or bf16 values, whose inputs and outputs are float32.
        destination: output path.
        rounded: round to the 16-bit type where a GPU does; False computes in float32 throughout.
    """
    model = load_typed(source)
    graph = model.graph
    for weight in graph.initializers.values():
        if weight.dtype in HALVES and weight.const_value is not None:
            weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name=weight.name)
            weight.dtype = FLOAT
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            _dequantize(graph, node)
            continue
        if not rounded and node.op_type == "Cast" and node.attributes["to"].as_int() in HALVES:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
        for value in node.outputs:
            if rounded and value.dtype in HALVES and node.op_type not in EXACT:
                _round(graph, node, value)
    written = ir.to_proto(model)
    del written.graph.value_info[:]
    save(written, destination, EXTERNAL_ABOVE)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Insert casts to the type of a value and back behind it; a cast to this type only needs the way back."""
    uses, half = list(value.uses()), value.dtype
    last = node
    for dtype in (FLOAT,) if node.op_type == "Cast" else (half, FLOAT):
        cast = ir.node("Cast", [last.outputs[0] if last is not node else value], {"to": dtype})
        cast.outputs[0].name = f"{value.name}/{'float32' if dtype == FLOAT else 'rounded'}"
        graph.insert_after(last, cast)
        last = cast
    for use in uses:
        use.node.replace_input_with(use.idx, last.outputs[0])


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the DequantizeLinear of a weight, which is symmetric, by the float32 weight."""
    stored, scale = (value.const_value.numpy() for value in node.inputs[:2] if value is not None and value.const_value)
    in_four_bits = stored.dtype == ir.DataType.INT4.numpy()
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    scale, old = scale.astype(np.float32), node.outputs[0]
    if scale.ndim == stored.ndim > 0:  # of blocks
        scale = scale.repeat(node.attributes["block_size"].as_int(), axis=axis)
    elif scale.size > 1:
        scale = scale.reshape([-1 if i == axis else 1 for i in range(stored.ndim)])
    value = stored.astype(np.float32) * scale
    if in_four_bits and old.dtype in HALVES:
        value = value.astype(old.dtype.numpy()).astype(np.float32)
    tensor = ir.tensor(value, name=f"{old.name}/weight")
    weight = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(FLOAT))
    graph.register_initializer(weight)
    ir.convenience.replace_all_uses_with(old, weight)
    graph.remove(node, safe=True)
