"""Tests of activation ranges: extremes and histograms against numpy, and each method against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compressor.choices import CALIBRATIONS
from compressor.quantize.calibration import (
    BINS,
    HISTOGRAM_SAMPLES,
    OUTSIDE,
    SHARES,
    Extremes,
    Histograms,
    extremes,
    histograms,
)
from compressor.quantize.qdq_rewrite import QuantizeError
from tests.onnx_files import MLP_WEIGHTS, Array, K, feeds_of, mlp, node, normal, save

pytest.importorskip("onnxruntime")

FLOAT32 = 1e-5  # a product of width 32 in float32, and its moments
Counts = npt.NDArray[np.float64]


def hidden(x: Array) -> Array:
    """Compute the activation between the Linears of `mlp`."""
    return np.asarray(np.maximum(x @ MLP_WEIGHTS["w1"] + MLP_WEIGHTS["b1"], 0))


def measured(path: Path, *batches: Array, names: tuple[str, ...] = ("x", "h2")) -> Extremes:
    return extremes(path, path.with_name("work.onnx"), names, feeds_of(*batches), lambda _: None)


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 3, 4, 5], [5]])
def test_extremes_equal_numpy_for_any_batching(tmp_path: Path, cuts: list[int]) -> None:
    x = normal(6, 5, K, seed=9) + np.float32(0.3)
    stats = measured(mlp(tmp_path / "f.onnx"), *np.split(x, cuts), names=("x", "h2", "x"))
    assert (stats.names, stats.samples) == (("x", "h2"), 6)
    for at, values in enumerate((x, hidden(x))):
        ends = np.stack([values.reshape(6, -1).min(axis=1), values.reshape(6, -1).max(axis=1)])
        np.testing.assert_allclose(stats.mean[:, at], ends.mean(axis=1), rtol=FLOAT32)
        # The variance is a difference of squares, which keeps the float32 rounding error of both.
        np.testing.assert_allclose(stats.deviation[:, at], ends.std(axis=1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(stats.extreme[:, at], [ends[0].min(), ends[1].max()], rtol=FLOAT32)


def test_rows_are_grouped_into_samples(tmp_path: Path) -> None:
    """The leading axis may be that of windows or tokens."""
    nodes = [node("Reshape", ["x", "flat"], "tokens"), node("MatMul", ["tokens", "w"], "y")]
    path = save(tmp_path / "f.onnx", nodes, {"flat": np.array([-1, K]), "w": normal(K, K)}, ["y"])
    x = normal(4, 5, K, seed=3)
    flat, whole = measured(path, x[:3], x[3:], names=("tokens",)), measured(path, x, names=("x",))
    np.testing.assert_allclose(flat.mean, whole.mean, rtol=FLOAT32)
    np.testing.assert_allclose(flat.deviation, whole.deviation, rtol=1e-3)


def test_every_range_includes_zero(tmp_path: Path) -> None:
    x = np.abs(normal(3, 2, K)) + np.float32(1)
    stats = measured(mlp(tmp_path / "f.onnx"), x, names=("x",))
    assert stats.ranges("minmax") == {"x": (0.0, float(x.max()))}


def test_typical_is_mean_plus_deviation_within_the_extremes() -> None:
    stats = Extremes(
        names=("a", "b"),
        mean=np.array([[-2.0, -3.0], [1.0, 4.0]]),
        deviation=np.array([[0.5, 9.0], [0.25, 0.5]]),
        extreme=np.array([[-3.0, -5.0], [2.0, 4.25]]),
        samples=7,
    )
    assert stats.ranges("typical") == {"a": (-2.5, 1.25), "b": (-5.0, 4.25)}
    assert stats.ranges("minmax") == {"a": (-3.0, 2.0), "b": (-5.0, 4.25)}


@pytest.mark.parametrize("size", [1, 3, 7, 80])
def test_histograms_equal_numpy_for_any_batching(tmp_path: Path, size: int) -> None:
    x = normal(HISTOGRAM_SAMPLES + 6, 2, K, seed=4)
    batches = [x[start : start + size] for start in range(0, len(x), size)]
    path = mlp(tmp_path / "f.onnx")
    counted = histograms(path, tmp_path / "work.onnx", measured(path, x), feeds_of(*batches))
    for name, values in (("x", x), ("h2", hidden(x))):
        expected, _ = np.histogram(values[:HISTOGRAM_SAMPLES], BINS, counted.extreme[name])
        assert counted.counts[name].sum() == expected.sum() == values[:HISTOGRAM_SAMPLES].size
        # A value on the edge of two bins may fall to either side: float32 sums in another order.
        assert np.abs(np.cumsum(counted.counts[name] - expected)).max() <= (0 if name == "x" else 3)


def test_missing_data_and_non_finite_values_raise(tmp_path: Path) -> None:
    path, x = mlp(tmp_path / "f.onnx"), normal(2, 5, K)
    with pytest.raises(QuantizeError, match="no calibration data"):
        measured(path)
    x[1, 2, 3] = np.nan
    with pytest.raises(QuantizeError, match="x has NaN or infinity"):
        measured(path, x)


# ---- methods, on prepared histograms


def long_tailed(low: float, high: float, seed: int = 0) -> Histograms:
    """Return a histogram of 4 million Laplace-distributed values within two thirds of the ends, and one at each end."""
    values = np.random.default_rng(seed).laplace(scale=max(-low, high) / 16, size=40_000)
    counts, _ = np.histogram(values, BINS, (low, high))
    counts *= 100
    counts[[0, -1]] += 1
    return Histograms({"a": counts.astype(np.float64)}, {"a": (low, high)})


def centres_of(low: float, high: float) -> Counts:
    return np.asarray(low + (np.arange(BINS) + 0.5) * (high - low) / BINS)


def squared_error(counts: Counts, centres: Counts, low: float, high: float, activations: str) -> float:
    """Compute the squared error of rounding to int8, independently of the module."""
    if activations == "int8":
        step = max(-low, high) / 127
        rounded = np.clip(np.round(centres / step), -127, 127) * step
    else:
        step = (high - low) / 255
        zero = np.round(-low / step)
        rounded = (np.clip(np.round(centres / step) + zero, 0, 255) - zero) * step
    return float((counts * (centres - rounded) ** 2).sum())


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("reach", [(0.0, 9.0), (-9.0, 9.0), (-4.0, 9.0), (-9.0, 1.0)])
def test_mse_minimises_the_squared_error(reach: tuple[float, float], activations: Any) -> None:
    histogram = long_tailed(*reach)
    clipped = histogram.ranges("mse", activations)["a"]
    counts, centres = histogram.counts["a"], centres_of(*reach)
    lows = SHARES * reach[0] if reach[0] < 0 else [0.0]
    costs = [squared_error(counts, centres, low, share * reach[1], activations) for low in lows for share in SHARES]
    cost = squared_error(counts, centres, *clipped, activations)
    # Coordinate descent reaches the joint minimum up to about one step of the shares.
    assert min(costs) * (1 - 1e-6) <= cost <= min(costs) * 1.02
    assert cost < 0.7 * squared_error(
        counts, centres, *reach, activations
    )  # clipping reduces the error on this histogram
    assert reach[0] <= clipped[0] <= 0 <= clipped[1] <= reach[1]


@pytest.mark.parametrize("reach", [(0.0, 9.0), (-9.0, 9.0), (-2.0, 9.0)])
def test_percentile_excludes_the_stated_share(reach: tuple[float, float]) -> None:
    histogram = long_tailed(*reach)
    low, high = histogram.ranges("percentile", "uint8")["a"]
    counts, centres = histogram.counts["a"], centres_of(*reach)
    width = (reach[1] - reach[0]) / BINS

    def outside(below: float, above: float) -> tuple[float, float]:
        total = counts.sum()
        return float(counts[centres < below].sum() / total), float(counts[centres > above].sum() / total)

    assert max(outside(low, high)) <= OUTSIDE / 2
    assert high < reach[1]
    tighter = outside(low + width, high - width)
    assert tighter[1] > OUTSIDE / 2
    assert low == 0.0 or tighter[0] > OUTSIDE / 2


def test_percentile_range_includes_zero() -> None:
    counts = np.zeros(BINS)
    counts[-100:] = 10
    assert Histograms({"a": counts}, {"a": (0.0, 5.0)}).ranges("percentile", "uint8")["a"] == (0.0, 5.0)


def divergence(counts: Counts, centres: Counts, high: float) -> float:
    """Compute KL(P || Q) of one-sided values clipped at `high`, value by value (Migacz 2017)."""
    kept = [(count, centre) for count, centre in zip(counts, centres, strict=True) if centre <= high]
    p = [count for count, _ in kept]
    p[-1] += counts.sum() - sum(p)
    level = [min(round(centre / (high / 255)), 255) for _, centre in kept]
    q = [0.0] * len(p)
    for current in set(level):
        members = [i for i, of in enumerate(level) if of == current]
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = sum(kept[j][0] for j in members) / len(filled)
    total, mass = sum(p), sum(q)
    cost = 0.0
    for one, other in zip(p, q, strict=True):
        if one > 0:
            cost += one / total * (np.log(one / total / (other / mass)) if other > 0 else np.log(1e6))
    return float(cost)


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_minimises_the_divergence(seed: int) -> None:
    histogram = long_tailed(0.0, 9.0, seed)
    low, high = histogram.ranges("entropy", "uint8")["a"]
    counts, centres = histogram.counts["a"], centres_of(0.0, 9.0)
    costs = {share * 9.0: divergence(counts, centres, share * 9.0) for share in SHARES}
    assert low == 0.0
    assert costs[high] == pytest.approx(min(costs.values()), rel=1e-9)
    assert high < 9.0


def test_entropy_clips_an_outlier_but_not_a_uniform_histogram() -> None:
    even = Histograms({"a": np.full(BINS, 50.0)}, {"a": (0.0, 8.0)})
    assert even.ranges("entropy", "uint8")["a"] == (0.0, 8.0)
    counts = np.zeros(BINS)
    counts[: BINS // 4] = 50 + np.arange(BINS // 4) % 7
    counts[-1] = 1
    _, high = Histograms({"a": counts}, {"a": (0.0, 8.0)}).ranges("entropy", "uint8")["a"]
    assert 2.0 <= high < 2.5  # the even part ends at 2


@pytest.mark.parametrize("method", [method for method in CALIBRATIONS if method not in ("typical", "minmax")])
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_zero_activation_has_an_empty_range(method: Any, activations: Any) -> None:
    counts = np.zeros(BINS)
    counts[BINS // 2] = 100
    low, high = Histograms({"a": counts}, {"a": (0.0, 0.0)}).ranges(method, activations)["a"]
    assert (low, high) == (0.0, 0.0)
