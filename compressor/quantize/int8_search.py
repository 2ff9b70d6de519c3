"""Post-training int8 quantization of a float ONNX file: search for activation ranges and for nodes to keep in float.

`compressor.quantize.qdq_rewrite` selects and rewrites the nodes; this module writes candidate files and measures them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from compressor.choices import Calibration
from compressor.quantize.calibration import BY_EXTREMES, Extremes, Histograms, extremes, histograms
from compressor.quantize.intermediate_values import Batch
from compressor.quantize.output_error import SQUARED, Judge, OutputErrors, file_error, layer_errors
from compressor.quantize.qdq_rewrite import (
    EXTERNAL_ABOVE,
    TYPED_OPSET,
    Activations,
    Kept,
    Linear,
    NothingToQuantizeError,
    QuantizeError,
    Range,
    candidates,
    in_opset,
    load,
    save,
    write,
)
from compressor.quantize.smoothquant import smooth

__all__ = ["Attempt", "Kept", "QuantizeError", "Quantized", "quantize"]

Mode = Literal["static", "dynamic"]
Feeds = Callable[[], Iterable[Batch]]

ATTEMPTS = 6
"""Numbers of nodes kept in float that are tried at most."""

FEW = 4
"""Number of nodes up to which one more node at a time returns to float."""

HOPELESS = 2.0
"""Error of the output, relative to the least of the calibrations so far, above which a loss is not measured."""

ENOUGH = 0.2
"""Share of the allowed loss at which the search for ranges stops."""


@dataclass(frozen=True)
class Attempt:
    """A measured file: the number of nodes kept in float for accuracy, and the loss."""

    kept: int
    loss: float


@dataclass(frozen=True)
class Calibrated:
    """A calibration that was tried.

    Args:
        method: the method; None for dynamic ranges.
        smoothed: whether SmoothQuant came first.
        loss: measured loss; None if it was not measured, because the error is far above that of another calibration.
        error: error of the model's output on a few calibration samples; None if it was not needed.
    """

    method: Calibration | None
    smoothed: bool
    loss: float | None
    error: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize`.

    Args:
        mode: "static" or "dynamic".
        activations: integer type of the activations.
        calibration: calibration method of the file (see `compressor.quantize.calibration`); None in dynamic mode.
        smoothed: whether SmoothQuant was applied first (see `compressor.quantize.smoothquant`).
        calibrations: all calibrations tried, in order.
        nodes: number of quantized nodes.
        kept: constant-weight nodes that stayed in float.
        loss: loss of the written file, None if not measured.
        attempts: all measured files with the final ranges, in order.
        samples: number of calibration samples used for the ranges.
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
    judge: Judge


@dataclass(frozen=True)
class _Job:
    source: Path
    destination: Path
    folder: Path  # for temporary models
    feeds: Feeds
    settings: _Settings

    @property
    def work(self) -> Path:
        """Path of the temporary model that outputs intermediate values."""
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
    judge: Judge = SQUARED,
) -> Quantized:
    """Quantize a float ONNX file to int8 or fp8 and return the nodes that stay in float.

    All eligible nodes are quantized first. With `calibration="auto"`, the methods of `compressor.quantize.calibration`
    and SmoothQuant are tried until the loss is at most a fifth of `max_loss`, and the best is kept. The loss of a
    calibration is not measured if the error of its output is more than `HOPELESS` times the least so far. If the least
    loss exceeds `max_loss`, nodes are ranked by their effect on the model's output: its error when only this node is in
    int8 (see `compressor.quantize.output_error`). The fewest of the worst nodes return to float
    that meet the loss, at most half of all. If the loss is still not met, the attempt with the lowest loss is kept, and
    the caller decides whether to accept it. Without `loss`, only the fixed rules of `compressor.quantize.qdq_rewrite`
    and the first method apply.

    Args:
        source: float ONNX file, opset 18 or newer, with or without external data.
        destination: output path; weights are saved in `<name>.data` next to it if they exceed `external_above` bytes.
        feeds: returns a new iterator over the calibration batches: input name to array, leading axis = samples; other
            sizes may vary between batches.
        mode: "static" (Q/DQ with fixed activation ranges) or "dynamic" (ranges computed at run time, as MatMulInteger,
            which TensorRT does not support).
        activations: "uint8" with a zero point (more accurate), symmetric "int8" (required by TensorRT), or "fp8", which
            applies to weights too. Dynamic mode always uses uint8.
        calibration: calibration method of static ranges, or "auto".
        convolutions: also give convolutions Q/DQ inputs, for TensorRT; ONNX Runtime's CPU kernels only emulate them.
        loss: returns the loss of a quantized file; 0 = as good as float, lower is better.
        max_loss: largest acceptable `loss`.
        external_above: weight size in bytes above which weights are stored as external data.
        progress: called with a short message at each step.
        judge: compares outputs in int8 with those of the float model.

    Raises:
        QuantizeError: there is no node to quantize or no calibration data, an input is missing, or a value is not
            finite.
    """
    if source.resolve() == destination.resolve():
        raise QuantizeError(f"Source and destination are the same file, {source}; give another destination.")
    if mode == "dynamic" and (activations != "uint8" or convolutions):
        raise QuantizeError(
            "Dynamic int8 has uint8 activations and no convolutions; use static, or leave both options out."
        )
    settings = _Settings(
        mode, activations, calibration, external_above, progress if progress is not None else _silent, judge
    )
    linears, kept = candidates(load(source), convolutions=convolutions)
    if not linears:
        name = "fp8" if activations == "fp8" else "int8"
        raise NothingToQuantizeError(source, name)
    with tempfile.TemporaryDirectory(prefix=".int8-", dir=destination.parent) as folder:
        # Next to the result: a model of several GB may not fit into the system's temporary folder.
        job = _Job(source, destination, Path(folder), feeds, settings)
        if activations == "fp8":
            job = replace(job, source=job.folder / "source.onnx")
            save(in_opset(load(source), TYPED_OPSET), job.source, external_above)
        trial, tried, samples = _calibrate(job, linears, loss, max_loss)
        attempts, returned = _return_to_float(trial, linears, loss, max_loss)
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
    """A calibration to try: the job (its source may be smoothed), the method, the ranges, and the measured loss."""

    job: _Job
    method: Calibration | None
    ranges: Mapping[str, Range] | None
    smoothed: bool = False
    loss: float | None = None


def _calibrate(
    job: _Job, linears: Sequence[Linear], loss: Callable[[Path], float] | None, max_loss: float
) -> tuple[_Trial, list[Calibrated], int]:
    """Write the file with the best ranges; return its trial, all calibrations tried, and the number of samples."""
    activations = [linear.activation for linear in linears]
    static = job.settings.mode == "static"
    measured = extremes(job.source, job.work, activations, job.feeds, job.settings.progress) if static else None
    tried: list[Calibrated] = []
    best = last = None
    least = math.inf
    for untried in _trials(job, measured):
        _write_attempt(untried, linears)
        last, error = untried, None
        if loss is not None and job.settings.calibration == "auto":
            error = file_error(job.source, job.destination, job.feeds, job.settings.judge)
            if error is not None and error > HOPELESS * least:
                tried.append(Calibrated(untried.method, untried.smoothed, None, error))
                continue
            least = least if error is None else min(least, error)
        trial = last = untried if loss is None else replace(untried, loss=float(loss(job.destination)))
        tried.append(Calibrated(trial.method, trial.smoothed, trial.loss, error))
        if best is None or _sort_key(trial.loss) < _sort_key(best.loss):
            best = trial
        if trial.loss is None or trial.loss <= ENOUGH * max_loss:
            break
    assert best is not None
    if last is not best:
        _write_attempt(best, linears)
    return best, tried, 0 if measured is None else measured.samples


def _sort_key(loss: float | None) -> float:
    return 0.0 if loss is None else math.inf if math.isnan(loss) else loss


def _trials(job: _Job, measured: Extremes | None) -> Iterator[_Trial]:
    """Yield the calibrations to try, cheap and usually good ones first; each is computed on demand."""
    calibration = job.settings.calibration
    if measured is None:
        yield _Trial(job, None, None)
        if calibration == "auto" and (smoothed := _smoothed(job)) is not None:
            yield _Trial(smoothed, None, None, smoothed=True)
        return
    if calibration != "auto":
        yield from _by_methods(job, measured, (calibration,))
        return
    yield from _by_methods(job, measured, ("typical",))
    if (smoothed := _smoothed(job)) is not None:
        remeasured = extremes(smoothed.source, job.work, measured.names, job.feeds, job.settings.progress)
        yield from _by_methods(smoothed, remeasured, ("typical", "mse"), smoothed=True)
    yield from _by_methods(job, measured, ("minmax", "mse", "percentile", "entropy"))


def _by_methods(
    job: _Job, measured: Extremes, methods: Sequence[Calibration], *, smoothed: bool = False
) -> Iterator[_Trial]:
    """Yield one trial per method; histograms are computed once, for the first method that needs them."""
    counted: Histograms | None = None
    for method in methods:
        if method in BY_EXTREMES:
            yield _Trial(job, method, measured.ranges(method), smoothed)
            continue
        if counted is None:
            job.settings.progress("int8: histograms of the activations")
            counted = histograms(job.source, job.work, measured, job.feeds)
        yield _Trial(job, method, counted.ranges(method, job.settings.activations), smoothed)


def _smoothed(job: _Job) -> _Job | None:
    """Return the job on a smoothed source file, or None if the model has no norm to smooth."""
    job.settings.progress("int8: smoothing the activations")
    smoothed = replace(job, source=job.folder / "smooth.onnx")
    return smoothed if smooth(job.source, smoothed.source, job.feeds, job.work) else None


def _return_to_float(
    trial: _Trial, linears: Sequence[Linear], loss: Callable[[Path], float] | None, max_loss: float
) -> tuple[list[Attempt], list[Kept]]:
    """Keep the fewest nodes in float that meet the loss; return the attempts and the nodes kept, worst first."""
    if loss is None or trial.loss is None:
        return [], []
    attempts = [Attempt(0, trial.loss)]
    if trial.loss <= max_loss or len(linears) < 2:
        return attempts, []
    errors = _layer_errors(trial, linears)
    worst = sorted(linears, key=lambda linear: -errors.alone[linear.output])
    while len(attempts) <= ATTEMPTS:
        count = _next_count(attempts, errors, [linear.output for linear in worst], max_loss)
        if count is None:
            break
        _write_attempt(trial, worst[count:])
        attempts.append(Attempt(count, float(loss(trial.job.destination))))
    met = [attempt for attempt in attempts if attempt.loss <= max_loss]
    chosen = min(met, key=lambda attempt: attempt.kept) if met else min(attempts, key=lambda each: _sort_key(each.loss))
    if chosen is not attempts[-1]:
        _write_attempt(trial, worst[chosen.kept :])
    return attempts, [_kept_for_accuracy(linear, errors.share(linear.output)) for linear in worst[: chosen.kept]]


def _next_count(attempts: Sequence[Attempt], errors: OutputErrors, worst: Sequence[str], max_loss: float) -> int | None:
    """Return the number of nodes to keep in float in the next attempt; None if no other number can be better.

    The first number is the one at which the remaining error of the output is expected to meet the loss, if both
    decrease alike; half of all nodes if none is. From there on, one node is returned at a time as long as they are few,
    then twice as many, up to half. Between a number that met the loss and one that did not, the middle is tried.
    """
    most = len(worst) // 2
    failed = max((attempt.kept for attempt in attempts if not attempt.loss <= max_loss), default=0)
    met = min((attempt.kept for attempt in attempts if attempt.loss <= max_loss), default=None)
    if met is not None:
        middle = (failed + met) // 2
        return middle if failed < middle < met else None
    if failed >= most:
        return None
    if len(attempts) > 1:
        return min(failed + 1 if failed < FEW else 2 * failed, most)
    left = 1.0
    for count, layer in enumerate(worst[:most], start=1):
        left -= max(errors.share(layer), 0.0)
        if left * attempts[0].loss <= max_loss:
            return count
    return most if math.isfinite(attempts[0].loss) else min(1, most)


def _write_attempt(trial: _Trial, linears: Sequence[Linear]) -> None:
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


def _kept_for_accuracy(linear: Linear, error: float) -> Kept:
    reason = f"accuracy: {error:.0%} of the error of the model's output comes from its int8"
    return Kept(linear.node, linear.module, reason, error)


def _silent(_: str) -> None:
    return


def _layer_errors(trial: _Trial, linears: Sequence[Linear]) -> OutputErrors:
    job = trial.job
    job.settings.progress("int8: effect of each layer on the output")
    return layer_errors(
        job.source, job.work, linears, trial.ranges, job.settings.activations, job.feeds, job.settings.judge
    )
