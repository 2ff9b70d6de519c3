"""Cut the ONNX file of a model of images and texts into the files of its towers.

The whole file compares images with texts. Who searches images computes the features of either alone, so the towers are
written too, under the names of transformers.js and with the outputs of transformers' own classes of one tower:

- ``vision_model.onnx``: pixel_values -> image_embeds, as CLIPVisionModelWithProjection, or pooler_output, as
  SiglipVisionModel, which has no projection
- ``text_model.onnx``: input_ids, attention_mask -> text_embeds, as CLIPTextModelWithProjection, or pooler_output

These features are not divided by their norm yet, unlike the outputs of the same names of the whole model.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from compressor.errors import CompressorError
from compressor.lower.cut.part import save

VISION, TEXT = "vision_model.onnx", "text_model.onnx"
OUTPUTS = {VISION: "image_embeds", TEXT: "text_embeds"}
POOLED = "pooler_output"
IMAGES = "pixel_values"


class TowerError(CompressorError):
    """A file of a model of images and texts that cannot be cut."""


def cut_towers(path: Path, folder: Path, *, projected: bool) -> tuple[Path, ...]:
    """Write the files of both towers.

    Args:
        path: ONNX file of the whole model.
        folder: existing folder for the files.
        projected: whether the features of the towers are projected into a space that they share.

    Returns:
        The paths of the files.

    Raises:
        TowerError: the embeddings are no features divided by their norm, or a tower reads inputs of the other.
    """
    return tuple(_write(path, folder / name, output, projected=projected) for name, output in OUTPUTS.items())


def _write(path: Path, destination: Path, output: str, *, projected: bool) -> Path:
    model = ir.load(path)
    graph = model.graph
    returned = next(value for value in graph.outputs if value.name == output)
    features = _features(graph, returned, destination.name)
    graph.outputs.clear()
    returned.name = f"{output} of the whole model"
    features.name = output if projected else POOLED
    features.shape, features.type = returned.shape, returned.type
    graph.outputs.append(features)
    common.RemoveUnusedNodesPass()(model)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    _check(graph, destination.name)
    save(model, destination)
    return destination


def _features(graph: ir.Graph, embeddings: ir.Value, name: str) -> ir.Value:
    """Return the features whose quotient by their norm is an output; of a file in half precision, cast to float32.

    Raises:
        TowerError: the output is no quotient.
    """
    node = embeddings.producer()
    cast = node is not None and node.op_type == "Cast"
    if cast:
        assert node is not None
        half = node.inputs[0]
        node = None if half is None else half.producer()
    features = None if node is None or node.op_type != "Div" else node.inputs[0]
    if features is None:
        raise TowerError(
            f"{name} cannot be cut: {embeddings.name} is computed by {node.op_type if node else 'no node'}, not by a "
            "division of features by their norm; please report the model."
        )
    if not cast:
        return features
    widened = ir.node("Cast", [features], {"to": ir.DataType.FLOAT})
    graph.append(widened)
    return widened.outputs[0]


def _check(graph: ir.Graph, name: str) -> None:
    """Raise if a tower reads inputs of the other."""
    inputs = {str(value.name) for value in graph.inputs}
    if not inputs or (IMAGES in inputs) != (inputs == {IMAGES}):
        raise TowerError(
            f"{name} cannot be cut: it reads {', '.join(sorted(inputs)) or 'no input'}; expected images or texts alone."
        )
