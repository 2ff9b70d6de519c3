"""SmoothQuant on an ONNX file: scaling that moves activation outliers into the weights of the next Linears.

If only Linears consume the output of a norm, the norm's scale (and shift) of channel j is divided by s_j and row j of
the weights is multiplied by s_j. The float result is unchanged, and the few large channels that waste the 256 levels of
int8 become smaller. s_j = max|X_j|^a / max|W_j|^(1 - a), a = 0.5 (Xiao et al. 2023, arXiv:2211.10438, equation 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from compressor.quantize.intermediate_values import Batch, save_with_outputs, stream
from compressor.quantize.qdq_rewrite import EXTERNAL_ABOVE, PREFIX, Edit, Linear, candidates, load, save, used

STRENGTH = 0.5
SMALLEST = 1e-5
"""Smallest channel maximum used in a scale; a channel that is always zero stays unchanged."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SmoothableNorm:
    """A norm to smooth: its output, the initializers of its scale and shift, and the Linears that consume it."""

    activation: str
    parameters: tuple[str, ...]
    linears: tuple[Linear, ...]


def smooth(source: Path, destination: Path, feeds: Callable[[], Iterable[Batch]], work: Path) -> int:
    """Write an equivalent float ONNX file with smoothed activations.

    Args:
        source: float ONNX file.
        destination: output path.
        feeds: returns a new iterator over the calibration batches.
        work: path for the temporary model that outputs the channel maxima.

    Returns:
        The number of norms smoothed. If it is 0 (no such norm, or no batch), no file is written.
    """
    norms = find_norms(load(source))
    if not norms:
        return 0
    maxima = _channel_maxima(source, work, norms, feeds)
    if not maxima:
        return 0
    model = load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for norm in norms:
        weights = {linear.weight: _stored(tensors[linear.weight], linear) for linear in norm.linears}
        scale = _scale(maxima[norm.activation], np.max([np.abs(w).max(axis=1) for w in weights.values()], axis=0))
        for name in norm.parameters:
            _replace(tensors[name], numpy_helper.to_array(tensors[name]) / scale)
        for linear in norm.linears:
            smoothed = weights[linear.weight] * scale[:, None]
            _replace(tensors[linear.weight], smoothed.T if linear.flip else smoothed)
    save(model, destination, EXTERNAL_ABOVE)
    return len(norms)


def find_norms(model: onnx.ModelProto) -> list[SmoothableNorm]:
    """Return the norms to smooth: all consumers are Linears, and scale, shift and weights have no other consumer."""
    linears, _ = candidates(model, convolutions=False)
    consumers = Counter(used(model.graph))  # graph outputs count as consumers
    stored = {tensor.name for tensor in model.graph.initializer}
    by_activation: dict[str, list[Linear]] = {}
    for linear in linears:
        by_activation.setdefault(linear.activation, []).append(linear)
    norms = []
    for node in model.graph.node:
        parameters = _parameters(node, stored)
        fed = by_activation.get(node.output[0], []) if node.output else []
        only_linears = bool(fed) and len(fed) == consumers[node.output[0]]
        shared = [name for name in (*parameters, *(linear.weight for linear in fed)) if consumers[name] != 1]
        plain = all(linear.weight in stored for linear in fed)
        if parameters and only_linears and plain and not shared:
            norms.append(SmoothableNorm(node.output[0], parameters, tuple(fed)))
    return norms


def _parameters(node: onnx.NodeProto, stored: set[str]) -> tuple[str, ...]:
    """Return the scale and shift of a LayerNormalization, or the scale of the final Mul of an RMS norm."""
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        names = tuple(node.input[1:])
        return names if all(name in stored for name in names) else ()
    if node.op_type == "Mul":
        return tuple(name for name in node.input if name in stored)[:1]
    return ()


def _channel_maxima(
    source: Path, work: Path, norms: list[SmoothableNorm], feeds: Callable[[], Iterable[Batch]]
) -> dict[str, Floats]:
    """Measure max|X_j| of the output of each norm per channel, over all samples."""
    model = load(source)
    edit = Edit(model.graph)
    outputs = []
    for norm in norms:
        base = f"{PREFIX}{norm.activation}"
        size = edit.node("Abs", [norm.activation], [f"{base}/size"])
        rows = edit.node("Flatten", [size], [f"{base}/flat"], axis=-1)
        axes = edit.constant(f"{PREFIX}first", np.array([0]))
        outputs.append(edit.node("ReduceMax", [rows, axes], [f"{base}/channels"], keepdims=0))
    save_with_outputs(model, edit, outputs, work)
    maxima: dict[str, Floats] = {}
    for _, values in stream(work, feeds(), outputs):
        for norm, value in zip(norms, values, strict=True):
            maxima[norm.activation] = np.maximum(maxima.get(norm.activation, np.float32(0)), value)
    return maxima


def _scale(activation: Floats, weight: Floats) -> Floats:
    """Return s_j of equation 4, and 1 where a channel or its weight row is zero."""
    live = (activation > SMALLEST) & (weight > SMALLEST)
    ratio = np.maximum(activation, SMALLEST) ** STRENGTH / np.maximum(weight, SMALLEST) ** (1 - STRENGTH)
    return np.asarray(np.where(live, ratio, 1.0), np.float32)


def _stored(tensor: onnx.TensorProto, linear: Linear) -> Floats:
    """Return a weight as [K, N]."""
    value = numpy_helper.to_array(tensor)
    return np.asarray(value.T if linear.flip else value, np.float32)


def _replace(tensor: onnx.TensorProto, value: npt.NDArray[Any]) -> None:
    fresh = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name)
    tensor.CopyFrom(fresh)
