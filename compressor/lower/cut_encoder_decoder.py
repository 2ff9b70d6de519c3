"""Cut the ONNX file of an encoder-decoder into the files of its encoder and its decoder.

The file that a graph is lowered to holds both towers, so that every precision and every comparison with torch applies
to them as to any other model. It is cut at values that are its outputs: the encoder's last hidden state, and the keys
and values of cross-attentions. The three files have the names, inputs and outputs of Optimum:

- ``encoder_model.onnx``: input_ids or input_features, attention_mask -> last_hidden_state
- ``decoder_model.onnx``, for the first token: input_ids, encoder_hidden_states, encoder_attention_mask -> logits and
  the keys and values of every attention
- ``decoder_with_past_model.onnx``, for every further token: input_ids, encoder_attention_mask and all keys and values
  -> logits and the longer keys and values of self-attentions
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from compressor.errors import CompressorError
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE
from runtimes.base.encoder_decoder import (
    DECODER,
    DECODER_IDS,
    ENCODER,
    ENCODER_HIDDEN,
    ENCODER_MASK,
    HIDDEN,
    IDS,
    LAST_HIDDEN,
    MASK,
    PAST,
    PRESENT,
    WITH_PAST,
    is_cross,
    is_self,
    past_of,
)

FOREIGN = "of the whole model: "  # before the names of inputs that a part does not have


class CutError(CompressorError):
    """A file of an encoder-decoder that cannot be cut."""


def cut(path: Path, folder: Path) -> Path:
    """Write the files of the encoder and the decoder.

    Args:
        path: ONNX file with both towers.
        folder: existing folder for the three files.

    Returns:
        The path of the encoder.

    Raises:
        CutError: the decoder reads values of the encoder other than its last hidden state and the attention mask.
    """
    for stem, part in ((ENCODER, _encoder), (DECODER, _decoder), (WITH_PAST, _with_past)):
        model = ir.load(path)
        _Part(model, stem).keep(*part(model))
        save(model, folder / f"{stem}.onnx")
    return folder / f"{ENCODER}.onnx"


def save(model: ir.Model, path: Path) -> None:
    """Save a model, with its weights in `<name>.data` next to it if they are too large for one file."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_ABOVE else None)


Values = Mapping[str, ir.Value]
Kept = tuple[dict[str, str], dict[str, str], dict[str, str]]  # inputs, values that become inputs, outputs: new names


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _encoder(model: ir.Model) -> Kept:
    inputs = [name for name in _names(model.graph.inputs) if name != DECODER_IDS and not is_self(name)]
    return {name: name for name in inputs}, {}, {ENCODER_HIDDEN: LAST_HIDDEN}


def _decoder(model: ir.Model) -> Kept:
    inputs, outputs = _names(model.graph.inputs), _names(model.graph.outputs)
    kept = {MASK: ENCODER_MASK} if MASK in inputs else {}
    presents = sorted((name for name in outputs if name.startswith(PRESENT)), key=_layer_of)
    return {DECODER_IDS: IDS, **kept}, {ENCODER_HIDDEN: HIDDEN}, {name: name for name in ("logits", *presents)}


def _with_past(model: ir.Model) -> Kept:
    inputs, outputs = _names(model.graph.inputs), _names(model.graph.outputs)
    kept = {MASK: ENCODER_MASK} if MASK in inputs else {}
    pasts = {name: name for name in inputs if is_self(name)}
    crosses = {name: past_of(name) for name in outputs if is_cross(name)}
    grown = sorted((name for name in outputs if is_self(name)), key=_layer_of)
    return {DECODER_IDS: IDS, **kept, **pasts}, crosses, {name: name for name in ("logits", *grown)}


def _layer_of(name: str) -> tuple[int, str]:
    """Order caches by layer, then self-attention, cross-attention, as Optimum does."""
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def order_of_input(value: ir.Value) -> tuple[int, str]:
    """Order inputs as Optimum expects them: the caches last, by layer; it feeds them by their positions."""
    name = str(value.name)
    return _layer_of(name) if name.startswith(PAST) else (-1, "")


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value, or a cast of it, as files in half precision hold for caches."""
    readers = [use.node for use in value.uses()]
    casts = [node.outputs[0] for node in readers if node.op_type == "Cast"]
    return [*readers, *(use.node for cast in casts for use in cast.uses())]


class _Part:
    """One part of a model, which is edited in place."""

    def __init__(self, model: ir.Model, stem: str) -> None:
        self.model, self.graph, self.stem = model, model.graph, stem

    def keep(self, inputs: Mapping[str, str], cuts: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Keep what the outputs need, with `cuts` as inputs instead of computed values."""
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
        self._empty_pasts([value for name, value in before.items() if is_self(name) and name not in inputs], own)
        self._resize([value for name, value in before.items() if name not in inputs], own)
        for old, new in outputs.items():
            returned[old].name = new
            self.graph.outputs.append(returned[old])
        common.RemoveUnusedNodesPass()(self.model)
        self._check(own.values())
        self._drop_unread()

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

    def _empty_pasts(self, pasts: Sequence[ir.Value], own: Values) -> None:
        """Replace caches by empty ones, [batch, heads, 0, width]."""
        for past in pasts:
            if not past.uses() or self.stem != DECODER:
                continue
            assert past.shape is not None
            heads, width = past.shape[1], past.shape[3]
            assert isinstance(heads, int)
            assert isinstance(width, int)
            sizes = ir.tensor([heads, 0, width], name=f"{past.name} sizes")
            sizes_node = ir.node("Constant", [], {"value": sizes})
            rows = ir.node("Shape", [own[IDS]], {"start": 0, "end": 1})
            shape = ir.node("Concat", [rows.outputs[0], sizes_node.outputs[0]], {"axis": 0})
            zero = ir.tensor([0.0], dtype=past.dtype)
            empty = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": zero})
            self.graph.insert_before(self.graph[0], [sizes_node, rows, shape, empty])
            ir.convenience.replace_all_uses_with(past, empty.outputs[0])

    def _resize(self, foreign: Sequence[ir.Value], own: Values) -> None:
        """Read sizes of inputs that the part does not have from its own inputs with the same size."""
        for value in foreign:
            for node in _readers(value):
                start = node.attributes.get_int("start", 0) if node.op_type == "Shape" else None
                if start is None or node.attributes.get_int("end", -1) != start + 1:
                    continue
                same = self._with_size(str(value.name).removeprefix(FOREIGN), start, own)
                if same is not None:
                    node.replace_input_with(0, same)

    def _with_size(self, name: str, axis: int, own: Values) -> ir.Value | None:
        """Return an own input whose axis has the size of that axis of another input."""
        if axis == 0:
            return next(iter(own.values()))
        if axis == 1 and name in (IDS, MASK):
            return own.get(ENCODER_MASK, own.get(MASK))
        return None

    def _check(self, own: Collection[ir.Value]) -> None:
        """Raise if a node reads a value that the part does not compute."""
        known = {*own, *self.graph.initializers.values()}
        for node in self.graph:
            for value in node.inputs:
                if value is not None and value not in known and value.producer() is None:
                    raise CutError(
                        f"{self.stem}.onnx cannot be cut: {node.op_type} reads {str(value.name).removeprefix(FOREIGN)} "
                        "of the whole model; expected a decoder that reads the encoder's last hidden state and the "
                        "attention mask alone."
                    )

    def _drop_unread(self) -> None:
        """Remove initializers that no node reads, and inputs that no node reads but the tokens."""
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        for value in [value for value in self.graph.inputs if not value.uses() and value.name != IDS]:
            self.graph.inputs.remove(value)
