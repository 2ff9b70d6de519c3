"""Int8 and fp8 products in an ONNX file: selection of the nodes and the Q/DQ rewrite.

`MatMul` and `Gemm` with a constant float32 weight are quantized. Products of two activations, residual additions,
LayerNorm, softmax and embeddings stay in float. Weights are symmetric int8 with one scale per output channel and zero
point 0; activations have one scale per tensor. Biases stay in float and the output of a Linear is not quantized: ONNX
Runtime's CPU kernels then convert the int32 sums directly to float, and TensorRT does not accept an int32 bias.

fp8 has the same form, with E4M3 in place of int8.

Two kinds of nodes stay in float by rule: convolutions, because ONNX Runtime runs one in int8 only if its output is also
quantized, which puts the residual stream of a vision transformer on 8 bits; and weights with fewer than 16 channels,
where the conversion costs more than the product.

On processors without VNNI instructions, ONNX Runtime's uint8 x int8 product may saturate at 16 bits.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnxscript import version_converter

from compressor.errors import CompressorError

Activations = Literal["uint8", "int8", "fp8"]
Range = tuple[float, float]

PRODUCTS = ("MatMul", "Gemm", "Conv")
"""Operators that can compute in int8."""

OTHERS = ("ConvTranspose", "Einsum", "LSTM", "GRU", "RNN")
"""Operators with weights that no rule quantizes."""

ROOT = "model"
"""Name of the model itself in the metadata of an exported file."""

SMALLEST = 16
"""Smallest number of input or output channels that is quantized."""

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

TYPED_OPSET = 21
"""The first opset whose DequantizeLinear has int4 and blocks, and whose QuantizeLinear needs no zero point."""

LARGEST_FP8 = 448.0
"""The largest E4M3 number."""

PREFIX = "int8/"
"""Name prefix of every added tensor and node; the torch exporter does not use it."""

EXTERNAL_ABOVE = 1_500_000_000
"""Weight size in bytes above which weights are stored as external data; protobuf is limited to 2 GB."""


class QuantizeError(CompressorError):
    """The model cannot be quantized with the given options."""


class NothingToQuantizeError(QuantizeError):
    """No layer of a file can be quantized to a precision.

    Attributes:
        found: what the file lacks, a clause without a full stop.
    """

    def __init__(self, file: Path, precision: str) -> None:
        least = f"{SMALLEST} x {SMALLEST}"
        self.found = f"{file.name} has no MatMul or Gemm with a constant float32 weight of at least {least}"
        super().__init__(f"{self.found}, so there is nothing to quantize to {precision}; choose another precision.")


@dataclass(frozen=True)
class Kept:
    """A constant-weight node that stayed in float.

    Args:
        node: name of the node in the ONNX file.
        module: qualified name of the torch module it was exported from, None if not in the metadata.
        reason: reason for which it stayed in float.
        sensitivity: share of the node in the errors of the model's output that the nodes cause alone in int8; None if
            not measured.
    """

    node: str
    module: str | None
    reason: str
    sensitivity: float | None = None


@dataclass(frozen=True)
class Linear:
    """A node to quantize, identified by `output`: value names are unique in ONNX, node names need not be."""

    output: str
    node: str
    module: str | None
    op: str
    activation: str
    weight: str
    flip: bool  # the stored initializer is the transpose of [K, N]
    bias: str

    @property
    def axis(self) -> int:
        """Return the axis of the output channels: 1 of a [K, N] matrix, 0 of a convolution's kernel."""
        return 0 if self.op == "Conv" else 1


def quantize_weight(weight: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight to int8 in [-127, 127] with one symmetric scale per index of `axis`; return both.

    >>> q, scale = quantize_weight(np.array([[1.0, -2.0], [0.5, 1.0]], np.float32), axis=1)
    >>> q.tolist(), (127 * scale).tolist()
    ([[127, -127], [64, 64]], [1.0, 2.0])
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = _positive(np.abs(weight).max(axis=others) / 127)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def quantize_weight_fp8(weight: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Round a weight to E4M3 with one scale per index of `axis`, whose largest weight becomes 448; return both.

    >>> q, scale = quantize_weight_fp8(np.array([[1.0, -2.0], [0.5, 1.0]], np.float32), axis=1)
    >>> q.astype(float).tolist(), (448 * scale).tolist()
    ([[448.0, -448.0], [224.0, 224.0]], [1.0, 2.0])
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = _positive(np.abs(weight).max(axis=others) / LARGEST_FP8)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.clip(weight / scale.reshape(shape), -LARGEST_FP8, LARGEST_FP8).astype(FP8), scale


def activation_grid(
    low: float, high: float, activations: Activations
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Return the scale and zero point (both rank 0) of [low, high], extended to 0 so that zeros are exact.

    >>> scale, zero = activation_grid(-1.0, 4.1, "uint8")
    >>> round(float(scale), 6), int(zero)
    (0.02, 50)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if activations == "fp8":
        return _positive(np.asarray(max(-low, high) / LARGEST_FP8)), np.zeros((), FP8)
    if activations == "int8":
        return _positive(np.asarray(max(-low, high) / 127)), np.asarray(0, np.int8)
    scale = _positive(np.asarray((high - low) / 255))
    return scale, np.asarray(np.clip(np.rint(-low / scale), 0, 255), np.uint8)


def _positive(scale: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Return the scale in float32, 1 where all values are zero, because a scale must be positive."""
    tiny = np.finfo(np.float32).tiny
    return np.asarray(np.where(scale < tiny, 1.0, scale), np.float32)


# ---- selection


def load(path: Path) -> onnx.ModelProto:
    """Load a model without its value_info: that of the exporter may be inconsistent and break shape inference."""
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf and the file system raise many types
        raise QuantizeError(f"{path.name} cannot be read as an ONNX file: {error}") from error
    version = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    if version < 18:
        raise QuantizeError(
            f"{path.name} has opset {version}, but quantization needs opset 18 or newer; export the model again."
        )
    del model.graph.value_info[:]
    return model


def in_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a model in an opset, or as it is if that is not older."""
    typed = ir.from_proto(model)
    if typed.opset_imports.get("", opset) < opset:
        version_converter.convert_version(typed, opset)
    return ir.to_proto(typed)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _weights(graph: onnx.GraphProto) -> dict[str, tuple[onnx.TensorProto, bool]]:
    """Return the constant tensors by value name, with True where the value is the transpose of the stored tensor.

    The exporter writes tied embeddings as Gather(W) and MatMul(x, Transpose(W)): it does not fold the transpose of a
    tensor with two consumers.
    """
    inputs = {value.name for value in graph.input}
    weights = {tensor.name: (tensor, False) for tensor in graph.initializer if tensor.name not in inputs}
    for node in graph.node:
        if node.op_type == "Constant" and (value := _attribute(node, "value", None)) is not None:
            weights[node.output[0]] = (value, False)
        elif (
            node.op_type == "Transpose"
            and node.input[0] in weights
            and list(_attribute(node, "perm", [1, 0])) == [1, 0]
        ):
            tensor, transposed = weights[node.input[0]]
            if len(tensor.dims) == 2:
                weights[node.output[0]] = (tensor, not transposed)
    return weights


def candidates(model: onnx.ModelProto, *, convolutions: bool) -> tuple[list[Linear], list[Kept]]:
    """Split the nodes with a constant weight into nodes to quantize and nodes that the fixed rules keep in float."""
    weights, computed = _weights(model.graph), _computed(model.graph)
    linears: list[Linear] = []
    kept: list[Kept] = []
    for node in model.graph.node:
        if node.domain not in {"", "ai.onnx"}:
            continue
        name, module = node.name or node.output[0], _module(node)
        reason = _other_form(node, weights, computed)
        if reason is not None:
            kept.append(Kept(name, module, reason))
        if node.op_type not in PRODUCTS or node.input[1] not in weights or node.input[0] in computed:
            continue
        tensor, transposed = weights[node.input[1]]
        reason = _refusal(node, tensor, convolutions=convolutions)
        if reason is not None:
            kept.append(Kept(name, module, reason))
            continue
        flip = transposed != (node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1)
        bias = node.input[2] if len(node.input) > 2 else ""
        linears.append(Linear(node.output[0], name, module, node.op_type, node.input[0], node.input[1], flip, bias))
    return linears, kept


def _computed(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the values that do not depend on an input: weights, and what is computed from them alone."""
    inputs = {value.name for value in graph.input}
    values = {tensor.name for tensor in graph.initializer} - inputs
    for node in graph.node:
        if not set(node.input) - values - {""} and not any(attribute.HasField("g") for attribute in node.attribute):
            values.update(node.output)
    return values


def _other_form(
    node: onnx.NodeProto, weights: Mapping[str, tuple[onnx.TensorProto, bool]], computed: set[str]
) -> str | None:
    """Return the reason for which a product with a weight of another form than `PRODUCTS` stays in float, or None."""
    if not set(node.input) - computed:
        return None  # a weight itself
    if node.op_type in OTHERS:
        matrices = [name for name in node.input if name in weights and len(weights[name][0].dims) > 1]
        return f"{node.op_type} is not quantized" if matrices else None
    if node.op_type not in PRODUCTS:
        return None
    if node.input[0] in computed:
        return "its weight is the first factor of the product"
    return "its weight is computed from others" if node.input[1] in computed - set(weights) else None


def _refusal(node: onnx.NodeProto, tensor: onnx.TensorProto, *, convolutions: bool) -> str | None:
    """Return the reason for which the rules keep a constant-weight node in float, or None."""
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return f"weight is {onnx.TensorProto.DataType.Name(tensor.data_type).lower()}, not 32-bit float"
    if node.op_type == "Conv":
        return None if convolutions else "convolution: int8 would also quantize its output, the residual stream"
    if len(tensor.dims) != 2:
        return f"weight has {len(tensor.dims)} axes, expected 2"
    if min(tensor.dims) < SMALLEST:
        return f"only {min(tensor.dims)} channels: below {SMALLEST}, the conversion costs more than it saves"
    plain = (
        _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0 and _attribute(node, "transA", 0) == 0
    )
    return None if plain else "Gemm with alpha, beta or transA"


def _module(node: onnx.NodeProto) -> str | None:
    return module_of({entry.key: entry.value for entry in node.metadata_props})


def module_of(metadata: Mapping[str, str]) -> str | None:
    """Return the qualified name of the torch module of a node from the exporter's metadata.

    None for a node without one, and for an operator that the model itself calls, outside of its modules.
    """
    try:
        names = ast.literal_eval(metadata.get("pkg.torch.onnx.name_scopes", "[]"))
        return str(names[-2]) if len(names) > 1 and names[-2] not in ("", ROOT) else None
    except (ValueError, SyntaxError, TypeError):
        return None


def paired(graph: onnx.GraphProto, linears: Sequence[Linear]) -> Iterator[tuple[onnx.NodeProto, Linear | None]]:
    """Yield every node in order, with its Linear or None."""
    by_output = {linear.output: linear for linear in linears}
    for node in graph.node:
        yield node, by_output.get(node.output[0]) if node.output else None


# ---- writing


class Edit:
    """Nodes and initializers to add to a graph; a shared weight or activation is quantized once."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = _weights(graph)
        self.stored = {tensor.name for tensor in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Append a node; return its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """Append an initializer unless it was added before; return its name."""
        if name not in self.made:
            self.made.add(name)
            self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, linear: Linear, activations: Activations = "int8") -> tuple[str, str, str]:
        """Add the int8 or fp8 weight; return the names of the weight, its scales and its zero points."""
        base = f"{PREFIX}{linear.weight}{'/flipped' if linear.flip else ''}"
        names = (base, f"{base}/scale", f"{base}/zero_point")
        if base not in self.made:
            stored = numpy_helper.to_array(self.weights[linear.weight][0])
            if not np.isfinite(stored).all():
                raise QuantizeError(f"Weight {linear.weight} of {linear.node} has NaN or infinity; check the model.")
            quantize = quantize_weight_fp8 if activations == "fp8" else quantize_weight
            quantized, scale = quantize(stored.T if linear.flip else stored, linear.axis)
            self.constant(names[0], np.ascontiguousarray(quantized))
            self.constant(names[1], scale)
            self.constant(names[2], np.zeros(scale.shape, quantized.dtype))
        return names

    def float_weight(self, linear: Linear, activations: Activations = "int8") -> str:
        """Return the name of the dequantized weight."""
        names = self.weight(linear, activations)
        return self.once("DequantizeLinear", names, f"{names[0]}/float", axis=linear.axis)

    def plain_weight(self, linear: Linear) -> str:
        """Return the name of the float weight as an initializer [K, N], added if it is stored in another form."""
        if not linear.flip and linear.weight in self.stored:
            return linear.weight
        stored = numpy_helper.to_array(self.weights[linear.weight][0])
        return self.constant(
            f"{PREFIX}{linear.weight}/plain", np.ascontiguousarray(stored.T if linear.flip else stored)
        )

    def once(self, op: str, inputs: Sequence[str], output: str, **attributes: int) -> str:
        """Append a node unless it was added before; return its output."""
        if output not in self.made:
            self.made.add(output)
            self.node(op, inputs, [output], **attributes)
        return output

    def grid(self, activation: str, reach: Range, activations: Activations) -> str:
        """Add QuantizeLinear and DequantizeLinear of an activation with a fixed scale; return the output.

        fp8 needs opset 21.
        """
        base = f"{PREFIX}{activation}"
        scale, zero = activation_grid(*reach, activations)
        parameters, attributes = [self.constant(f"{base}/scale", scale)], {}
        if activations == "fp8":  # ONNX Runtime 1.32 drops a Relu before a QuantizeLinear whose zero point is fp8
            attributes["output_dtype"] = onnx.TensorProto.FLOAT8E4M3FN
        else:
            parameters.append(self.constant(f"{base}/zero_point", zero))
        self.once("QuantizeLinear", (activation, *parameters), f"{base}/quantized", **attributes)
        return self.once("DequantizeLinear", (f"{base}/quantized", *parameters), f"{base}/float")

    def dynamic(self, activation: str) -> tuple[str, str, str]:
        """Add DynamicQuantizeLinear; return the names of the quantized activation, its scale and its zero point."""
        base = f"{PREFIX}{activation}"
        names = (f"{base}/quantized", f"{base}/scale", f"{base}/zero_point")
        if base not in self.made:
            self.made.add(base)
            self.node("DynamicQuantizeLinear", [activation], names)
        return names

    def product(self, linear: Linear, inputs: tuple[str, str], output: str) -> None:
        """Add MatMul, and Add for the bias, in place of a Gemm; this is the form of every other Linear."""
        if not linear.bias:
            self.node("MatMul", inputs, [output])
            return
        self.node("Add", [self.node("MatMul", inputs, [f"{PREFIX}{output}/product"]), linear.bias], [output])

    def subtracted(self, linear: Linear, inputs: tuple[str, str], output: str) -> None:
        """Add MatMul, and Sub of the negated bias, in place of a Gemm with a constant bias.

        ONNX Runtime 1.32 has no int8 kernel for a Gemm with a float bias, and fuses a MatMul of two axes and an Add
        back into a Gemm, whose weight it then dequantizes in every run. It does not fuse a Sub, which gives the same
        numbers.
        """
        bias = numpy_helper.to_array(self.weights[linear.bias][0])
        negated = self.constant(f"{PREFIX}{linear.bias}/negated", -bias)
        self.node("Sub", [self.node("MatMul", inputs, [f"{PREFIX}{output}/product"]), negated], [output])


def write(
    source: Path,
    destination: Path,
    linears: Sequence[Linear],
    ranges: Mapping[str, Range] | None,
    *,
    activations: Activations,
    external_above: int,
) -> None:
    """Write the model with `linears` in int8; without `ranges`, activations are quantized dynamically.

    The source is loaded again on each call to avoid a second copy of the weights in memory.
    """
    model = load(source)
    edit = Edit(model.graph)
    for node, linear in paired(model.graph, linears):
        if linear is None:
            edit.nodes.append(node)
        elif ranges is None:
            _add_integer(edit, linear)
        else:
            reach = ranges[linear.activation]
            grid = edit.grid(linear.activation, reach, activations)
            add_fake(edit, linear, node, grid, linear.output, activations)
    replace_nodes(model.graph, edit.nodes)
    weights = {name for linear in linears for name in (linear.weight, linear.bias) if name}
    remove_unused(model.graph, weights)
    save(model, destination, external_above)


def add_fake(
    edit: Edit, linear: Linear, node: onnx.NodeProto, activation: str, output: str, activations: Activations
) -> None:
    """Add the product of a dequantized activation and weight, the Q/DQ form of a quantized product in ONNX."""
    weight = edit.float_weight(linear, activations)
    if linear.op == "Gemm":
        constant = linear.bias in edit.weights and not edit.weights[linear.bias][1]
        write_product = edit.subtracted if activations == "uint8" and constant else edit.product
        write_product(linear, (activation, weight), output)
        return
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[0], copy.input[1], copy.output[0] = activation, weight, output
    copy.name = node.name if output == linear.output else output
    edit.nodes.append(copy)


def _add_integer(edit: Edit, linear: Linear) -> None:
    """Add a dynamically quantized product in the form that ONNX Runtime fuses into DynamicQuantizeMatMul."""
    quantized, scale, zero = edit.dynamic(linear.activation)
    weight, weight_scale, weight_zero = edit.weight(linear)
    base = f"{PREFIX}{linear.output}"
    whole = edit.node("MatMulInteger", [quantized, weight, zero, weight_zero], [f"{base}/integer"])
    cast = edit.node("Cast", [whole], [f"{base}/cast"], to=onnx.TensorProto.FLOAT)
    factor = edit.node("Mul", [scale, weight_scale], [f"{base}/factor"])
    if not linear.bias:
        edit.node("Mul", [cast, factor], [linear.output])
        return
    edit.node("Add", [edit.node("Mul", [cast, factor], [f"{base}/product"]), linear.bias], [linear.output])


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph; `nodes` may contain some of the old ones."""
    # Copied first, because the deletion invalidates the graph's own nodes.
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def used(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the value names consumed by the nodes, outputs and subgraphs of a graph, once per use."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from used(inner)


def remove_unused(graph: onnx.GraphProto, values: set[str]) -> None:
    """Remove the float weights without a consumer and the nodes that produce them; a tied embedding stays."""
    while unused := values - set(used(graph)):
        producers = [node for node in graph.node if unused & set(node.output)]
        dead = [tensor for tensor in graph.initializer if tensor.name in unused]
        for producer in producers:
            graph.node.remove(producer)
        for tensor in dead:
            graph.initializer.remove(tensor)
        values = {name for producer in producers for name in producer.input}


def save(model: onnx.ModelProto, path: Path, external_above: int) -> None:
    """Save a model, with its weights in `<name>.data` next to it if they exceed `external_above` bytes."""
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to a file that exists
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)  # ByteSize fails beyond 2 GB
    if size > external_above:
        onnx.save(model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    else:
        onnx.save(model, str(path))
