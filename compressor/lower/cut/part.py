"""One part of a model, cut out of the ONNX file of the whole model at values that are its outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE

FOREIGN = "of the whole model: "  # before the names of values that a part does not have
PAST = "past_key_values."

Values = Mapping[str, ir.Value]
Kept = tuple[dict[str, str], dict[str, str], dict[str, str]]  # inputs, values that become inputs, outputs: new names


class CutError(CompressorError):
    """A file of a part of a model that cannot be cut."""


def names(values: Sequence[ir.Value]) -> list[str]:
    """Return the names of values."""
    return [str(value.name) for value in values]


def layer_of(name: str) -> tuple[int, str]:
    """Order caches by layer, then self-attention, cross-attention, as Optimum does."""
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def save(model: ir.Model, path: Path) -> None:
    """Save a model, with its weights in `<name>.data` next to it if they are too large for one file."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_ABOVE else None)


def order_of_input(value: ir.Value) -> tuple[int, str]:
    """Order inputs as Optimum expects them: the caches last, by layer; it feeds them by their positions."""
    name = str(value.name)
    return layer_of(name) if name.startswith(PAST) else (-1, "")


def readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value in any type.

    A file in half precision casts the caches that are its inputs, and its outputs are casts of the values that its
    nodes read.
    """
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return readers(producer.inputs[0])
    direct = [use.node for use in value.uses()]
    casts = [node.outputs[0] for node in direct if node.op_type == "Cast"]
    return [*direct, *(use.node for cast in casts for use in cast.uses())]


class Part:
    """One part of a model, which is edited in place.

    Attributes:
        model: the whole model.
        stem: name of the part's file, without its extension.
        expected: the kind of model that can be cut, for messages.
        always: inputs that stay although no node reads them.
    """

    def __init__(self, model: ir.Model, stem: str, *, expected: str, always: Collection[str] = ()) -> None:
        self.model, self.graph, self.stem = model, model.graph, stem
        self.expected, self.always = expected, always

    def keep(self, inputs: Mapping[str, str], cuts: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Keep what the outputs need, with `cuts` as inputs instead of computed values.

        Raises:
            CutError: a node reads a value that the part does not compute.
        """
        before = {str(value.name): value for value in self.graph.inputs}
        returned = {str(value.name): value for value in self.graph.outputs}
        self.graph.outputs.clear()
        self._rename_foreign(before, inputs)
        added = {new: self._cut(returned[old], new) for old, new in cuts.items() if old in returned}
        own = {new: before[old] for old, new in inputs.items()}
        for name, value in own.items():
            value.name = name
        own |= added
        self.graph.inputs.clear()
        self.graph.inputs.extend(sorted(own.values(), key=order_of_input))
        foreign = [value for name, value in before.items() if name not in inputs]
        self.replace(foreign, own)
        self._resize(foreign, own)
        for old, new in outputs.items():
            returned[old].name = new
            self.graph.outputs.append(returned[old])
        common.RemoveUnusedNodesPass()(self.model)
        self._check(own.values())
        self._drop_unused()

    def replace(self, foreign: Sequence[ir.Value], own: Values) -> None:
        """Replace inputs by other values; nothing by default.

        Args:
            foreign: inputs of the whole model that the part does not have.
            own: inputs of the part, by name.
        """

    def with_size(self, name: str, axis: int, own: Values) -> ir.Value | None:
        """Return an own input whose axis has the size of that axis of another input of the whole model."""
        raise NotImplementedError

    def _rename_foreign(self, values: Values, kept: Collection[str]) -> None:
        """Rename the inputs that the part does not have, whose names its own inputs may take."""
        for name, value in values.items():
            if name not in kept:
                value.name = FOREIGN + name

    def _cut(self, value: ir.Value, name: str) -> ir.Value:
        """Return a new input that every reader of a value reads instead.

        A file in half precision computes the value in half and casts it for the output; there the readers of the half
        value read the cast input.
        """
        value.name = f"{FOREIGN}{value.name}"
        new = ir.Value(name=name, shape=value.shape, type=value.type)
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
            half, kind = producer.inputs[0], self._half_type()
            if kind is not None:
                cast = ir.node("Cast", [new], {"to": kind})
                self.graph.insert_before(self.graph[0], cast)
                ir.convenience.replace_all_uses_with(half, cast.outputs[0])
        ir.convenience.replace_all_uses_with(value, new)
        return new

    def _half_type(self) -> int | None:
        """Return the type of 16 bits that the file computes in; None for float32. Its values need not note theirs."""
        casts = (node.attributes["to"].as_int() for node in self.graph if node.op_type == "Cast")
        return next((kind for kind in casts if kind in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)), None)

    def _resize(self, foreign: Sequence[ir.Value], own: Values) -> None:
        """Read sizes of inputs that the part does not have from its own inputs with the same size."""
        for value in foreign:
            for node in readers(value):
                start = node.attributes.get_int("start", 0) if node.op_type == "Shape" else None
                if start is None or node.attributes.get_int("end", -1) != start + 1:
                    continue
                same = self.with_size(str(value.name).removeprefix(FOREIGN), start, own)
                if same is not None:
                    node.replace_input_with(0, same)

    def _check(self, own: Collection[ir.Value]) -> None:
        """Raise if a node reads a value that the part does not compute."""
        known = {*own, *self.graph.initializers.values()}
        for node in self.graph:
            for value in node.inputs:
                if value is not None and value not in known and value.producer() is None:
                    raise CutError(
                        f"{self.stem}.onnx cannot be cut: {node.op_type} reads {str(value.name).removeprefix(FOREIGN)} "
                        f"of the whole model; expected {self.expected}."
                    )

    def _drop_unused(self) -> None:
        """Remove initializers that no node reads, and inputs that no node reads."""
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        for value in [value for value in self.graph.inputs if not value.uses() and value.name not in self.always]:
            self.graph.inputs.remove(value)
