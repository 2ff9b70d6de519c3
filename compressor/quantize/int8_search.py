"""Int8 quantization of a float ONNX file after training: which ranges, and what must stay in float.

What is quantized and how it is written is decided in compressor.int8; this module tries and measures.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from compressor.choices import Calibration
from compressor.quantize.calibration import BY_EXTREMES, Extremes, Histograms, extremes, histograms
from compressor.quantize.intermediate_values import Batch, stream, write_measuring
from compressor.quantize.qdq_rewrite import (
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
    paired,
    replace_nodes,
    write,
)
from compressor.quantize.smoothquant import smooth

__all__ = ["Attempt", "Kept", "QuantizeError", "Quantized", "quantize"]

Mode = Literal["static", "dynamic"]
Feeds = Callable[[], Iterator[Batch]]

SENSITIVITY_BATCHES = 4
"""Calibration batches over which the error of each node is measured."""

ENOUGH = 0.2
"""Share of the loss allowed at which no other way to find ranges is tried any more."""


@dataclass(frozen=True)
class Attempt:
    """One quantized file that was measured: how many nodes were kept in float for accuracy, and the loss."""

    kept: int
    loss: float


@dataclass(frozen=True)
class Calibrated:
    """A way to find ranges that was tried: the method (None: at run time), whether after smoothing, and the loss."""

    method: Calibration | None
    smoothed: bool
    loss: float | None


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did.

    Args:
        mode: "static" or "dynamic".
        activations: integer type of the activations.
        calibration: how activation ranges were chosen (see compressor.calibration); None in dynamic mode.
        smoothed: whether outliers were moved from activations into weights first (see compressor.smooth).
        calibrations: every way to find ranges that was tried, in order.
        nodes: number of quantized nodes.
        kept: every constant-weight node that stayed in float.
        loss: loss of the written file, None if it was not measured.
        attempts: all files that were measured, in order.
        samples: calibration samples that went into the ranges.
    """

    mode: Mode
    activations: Activations
    calibration: Calibration | None
    smoothed: bool
    calibrations: tuple[Calibrated, ...]
    nodes: int
    kept: tuple[Kept, ...]
    loss: float | None
    attempts: tuple[Attempt, ...]
    samples: int


@dataclass(frozen=True)
class _Settings:
    mode: Mode
    activations: Activations
    calibration: Calibration | Literal["auto"]
    external_above: int
    progress: Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    source: Path
    destination: Path
    folder: Path  # where models made for measuring go
    feeds: Feeds
    settings: _Settings

    @property
    def work(self) -> Path:
        """The model made for measuring."""
        return self.folder / "measure.onnx"


def quantize(
    source: Path,
    destination: Path,
    feeds: Feeds,
    *,
    mode: Mode = "static",
    activations: Activations = "uint8",
    calibration: Calibration | Literal["auto"] = "auto",
    convolutions: bool = False,
    loss: Callable[[Path], float] | None = None,
    max_loss: float = 0.005,
    external_above: int = EXTERNAL_ABOVE,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Write the int8 version of a float ONNX file and say what stayed in float.

    All eligible nodes are quantized first, with ranges as `calibration` says. "auto" tries the methods of
    compressor.calibration, then SmoothQuant, until one loses a fifth of what is allowed or less, and keeps the best. If
    that loses more than `max_loss`, nodes are ranked by the relative squared error that int8 causes at their own
    output, |Y - Y8|^2 / |Y|^2, and the worst 1, 2, 4, 8 ... of them return to float until the loss is met or half of
    them are in float; failing that, the attempt with the lowest loss is kept, and the caller decides whether it will
    do. Without `loss` only the fixed rules of compressor.int8 and the first method apply.

    Args:
        source: float ONNX file, opset 18 or newer; external data is read where there is some.
        destination: where to write; weights go to `<name>.data` beside it when they exceed `external_above` bytes.
        feeds: called for a fresh stream of calibration batches: input name to array, leading axis = samples, other
            sizes may vary from batch to batch.
        mode: "static" (Q/DQ with fixed activation ranges) or "dynamic" (ranges found at run time, as MatMulInteger,
            which TensorRT does not read).
        activations: "uint8" with a zero point (more accurate) or "int8" symmetric (what TensorRT needs).
            Dynamic is always uint8.
        calibration: how static ranges are found: a method, or "auto".
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
        job = _Job(source, destination, Path(folder), feeds, settings)
        trial, tried, samples = _calibrate(job, linears, loss, max_loss)
        attempts, returned = _fit(trial, linears, loss, max_loss)
    return Quantized(
        mode=mode,
        activations=activations,
        calibration=trial.method,
        smoothed=trial.smoothed,
        calibrations=tuple(tried),
        nodes=len(linears) - len(returned),
        kept=(*kept, *returned),
        loss=next((attempt.loss for attempt in attempts if attempt.kept == len(returned)), None),
        attempts=tuple(attempts),
        samples=samples,
    )


@dataclass(frozen=True)
class _Trial:
    """One way to find ranges: the job (with a smoothed source, maybe), the method, the ranges, the loss once known."""

    job: _Job
    method: Calibration | None
    ranges: Mapping[str, Range] | None
    smoothed: bool = False
    loss: float | None = None


def _calibrate(
    job: _Job, linears: Sequence[Linear], loss: Callable[[Path], float] | None, max_loss: float
) -> tuple[_Trial, list[Calibrated], int]:
    """Write the file with the best ranges; return that trial, all that were tried, and how many samples there were."""
    activations = [linear.activation for linear in linears]
    static = job.settings.mode == "static"
    found = extremes(job.source, job.work, activations, job.feeds, job.settings.progress) if static else None
    tried: list[Calibrated] = []
    best = last = None
    for untried in _trials(job, found):
        _attempt(untried, linears)
        trial = last = untried if loss is None else replace(untried, loss=float(loss(job.destination)))
        tried.append(Calibrated(trial.method, trial.smoothed, trial.loss))
        if best is None or _badness(trial.loss) < _badness(best.loss):
            best = trial
        if trial.loss is None or trial.loss <= ENOUGH * max_loss:
            break
    assert best is not None
    if last is not best:
        _attempt(best, linears)
    return best, tried, 0 if found is None else found.samples


def _badness(loss: float | None) -> float:
    return 0.0 if loss is None else math.inf if math.isnan(loss) else loss


def _trials(job: _Job, found: Extremes | None) -> Iterator[_Trial]:
    """The ways to find ranges, cheap and mostly good ones first; each is made when it is asked for."""
    wanted = job.settings.calibration
    if found is None:
        yield _Trial(job, None, None)
        if wanted == "auto" and (smoother := _smoothed(job)) is not None:
            yield _Trial(smoother, None, None, smoothed=True)
        return
    if wanted != "auto":
        yield from _by_methods(job, found, (wanted,))
        return
    yield from _by_methods(job, found, ("typical",))
    if (smoother := _smoothed(job)) is not None:
        again = extremes(smoother.source, job.work, found.names, job.feeds, job.settings.progress)
        yield from _by_methods(smoother, again, ("typical", "mse"), smoothed=True)
    yield from _by_methods(job, found, ("minmax", "mse", "percentile", "entropy"))


def _by_methods(
    job: _Job, found: Extremes, methods: Sequence[Calibration], *, smoothed: bool = False
) -> Iterator[_Trial]:
    """One trial for each method; histograms are made once, when the first method needs them."""
    counted: Histograms | None = None
    for method in methods:
        if method in BY_EXTREMES:
            yield _Trial(job, method, found.ranges(method), smoothed)
            continue
        if counted is None:
            job.settings.progress("int8: histograms of the activations")
            counted = histograms(job.source, job.work, found, job.feeds)
        yield _Trial(job, method, counted.ranges(method, job.settings.activations), smoothed)


def _smoothed(job: _Job) -> _Job | None:
    """The same job on a file whose activations were smoothed, where there is something to smooth."""
    job.settings.progress("int8: smoothing the activations")
    smoother = replace(job, source=job.folder / "smooth.onnx")
    return smoother if smooth(job.source, smoother.source, job.feeds, job.work) else None


def _fit(
    trial: _Trial, linears: Sequence[Linear], loss: Callable[[Path], float] | None, max_loss: float
) -> tuple[list[Attempt], list[Kept]]:
    """Return nodes to float until the loss is met; what was measured, and the nodes in float, worst first."""
    if loss is None or trial.loss is None:
        return [], []
    attempts = [Attempt(0, trial.loss)]
    if trial.loss <= max_loss:
        return attempts, []
    errors = _sensitivity(trial, linears)
    worst = sorted(linears, key=lambda linear: -errors[linear.output])
    for count in _steps(len(worst)):
        _attempt(trial, worst[count:])
        attempts.append(Attempt(count, float(loss(trial.job.destination))))
        if attempts[-1].loss <= max_loss:
            break
    best = min(attempts, key=lambda attempt: _badness(attempt.loss))
    chosen = attempts[-1] if attempts[-1].loss <= max_loss else best
    if chosen is not attempts[-1]:
        _attempt(trial, worst[chosen.kept :])
    return attempts, [_kept_for_accuracy(linear, errors[linear.output]) for linear in worst[: chosen.kept]]


def _attempt(trial: _Trial, linears: Sequence[Linear]) -> None:
    job, settings = trial.job, trial.job.settings
    settings.progress(f"int8: writing {len(linears)} nodes")
    write(
        job.source,
        job.destination,
        linears,
        trial.ranges,
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


def _sensitivity(trial: _Trial, linears: Sequence[Linear]) -> dict[str, float]:
    """Relative squared output error of each node when it alone is in int8, |Y - Y8|^2 / |Y|^2, over a few batches."""
    job, ranges = trial.job, trial.ranges
    job.settings.progress("int8: error of each node")
    model = load(job.source)
    edit = Edit(model.graph)
    outputs: list[str] = []
    for node, linear in paired(model.graph, linears):
        edit.nodes.append(node)
        if linear is not None:
            outputs += _error_nodes(edit, linear, node, ranges, job.settings.activations)
    nodes, edit.nodes = edit.nodes, []
    replace_nodes(model.graph, nodes)
    write_measuring(model, edit, outputs, job.work)
    sums = np.zeros(len(outputs))
    for _, values in stream(job.work, itertools.islice(job.feeds(), SENSITIVITY_BATCHES), outputs):
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
