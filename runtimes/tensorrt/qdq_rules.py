"""Rules of TensorRT for quantized ONNX files, checked before the build.

TensorRT supports int8 only as QuantizeLinear and DequantizeLinear (Q, DQ), and only symmetric, per channel for weights
alone. For a file that violates these rules, the parser fails with an error about its internals or reads another type,
or the builder adds a kernel or stores a weight in float. tests/runtimes/tensorrt_rtx/test_rules.py shows each rule by a
file that TensorRT for RTX refuses, misreads, or builds into a larger engine.

The check covers the main graph, not the bodies of If and Loop. It excludes patterns that only cost speed, such as
partly quantized attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import BuildError, first_line

if TYPE_CHECKING:
    import onnx

UNREAD = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
# By name, because the enum values would require importing onnx.
QUANTIZED = frozenset({"INT8", "INT4", "FLOAT4E2M1", "FLOAT8E4M3FN"})


@dataclass(frozen=True)
class Violation:
    """A node that violates a rule; `rule` completes a sentence that starts with the node."""

    node: str
    rule: str


def check(path: Path) -> None:
    """Raise BuildError with the first node and rule if the quantization of an ONNX file violates a rule."""
    broken = violations(path)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise BuildError(f"TensorRT cannot import {path.name}: node {broken[0].node!r} {broken[0].rule}{more}.")


def violations(path: Path) -> list[Violation]:
    """Return all rule violations, in the order of the nodes.

    Raises:
        BuildError: The file does not exist or is no ONNX file.
    """
    import onnx

    if not path.is_file():
        raise BuildError(f"There is no ONNX file {path}.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf and the file system raise many types of errors
        raise BuildError(f"{path.name} cannot be read as an ONNX file: {first_line(error)}.") from error
    if not model.graph.node:
        raise BuildError(f"{path.name} cannot be read as an ONNX file: it has no node.")
    graph = _Graph(model.graph, path.parent, _types(model))
    return [Violation(node.name or node.output[0], rule) for node in model.graph.node for rule in _broken(graph, node)]


class _Graph:
    """Constants, producers, consumers and types of the tensors of a graph."""

    def __init__(self, graph: onnx.GraphProto, folder: Path, types: dict[str, str]) -> None:
        inputs = {value.name for value in graph.input}
        self.folder = folder
        self.types = types
        self.makers = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def value(self, name: str) -> npt.NDArray[Any]:
        """Return the array of a constant, loading its external data if necessary."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name], base_dir=str(self.folder))

    def behind(self, name: str, op: str) -> onnx.NodeProto | None:
        """Return the producer of tensor `name` if its operator is `op`, else None."""
        maker = self.makers.get(name)
        return maker if maker is not None and maker.op_type == op else None


def _broken(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    if node.domain.startswith("com.microsoft") or node.op_type in UNREAD:
        yield f"is {node.op_type}, which TensorRT does not support: use unfused Q and DQ with constant scales"
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _of_type(graph, node)
        yield from _of_zero_point(graph, node)
        yield from _of_scale(graph, node)
        yield from _of_place(graph, node)
    elif node.op_type in PRODUCTS:
        yield from _of_product(graph, node)
        yield from _of_computing_type(graph, node)


def _of_type(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    kind = _kind(graph, node)
    if kind is None:
        yield "has no stated quantized type: add an int8 zero point"
    elif kind not in QUANTIZED:
        hint = "leave biases in float" if kind == "INT32" else "quantize symmetrically, to int8"
        yield f"has the quantized type {kind.lower()}, expected int8: {hint}"


def _kind(graph: _Graph, node: onnx.NodeProto) -> str | None:
    """Return the name of the quantized type of Q or DQ; UINT8, the ONNX default, for Q without a zero point."""
    if node.op_type == "DequantizeLinear":
        if node.input[0] in graph.constants:
            return _name(graph.constants[node.input[0]].data_type)
        maker = graph.behind(node.input[0], "QuantizeLinear")
        return None if maker is None else _kind(graph, maker)
    if (zero := _input(node, 2)) is not None:
        return _name(graph.constants[zero].data_type) if zero in graph.constants else None
    output_dtype = int(_attribute(node, "output_dtype", 0))
    return _name(output_dtype) if output_dtype else "UINT8"


def _of_zero_point(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    zero = _input(node, 2)
    if zero is None:
        return
    if zero not in graph.constants:
        yield f"has the zero point {zero}, which is computed: expected a constant"
    elif np.any(graph.value(zero).astype(np.float32)):
        yield "has a zero point other than 0: quantize symmetrically"


def _of_scale(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    if node.input[1] not in graph.constants:
        return  # a computed scale is supported
    scale = graph.value(node.input[1]).astype(np.float32)
    if not np.all(np.isfinite(scale) & (scale > 0)):
        yield "has a scale that is not positive and finite"
    if scale.size > 1 and not int(_attribute(node, "block_size", 0)):
        yield from _of_channels(graph, node, scale)


def _of_computing_type(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Check that all inputs of an int8 product, a bias included, have the type of the scales of its DQs."""
    types = {kind for name in node.input if (kind := graph.types.get(name)) is not None}
    if len(types) > 1 and any(graph.behind(name, "DequantizeLinear") for name in node.input):
        yield f"has inputs of types {_listed(types)}, expected one: that of the scales of its DQs"


def _of_channels(graph: _Graph, node: onnx.NodeProto, scale: npt.NDArray[np.float32]) -> Iterator[str]:
    source = _stored(graph, node)
    if source is None:
        yield "has one scale per channel on an activation, expected one scale per tensor: only weights may have several"
        return
    dims, axis = list(graph.constants[source].dims), int(_attribute(node, "axis", 1))
    if scale.ndim != 1 or not -len(dims) <= axis < len(dims) or dims[axis] != scale.size:
        yield f"has {scale.size} scales for axis {axis} of a weight of shape {dims}, expected one per channel"


def _stored(graph: _Graph, node: onnx.NodeProto) -> str | None:
    """Return the name of the constant that Q or DQ converts; None for an activation."""
    maker = graph.behind(node.input[0], "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
    name = node.input[0] if maker is None else maker.input[0]
    return name if name in graph.constants else None


def _of_place(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    if node.input[0] in graph.constants and not graph.constants[node.input[0]].dims:
        yield "has a scalar input, expected at least one axis"
    if node.op_type == "DequantizeLinear":
        return
    maker = graph.makers.get(node.input[0])
    if maker is not None and maker.op_type == "MatMul" and _adds_bias(graph, node):
        yield f"lies between {maker.name or maker.output[0]} and its bias: quantize inputs of products, not outputs"


def _adds_bias(graph: _Graph, quantize: onnx.NodeProto) -> bool:
    floats = [dq.output[0] for dq in graph.readers.get(quantize.output[0], []) if dq.op_type == "DequantizeLinear"]
    adds = [add for name in floats for add in graph.readers.get(name, []) if add.op_type == "Add"]
    return any(_is_constant(graph, name) for add in adds for name in add.input)


def _is_constant(graph: _Graph, name: str) -> bool:
    """Return whether a tensor is a constant, float or dequantized."""
    weight = graph.behind(name, "DequantizeLinear")
    return name in graph.constants or (weight is not None and _stored(graph, weight) is not None)


def _of_product(graph: _Graph, node: onnx.NodeProto) -> Iterator[str]:
    sides = [graph.behind(name, "DequantizeLinear") for name in node.input[:2]]
    if sides[0] is not None and sides[1] is None:
        yield f"has an int8 input and the float input {node.input[1]}: put Q and DQ on both, or on neither"
    weight = sides[1]
    if weight is None or (source := _stored(graph, weight)) is None:
        return
    if weight.input[1] not in graph.constants or math.prod(graph.constants[weight.input[1]].dims) == 1:
        return
    rank = len(graph.constants[source].dims)
    axis, expected = int(_attribute(weight, "axis", 1)) % max(rank, 1), _channels(node, rank)
    if axis != expected and not int(_attribute(weight, "block_size", 0)):
        yield f"has weight scales along axis {axis}, expected the output channels, axis {expected}"


def _channels(node: onnx.NodeProto, rank: int) -> int:
    """Return the output channel axis of a product's weight."""
    if node.op_type == "MatMul":
        return rank - 1
    return 0 if node.op_type == "Conv" else 1 - int(_attribute(node, "transB", 0))


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the data types that ONNX's type inference determines, by tensor name; undetermined ones are left out.

    The file's own value_info is dropped: a quantizer may have left it outdated, and inference fails at a contradiction.
    If inference fails for another reason, the result has only constants, inputs and outputs.
    """
    from onnx import shape_inference

    del model.graph.value_info[:]
    graph = model.graph
    with contextlib.suppress(Exception):  # the C++ code raises RuntimeError and other types
        graph = shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return {name: _name(kind) for name, kind in types.items() if kind}


def _name(kind: int) -> str:
    """Return the name of an ONNX type, such as "INT8"."""
    from onnx import TensorProto

    return str(TensorProto.DataType.Name(kind))


def _listed(kinds: set[str]) -> str:
    return " and ".join(sorted(map(str.lower, kinds)))


def _input(node: onnx.NodeProto, i: int) -> str | None:
    """Return the name of optional input `i`; None if it is left out."""
    return (node.input[i] or None) if len(node.input) > i else None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
