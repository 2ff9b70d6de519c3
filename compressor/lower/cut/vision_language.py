"""Cut the ONNX file of a vision-language model into the files that Optimum and transformers.js expect.

The file that a graph is lowered to holds the vision tower, the projector and the language model. It is cut at values
that are its outputs, see `compressor.models.vision_language.call`:

- ``vision_encoder.onnx``: pixel_values -> image_features [images, image tokens, width]
- ``embed_tokens.onnx``: input_ids -> inputs_embeds [batch, tokens, width]
- ``decoder_model_merged.onnx``: inputs_embeds, attention_mask, position_ids and the cache -> logits and the longer
  cache. The first call has a cache of length zero, so that it needs no branch of its own.

What calls them puts the features in the places of the placeholders. If the language model itself asks which tokens are
placeholders, as it does when image tokens are left out, its file has the input ``input_ids`` too.

For images as grids of patches, as in Qwen2-VL, the graph takes a row of padded patches for each image, and the file the
patches of all images behind each other; it sorts them into rows, and their features back. Positions on three axes are
``[3, batch, tokens]`` in the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from compressor.lower.cut.packed_images import pack_images, put_axes_first
from compressor.lower.cut.part import Kept, Part, Values, names, save
from compressor.models.preprocess import GridInput
from runtimes.base.vision_language import (
    DECODER,
    EMBED,
    EMBEDS,
    FACTS,
    FEATURES,
    IDS,
    IMAGE_TOKEN,
    MASK,
    MERGE,
    POSITIONS,
    READS_IDS,
    TEXT_EMBEDS,
    VISION,
    is_image,
    is_past,
    is_present,
)

EXPECTED = "a language model that reads the image through the embeddings of its tokens alone"


def cut(path: Path, folder: Path, image_token: int, grid: GridInput | None = None) -> Path:
    """Write the files of the vision tower, the embeddings and the language model.

    Args:
        path: ONNX file of the whole model.
        folder: existing folder for the three files.
        image_token: token id of the placeholders, which is noted beside the files.
        grid: how the vision encoder takes grids of patches; None for images of one size.

    Returns:
        The path of the vision encoder.

    Raises:
        CutError: the language model reads values of the vision tower other than the features.
    """
    facts = {IMAGE_TOKEN: image_token} | ({} if grid is None else {MERGE: grid.merge})
    for stem, part in ((VISION, _vision), (EMBED, _embed), (DECODER, _decoder)):
        model = ir.load(path)
        _File(model, stem, expected=EXPECTED, always=(EMBEDS,)).keep(*part(model))
        if grid is not None and stem == VISION:
            pack_images(model, grid.merge, grid.file_input)
        if grid is not None and stem == DECODER:
            put_axes_first(model)
        if stem == DECODER and IDS in names(model.graph.inputs):
            facts[READS_IDS] = 1
        save(model, folder / f"{stem}.onnx")
    (folder / FACTS).write_text(json.dumps(facts) + "\n")
    return folder / f"{VISION}.onnx"


def _vision(model: ir.Model) -> Kept:
    images = [name for name in names(model.graph.inputs) if is_image(name)]
    return {name: name for name in images}, {}, {FEATURES: FEATURES}


def _embed(model: ir.Model) -> Kept:
    return {IDS: IDS}, {}, {TEXT_EMBEDS: EMBEDS}


def _decoder(model: ir.Model) -> Kept:
    inputs, outputs = names(model.graph.inputs), names(model.graph.outputs)
    pasts, presents = filter(is_past, inputs), filter(is_present, outputs)
    kept = [name for name in (IDS, MASK, POSITIONS, *pasts) if name in inputs]
    return {name: name for name in kept}, {EMBEDS: EMBEDS}, {name: name for name in ("logits", *presents)}


class _File(Part):
    """The vision tower, the embeddings, or the language model."""

    def replace(self, foreign: Sequence[ir.Value], own: Values) -> None:
        """Read the sizes of the tokens from their embeddings, so that the tokens themselves may be left out."""
        if self.stem != DECODER:
            return
        for use in list(own[IDS].uses()):
            if use.node.op_type == "Shape":
                use.node.replace_input_with(use.idx, own[EMBEDS])

    def with_size(self, name: str, axis: int, own: Values) -> ir.Value | None:
        """Return an own input with the number of rows, which is the same everywhere."""
        return next(iter(own.values())) if axis == 0 else None
