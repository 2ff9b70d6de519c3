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

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from compressor.lower.cut.part import FOREIGN, Kept, Part, Values, layer_of, names, readers, save
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
    PRESENT,
    WITH_PAST,
    is_cross,
    is_self,
    past_of,
)

EXPECTED = "a decoder that reads the encoder's last hidden state and the attention mask alone"


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
        _Tower(model, stem, expected=EXPECTED, always=(IDS,)).keep(*part(model))
        save(model, folder / f"{stem}.onnx")
    return folder / f"{ENCODER}.onnx"


def _encoder(model: ir.Model) -> Kept:
    inputs = [name for name in names(model.graph.inputs) if name != DECODER_IDS and not is_self(name)]
    return {name: name for name in inputs}, {}, {ENCODER_HIDDEN: LAST_HIDDEN}


def _decoder(model: ir.Model) -> Kept:
    inputs, outputs = names(model.graph.inputs), names(model.graph.outputs)
    kept = {MASK: ENCODER_MASK} if MASK in inputs else {}
    presents = sorted((name for name in outputs if name.startswith(PRESENT)), key=layer_of)
    return {DECODER_IDS: IDS, **kept}, {ENCODER_HIDDEN: HIDDEN}, {name: name for name in ("logits", *presents)}


def _with_past(model: ir.Model) -> Kept:
    inputs, outputs = names(model.graph.inputs), names(model.graph.outputs)
    kept = {MASK: ENCODER_MASK} if MASK in inputs else {}
    pasts = {name: name for name in inputs if is_self(name)}
    crosses = {name: past_of(name) for name in outputs if is_cross(name)}
    grown = sorted((name for name in outputs if is_self(name)), key=layer_of)
    return {DECODER_IDS: IDS, **kept, **pasts}, crosses, {name: name for name in ("logits", *grown)}


class _Tower(Part):
    """The encoder, or one of the two files of the decoder."""

    def replace(self, foreign: Sequence[ir.Value], own: Values) -> None:
        """Replace the caches of self-attentions by empty ones, [batch, heads, 0, width], in the first call.

        In a further call, the length of the source is read off the keys of a cross-attention.
        """
        self._read_length(own)
        for past in foreign:
            if not is_self(str(past.name).removeprefix(FOREIGN)) or not past.uses() or self.stem != DECODER:
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

    def _read_length(self, own: Values) -> None:
        """Read the number of the encoder's states off the keys of a cross-attention, [batch, heads, states, width]."""
        keys = next((value for name, value in own.items() if is_cross(name)), None)
        states = (value for node in self.graph for value in node.outputs if value.name == ENCODER_HIDDEN)
        hidden = next(states, None)
        if keys is None or hidden is None:
            return
        for node in readers(hidden):
            axes = tuple(node.attributes.get_int(name, 0) for name in ("start", "end"))
            if node.op_type == "Shape" and axes == (1, 2):
                length = ir.node("Shape", [keys], {"start": 2, "end": 3})
                self.graph.insert_before(node, length)
                ir.convenience.replace_all_uses_with(node.outputs[0], length.outputs[0])

    def with_size(self, name: str, axis: int, own: Values) -> ir.Value | None:
        """Return an own input with the size of an axis: rows are the same everywhere, and so is the source's length."""
        if axis == 0:
            return next(iter(own.values()))
        if axis == 1 and name in (IDS, MASK):
            return own.get(ENCODER_MASK, own.get(MASK))
        return None
