"""Conversion of an ONNX file to fp16 or bf16; nodes that need more range or precision stay in float32.

Each node computes in one type. Casts stand only between nodes of different types, so a value between two float32 nodes
is never half. The converters of ONNX Runtime and of onnxconverter-common cast every output of a float32 node to fp16
and back (microsoft/onnxruntime issue 21345), clip weights, and append casts out of order, which ONNX's checker rejects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from compressor.errors import CompressorError
from compressor.quantize.intermediate_values import load_typed
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, PREFIX, PRODUCTS, Kept, module_of, save

FLOAT, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
NAMES = {FP16: "fp16", BF16: "bf16"}

LARGEST = 65_504.0
"""The largest finite fp16 number."""

LARGEST_BF16 = 2.0**127 * (2 - 2**-7)
"""The largest finite bf16 number, 0.4 % below that of float32, which masks may contain."""

HEADROOM = 2.0
"""Values must stay below `LARGEST` by this factor, because samples after calibration may have larger values."""

SMALLEST = 2.0**-14
"""The smallest normal fp16 number. Smaller numbers have fewer than 11 significant bits; below 3e-8 they become 0."""

ROUNDING = 2.0**-11
"""Largest relative rounding error of a normal fp16 number."""

SCALE_ROUNDING = 2.0**-8
"""Largest relative rounding error of an int8 scale: half an int8 step at the largest value."""

KEPT = frozenset(
    {
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
        *("LpNormalization", "MeanVarianceNormalization", "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum"),
        *("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "CumSum"),
        *("Pow", "Sqrt", "Exp", "Log", "Reciprocal", "Sin", "Cos"),
    }
)
"""Operators that stay in float32: norms, softmax and reductions, whose sums and squares exceed the range of fp16, and
functions that amplify the rounding of their input."""

KEPT_IN_BF16 = frozenset({"HardSwish", "Mish"})
"""Operators that TensorRT's parser takes in fp16 and not in bf16 (1.7)."""

MOVING = frozenset(
    {
        *("Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"),
        *("Where", "Mul"),
    }
)
"""Operators whose output is as large as their largest input, or that scale a mask."""

SCALES_SINCE = 19
"""The first opset in which the scale of QuantizeLinear may be fp16."""

BF16_OPSET = 22
"""The first opset in which every operator that has an fp16 form has a bf16 form, convolutions among them."""


class HalfError(CompressorError):
    """A model cannot be converted to fp16 or bf16."""


class Excess(NamedTuple):
    """Why a node stays in float32: the largest magnitude, and a clause; empty for the fixed rules."""

    largest: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Half:
    """Result of `to_fp16` and `to_bf16`.

    Args:
        nodes: number of nodes that compute in 16 bits.
        kept: layers that stay in float32 because of their values, one entry per torch module.
    """

    nodes: int
    kept: tuple[Kept, ...]


def to_fp16(source: Path, destination: Path, maxima: Mapping[str, float]) -> Half:
    """Convert a float32 ONNX file to fp16; inputs and outputs stay float32.

    A node stays in float32 if its operator is in `KEPT`, if it has no fp16 form in ONNX, if it computes on integers
    (positions and masks), or if a weight, an input or an output exceeds half the range of fp16 or is too small for its
    precision. In a file with int8 products the scales, and with them the outputs of the products, become fp16. A
    product and its QuantizeLinear and DequantizeLinear have one type.

    Args:
        source: float32 ONNX file, with or without int8 products.
        destination: output path; may equal `source`.
        maxima: largest magnitude of each value (see `intermediate_values.absolute_maxima`); values without an entry
            are not checked.

    Returns:
        The number of fp16 nodes, and the layers that stay in float32 because of their values.

    Raises:
        HalfError: no node would compute in fp16, the opset of the file does not support fp16 scales, or the written
            file fails ONNX's checker.
    """
    model = load_typed(source)
    _check_scales(model, source)
    return _converted(model, source, destination, _Format(FP16, maxima))


def to_bf16(source: Path, destination: Path) -> Half:
    """Convert a float32 ONNX file to bf16 and opset 22; inputs and outputs stay float32.

    bf16 has 8 significant bits and nearly the range of float32, so values are not measured. A node stays in float32 if
    its operator is in `KEPT`, if it has no bf16 form in ONNX, if it computes on integers, or if it reads a mask that
    reaches the end of the range, where bf16 is infinite.

    Args:
        source: float32 ONNX file without int8 products.
        destination: output path; may equal `source`.

    Raises:
        HalfError: no node would compute in bf16, or the written file fails ONNX's checker.
    """
    return _converted(load_typed(source, opset=BF16_OPSET), source, destination, _Format(BF16, {}))


@dataclass(frozen=True)
class _Format:
    """A 16-bit type, and the maxima of values that its range must hold."""

    dtype: ir.DataType
    maxima: Mapping[str, float]

    @property
    def name(self) -> str:
        return NAMES[self.dtype]

    @property
    def largest(self) -> float:
        return LARGEST if self.dtype == FP16 else LARGEST_BF16

    @property
    def smallest(self) -> float:
        return SMALLEST if self.dtype == FP16 else 0.0

    @property
    def schema_type(self) -> str:
        return f"tensor({self.dtype.name.lower()})"


def _converted(model: ir.Model, source: Path, destination: Path, half: _Format) -> Half:
    """Convert a loaded model and write it."""
    excess = _float32_nodes(model.graph, half)
    layers = _layers(excess)
    halves = {node for node in model.graph if node not in excess}
    if not any(_weights(node, half) for node in halves):
        raise HalfError(_nothing_to_convert(source, layers, half))
    _Conversion(model.graph, halves, half).apply()
    common.TopologicalSortPass()(model)
    common.NameFixPass()(model)
    written = ir.to_proto(model)
    del written.graph.value_info[:]
    save(written, destination, EXTERNAL_ABOVE)
    check_file(destination, half.name)
    return Half(len(halves), layers)


def check_file(path: Path, precision: str = "fp16") -> None:
    """Check a file in a precision with ONNX's checker in full, which also infers all types and shapes.

    Raises:
        HalfError: the checker rejects the file.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and the inference have no common class of errors
        reason = str(error).strip().splitlines()[0]
        raise HalfError(
            f"{path.name} fails ONNX's checker after the conversion to {precision} ({reason}); choose another "
            "precision, and report this with the model."
        ) from error


def _check_scales(model: ir.Model, source: Path) -> None:
    """Raise HalfError for int8 products in an opset whose QuantizeLinear does not support fp16 scales."""
    version = _opset(model.graph)
    if version < SCALES_SINCE and any(node.op_type == "QuantizeLinear" for node in model.graph):
        raise HalfError(
            f"{source.name} has int8 products and opset {version}, but fp16 scales need opset {SCALES_SINCE} or newer; "
            "export the model again."
        )


def _nothing_to_convert(source: Path, layers: Sequence[Kept], half: _Format) -> str:
    if not layers:
        nothing = f"{source.name} has no float32 weight, so there is nothing to convert to {half.name}"
        return f"{nothing}; choose another precision."
    return (
        f"Every layer of {source.name} with weights exceeds the range of {half.name} (such as {layers[0].module}: "
        f"{layers[0].reason}), so there is nothing to convert; choose another precision."
    )


# ---- which nodes stay in float32


def _float32_nodes(graph: ir.Graph, half: _Format) -> dict[ir.Node, Excess]:
    """Return the nodes that stay in float32, with the reason; nodes without a float value are among them."""
    positional = _positional(graph)
    kept = {node: Excess() for node in graph if node in positional or _by_rule(node, half)}
    kept |= {node: Excess() for node in graph if node not in kept and _is_enclosed(node, kept)}
    reach = _reach(graph, half.maxima, positional)
    found = {node: _excess(node, reach, half) for node in graph if node not in kept}
    kept |= {node: excess for node, excess in found.items() if excess is not None}
    return _with_products(graph, kept)


def _by_rule(node: ir.Node, half: _Format) -> bool:
    """Return whether a node stays in float32 whatever its values are: it is in `KEPT` or has no half form."""
    if node.op_type in KEPT or (half.dtype == BF16 and node.op_type in KEPT_IN_BF16):
        return True
    if node.domain not in ("", "ai.onnx") or "dtype" in node.attributes:
        return True
    bodies = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if any(attribute.type in bodies for attribute in node.attributes.values()):
        return True
    divisor = node.inputs[1] if node.op_type == "Div" else None
    if divisor is not None and not divisor.is_initializer():  # near 0 it would become 0
        return True
    outputs = [i for i, value in enumerate(node.outputs) if value.dtype == FLOAT]
    schema = _schema(node)
    has_floats = bool(outputs or half_inputs(node, half))
    return not has_floats or not all(_allows_half(schema.outputs, i, half) for i in outputs)


def half_inputs(node: ir.Node, half: _Format) -> list[int]:
    """Return the positions of the float32 inputs that the operator also accepts in 16 bits."""
    inputs = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == FLOAT]
    return [i for i in inputs if _allows_half(_schema(node).inputs, i, half)]


def _schema(node: ir.Node) -> onnx.defs.OpSchema:
    assert isinstance(node.graph, ir.Graph)
    return onnx.defs.get_schema(node.op_type, _opset(node.graph), "")


def _opset(graph: ir.Graph) -> int:
    return next(version for domain, version in graph.opset_imports.items() if domain in ("", "ai.onnx"))


def _allows_half(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int, half: _Format) -> bool:
    return half.schema_type in parameters[min(index, len(parameters) - 1)].types  # the last one may be variadic


def _positional(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that compute floats from integers and constants alone, such as positions and masks.

    fp16 represents integers exactly only up to 2,048, so the angles of rotary embeddings need float32. Embeddings,
    which read a table by integers, and int8 activations are not among them.
    """
    found: set[ir.Node] = set()
    for node in graph:
        computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
        from_integers = all(value.producer() in found for value in computed if value.dtype == FLOAT)
        makes_floats = any(value.dtype == FLOAT for value in node.outputs)
        if computed and from_integers and makes_floats and not _reads_table(node):
            found.add(node)
    return found


def _reads_table(node: ir.Node) -> bool:
    """Return whether a node is an embedding, or dequantizes an activation."""
    data = node.inputs[0] if node.op_type == "Gather" else None
    return node.op_type == "DequantizeLinear" or (data is not None and data.is_initializer())


def _is_enclosed(node: ir.Node, kept: Mapping[ir.Node, Excess]) -> bool:
    """Return whether only float32 nodes surround a node, as the sum of variance and epsilon in a norm."""
    producers = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
    consumers = [use.node for value in node.outputs for use in value.uses()]
    ends = any(value.is_graph_output() for value in node.outputs)
    return bool(producers and consumers) and not ends and all(each in kept for each in (*producers, *consumers))


def _reach(graph: ir.Graph, maxima: Mapping[str, float], positional: set[ir.Node]) -> dict[str, float]:
    """Return the measured maxima, raised for masks to what their constants allow: calibration may not mask anything."""
    reach = dict(maxima)
    for node in graph:
        if node in positional and node.op_type in MOVING:
            inputs = [value for value in node.inputs if value is not None and value.dtype == FLOAT]
            largest = max((_largest(value, reach) for value in inputs), default=0.0)
            for value in node.outputs:
                reach[str(value.name)] = max(reach.get(str(value.name), 0.0), largest)
    return reach


def _largest(value: ir.Value, reach: Mapping[str, float]) -> float:
    if value.const_value is not None:
        return float(np.abs(value.const_value.numpy()).max(initial=0.0))
    return reach.get(str(value.name), 0.0)


def _excess(node: ir.Node, reach: Mapping[str, float], half: _Format) -> Excess | None:
    """Return why the values of a node do not fit the type, or None if they do."""
    weighed = (_weight_excess(node, weight, half) for _, weight in _weights(node, half))
    found = [excess for excess in weighed if excess is not None]
    values = [node.inputs[i] for i in half_inputs(node, half)] + [each for each in node.outputs if each.dtype == FLOAT]
    for value in values:
        if value is None or value.is_initializer() or (largest := _measured(str(value.name), reach)) is None:
            continue
        if not largest <= half.largest / HEADROOM:
            found.append(Excess(largest, f"largest value {largest:.2g}"))
        elif 0 < largest < half.smallest:
            found.append(Excess(largest, f"largest value {largest:.2g}, below the normal range of fp16"))
    return max(found, default=None)


def _measured(name: str, reach: Mapping[str, float]) -> float | None:
    """Return the maximum of a value; a value of an int8 rewrite has that of the value it is named after."""
    if name in reach or not name.startswith(PREFIX):
        return reach.get(name)
    return reach.get(name.removeprefix(PREFIX).rpartition("/")[0])


def _weights(node: ir.Node, half: _Format) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Return the constant inputs of a node that may become half, by name."""
    inputs = [node.inputs[i] for i in half_inputs(node, half)] if node.domain in ("", "ai.onnx") else []
    return [(str(value.name), value.const_value.numpy()) for value in inputs if value is not None and value.const_value]


def _weight_excess(node: ir.Node, weight: npt.NDArray[np.float32], half: _Format) -> Excess | None:
    finite = weight[np.isfinite(weight)].astype(np.float64)  # fp16 has infinities
    largest = float(np.abs(finite).max(initial=0.0))
    if largest > half.largest:
        return Excess(largest, f"largest weight {largest:.2g}")
    if half.dtype == BF16:
        return None
    error = finite.astype(np.float16) - finite
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        lost = bool((np.abs(error) > SCALE_ROUNDING * np.abs(finite)).any())
        return Excess(largest, f"an int8 scale of {finite.min():.2g}, below the range of fp16") if lost else None
    if np.linalg.norm(error) > ROUNDING * np.linalg.norm(finite):
        return Excess(largest, f"largest weight {largest:.2g}, below the normal range of fp16")
    return None


def _with_products(graph: ir.Graph, kept: dict[ir.Node, Excess]) -> dict[ir.Node, Excess]:
    """Extend float32 to whole int8 products: the Q, the DQs and the product of one must have one type."""
    groups = [_group(node) for node in graph if node.op_type == "DequantizeLinear"]
    changed = True
    while changed:
        changed = False
        for group in groups:
            held = [kept[node] for node in group if node in kept]
            if held and len(held) < len(group):
                kept |= {node: Excess(max(held).largest, "int8 with a layer in float32") for node in group - set(kept)}
                changed = True
    return kept


def _group(dequantize: ir.Node) -> set[ir.Node]:
    """Return a DequantizeLinear with the QuantizeLinear that it reads and the products that read it."""
    stored = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    readers = {use.node for use in dequantize.outputs[0].uses() if use.node.op_type in PRODUCTS}
    return {dequantize, *readers, *([stored] if stored is not None and stored.op_type == "QuantizeLinear" else [])}


def _layers(excess: Mapping[ir.Node, Excess]) -> tuple[Kept, ...]:
    """Return one entry per torch module whose values do not fit, with its largest value, in the order of the graph."""
    largest: dict[str, tuple[Excess, ir.Node]] = {}
    for node, found in excess.items():
        name = module_of(node.metadata_props) or str(node.name or node.outputs[0].name)
        if found.reason and (name not in largest or found > largest[name][0]):
            largest[name] = (found, node)
    return tuple(Kept(str(node.name), name, found.reason) for name, (found, node) in largest.items())


# ---- writing


@dataclass
class _Conversion:
    """Conversion of the nodes `halves` of a graph, with casts where float32 and the 16-bit type meet."""

    graph: ir.Graph
    halves: set[ir.Node]
    half: _Format
    casts: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def apply(self) -> None:
        """Convert weights, insert casts, and cast the graph outputs back to float32."""
        wanted = {(node, i) for node in self.halves for i in half_inputs(node, self.half)}
        produced = [value for node in self.graph for value in node.outputs if value.dtype == FLOAT]
        for weight in [each for each in self.graph.initializers.values() if each.dtype == FLOAT]:
            self._convert_weight(weight, wanted)
        for value in (*self.graph.inputs, *produced):
            if value.dtype == FLOAT and not value.is_initializer():
                self._cast_uses(value, wanted)
        for value in produced:
            if value.producer() in self.halves:
                self._convert_output(value)

    def _convert_weight(self, weight: ir.Value, wanted: set[tuple[ir.Node, int]]) -> None:
        """Convert a weight in place, or a copy of it where float32 nodes read it too."""
        uses = list(weight.uses())
        halves = [use for use in uses if (use.node, use.idx) in wanted]
        if not halves or weight.const_value is None:
            return
        tensor = ir.tensor(weight.const_value.numpy().astype(self.half.dtype.numpy()), name=weight.name)
        if len(halves) == len(uses) and not weight.is_graph_output():
            weight.const_value, weight.dtype = tensor, self.half.dtype
            return
        name = f"{weight.name}/{self.half.name}"
        tensor.name = name
        copy = ir.Value(name=name, const_value=tensor, type=ir.TensorType(self.half.dtype), shape=weight.shape)
        self.graph.register_initializer(copy)
        for use in halves:
            use.node.replace_input_with(use.idx, copy)

    def _cast_uses(self, value: ir.Value, wanted: set[tuple[ir.Node, int]]) -> None:
        """Insert one cast for the uses of a value in the other type."""
        is_half = value.producer() in self.halves
        others = [use for use in value.uses() if ((use.node, use.idx) in wanted) != is_half]
        if others:
            cast = self._cast(value, FLOAT if is_half else self.half.dtype)
            for use in others:
                use.node.replace_input_with(use.idx, cast)

    def _convert_output(self, value: ir.Value) -> None:
        """Set the type of a value to the 16-bit type; a graph output keeps its name and type behind a cast."""
        if value.is_graph_output():
            name, position = value.name, list(self.graph.outputs).index(value)
            cast = self._cast(value, FLOAT)
            value.name, cast.name, cast.shape = f"{name}/{self.half.name}", name, value.shape
            self.graph.outputs[position] = cast
        value.dtype = self.half.dtype
        node = value.producer()
        if node is not None and node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", self.half.dtype)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}/{'fp32' if dtype == FLOAT else self.half.name}"
        node = ir.node("Cast", [value], {"to": dtype}, name=name)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        output = node.outputs[0]
        output.name, output.type = name, ir.TensorType(dtype)
        return output
