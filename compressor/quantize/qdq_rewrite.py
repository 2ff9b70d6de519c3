"""Int8 products in an ONNX file: which nodes can have them, and writing them.

What is quantized: `MatMul` and `Gemm` with a constant 32-bit float weight. Products of two activations, residual
additions, LayerNorm, softmax and embeddings stay in float. Weights are symmetric int8 with one scale per output channel
and zero point 0; activations have one scale per tensor. Biases stay in float and a Linear's output is not quantized:
ONNX Runtime's CPU kernels then go straight from the int32 sums to float, and TensorRT accepts no int32 bias.

Kept in float by rule: convolutions, because ONNX Runtime runs one in int8 only if its output is quantized as well,
which puts the residual stream of a vision transformer on 8 bits; and weights under 16 channels, where converting costs
more than the product.

Where a processor has no VNNI instructions, ONNX Runtime's uint8 x int8 product may saturate at 16 bits.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from compressor.errors import CompressorError

Activations = Literal["uint8", "int8"]
Range = tuple[float, float]

SMALLEST = 16
"""Fewest input or output channels for which int8 is tried."""

PREFIX = "int8/"
"""What the name of every added tensor and node starts with; the torch exporter makes no such names."""

EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of weights beyond which they are stored beside the file: protobuf ends at 2 GB."""


class QuantizeError(CompressorError):
    """The model cannot be quantized as asked; the message says what was found and what to do."""


@dataclass(frozen=True)
class Kept:
    """A constant-weight node that stayed in float.

    Args:
        node: its name in the ONNX file.
        module: the torch module it came from, where the file says so.
        reason: why it stayed in float.
        sensitivity: relative squared output error under int8, where it was measured.
    """

    node: str
    module: str | None
    reason: str
    sensitivity: float | None = None


@dataclass(frozen=True)
class Linear:
    """A node that can be quantized. `output` identifies it: value names are unique in ONNX, node names need not be."""

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
        """Output channels: axis 1 of a [K, N] matrix, axis 0 of a convolution's kernel."""
        return 0 if self.op == "Conv" else 1


def quantize_weight(weight: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round a weight to int8 in [-127, 127] with one symmetric scale per index of `axis`; return it and the scales.

    >>> q, scale = quantize_weight(np.array([[1.0, -2.0], [0.5, 1.0]], np.float32), axis=1)
    >>> q.tolist(), (127 * scale).tolist()
    ([[127, -127], [64, 64]], [1.0, 2.0])
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = _positive(np.abs(weight).max(axis=others) / 127)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def activation_grid(
    low: float, high: float, activations: Activations
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Scale and zero point (both rank 0) that cover [low, high] and 0; padding and ReLU produce exact zeros.

    >>> scale, zero = activation_grid(-1.0, 4.1, "uint8")
    >>> round(float(scale), 6), int(zero)
    (0.02, 50)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if activations == "int8":
        return _positive(np.asarray(max(-low, high) / 127)), np.asarray(0, np.int8)
    scale = _positive(np.asarray((high - low) / 255))
    return scale, np.asarray(np.clip(np.rint(-low / scale), 0, 255), np.uint8)


def _positive(scale: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """The scale in float32, 1 where all values are zero: a scale must be positive."""
    tiny = np.finfo(np.float32).tiny
    return np.asarray(np.where(scale < tiny, 1.0, scale), np.float32)


# ---- what can be quantized


def load(path: Path) -> onnx.ModelProto:
    """Read a model without its value_info: the exporter's can contradict itself, and shape inference then stops."""
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf and the file system raise a dozen types here
        raise QuantizeError(f"{path.name} cannot be read as an ONNX file: {error}") from error
    version = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    if version < 18:
        raise QuantizeError(f"{path.name} has opset {version}; int8 needs opset 18 or newer, export it again.")
    del model.graph.value_info[:]
    return model


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _weights(graph: onnx.GraphProto) -> dict[str, tuple[onnx.TensorProto, bool]]:
    """Constant tensors by value name, and whether the value is the transpose of the stored tensor.

    Tied embeddings arrive as Gather(W) and MatMul(x, Transpose(W)): the exporter does not fold the transpose of a
    tensor that is used twice.
    """
    inputs = {value.name for value in graph.input}
    found = {tensor.name: (tensor, False) for tensor in graph.initializer if tensor.name not in inputs}
    for node in graph.node:
        if node.op_type == "Constant" and (value := _attribute(node, "value", None)) is not None:
            found[node.output[0]] = (value, False)
        elif (
            node.op_type == "Transpose" and node.input[0] in found and list(_attribute(node, "perm", [1, 0])) == [1, 0]
        ):
            tensor, flipped = found[node.input[0]]
            if len(tensor.dims) == 2:
                found[node.output[0]] = (tensor, not flipped)
    return found


def candidates(model: onnx.ModelProto, *, convolutions: bool) -> tuple[list[Linear], list[Kept]]:
    """Split the nodes with a constant weight into those to quantize and those the fixed rules keep in float."""
    weights = _weights(model.graph)
    linears: list[Linear] = []
    kept: list[Kept] = []
    for node in model.graph.node:
        if node.domain not in {"", "ai.onnx"} or node.op_type not in {"MatMul", "Gemm", "Conv"}:
            continue
        if node.input[1] not in weights or node.input[0] in weights:
            continue
        tensor, flipped = weights[node.input[1]]
        reason = _refusal(node, tensor, convolutions=convolutions)
        name, module = node.name or node.output[0], _module(node)
        if reason is not None:
            kept.append(Kept(name, module, reason))
            continue
        flip = flipped != (node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1)
        bias = node.input[2] if len(node.input) > 2 else ""
        linears.append(Linear(node.output[0], name, module, node.op_type, node.input[0], node.input[1], flip, bias))
    return linears, kept


def _refusal(node: onnx.NodeProto, tensor: onnx.TensorProto, *, convolutions: bool) -> str | None:
    """Why the rules keep a constant-weight node in float, or None."""
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return f"weight is {onnx.TensorProto.DataType.Name(tensor.data_type).lower()}, not 32-bit float"
    if node.op_type == "Conv":
        return None if convolutions else "convolution: int8 would need its output, the residual stream, on 8 bits too"
    if len(tensor.dims) != 2:
        return f"weight has {len(tensor.dims)} axes, a Linear has 2"
    if min(tensor.dims) < SMALLEST:
        return f"only {min(tensor.dims)} channels: converting costs more than int8 saves under {SMALLEST}"
    plain = (
        _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0 and _attribute(node, "transA", 0) == 0
    )
    return None if plain else "Gemm with alpha, beta or transA"


def _module(node: onnx.NodeProto) -> str | None:
    """Qualified name of the torch module a node came from, which the exporter leaves in the node's metadata."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    try:
        names = ast.literal_eval(scopes)
        return str(names[-2]) if len(names) > 1 and names[-2] else None
    except (ValueError, SyntaxError, TypeError):
        return None


def paired(graph: onnx.GraphProto, linears: Sequence[Linear]) -> Iterator[tuple[onnx.NodeProto, Linear | None]]:
    """Every node in order, with the Linear that it is."""
    wanted = {linear.output: linear for linear in linears}
    for node in graph.node:
        yield node, wanted.get(node.output[0]) if node.output else None


# ---- writing


class Edit:
    """Nodes and initializers being added to a graph; a weight or activation that nodes share is converted once."""

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
        """Append an initializer unless it is there already; return its name."""
        if name not in self.made:
            self.made.add(name)
            self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, linear: Linear) -> tuple[str, str, str]:
        """Names of the int8 weight, its scales and its zero points."""
        base = f"{PREFIX}{linear.weight}{'/flipped' if linear.flip else ''}"
        names = (base, f"{base}/scale", f"{base}/zero_point")
        if base not in self.made:
            stored = numpy_helper.to_array(self.weights[linear.weight][0])
            if not np.isfinite(stored).all():
                raise QuantizeError(
                    f"The weight {linear.weight} of {linear.node} has NaN or infinity; check the model."
                )
            quantized, scale = quantize_weight(stored.T if linear.flip else stored, linear.axis)
            self.constant(names[0], np.ascontiguousarray(quantized))
            self.constant(names[1], scale)
            self.constant(names[2], np.zeros(scale.shape, np.int8))
        return names

    def float_weight(self, linear: Linear) -> str:
        """The weight behind DequantizeLinear."""
        names = self.weight(linear)
        return self.once("DequantizeLinear", names, f"{names[0]}/float", axis=linear.axis)

    def plain_weight(self, linear: Linear) -> str:
        """The float weight as a stored [K, N] matrix, whatever form the node had it in."""
        if not linear.flip and linear.weight in self.stored:
            return linear.weight
        stored = numpy_helper.to_array(self.weights[linear.weight][0])
        return self.constant(
            f"{PREFIX}{linear.weight}/plain", np.ascontiguousarray(stored.T if linear.flip else stored)
        )

    def once(self, op: str, inputs: Sequence[str], output: str, **attributes: int) -> str:
        """Append a node unless it is there already; return its output."""
        if output not in self.made:
            self.made.add(output)
            self.node(op, inputs, [output], **attributes)
        return output

    def grid(self, activation: str, reach: Range, activations: Activations) -> str:
        """The activation behind QuantizeLinear and DequantizeLinear with fixed scale."""
        base = f"{PREFIX}{activation}"
        scale, zero = activation_grid(*reach, activations)
        parameters = (self.constant(f"{base}/scale", scale), self.constant(f"{base}/zero_point", zero))
        self.once("QuantizeLinear", (activation, *parameters), f"{base}/quantized")
        return self.once("DequantizeLinear", (f"{base}/quantized", *parameters), f"{base}/float")

    def dynamic(self, activation: str) -> tuple[str, str, str]:
        """Names of the activation quantized at run time, its scale and its zero point."""
        base = f"{PREFIX}{activation}"
        names = (f"{base}/quantized", f"{base}/scale", f"{base}/zero_point")
        if base not in self.made:
            self.made.add(base)
            self.node("DynamicQuantizeLinear", [activation], names)
        return names

    def product(self, linear: Linear, inputs: tuple[str, str], output: str) -> None:
        """MatMul and Add for a Gemm, the form of every other Linear.

        ONNX Runtime 1.31 has no int8 kernel for a Gemm with a float bias, and turns a MatMul and Add of two axes back
        into one: in static mode such a node (a classifier; GPT-2's layers) becomes smaller but not faster.
        """
        if not linear.bias:
            self.node("MatMul", inputs, [output])
            return
        self.node("Add", [self.node("MatMul", inputs, [f"{PREFIX}{output}/product"]), linear.bias], [output])


def write(
    source: Path,
    destination: Path,
    linears: Sequence[Linear],
    ranges: Mapping[str, Range] | None,
    *,
    activations: Activations,
    external_above: int,
) -> None:
    """Write the model with the given nodes in int8; reading the source anew avoids a second copy of the weights.

    Without `ranges` they are found at run time.
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
            add_fake(edit, linear, node, edit.grid(linear.activation, reach, activations), linear.output)
    replace_nodes(model.graph, edit.nodes)
    remove_unused(model.graph, {linear.weight for linear in linears})
    save(model, destination, external_above)


def add_fake(edit: Edit, linear: Linear, node: onnx.NodeProto, activation: str, output: str) -> None:
    """Add a node whose activation and weight come from DequantizeLinear, which is how ONNX writes an int8 product."""
    weight = edit.float_weight(linear)
    if linear.op == "Gemm":
        edit.product(linear, (activation, weight), output)
        return
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[0], copy.input[1], copy.output[0] = activation, weight, output
    copy.name = node.name if output == linear.output else output
    edit.nodes.append(copy)


def _add_integer(edit: Edit, linear: Linear) -> None:
    """Add the product with ranges found at run time, as ONNX Runtime fuses it into one DynamicQuantizeMatMul."""
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
    """Give a graph a new list of nodes, some of which may be its own."""
    fresh = [
        onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes
    ]  # the graph's own nodes die with the deletion
    del graph.node[:]
    graph.node.extend(fresh)


def used(graph: onnx.GraphProto) -> Iterator[str]:
    """Every value name that is read in a graph, its outputs and its subgraphs."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from used(inner)


def remove_unused(graph: onnx.GraphProto, values: set[str]) -> None:
    """Drop the given float weights and their makers, unless something else still reads them (a tied embedding)."""
    while unread := values - set(used(graph)):
        makers = [node for node in graph.node if unread & set(node.output)]
        dead = [tensor for tensor in graph.initializer if tensor.name in unread]
        for maker in makers:
            graph.node.remove(maker)
        for tensor in dead:
            graph.initializer.remove(tensor)
        values = {name for maker in makers for name in maker.input}


def save(model: onnx.ModelProto, path: Path, external_above: int) -> None:
    """Write a model, with its weights in `<name>.data` beside it if they take more than `external_above` bytes."""
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # onnx appends to a file that exists
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)  # ByteSize fails beyond 2 GB
    if size > external_above:
        onnx.save(model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    else:
        onnx.save(model, str(path))
