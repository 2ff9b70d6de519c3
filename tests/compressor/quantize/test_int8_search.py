"""Tests of int8: the arithmetic against numpy, the selection of nodes, and sensitive nodes kept in float."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compressor.choices import CALIBRATIONS, Calibration
from compressor.errors import CompressorError
from compressor.quantize import int8_search
from compressor.quantize.calibration import BY_EXTREMES, extremes, histograms
from compressor.quantize.int8_search import ENOUGH, Attempt, Calibrated, Quantized, QuantizeError, quantize
from compressor.quantize.output_error import Judge, OutputErrors, file_error, layer_errors
from compressor.quantize.qdq_rewrite import activation_grid, candidates, load, module_of, quantize_weight, write
from tests.onnx_files import (
    MLP_WEIGHTS,
    Array,
    Feeds,
    H,
    K,
    N,
    count,
    feeds_of,
    initializers,
    mlp,
    node,
    normal,
    normed,
    outlier,
    relative_loss,
    round_activation,
    round_weight,
    run,
    save,
)
from tests.processors import exact_int8

pytest.importorskip("onnxruntime")


def test_fp8_equals_rounding_to_e4m3_in_numpy(tmp_path: Path) -> None:
    x, w = normal(6, 5, K, seed=9), MLP_WEIGHTS
    done = quantize(mlp(tmp_path / "f.onnx"), tmp_path / "q.onnx", feeds_of(x), activations="fp8", calibration="minmax")
    assert (done.nodes, done.kept, done.samples, done.activations) == (2, (), 6, "fp8")

    def rounded(value: Array, largest: Any) -> Array:
        scale = np.asarray(largest / 448, np.float32)
        return (value / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale

    def linear(value: Array, calibrating: Array, weight: Array, bias: Array) -> Array:
        return rounded(value, np.abs(calibrating).max()) @ rounded(weight, np.abs(weight).max(axis=0)) + bias

    float_hidden = np.maximum(x @ w["w1"] + w["b1"], 0)
    hidden = np.maximum(linear(x, x, w["w1"], w["b1"]), 0)
    expected = linear(hidden, float_hidden, w["w2"], w["b2"])
    # A hidden value between two steps may round to either: an eighth of the value at most.
    assert np.abs(run(tmp_path / "q.onnx", x)[0] - expected).max() < 0.02 * np.abs(expected).max()
    exact = run(tmp_path / "f.onnx", x)[0]
    assert 0.01 < np.linalg.norm(expected - exact) / np.linalg.norm(exact) < 0.06  # 3 bits of mantissa


@exact_int8
@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("calibration", ["typical", "minmax"])
def test_static_result_equals_rounding_in_numpy(tmp_path: Path, activations: Any, calibration: Any) -> None:
    x = normal(6, 5, K, seed=9)
    parts = (x[:4], x[4:])  # unequal batches: statistics are over samples, not over batches
    done = quantize(
        mlp(tmp_path / "f.onnx"),
        tmp_path / "q.onnx",
        feeds_of(*parts),
        activations=activations,
        calibration=calibration,
    )
    assert (done.nodes, done.kept, done.samples, done.calibration) == (2, (), 6, calibration)

    def linear(value: Array, calibrating: Array, w: Array, b: Array) -> Array:
        low, high = calibrating.reshape(6, -1).min(axis=1), calibrating.reshape(6, -1).max(axis=1)
        reach = (low.min(), high.max())
        if calibration == "typical":
            reach = (max(reach[0], low.mean() - low.std()), min(reach[1], high.mean() + high.std()))
        rounded = round_activation(value, float(reach[0]), float(reach[1]), symmetric=activations == "int8")
        return np.asarray(rounded @ round_weight(w) + b)

    w = MLP_WEIGHTS
    float_hidden = np.maximum(x @ w["w1"] + w["b1"], 0)
    hidden = np.maximum(linear(x, x, w["w1"], w["b1"]), 0)
    expected = linear(hidden, float_hidden, w["w2"], w["b2"])
    (result,) = run(tmp_path / "q.onnx", x)
    # A hidden value between two steps may round to either (float32 sums in another order): the bound is one step
    # of the hidden grid times the largest weight. All other differences are float32 rounding.
    step = float_hidden.max() / (127 if activations == "int8" else 255)
    assert np.abs(result - expected).max() <= step * np.abs(w["w2"]).max()
    assert np.median(np.abs(result - expected)) < 1e-4
    (exact,) = run(tmp_path / "f.onnx", x)
    assert np.abs(result - exact).max() > 1e-3  # the result is not that of the float model


@exact_int8
def test_dynamic_result_equals_rounding_in_numpy(tmp_path: Path) -> None:
    x = normal(2, 3, K, seed=5)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": MLP_WEIGHTS["w1"]}, ["y"])
    done = quantize(path, tmp_path / "q.onnx", feeds_of(), mode="dynamic")
    rounded = round_activation(x, float(x.min()), float(x.max()), symmetric=False)
    assert (done.nodes, done.calibration, done.samples) == (1, None, 0)
    # Integer sums are exact; the tolerance covers float32 rounding of values around ten.
    np.testing.assert_allclose(run(tmp_path / "q.onnx", x)[0], rounded @ round_weight(MLP_WEIGHTS["w1"]), atol=1e-4)


def test_only_products_with_a_constant_weight_are_quantized(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Transpose", ["a"], "t", perm=[0, 2, 1]),
        node("MatMul", ["a", "t"], "scores"),
        node("Softmax", ["scores"], "p", axis=-1),
        node("MatMul", ["p", "a"], "mixed"),
        node("Add", ["mixed", "x"], "y"),
        node("MatMul", ["y", "small"], "few"),
        node("Conv", ["x", "kernel"], "c"),
        node("Cast", ["x"], "whole", to=TensorProto.INT32),
        node("MatMul", ["whole", "integers"], "product"),
        node("Cast", ["product"], "z", to=TensorProto.FLOAT),
    ]
    weights = {
        "w": normal(K, K),
        "small": normal(K, 4),
        "kernel": normal(5, 5, 1),
        "integers": np.ones((K, K), np.int32),
    }
    path = save(tmp_path / "f.onnx", nodes, weights, ["y", "few", "c", "z"])
    done = quantize(path, tmp_path / "q.onnx", feeds_of(normal(2, 5, K)))
    assert done.nodes == 1
    assert {kept.node for kept in done.kept} == {"node_few", "node_c", "node_product"}
    assert all(kept.reason for kept in done.kept)
    after = {n.name: n for n in onnx.load(str(tmp_path / "q.onnx")).graph.node}
    for name in ("node_scores", "node_mixed", "node_y", "node_p", "node_few", "node_c", "node_product"):
        before = next(n for n in nodes if n.name == name)
        assert after[name] == before, f"{name} was changed"
    assert list(after["node_a"].input) != ["x", "w"]
    with_conv = quantize(path, tmp_path / "c.onnx", feeds_of(normal(2, 5, K)), convolutions=True)
    assert with_conv.nodes == 2
    assert initializers(tmp_path / "c.onnx")["int8/kernel/scale"].shape == (5,)  # output channels, axis 0


def test_matmul_weight_has_one_scale_per_column_and_zero_point_zero(tmp_path: Path) -> None:
    quantize(mlp(tmp_path / "f.onnx"), tmp_path / "q.onnx", feeds_of(normal(2, 5, K)), activations="int8")
    values = initializers(tmp_path / "q.onnx")
    assert values["int8/w1"].dtype == np.int8
    assert values["int8/w1"].shape == (K, H)
    assert values["int8/w1/scale"].shape == (H,)
    np.testing.assert_allclose(values["int8/w1/scale"] * 127, np.abs(MLP_WEIGHTS["w1"]).max(axis=0), rtol=1e-6)
    assert "w1" not in values  # the float weight is removed
    zero_points = [value for name, value in values.items() if name.endswith("zero_point")]
    assert len(zero_points) == 4
    assert all(value.dtype == np.int8 and not value.any() for value in zero_points)  # required by TensorRT
    weight = next(n for n in onnx.load(str(tmp_path / "q.onnx")).graph.node if n.input[0] == "int8/w1")
    assert (weight.op_type, [a.i for a in weight.attribute if a.name == "axis"]) == ("DequantizeLinear", [1])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_names_dynamic_axes_and_metadata_are_kept(tmp_path: Path, mode: Any) -> None:
    path = mlp(tmp_path / "f.onnx")
    quantize(path, tmp_path / "q.onnx", feeds_of(normal(2, 5, K)), mode=mode)
    before, after = onnx.load(str(path)), onnx.load(str(tmp_path / "q.onnx"))
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert run(tmp_path / "q.onnx", normal(7, 3, K))[0].shape == (7, 3, N)
    onnx.checker.check_model(after, full_check=True)


@exact_int8
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_with_bias_is_quantized(tmp_path: Path, mode: Any, transposed: bool) -> None:
    w = normal(K, N)
    nodes = [
        node("ReduceMean", ["x", "axes"], "pooled", keepdims=0),
        node("Gemm", ["pooled", "w", "b"], "y", transB=int(transposed)),
    ]
    weights = {"w": np.ascontiguousarray(w.T) if transposed else w, "b": normal(N), "axes": np.array([1])}
    path = save(tmp_path / "f.onnx", nodes, weights, ["y"])
    x = normal(8, 4, K)
    assert quantize(path, tmp_path / "q.onnx", feeds_of(x), mode=mode, calibration="minmax").nodes == 1
    exact, rounded = run(path, x)[0], run(tmp_path / "q.onnx", x)[0]
    # 8 bits on both sides of 32 products give a relative error of about one percent.
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


@pytest.mark.parametrize("bias", ["constant", "computed"])
def test_gemm_with_a_constant_bias_keeps_no_float_weight_in_the_engine(tmp_path: Path, bias: str) -> None:
    """ONNX Runtime multiplies it in int8; with an Add in place of the Sub it dequantizes the weight in every run."""
    nodes = [
        node("ReduceMean", ["x", "axes"], "pooled", keepdims=0),
        node("ReduceMean", ["pooled"], "b_computed", keepdims=0),
        node("Gemm", ["pooled", "w", "b" if bias == "constant" else "b_computed"], "y"),
    ]
    path = save(tmp_path / "f.onnx", nodes, {"w": normal(K, N), "b": normal(N), "axes": np.array([1])}, ["y"])
    x = normal(8, 4, K)
    quantize(path, tmp_path / "q.onnx", feeds_of(x), mode="static", calibration="minmax")
    kinds = optimized_kinds(tmp_path / "q.onnx")
    if bias == "constant":
        assert "b" not in initializers(tmp_path / "q.onnx")
        assert "MatMulIntegerToFloat" in kinds
        assert "DequantizeLinear" not in kinds
    exact, rounded = run(path, x)[0], run(tmp_path / "q.onnx", x)[0]
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


def optimized_kinds(path: Path) -> list[str]:
    """Return the operators of a file after the optimizations of ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="its optimizations are tested")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [each.op_type for each in onnx.load(options.optimized_model_filepath).graph.node]


@exact_int8
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_shared_and_tied_weights(tmp_path: Path, mode: Any) -> None:
    embedding = normal(K, K)
    nodes = [
        node("Gather", ["embedding", "row"], "e"),
        node("Add", ["x", "e"], "x0"),
        node("MatMul", ["x0", "w"], "a"),
        node("MatMul", ["a", "w"], "b"),
        node("Transpose", ["embedding"], "head", perm=[1, 0]),
        node("MatMul", ["b", "head"], "y"),
    ]
    weights = {"embedding": embedding, "row": np.array(3), "w": normal(K, K, seed=1)}
    path = save(tmp_path / "f.onnx", nodes, weights, ["y"])
    x = normal(4, 5, K)
    assert quantize(path, tmp_path / "q.onnx", feeds_of(x), mode=mode, calibration="minmax").nodes == 3
    values = initializers(tmp_path / "q.onnx")
    assert sum(value.dtype == np.int8 and value.ndim == 2 for value in values.values()) == 2
    np.testing.assert_array_equal(values["embedding"], embedding)  # still used by the lookup
    assert "w" not in values
    assert count(tmp_path / "q.onnx", "Transpose") == 0
    exact, rounded = run(path, x)[0], run(tmp_path / "q.onnx", x)[0]
    # Three roundings in a row, of about one percent each.
    assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05


@exact_int8
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_sensitive_node_stays_in_float(tmp_path: Path, mode: Any) -> None:
    path, x = outlier(tmp_path / "f.onnx"), normal(8, 5, K)
    loss = relative_loss(path, x)
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), mode=mode, calibration="typical", loss=loss, max_loss=0.1)
    assert [kept.node for kept in done.kept] == ["node_bad"]
    assert done.kept[0].sensitivity is not None
    assert done.kept[0].sensitivity > 0.01
    assert [attempt.kept for attempt in done.attempts] == [0, 1]
    assert done.attempts[0].loss > 0.1 >= done.attempts[1].loss
    assert done.loss == done.attempts[1].loss == loss(tmp_path / "q.onnx")
    assert done.nodes == 3


def test_unmet_loss_keeps_the_best_attempt_with_at_most_half_in_float(tmp_path: Path) -> None:
    path, x = outlier(tmp_path / "f.onnx"), normal(8, 5, K)
    answers = iter([float("nan"), 0.5, 0.7])
    done = quantize(
        path,
        tmp_path / "q.onnx",
        feeds_of(x),
        calibration="typical",
        loss=lambda _: next(answers),
        max_loss=0.1,
    )
    assert [attempt.kept for attempt in done.attempts] == [0, 1, 2]
    assert (done.loss, done.nodes, [kept.node for kept in done.kept]) == (0.5, 3, ["node_bad"])
    assert count(tmp_path / "q.onnx", "QuantizeLinear") == 3  # the best attempt is written again


def test_loss_within_the_limit_keeps_no_node_in_float(tmp_path: Path) -> None:
    done = quantize(mlp(tmp_path / "f.onnx"), tmp_path / "q.onnx", feeds_of(normal(2, 5, K)), loss=lambda _: 0.001)
    assert (done.nodes, done.kept, done.loss, len(done.attempts)) == (2, (), 0.001, 1)


class Losses:
    """A loss function that returns prepared values in turn and records the measured files."""

    def __init__(self, *answers: float) -> None:
        self.answers = iter(answers)
        self.files: list[bytes] = []

    def __call__(self, path: Path) -> float:
        self.files.append(path.read_bytes())
        return next(self.answers)


CALIBRATION_ORDER = [
    ("typical", False),
    ("typical", True),
    ("mse", True),
    ("minmax", False),
    ("mse", False),
    ("percentile", False),
    ("entropy", False),
]


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_auto_stops_at_the_first_sufficient_calibration(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_search, "HOPELESS", float("inf"))  # which attempts are hopeless depends on the processor
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    losses = Losses(*[0.09] * at, ENOUGH * 0.1)
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), loss=losses, max_loss=0.1)
    assert [(tried.method, tried.smoothed) for tried in done.calibrations] == CALIBRATION_ORDER[: at + 1]
    assert (done.calibration, done.smoothed) == CALIBRATION_ORDER[at]
    assert len(losses.files) == at + 1
    assert len(set(losses.files)) == at + 1  # each calibration gives another file
    assert (tmp_path / "q.onnx").read_bytes() == losses.files[-1]
    assert (done.loss, done.samples) == (ENOUGH * 0.1, 8)


@pytest.mark.parametrize("best", range(7))
def test_auto_keeps_the_best_if_no_calibration_is_sufficient(
    tmp_path: Path, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_search, "HOPELESS", float("inf"))
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    answers = [float("nan"), *[0.09] * 6]
    answers[best] = 0.05
    losses = Losses(*answers)
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), loss=losses, max_loss=0.1)
    tried = [(entry.method, entry.smoothed) for entry in done.calibrations]
    assert tried == CALIBRATION_ORDER
    np.testing.assert_array_equal([entry.loss for entry in done.calibrations], answers)
    assert (done.calibration, done.smoothed) == CALIBRATION_ORDER[best]
    assert (done.loss, done.kept) == (0.05, ())
    assert (tmp_path / "q.onnx").read_bytes() == losses.files[best]  # written again unless it was the last


def test_the_loss_of_a_calibration_that_cannot_win_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of an attempt differs more than twice as much as that of an earlier one."""
    errors = iter([0.4, 0.1, 0.3, 0.21, 0.19, 0.05, 0.09])
    monkeypatch.setattr(int8_search, "file_error", lambda *_: next(errors))
    losses = Losses(0.05, 0.09, 0.08, 0.07, 0.06)
    done = quantize(
        normed(tmp_path / "f.onnx"), tmp_path / "q.onnx", feeds_of(normal(8, 5, K)), loss=losses, max_loss=0.1
    )
    assert [entry.loss for entry in done.calibrations] == [0.05, 0.09, None, None, 0.08, 0.07, 0.06]
    assert (done.calibration, done.smoothed, done.loss) == ("typical", False, 0.05)
    assert (tmp_path / "q.onnx").read_bytes() == losses.files[0]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_error_of_each_layer_equals_that_of_a_file_with_this_layer_in_int8(tmp_path: Path, mode: Any) -> None:
    path, x = outlier(tmp_path / "f.onnx"), normal(8, 5, K)
    linears, _ = candidates(load(path), convolutions=False)
    names = [linear.activation for linear in linears]
    feeds, work = feeds_of(x), tmp_path / "w.onnx"
    ranges = extremes(path, work, names, feeds, lambda _: None).ranges("typical") if mode == "static" else None
    errors = layer_errors(path, work, linears, ranges, "uint8", feeds, Judge())
    (exact,) = run(path, x)
    for linear in linears:
        write(path, tmp_path / "q.onnx", [linear], ranges, activations="uint8", external_above=10**9)
        error = np.square(run(tmp_path / "q.onnx", x)[0] - exact).sum() / np.square(exact).sum()
        assert file_error(path, tmp_path / "q.onnx", feeds, Judge()) == pytest.approx(float(error), rel=1e-5)
        # A fused kernel rounds float32 elsewhere than its emulation, which turns a few values to the next step.
        assert errors.alone[linear.output] == pytest.approx(float(error), rel=0.05)
    assert max(linears, key=lambda linear: errors.share(linear.output)).node == "node_bad"
    assert sum(errors.share(linear.output) for linear in linears) == pytest.approx(1.0)


def test_layers_are_ranked_by_their_effect_on_the_output_not_by_their_own_error(tmp_path: Path) -> None:
    """`lost` has a large error of its own that hardly reaches the output; `y` a smaller one that is the output."""
    spread = np.ones(K, np.float32)
    spread[0] = 1000
    weights = {f"w{i}": normal(K, K, seed=i) / np.float32(np.sqrt(K)) for i in range(4)}
    weights["w1"][0] /= 1000
    nodes = [
        node("Mul", ["x", "spread"], "wide"),
        node("MatMul", ["wide", "w1"], "lost"),
        node("Mul", ["lost", "little"], "less"),
        node("MatMul", ["x", "w2"], "kept"),
        node("Add", ["less", "kept"], "sum"),
        node("MatMul", ["sum", "w3"], "mid"),
        node("MatMul", ["mid", "w0"], "y"),
    ]
    path = save(tmp_path / "f.onnx", nodes, {**weights, "spread": spread, "little": np.float32([1e-4])}, ["y"])
    x = normal(8, 5, K)
    whole = relative_loss(path, x)
    quantize(path, tmp_path / "all.onnx", feeds_of(x), calibration="typical")
    limit = whole(tmp_path / "all.onnx") * 0.95
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), calibration="typical", loss=whole, max_loss=limit)
    assert done.loss is not None
    assert done.loss <= limit
    assert [kept.node for kept in done.kept] != ["node_lost"]
    assert len(done.kept) == 1
    assert "of the error of the model's output" in done.kept[0].reason


def test_the_fewest_layers_that_meet_the_loss_stay_in_float() -> None:
    """The number is predicted, then corrected one by one or by halves; nothing is tried twice."""
    worst = [f"l{n}" for n in range(20)]

    def attempts(needed: int, shares: list[float], loss: float = 1.0) -> list[int]:
        errors = OutputErrors(dict(zip(worst, shares, strict=True)))
        tried = [Attempt(0, loss)]
        while (count := int8_search._next_count(tried, errors, worst, 0.5)) is not None:
            tried.append(Attempt(count, 0.4 if count >= needed else 0.6))
            assert len(tried) < 12
        return [attempt.kept for attempt in tried[1:]]

    few = [0.3, 0.3, *[0.4 / 18] * 18]
    assert attempts(2, few) == [2, 1]
    assert attempts(1, few) == [2, 1]
    assert attempts(4, few) == [2, 3, 4]
    assert attempts(7, few) == [2, 3, 4, 8, 6, 7]
    assert attempts(11, few) == [2, 3, 4, 8, 10]
    even = [0.05] * 20
    assert attempts(9, even) == [10, 5, 7, 8, 9]
    assert attempts(99, even) == [10]  # half of the layers do not suffice: no other number can
    assert attempts(1, few, loss=float("nan")) == [1]


def test_auto_without_a_loss_uses_the_first_calibration(tmp_path: Path) -> None:
    done = quantize(normed(tmp_path / "f.onnx"), tmp_path / "q.onnx", feeds_of(normal(8, 5, K)))
    assert done.calibrations == (Calibrated("typical", False, None),)
    assert done.loss is None


def test_explicit_method_is_the_only_one_tried(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), calibration="mse", loss=lambda _: 0.09, max_loss=0.1)
    assert done.calibrations == (Calibrated("mse", False, 0.09),)


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_written_ranges_are_those_of_the_method(tmp_path: Path, method: Calibration) -> None:
    path, feeds = mlp(tmp_path / "f.onnx"), feeds_of(normal(70, 5, K) ** 3)
    quantize(path, tmp_path / "q.onnx", feeds, calibration=method)
    names, work = ("x", "h2"), tmp_path / "work.onnx"
    stats = extremes(path, work, names, feeds, lambda _: None)
    if method in BY_EXTREMES:
        ranges = stats.ranges(method)
    else:
        ranges = histograms(path, work, stats, feeds).ranges(method, "uint8")
        assert ranges["x"] != stats.ranges("minmax")["x"]  # long tails are clipped
    values = initializers(tmp_path / "q.onnx")
    for name in names:
        scale, zero = activation_grid(*ranges[name], "uint8")
        assert (values[f"int8/{name}/scale"], values[f"int8/{name}/zero_point"]) == (scale, zero)


def test_dynamic_int8_tries_smoothing(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    losses = Losses(0.09, 0.05)
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), mode="dynamic", loss=losses, max_loss=0.1)
    assert done.calibrations == (Calibrated(None, False, 0.09), Calibrated(None, True, 0.05))
    assert (done.calibration, done.smoothed, done.loss) == (None, True, 0.05)
    assert (tmp_path / "q.onnx").read_bytes() == losses.files[1]
    named = quantize(path, tmp_path / "q.onnx", feeds_of(x), mode="dynamic", calibration="mse", loss=lambda _: 0.09)
    assert named.calibrations == (Calibrated(None, False, 0.09),)


def test_dynamic_int8_needs_no_calibration_data(tmp_path: Path) -> None:
    path = normed(tmp_path / "f.onnx")
    done = quantize(path, tmp_path / "q.onnx", feeds_of(), mode="dynamic", loss=lambda _: 0.09, max_loss=0.1)
    assert done.calibrations == (Calibrated(None, False, 0.09),)


@exact_int8
def test_smoothing_quantizes_the_node_with_an_outlier(tmp_path: Path) -> None:
    """The node that would stay in float is quantized instead, because smoothing scales its hundredfold channel."""
    path, x = outlier(tmp_path / "f.onnx"), normal(8, 5, K)
    done = quantize(path, tmp_path / "q.onnx", feeds_of(x), loss=relative_loss(path, x), max_loss=0.1)
    assert (done.smoothed, done.kept, done.nodes) == (True, (), 4)
    before, after = done.calibrations[0].loss, done.loss
    assert before is not None
    assert after is not None
    assert after < 0.1 < before
    assert relative_loss(path, x)(tmp_path / "q.onnx") == after


def test_only_one_calibration_batch_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Array]] = []
    streams = 0

    def feeds() -> Iterator[dict[str, Array]]:
        nonlocal streams
        streams += 1
        for i in range(6):
            assert all(reference() is None for reference in alive)
            batch = normal(2, 3 + i % 2, K, seed=i)  # lengths vary, as with texts
            alive.append(weakref.ref(batch))
            feed = {"x": batch}
            del batch
            yield feed
            del feed

    path = outlier(tmp_path / "f.onnx")
    done = quantize(path, tmp_path / "q.onnx", feeds, calibration="typical", loss=lambda _: 1.0)
    assert done.samples == 12
    assert streams == 2  # one pass for ranges and one for effects on the output, for any number of attempts
    kept = [attempt.kept for attempt in done.attempts]
    assert kept in (
        [0, 2],
        [0, 1, 2],
    )  # half of the nodes do not suffice; 1 is left out if its errors say that it cannot
    assert len(alive) == 6 + 1


def test_large_weights_are_saved_as_external_data(tmp_path: Path) -> None:
    model = onnx.load(str(mlp(tmp_path / "f.onnx")))
    onnx.save(model, str(tmp_path / "g.onnx"), save_as_external_data=True, location="g.bin", size_threshold=0)
    x = normal(2, 5, K)
    quantize(tmp_path / "g.onnx", tmp_path / "q.onnx", feeds_of(x), external_above=0)
    once = (tmp_path / "q.onnx.data").stat().st_size
    quantize(tmp_path / "g.onnx", tmp_path / "q.onnx", feeds_of(x), external_above=0)
    assert (tmp_path / "q.onnx.data").stat().st_size == once > 0  # overwritten, not appended to
    quantize(tmp_path / "f.onnx", tmp_path / "inline.onnx", feeds_of(x))
    np.testing.assert_array_equal(run(tmp_path / "q.onnx", x)[0], run(tmp_path / "inline.onnx", x)[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".int8")]  # no temporary file remains


def test_output_is_silent_except_for_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[str] = []
    path = outlier(tmp_path / "f.onnx")
    quantize(path, tmp_path / "q.onnx", feeds_of(normal(2, 5, K)), loss=lambda _: 1.0, progress=steps.append)
    assert capfd.readouterr() == ("", "")
    assert any("calibration samples" in step for step in steps)


def test_module_names_come_from_the_exporter(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "small"], "y")], {"small": normal(K, 4)}, ["y"])
    model = onnx.load(str(path))
    extra = model.graph.node.add()
    extra.CopyFrom(node("MatMul", ["x", "w"], "z"))
    model.graph.initializer.append(numpy_helper.from_array(normal(K, K), "w"))
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'blocks.0', 'blocks.0.head', 'linear']"
    onnx.save(model, str(path))
    done = quantize(path, tmp_path / "q.onnx", feeds_of(normal(1, 2, K)))
    assert [(kept.node, kept.module) for kept in done.kept] == [("node_y", "blocks.0.head")]


def expect(tmp_path: Path, path: Path, feeds: Feeds, match: str, **options: Any) -> None:
    with pytest.raises(QuantizeError, match=match):
        quantize(path, tmp_path / "q.onnx", feeds, **options)
    assert issubclass(QuantizeError, CompressorError)


def test_invalid_input_raises(tmp_path: Path) -> None:
    path, x = mlp(tmp_path / "f.onnx"), normal(2, 5, K)
    nothing = save(tmp_path / "n.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    expect(tmp_path, nothing, feeds_of(x), "nothing to quantize to int8")
    expect(tmp_path, path, feeds_of(), "no calibration data")
    expect(tmp_path, path, lambda: iter([{"pixels": x}]), r"\['x'\] is missing")
    expect(tmp_path, path, feeds_of(x[..., :7]), "does not run")
    expect(tmp_path, path, feeds_of(x), "no convolutions", mode="dynamic", activations="int8")
    expect(tmp_path, tmp_path / "missing.onnx", feeds_of(x), "cannot be read")
    with pytest.raises(QuantizeError, match="same file"):
        quantize(path, path, feeds_of(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_raise(tmp_path: Path, bad: float) -> None:
    path, x = mlp(tmp_path / "f.onnx"), normal(2, 5, K)
    x[1, 2, 3] = bad
    expect(tmp_path, path, feeds_of(x), "has NaN or infinity")
    weight = normal(K, K)
    weight[3, 3] = bad
    broken = save(tmp_path / "b.onnx", [node("MatMul", ["x", "w"], "y")], {"w": weight}, ["y"])
    expect(tmp_path, broken, feeds_of(normal(2, 5, K)), "NaN or infinity")


def test_zero_weight_and_activation_stay_zero(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": np.zeros((K, K), np.float32)}, ["y"])
    done: Quantized = quantize(path, tmp_path / "q.onnx", feeds_of(np.zeros((2, 5, K), np.float32)))
    assert done.nodes == 1
    np.testing.assert_array_equal(run(tmp_path / "q.onnx", normal(2, 5, K))[0], 0)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_activation_grid_contains_zero_and_both_ends(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    for kind, least, most in (("uint8", 0, 255), ("int8", -127, 127)):
        scale, zero = activation_grid(low, high, "uint8" if kind == "uint8" else "int8")
        assert scale > 0
        assert least <= int(zero) <= most
        # Half a step at each end: rounding the zero point moves the grid by that much.
        assert (least - int(zero)) * float(scale) <= low + 0.51 * float(scale)
        assert (most - int(zero)) * float(scale) >= high - 0.51 * float(scale)


@given(st.integers(0, 10_000), st.sampled_from([0, 1]))
def test_weight_is_rounded_to_the_nearest_step_of_its_channel(seed: int, axis: int) -> None:
    w = normal(5, 7, seed=seed)
    quantized, scale = quantize_weight(w, axis)
    assert scale.shape == (w.shape[axis],)
    steps = np.expand_dims(scale, 1 - axis)
    # Half a step, and float32 rounding of the division and of the product: up to 127 steps times 1.2e-7 each.
    assert (np.abs(quantized * steps - w) <= 0.5 * steps * (1 + 1e-4)).all()
    assert (np.abs(quantized).max(axis=1 - axis) == 127).all()


def test_weights_that_no_rule_quantizes_are_named(tmp_path: Path) -> None:
    """Products of two activations have no weight; what computes a weight is no layer of its own."""
    weights = {"w": normal(K, K), "v": normal(K, K), "r": normal(1, 4 * K, K), "kernel": normal(K, K, 2)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["plain"], name="plain"),
        helper.make_node("MatMul", ["w", "plain"], ["first"], name="first"),
        helper.make_node("Mul", ["w", "v"], ["product"], name="product"),
        helper.make_node("MatMul", ["product", "v"], ["both"], name="both"),
        helper.make_node("MatMul", ["first", "both"], ["computed"], name="computed"),
        helper.make_node("Einsum", ["computed", "v"], ["sum"], name="einsum", equation="bij,kj->bik"),
        helper.make_node("LSTM", ["sum", "r", "r"], ["steps"], name="lstm", hidden_size=K),
        helper.make_node("Squeeze", ["steps"], ["sequence"], name="squeeze"),
        helper.make_node("ConvTranspose", ["sequence", "kernel"], ["wide"], name="transposed"),
        helper.make_node("MatMul", ["sum", "sequence"], ["y"], name="activations"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    linears, kept = candidates(helper.make_model(graph), convolutions=False)
    assert [linear.node for linear in linears] == ["plain"]
    assert {each.node: each.reason for each in kept} == {
        "first": "its weight is the first factor of the product",
        "computed": "its weight is computed from others",
        "einsum": "Einsum is not quantized",
        "lstm": "LSTM is not quantized",
        "transposed": "ConvTranspose is not quantized",
    }


def test_an_operator_of_the_model_itself_is_named_by_its_node() -> None:
    def scopes(*names: str) -> dict[str, str]:
        return {"pkg.torch.onnx.name_scopes": str(list(names))}

    assert module_of(scopes("", "model", "linear_1")) is None
    assert module_of(scopes("", "model", "model.model.head", "linear_1")) == "model.model.head"
    assert module_of(scopes("", "linear_1")) is None
    assert module_of({}) is None
