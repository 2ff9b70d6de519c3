"""Errors of int8 on the output of an ONNX model: of a whole file, and what each layer adds to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper

from compressor.models.base import EvaluatedOutput
from compressor.quality.heads.base import Head
from compressor.quantize.intermediate_values import Batch, beside, save_with_outputs, stream
from compressor.quantize.qdq_rewrite import (
    PREFIX,
    Activations,
    Edit,
    Linear,
    QuantizeError,
    Range,
    add_fake,
    load,
    paired,
    replace_nodes,
)
from passes.analysis.redundancy import output_mask

Array = npt.NDArray[Any]
Feeds = Callable[[], Iterable[Batch]]
Outputs = Mapping[str, Array]

SAMPLES = 16
"""Number of calibration samples on which errors of the output are measured."""

SWITCHES = f"{PREFIX}switches"


def squared_error(outputs: Outputs, exact: Outputs, feeds: Batch) -> float:
    """Return |Y - Y8|^2 / |Y|^2, averaged over the outputs."""
    errors = []
    for name, goal in exact.items():
        wide = goal.astype(np.float64)
        norm = max(float(np.square(wide).sum()), float(np.finfo(np.float64).tiny))
        errors.append(float(np.square(outputs[name] - wide).sum()) / norm)
    return float(np.mean(errors))


@dataclass(frozen=True)
class Judge:
    """How outputs in int8 are compared with those of the float model.

    Attributes:
        answers: names of the outputs; all of floating point if empty.
        distance: takes outputs by name, those of the float model, and the inputs, and returns their distance.
    """

    answers: tuple[str, ...] = ()
    distance: Callable[[Outputs, Outputs, Batch], float] = squared_error


SQUARED = Judge()


@dataclass(frozen=True)
class HeadDivergence:
    """The mean divergence of outputs from others, by the head of a model.

    Attributes:
        output: the output that is evaluated.
        head: how it is evaluated.
    """

    output: EvaluatedOutput
    head: Head

    def __call__(self, outputs: Mapping[str, Any], exact: Mapping[str, Any], feeds: Mapping[str, Any]) -> float:
        """Return the divergence; `feeds` has the mask of the tokens."""
        changed, original = (torch.from_numpy(np.asarray(self.output.of(each))) for each in (outputs, exact))
        mask = output_mask(feeds) if original.ndim > 2 else None
        return float(self.head.divergence(changed, original, None if mask is None else torch.from_numpy(mask)).mean())


@dataclass(frozen=True)
class OutputErrors:
    """Errors of a model on its output with one layer in int8 and all others in float.

    The reverse, one layer in float among all others in int8, would rank by noise: how the others round depends on every
    bit of their inputs.

    Attributes:
        alone: error by name of the layer's output.
    """

    alone: Mapping[str, float]

    def share(self, layer: str) -> float:
        """Return the share of a layer in the sum of all errors."""
        whole = sum(self.alone.values())
        return self.alone[layer] / whole if 0.0 < whole < math.inf else 0.0


def file_error(source: Path, file: Path, feeds: Feeds, judge: Judge) -> float | None:
    """Return the error of the output of a file against that of the float file `source`; None without samples.

    Args:
        source: float ONNX file.
        file: ONNX file with the same inputs and outputs.
        feeds: returns a new iterator over the calibration batches.
        judge: the outputs and the distance between them.

    Raises:
        QuantizeError: the samples do not fit the model.
    """
    names = _outputs(load(source), judge)
    batch = _few(feeds())
    if batch is None:
        return None
    exact, rounded = (next(stream(path, [batch], names))[1] for path in (source, file))
    return _error(judge, names, exact, batch, rounded)


def layer_errors(
    source: Path,
    work: Path,
    linears: Sequence[Linear],
    ranges: Mapping[str, Range] | None,
    activations: Activations,
    feeds: Feeds,
    judge: Judge,
) -> OutputErrors:
    """Measure the error of the output with each layer alone in int8.

    One model holds every layer in both forms, and an input switches between them, so it is written once.

    Args:
        source: float ONNX file.
        work: path of the temporary model.
        linears: layers in int8.
        ranges: activation ranges; None for dynamic ones.
        activations: integer type of the activations.
        feeds: returns a new iterator over the calibration batches.
        judge: the outputs and the distance between them.

    Raises:
        QuantizeError: there is no calibration data, or it does not fit the model.
    """
    model = load(source)
    calibration, names = feeds(), _outputs(model, judge)
    batch = _few(calibration)
    if batch is None:
        raise QuantizeError(
            "int8 exceeds the largest loss, and without calibration data the effect of its layers cannot be measured; "
            "give at least one batch."
        )
    edit = Edit(model.graph)
    number = itertools.count()
    for node, linear in paired(model.graph, linears):
        if linear is None:
            edit.nodes.append(node)
        else:
            _add_both(edit, linear, node, ranges, activations, next(number))
    nodes, edit.nodes = edit.nodes, []
    replace_nodes(model.graph, nodes)
    model.graph.input.append(helper.make_tensor_value_info(SWITCHES, onnx.TensorProto.BOOL, [len(linears)]))
    save_with_outputs(model, edit, names, work)
    order = [linear.output for _, linear in paired(load(source).graph, linears) if linear is not None]
    exact = next(stream(work, [{**batch, SWITCHES: np.zeros(len(linears), dtype=bool)}], names))[1]
    each = ({**batch, SWITCHES: switch} for switch in np.eye(len(linears), dtype=bool))
    errors = stream(work, beside(calibration, each, len(linears)), names, partial(_error, judge, names, exact, batch))
    return OutputErrors(dict(zip(order, (error for _, error in errors), strict=True)))


def _add_both(
    edit: Edit,
    linear: Linear,
    node: onnx.NodeProto,
    ranges: Mapping[str, Range] | None,
    activations: Activations,
    number: int,
) -> None:
    """Add a layer in float and in int8, and a switch between them."""
    base = f"{PREFIX}{linear.output}"
    exact = onnx.NodeProto()
    exact.CopyFrom(node)
    exact.output[0] = exact.name = f"{base}/exact"
    edit.nodes.append(exact)
    if ranges is None:
        dynamic = edit.dynamic(linear.activation)
        activation = edit.once("DequantizeLinear", dynamic, f"{PREFIX}{linear.activation}/float")
    else:
        activation = edit.grid(linear.activation, ranges[linear.activation], activations)
    add_fake(edit, linear, node, activation, f"{base}/copy", activations)
    index = edit.constant(f"{base}/index", np.array(number))
    switch = edit.node("Gather", [SWITCHES, index], [f"{base}/switch"])
    edit.node("Where", [switch, f"{base}/copy", f"{base}/exact"], [linear.output])


def _outputs(model: onnx.ModelProto, judge: Judge) -> list[str]:
    """Return the names of the outputs to compare."""
    if judge.answers:
        return list(judge.answers)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED)
    return [value.name for value in model.graph.output if value.type.tensor_type.elem_type in floats]


def _few(feeds: Iterable[Batch]) -> Batch | None:
    """Return the first `SAMPLES` calibration samples of the first batch; None if there is none."""
    batch = next(iter(feeds), None)
    return None if batch is None else {name: value[:SAMPLES] for name, value in batch.items()}


def _error(judge: Judge, names: Sequence[str], exact: Sequence[Array], feeds: Batch, values: Sequence[Array]) -> float:
    """Return the distance of outputs from those of the float model; infinity for NaN."""
    named, goals = (dict(zip(names, each, strict=True)) for each in (values, exact))
    error = judge.distance(named, goals, feeds)
    return error if np.isfinite(error) else math.inf
