"""SmoothQuant on an ONNX file: the outliers of activations moved into the weights that multiply them.

Where a norm's scale (and shift) feeds Linears alone, dividing its channel j by s_j and multiplying row j of their
weights by s_j changes nothing in float, and takes from the activations the few large channels that waste the 256
levels of int8. s_j = max|X_j|^a / max|W_j|^(1 - a), a = 0.5 (Xiao et al. 2023, arXiv:2211.10438, equation 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from compressor.quantize.intermediate_values import Batch, stream, write_measuring
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, PREFIX, Edit, Linear, candidates, load, save, used

STRENGTH = 0.5
SMALLEST = 1e-5
"""Least channel maximum that is divided by; a channel that is always zero stays as it is."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """A norm's output that only Linears read: the value, what it is scaled and shifted by, and the Linears."""

    activation: str
    parameters: tuple[str, ...]
    linears: tuple[Linear, ...]


def smooth(source: Path, destination: Path, feeds: Callable[[], Iterator[Batch]], work: Path) -> int:
    """Write a float file that computes the same with smoother activations.

    Args:
        source: the float ONNX file.
        destination: what to write.
        feeds: gives a fresh stream of calibration batches.
        work: where a copy of the model goes that gives the channels' maxima.

    Returns:
        The number of norms that were changed; nothing is written where there are none, or no batch.
    """
    found = places(load(source))
    if not found:
        return 0
    maxima = _channel_maxima(source, work, found, feeds)
    if not maxima:
        return 0
    model = load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for place in found:
        weights = {linear.weight: _stored(tensors[linear.weight], linear) for linear in place.linears}
        scale = _scale(maxima[place.activation], np.max([np.abs(w).max(axis=1) for w in weights.values()], axis=0))
        for name in place.parameters:
            _replace(tensors[name], numpy_helper.to_array(tensors[name]) / scale)
        for linear in place.linears:
            smoothed = weights[linear.weight] * scale[:, None]
            _replace(tensors[linear.weight], smoothed.T if linear.flip else smoothed)
    save(model, destination, EXTERNAL_ABOVE)
    return len(found)


def places(model: onnx.ModelProto) -> list[Place]:
    """Where a norm can be smoothed: its scale and shift, and all weights behind it, are read there alone."""
    linears, _ = candidates(model, convolutions=False)
    readers = Counter(used(model.graph))  # what the model gives is read as well
    stored = {tensor.name for tensor in model.graph.initializer}
    by_activation: dict[str, list[Linear]] = {}
    for linear in linears:
        by_activation.setdefault(linear.activation, []).append(linear)
    found = []
    for node in model.graph.node:
        parameters = _parameters(node, stored)
        behind = by_activation.get(node.output[0], []) if node.output else []
        alone = bool(behind) and len(behind) == readers[node.output[0]]
        shared = [name for name in (*parameters, *(linear.weight for linear in behind)) if readers[name] != 1]
        plain = all(linear.weight in stored for linear in behind)
        if parameters and alone and plain and not shared:
            found.append(Place(node.output[0], parameters, tuple(behind)))
    return found


def _parameters(node: onnx.NodeProto, stored: set[str]) -> tuple[str, ...]:
    """The scale and shift of a LayerNormalization, or the scale that an RMS norm ends with."""
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        names = tuple(node.input[1:])
        return names if all(name in stored for name in names) else ()
    if node.op_type == "Mul":
        return tuple(name for name in node.input if name in stored)[:1]
    return ()


def _channel_maxima(
    source: Path, work: Path, found: list[Place], feeds: Callable[[], Iterator[Batch]]
) -> dict[str, Floats]:
    """max|X_j| of each place's activation over all samples, by channel."""
    model = load(source)
    edit = Edit(model.graph)
    outputs = []
    for place in found:
        base = f"{PREFIX}{place.activation}"
        size = edit.node("Abs", [place.activation], [f"{base}/size"])
        rows = edit.node("Flatten", [size], [f"{base}/flat"], axis=-1)
        axes = edit.constant(f"{PREFIX}first", np.array([0]))
        outputs.append(edit.node("ReduceMax", [rows, axes], [f"{base}/channels"], keepdims=0))
    write_measuring(model, edit, outputs, work)
    maxima: dict[str, Floats] = {}
    for _, values in stream(work, feeds(), outputs):
        for place, value in zip(found, values, strict=True):
            maxima[place.activation] = np.maximum(maxima.get(place.activation, np.float32(0)), value)
    return maxima


def _scale(activation: Floats, weight: Floats) -> Floats:
    """s_j of equation 4; 1 where a channel or its row is zero."""
    live = (activation > SMALLEST) & (weight > SMALLEST)
    ratio = np.maximum(activation, SMALLEST) ** STRENGTH / np.maximum(weight, SMALLEST) ** (1 - STRENGTH)
    return np.asarray(np.where(live, ratio, 1.0), np.float32)


def _stored(tensor: onnx.TensorProto, linear: Linear) -> Floats:
    """A weight as [K, N]."""
    value = numpy_helper.to_array(tensor)
    return np.asarray(value.T if linear.flip else value, np.float32)


def _replace(tensor: onnx.TensorProto, value: npt.NDArray[Any]) -> None:
    fresh = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name)
    tensor.CopyFrom(fresh)
