"""Activation ranges for static int8 from calibration data, by five methods.

``typical``: mean of the per-sample extremes plus one standard deviation, clipped to the extremes of all samples.
``minmax``: the extremes of all samples (Jacob et al. 2018, arXiv:1712.05877).
``percentile``: the range that excludes a share of 1e-4 of the values (McKinstry et al. 2018, arXiv:1809.04191).
``entropy``: the clipping with the least Kullback-Leibler divergence between the values' histogram and its quantized
form (Migacz, "8-bit inference with TensorRT", GTC 2017).
``mse``: the clipping with the least mean squared error (Nagel et al. 2021, arXiv:2106.08295, section 3.1).

The last three use a histogram of every activation, which takes a second pass over some of the samples. Memory use does
not depend on the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.choices import Calibration
from compressor.data.rows import take_rows
from compressor.quantize.intermediate_values import Batch, beside, save_with_outputs, stream
from compressor.quantize.qdq_rewrite import PREFIX, Activations, Edit, QuantizeError, Range, activation_grid, load

BY_EXTREMES = ("typical", "minmax")
Array = npt.NDArray[np.float64]

BINS = 2048
HISTOGRAM_SAMPLES = 64
"""Maximum number of samples in the histograms."""

ROWS = 4
"""Samples per run that returns whole activations."""

OUTSIDE = 1e-4
"""Share of the values that ``percentile`` clips, half on each side."""

SHARES = np.linspace(0.2, 1.0, 33)
"""Clipping thresholds tried, as shares of the extremes."""


@dataclass(frozen=True)
class Extremes:
    """Statistics of the minimum and maximum of each activation, from one pass over the samples.

    Args:
        names: names of the T activations.
        mean: mean over samples of the per-sample minimum and maximum, [2, T].
        deviation: standard deviation over samples of the same, [2, T].
        extreme: minimum and maximum over all samples, [2, T]; every range includes 0.
        samples: number of samples.
    """

    names: tuple[str, ...]
    mean: Array
    deviation: Array
    extreme: Array
    samples: int

    def ranges(self, method: Calibration) -> dict[str, Range]:
        """Return the range of each activation by ``minmax`` or ``typical``."""
        reach = self.extreme
        if method == "typical":
            low, high = self.mean[0] - self.deviation[0], self.mean[1] + self.deviation[1]
            reach = np.stack([np.maximum(low, self.extreme[0]), np.minimum(high, self.extreme[1])])
        return {name: (float(low), float(high)) for name, low, high in zip(self.names, *reach, strict=True)}


def extremes(
    source: Path,
    work: Path,
    names: Sequence[str],
    feeds: Callable[[], Iterable[Batch]],
    progress: Callable[[str], None],
) -> Extremes:
    """Measure the minimum and maximum of activations in one pass.

    Nodes added to the graph reduce each activation to one minimum and maximum per index of its leading axis (samples,
    windows or tokens), so the outputs are small. Rows are grouped into samples here.

    Args:
        source: float ONNX file.
        work: path for the temporary model that outputs these values.
        names: names of the activations.
        feeds: returns a new iterator over the calibration batches.
        progress: called with a short message after each batch.

    Raises:
        QuantizeError: there is no batch, a batch does not fit the model, or an activation is not finite.
    """
    names = tuple(dict.fromkeys(names))
    model = load(source)
    edit = Edit(model.graph)
    outputs = [output for name in names for output in _reductions(edit, name)]
    save_with_outputs(model, edit, outputs, work)
    moments, extreme = np.zeros((2, 2, len(names))), np.zeros((2, len(names)))
    samples = 0
    for batch, rows in stream(work, feeds(), outputs):
        _check_finite(names, rows[2::3])
        low = [_per_sample(values, batch, np.minimum) for values in rows[0::3]]
        high = [_per_sample(values, batch, np.maximum) for values in rows[1::3]]
        for power in (1, 2):
            moments[power - 1] += batch * np.array([[(v**power).mean() for v in side] for side in (low, high)])
        extreme[0] = np.minimum(extreme[0], [values.min() for values in low])
        extreme[1] = np.maximum(extreme[1], [values.max() for values in high])
        samples += batch
        progress(f"int8: {samples} calibration samples")
    if samples == 0:
        raise QuantizeError("There is no calibration data; static int8 needs at least one batch, or use dynamic int8.")
    mean, square = moments / samples
    return Extremes(names, mean, np.sqrt(np.maximum(square - mean**2, 0)), extreme, samples)


@dataclass(frozen=True)
class Histograms:
    """Histogram of each activation, with `BINS` equal bins between its extremes."""

    counts: Mapping[str, Array]
    extreme: Mapping[str, Range]

    def ranges(self, method: Calibration, activations: Activations) -> dict[str, Range]:
        """Return the range of each activation by ``percentile``, ``entropy`` or ``mse``."""
        if method == "percentile":
            return {name: _percentile(counts, self.extreme[name]) for name, counts in self.counts.items()}
        cost = partial({"entropy": _divergence, "mse": _squared_error}[method], activations=activations)
        return {name: _cheapest(counts, self.extreme[name], cost) for name, counts in self.counts.items()}


def histograms(source: Path, work: Path, found: Extremes, feeds: Callable[[], Iterable[Batch]]) -> Histograms:
    """Compute histograms of activations between their extremes, over the first `HISTOGRAM_SAMPLES` samples.

    Args:
        source: float ONNX file.
        work: path for the temporary model that outputs the activations.
        found: extremes of the activations.
        feeds: returns a new iterator over the calibration batches.

    Raises:
        QuantizeError: a batch does not fit the model.
    """
    model = load(source)
    save_with_outputs(model, Edit(model.graph), found.names, work)
    reach = found.ranges("minmax")
    counts = {name: np.zeros(BINS) for name in found.names}
    calibration = feeds()
    few = beside(calibration, _few_rows(calibration, HISTOGRAM_SAMPLES), HISTOGRAM_SAMPLES // ROWS)
    for _, counted in stream(work, few, found.names, partial(_counted, [reach[name] for name in found.names])):
        for name, value in zip(found.names, counted, strict=True):
            counts[name] += value
    return Histograms(counts, reach)


def _counted(ranges: Sequence[Range], values: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Count the values of each activation in the bins of its range."""
    return [np.histogram(value, BINS, reach)[0] for value, reach in zip(values, ranges, strict=True)]


def _few_rows(feeds: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Yield the first `most` samples in batches of at most `ROWS`."""
    for batch in feeds:
        rows = min(max(map(len, batch.values())), most)
        for start in range(0, rows, ROWS):
            yield take_rows(batch, range(start, min(start + ROWS, rows)))
        most -= rows
        if most <= 0:
            return


# ---- clipping thresholds


def _percentile(counts: Array, reach: Range) -> Range:
    """Return the range that excludes a share of `OUTSIDE` / 2 on each side and includes 0."""
    share = np.cumsum(counts) / max(counts.sum(), 1.0)
    edges = np.linspace(*reach, BINS + 1)
    low = edges[int(np.searchsorted(share, OUTSIDE / 2))]
    high = edges[min(int(np.searchsorted(share, 1 - OUTSIDE / 2)) + 1, BINS)]
    return float(min(low, 0.0)), float(max(high, 0.0))


def _cheapest(counts: Array, reach: Range, cost: Callable[..., float]) -> Range:
    """Return the clipped range of least cost by coordinate descent: each side in turn, twice.

    A joint search over both sides takes the square of the time and nearly always finds the same minimum.
    """
    edges = np.linspace(*reach, BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = reach
    for _ in range(2):
        high = min((share * reach[1] for share in SHARES), key=lambda end: cost(counts, centres, (low, end)))
        low = min((share * reach[0] for share in SHARES), key=lambda end: cost(counts, centres, (end, high)))
    return float(low), float(high)


def _rounded(centres: Array, reach: Range, activations: Activations) -> npt.NDArray[np.int64]:
    """Return the quantization level of each value."""
    scale, zero = activation_grid(*reach, activations)
    ends = (0, 255) if activations == "uint8" else (-127, 127)
    levels: npt.NDArray[np.int64] = np.clip(np.rint(centres / float(scale)) + int(zero), *ends).astype(np.int64)
    return levels


def _squared_error(counts: Array, centres: Array, reach: Range, activations: Activations) -> float:
    """Return the sum of (x - Q(x))^2 over all values."""
    scale, zero = activation_grid(*reach, activations)
    levels = _rounded(centres, reach, activations)
    return float(counts @ (centres - (levels - int(zero)) * float(scale)) ** 2)


def _divergence(counts: Array, centres: Array, reach: Range, activations: Activations) -> float:
    """Return KL(P || Q): P adds the clipped counts to the end bins, Q spreads the counts of each level evenly."""
    inside = (centres >= reach[0]) & (centres <= reach[1])
    if not counts[inside].any():
        return float("inf")
    clipped = counts[inside].copy()
    clipped[0] += counts[centres < reach[0]].sum()
    clipped[-1] += counts[centres > reach[1]].sum()
    levels = _rounded(centres[inside], reach, activations)
    levels -= levels.min()
    filled = clipped > 0  # of the clipped histogram, so that an end bin has mass in Q
    total = np.bincount(levels, counts[inside])[levels]
    spread = np.where(filled, total / np.maximum(np.bincount(levels, filled)[levels], 1), 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-12)
    both = filled & (q > 0)
    lost = p[filled & (q <= 0)].sum()  # mass where Q is 0: a penalty of log(1e6) instead of infinity
    return float((p[both] * np.log(p[both] / q[both])).sum() + lost * np.log(1e6))


# ---- reductions inside the graph


def _check_finite(names: Sequence[str], sums: Sequence[npt.NDArray[Any]]) -> None:
    for name, value in zip(names, sums, strict=True):
        if not np.isfinite(value).all():
            raise QuantizeError(f"Activation {name} has NaN or infinity; check the model and the calibration data.")


def _reductions(edit: Edit, name: str) -> tuple[str, str, str]:
    """Add nodes for the minimum, maximum and sum of each index of the leading axis; return their outputs.

    The sum detects NaN, which the minimum and maximum of ONNX Runtime ignore.
    """
    base = f"{PREFIX}{name}"
    inputs = (edit.node("Flatten", [name], [f"{base}/rows"], axis=1), edit.constant(f"{PREFIX}axes", np.array([1])))
    low = edit.node("ReduceMin", inputs, [f"{base}/low"], keepdims=0)
    high = edit.node("ReduceMax", inputs, [f"{base}/high"], keepdims=0)
    return low, high, edit.node("ReduceSum", inputs, [f"{base}/sum"], keepdims=0)


def _per_sample(rows: npt.NDArray[Any], samples: int, reduce: np.ufunc) -> Array:
    """Reduce the rows of each sample; rows that do not divide evenly (no batch axis) count as one sample."""
    groups = samples if samples and len(rows) % samples == 0 else 1
    return np.asarray(reduce.reduce(rows.reshape(groups, -1), axis=1), np.float64)
