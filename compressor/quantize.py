"""Int8 quantization of a float ONNX file after training: ranges, the error of each node, and what must stay in float.

What is quantized and how it is written is decided in compressor.int8; this module measures.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from compressor.int8 import (
    EXTERNAL_ABOVE,
    PREFIX,
    SMALLEST,
    Activations,
    Edit,
    Kept,
    Linear,
    QuantizeError,
    Range,
    add_fake,
    candidates,
    load,
    replace_nodes,
    save,
    write,
)

__all__ = ["Attempt", "Kept", "QuantizeError", "Quantized", "quantize"]

Mode = Literal["static", "dynamic"]
Calibration = Literal["typical", "minmax"]
Batch = Mapping[str, npt.NDArray[Any]]
Feeds = Callable[[], Iterator[Batch]]

SENSITIVITY_BATCHES = 4
"""Calibration batches over which the error of each node is measured."""


@dataclass(frozen=True)
class Attempt:
    """One quantized file that was measured: how many nodes were kept in float for accuracy, and the loss."""

    kept: int
    loss: float


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did.

    Args:
        mode: "static" or "dynamic".
        activations: integer type of the activations.
        calibration: how activation ranges were chosen ("typical", "minmax"); None in dynamic mode.
        nodes: number of quantized nodes.
        kept: every constant-weight node that stayed in float.
        loss: loss of the written file, None if it was not measured.
        attempts: all files that were measured, in order.
        samples: calibration samples that went into the ranges.
    """

    mode: Mode
    activations: Activations
    calibration: Calibration | None
    nodes: int
    kept: tuple[Kept, ...]
    loss: float | None
    attempts: tuple[Attempt, ...]
    samples: int


@dataclass(frozen=True)
class _Settings:
    mode: Mode
    activations: Activations
    calibration: Calibration
    external_above: int
    progress: Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    source: Path
    destination: Path
    work: Path  # where models made for measuring go
    feeds: Feeds
    settings: _Settings


def quantize(
    source: Path,
    destination: Path,
    feeds: Feeds,
    *,
    mode: Mode = "static",
    activations: Activations = "uint8",
    calibration: Calibration = "typical",
    convolutions: bool = False,
    loss: Callable[[Path], float] | None = None,
    max_loss: float = 0.005,
    external_above: int = EXTERNAL_ABOVE,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Write the int8 version of a float ONNX file and say what stayed in float.

    All eligible nodes are quantized first. If `loss` then says more than `max_loss`, they are ranked by the relative
    squared error that int8 causes at their own output, |Y - Y8|^2 / |Y|^2, and the worst 1, 2, 4, 8 ... of them return
    to float until the loss is met or half of them are in float; failing that, the attempt with the lowest loss is kept,
    and the caller decides whether it will do. Without `loss` only the fixed rules of compressor.int8 apply.

    Static activation ranges come from one streaming pass over each sample's minimum and maximum: "typical" takes their
    mean over the samples plus one standard deviation (never beyond the extremes), which clips rare outliers and gains
    resolution for everything else; "minmax" takes the extremes. Memory does not depend on the number of samples.

    Args:
        source: float ONNX file, opset 18 or newer; external data is read where there is some.
        destination: where to write; weights go to `<name>.data` beside it when they exceed `external_above` bytes.
        feeds: called for a fresh stream of calibration batches: input name to array, leading axis = samples, other
            sizes may vary from batch to batch.
        mode: "static" (Q/DQ with fixed activation ranges) or "dynamic" (ranges found at run time, as MatMulInteger,
            which TensorRT does not read).
        activations: "uint8" with a zero point (more accurate) or "int8" symmetric (what TensorRT needs).
            Dynamic is always uint8.
        calibration: how static ranges are found.
        convolutions: also give convolutions Q/DQ inputs, for TensorRT; ONNX Runtime's CPU then only emulates int8.
        loss: measures a quantized file; 0 = as good as float, lower is better.
        max_loss: largest acceptable `loss`.
        external_above: bytes of weights above which they are stored as external data.
        progress: told in a few words about each step.

    Raises:
        QuantizeError: nothing to quantize, no calibration data, inputs missing, or values that are not finite.
    """
    if source.resolve() == destination.resolve():
        raise QuantizeError(f"Source and destination are the same file, {source}; give another destination.")
    if mode == "dynamic" and (activations != "uint8" or convolutions):
        raise QuantizeError(
            "Dynamic int8 has uint8 activations and no convolutions; use static, or leave both options out."
        )
    settings = _Settings(mode, activations, calibration, external_above, progress if progress is not None else _silent)
    linears, kept = candidates(load(source), convolutions=convolutions)
    if not linears:
        raise QuantizeError(
            f"{source.name} has no MatMul or Gemm with a constant float32 weight of at least {SMALLEST} x {SMALLEST}: "
            "int8 has nothing to work on, leave it out for this model."
        )
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=destination.parent) as folder:
        # Beside the result, because a model of several GB may not fit into the system's temporary folder.
        job = _Job(source, destination, Path(folder) / "measure.onnx", feeds, settings)
        ranges, samples = _calibrate(job, linears) if mode == "static" else (None, 0)
        attempts, returned = _fit(job, linears, ranges, loss, max_loss)
    return Quantized(
        mode=mode,
        activations=activations,
        calibration=calibration if mode == "static" else None,
        nodes=len(linears) - len(returned),
        kept=(*kept, *returned),
        loss=next((attempt.loss for attempt in attempts if attempt.kept == len(returned)), None),
        attempts=tuple(attempts),
        samples=samples,
    )


def _fit(
    job: _Job,
    linears: Sequence[Linear],
    ranges: Mapping[str, Range] | None,
    loss: Callable[[Path], float] | None,
    max_loss: float,
) -> tuple[list[Attempt], list[Kept]]:
    """Write the file; return what was measured and the nodes that had to stay in float for accuracy, worst first."""
    _attempt(job, linears, ranges)
    if loss is None:
        return [], []
    attempts = [Attempt(0, float(loss(job.destination)))]
    if attempts[0].loss <= max_loss:
        return attempts, []
    errors = _sensitivity(job, linears, ranges)
    worst = sorted(linears, key=lambda linear: -errors[linear.output])
    for count in _steps(len(worst)):
        _attempt(job, worst[count:], ranges)
        attempts.append(Attempt(count, float(loss(job.destination))))
        if attempts[-1].loss <= max_loss:
            break
    best = min(attempts, key=lambda attempt: math.inf if math.isnan(attempt.loss) else attempt.loss)
    chosen = attempts[-1] if attempts[-1].loss <= max_loss else best
    if chosen is not attempts[-1]:
        _attempt(job, worst[chosen.kept :], ranges)
    return attempts, [_kept_for_accuracy(linear, errors[linear.output]) for linear in worst[: chosen.kept]]


def _attempt(job: _Job, linears: Sequence[Linear], ranges: Mapping[str, Range] | None) -> None:
    settings = job.settings
    settings.progress(f"int8: writing {len(linears)} nodes")
    write(
        job.source,
        job.destination,
        linears,
        ranges,
        activations=settings.activations,
        external_above=settings.external_above,
    )


def _steps(nodes: int) -> list[int]:
    """How many nodes to keep in float, attempt after attempt: powers of two, then half.

    >>> _steps(49), _steps(2), _steps(1)
    ([1, 2, 4, 8, 16, 24], [1], [])
    """
    half = nodes // 2
    powers = itertools.takewhile(lambda count: count < half, (2**i for i in itertools.count()))
    return [*powers, half] if half > 0 else []


def _kept_for_accuracy(linear: Linear, error: float) -> Kept:
    return Kept(linear.node, linear.module, f"accuracy: relative output error {error:.2g} in int8", error)


def _silent(_: str) -> None:
    return


def _calibrate(job: _Job, linears: Sequence[Linear]) -> tuple[dict[str, Range], int]:
    """Activation ranges from one pass over the calibration stream, and the number of samples.

    The graph reduces each activation to one minimum and maximum per index of its leading axis (samples, windows or
    tokens), so nothing large leaves it; rows are joined into samples here.
    """
    names = list(dict.fromkeys(linear.activation for linear in linears))
    model = load(job.source)
    edit = Edit(model.graph)
    outputs = [output for name in names for output in _extremes(edit, name)]
    _measure(model, edit, outputs, job)
    moments, extreme = np.zeros((2, 2, len(names))), np.zeros((2, len(names)))  # 0 belongs to every range
    samples = 0
    for batch, rows in _stream(job.work, job.feeds(), outputs):
        _check_finite(names, rows[2::3])
        low = [_per_sample(values, batch, np.minimum) for values in rows[0::3]]
        high = [_per_sample(values, batch, np.maximum) for values in rows[1::3]]
        for power in (1, 2):
            moments[power - 1] += batch * np.array([[(v**power).mean() for v in side] for side in (low, high)])
        extreme[0] = np.minimum(extreme[0], [values.min() for values in low])
        extreme[1] = np.maximum(extreme[1], [values.max() for values in high])
        samples += batch
        job.settings.progress(f"int8: {samples} calibration samples")
    if samples == 0:
        raise QuantizeError("There is no calibration data; static int8 needs at least one batch, or use dynamic int8.")
    reach = _typical(moments / samples, extreme) if job.settings.calibration == "typical" else extreme
    return {name: (float(low), float(high)) for name, low, high in zip(names, *reach, strict=True)}, samples


def _typical(moments: npt.NDArray[np.float64], extreme: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranges [2, tensors]: mean of the samples' minima less, of their maxima plus one standard deviation."""
    mean, square = moments
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return np.stack([np.maximum(mean[0] - deviation[0], extreme[0]), np.minimum(mean[1] + deviation[1], extreme[1])])


def _check_finite(names: Sequence[str], sums: Sequence[npt.NDArray[Any]]) -> None:
    for name, value in zip(names, sums, strict=True):
        if not np.isfinite(value).all():
            raise QuantizeError(f"The activation {name} has NaN or infinity; check the model and the calibration data.")


def _extremes(edit: Edit, name: str) -> tuple[str, str, str]:
    """Add nodes for minimum, maximum and sum of each index of the leading axis.

    The sum is there to notice a NaN: ONNX Runtime's minimum and maximum pass over it.
    """
    base = f"{PREFIX}{name}"
    inputs = (edit.node("Flatten", [name], [f"{base}/rows"], axis=1), edit.constant(f"{PREFIX}axes", np.array([1])))
    low = edit.node("ReduceMin", inputs, [f"{base}/low"], keepdims=0)
    high = edit.node("ReduceMax", inputs, [f"{base}/high"], keepdims=0)
    return low, high, edit.node("ReduceSum", inputs, [f"{base}/sum"], keepdims=0)


def _per_sample(rows: npt.NDArray[Any], samples: int, reduce: np.ufunc) -> npt.NDArray[np.float64]:
    """Join the rows of each sample; rows that do not divide among the samples (no batch axis) count as one."""
    groups = samples if samples and len(rows) % samples == 0 else 1
    return np.asarray(reduce.reduce(rows.reshape(groups, -1), axis=1), np.float64)


def _sensitivity(job: _Job, linears: Sequence[Linear], ranges: Mapping[str, Range] | None) -> dict[str, float]:
    """Relative squared output error of each node when it alone is in int8, |Y - Y8|^2 / |Y|^2, over a few batches."""
    job.settings.progress("int8: error of each node")
    model = load(job.source)
    edit = Edit(model.graph)
    wanted = {linear.output: linear for linear in linears}
    outputs: list[str] = []
    for node in model.graph.node:
        edit.nodes.append(node)
        linear = wanted.get(node.output[0]) if node.output else None
        if linear is not None:
            outputs += _error_nodes(edit, linear, node, ranges, job.settings.activations)
    nodes, edit.nodes = edit.nodes, []
    replace_nodes(model.graph, nodes)
    _measure(model, edit, outputs, job)
    sums = np.zeros(len(outputs))
    for _, values in _stream(job.work, itertools.islice(job.feeds(), SENSITIVITY_BATCHES), outputs):
        sums += np.array([float(value) for value in values])
    errors = sums[::2] / np.maximum(sums[1::2], np.finfo(np.float64).tiny)
    return {linear.output: float(error) for linear, error in zip(linears, errors, strict=True)}


def _error_nodes(
    edit: Edit, linear: Linear, node: onnx.NodeProto, ranges: Mapping[str, Range] | None, activations: Activations
) -> tuple[str, str]:
    """Add a second, int8 version of a node that nothing reads but its squared difference from the float one."""
    base = f"{PREFIX}{linear.output}"
    if ranges is None:
        activation = edit.once(
            "DequantizeLinear", edit.dynamic(linear.activation), f"{PREFIX}{linear.activation}/float"
        )
    else:
        activation = edit.grid(linear.activation, ranges[linear.activation], activations)
    add_fake(edit, linear, node, activation, f"{base}/copy")
    gap = edit.node("Sub", [f"{base}/copy", linear.output], [f"{base}/gap"])
    error = edit.node("ReduceSumSquare", [gap], [f"{base}/error"], keepdims=0)
    return error, edit.node("ReduceSumSquare", [linear.output], [f"{base}/norm"], keepdims=0)


def _measure(model: onnx.ModelProto, edit: Edit, outputs: Sequence[str], job: _Job) -> None:
    """Save a model that has the given values as its only outputs; what they do not need is not computed."""
    model.graph.node.extend(edit.nodes)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    save(model, job.work, job.settings.external_above)


def _stream(path: Path, feeds: Iterable[Batch], outputs: Sequence[str]) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """Run each batch, yielding its number of samples and the outputs; it is released before the next is asked for."""
    session = _session(path)
    names = [value.name for value in session.get_inputs()]
    for batch in feeds:
        missing = [name for name in names if name not in batch]
        if missing:
            raise QuantizeError(
                f"The calibration batch has inputs {sorted(batch)}, and {missing} is missing; give every input."
            )
        size = len(batch[names[0]])
        try:
            values = session.run(list(outputs), {name: batch[name] for name in names})
        except Exception as error:  # ONNX Runtime's errors have no common base class
            shapes = {name: batch[name].shape for name in names}
            raise QuantizeError(f"The calibration batch {shapes} does not run through the model: {error}") from error
        del batch
        yield size, values


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise QuantizeError(
            "Int8 is calibrated with ONNX Runtime, which is missing: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: nothing may be written between the lines of a progress display
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
