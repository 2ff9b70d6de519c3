"""Tests of the substitute of a target: fp16 files are judged in fp16 arithmetic, unlike ONNX Runtime's CPU kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from compressor.quantize.convert import convert
from compressor.quantize.half_precision import to_bf16, to_fp16
from compressor.target.half_arithmetic import BF16, FP16, half_types, write_float32
from compressor.target.stand_in import load_for_quality, substitute_for
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.registry import runtime
from tests.onnx_files import K, N, feeds_of, initializers, mlp, node, normal, normed, run, save

pytest.importorskip("onnxruntime")

OPTIONS = BuildOptions(threads=1)
ULP = 2**-10  # distance of neighbouring fp16 numbers, relative to the smaller power of two


def answer(target: Runtime, path: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    with load_for_quality(target, path, OPTIONS) as engine:
        return engine.run({"x": x})["y"]


def substitute() -> Runtime:
    return substitute_for(runtime("tensorrt"))


@pytest.mark.parametrize("write", [mlp, normed])
def test_fp16_files_compute_as_onnx_defines_them(tmp_path: Path, write: Any) -> None:
    path, x = write(tmp_path / "f.onnx"), normal(6, 5, K)
    to_fp16(path, tmp_path / "h.onnx", {})
    expected = ReferenceEvaluator(str(tmp_path / "h.onnx")).run(None, {"x": x})[0]
    found = answer(substitute(), tmp_path / "h.onnx", x)
    size = np.abs(expected).max()
    # NumPy's sums of products differ from ours in the last float32 bits: few values move to the next fp16 number.
    assert np.abs(found - expected).max() <= 2 * ULP * size
    assert np.mean(found != expected) < 0.1
    # ONNX Runtime's own arithmetic is not that of fp16: most values differ.
    assert np.mean(run(tmp_path / "h.onnx", x)[0] != expected) > 0.3
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f.onnx", "h.onnx"]


def test_products_are_those_of_torch_in_float16(tmp_path: Path) -> None:
    w, x = normal(K, K), 30 * normal(4, 5, K)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    to_fp16(path, tmp_path / "h.onnx", {})
    expected = (torch.from_numpy(x).half() @ torch.from_numpy(w).half()).float().numpy()
    found = answer(substitute(), tmp_path / "h.onnx", x)
    np.testing.assert_allclose(found, expected, rtol=ULP, atol=0.05 * ULP * np.abs(expected).max())
    assert np.mean(found == expected) > 0.95


def test_products_are_those_of_torch_in_bfloat16(tmp_path: Path) -> None:
    """ONNX Runtime has no bf16 kernel for the CPU: the file is opened in float32, rounded where quality is measured."""
    w, x = normal(K, K), 30 * normal(4, 5, K)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    to_bf16(path, tmp_path / "b.onnx")
    assert half_types(tmp_path / "b.onnx") == {BF16}
    expected = (torch.from_numpy(x).bfloat16() @ torch.from_numpy(w).bfloat16()).float().numpy()
    found = answer(substitute(), tmp_path / "b.onnx", x)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=0.05 * 2**-7 * np.abs(expected).max())
    assert np.mean(found == expected) > 0.95
    assert substitute().build(tmp_path / "b.onnx", tmp_path, OPTIONS) == tmp_path / "b.onnx"
    with substitute().load(tmp_path / "b.onnx", OPTIONS) as engine:  # as it is timed
        plain = engine.run({"x": x})["y"]
    rounded = torch.from_numpy(w).bfloat16().float().numpy()
    np.testing.assert_allclose(plain, x @ rounded, rtol=1e-5, atol=1e-4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b.onnx", "f.onnx"]


def test_int4_weights_multiply_activations_in_fp16(tmp_path: Path) -> None:
    """ONNX Runtime would round the activations to int8, at a hundred times the error of fp16."""
    w, x = normal(K, N), normal(4, 5, K)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    convert(path, tmp_path / "q.onnx", "int4", runtime("tensorrt_rtx").int8, feeds_of(x))
    steps, scales = (initializers(tmp_path / "q.onnx")[name] for name in ("int8/w", "int8/w/scale"))
    weight = (steps.astype(np.float32) * scales.astype(np.float32).repeat(32, axis=0)).astype(np.float16)
    expected = (torch.from_numpy(x).half() @ torch.from_numpy(weight)).float().numpy()
    found = answer(substitute(), tmp_path / "q.onnx", x)
    np.testing.assert_allclose(found, expected, rtol=ULP, atol=0.05 * ULP * np.abs(expected).max())
    assert np.mean(found == expected) > 0.95
    assert np.abs(run(tmp_path / "q.onnx", x)[0] - expected).max() > 5 * ULP * np.abs(expected).max()


def test_fp8_products_are_those_of_their_rounded_factors(tmp_path: Path) -> None:
    w, x = normal(K, N), normal(4, 5, K)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    done = convert(path, tmp_path / "q.onnx", "fp8", runtime("tensorrt_rtx").int8, feeds_of(x))
    assert (done.rest, done.by) == ("fp16", "compressor")
    stored = {name: value.astype(np.float32) for name, value in initializers(tmp_path / "q.onnx").items()}
    scale = stored["int8/x/scale"]
    steps = torch.from_numpy(x.astype(np.float16).astype(np.float32) / scale).to(torch.float8_e4m3fn).float().numpy()
    expected = (steps * scale) @ (stored["int8/w"] * stored["int8/w/scale"])
    found = answer(substitute(), tmp_path / "q.onnx", x)
    assert np.mean(np.abs(found - expected) <= ULP * np.abs(expected) + 1e-6) > 0.95  # of x, a few lie between steps


def test_overflow_is_infinite_where_onnxruntime_hides_it(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("Mul", ["a", "small"], "b"), node("MatMul", ["b", "w"], "y")]
    weights = {"w": 100 * np.eye(K, dtype=np.float32), "small": np.array(1e-3, np.float32)}
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), np.full((1, 1, K), 1000, np.float32)
    to_fp16(path, tmp_path / "h.onnx", {})
    assert not np.isfinite(answer(substitute(), tmp_path / "h.onnx", x)).any()  # infinity times 0 is NaN
    assert np.isfinite(run(tmp_path / "h.onnx", x)[0]).all()
    np.testing.assert_allclose(answer(substitute(), path, x), run(path, x)[0])  # a float file is as it is


def test_int8_products_with_fp16_scales_do_not_saturate(tmp_path: Path) -> None:
    """All weights and activations at their largest: kernels that add pairs of products in 16 bits lose a half."""
    w, x = np.full((K, K), 0.5, np.float32), np.ones((2, 3, K), np.float32)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    style = runtime("tensorrt").int8
    convert(path, tmp_path / "q.onnx", "int8", style, feeds_of(x), calibration="minmax")
    assert initializers(tmp_path / "q.onnx")["int8/x/scale"].dtype == np.float16
    np.testing.assert_allclose(answer(substitute(), tmp_path / "q.onnx", x), x @ w, rtol=4 * ULP)


def test_rounded_file_is_valid_and_float32(tmp_path: Path) -> None:
    path = normed(tmp_path / "f.onnx")
    to_fp16(path, tmp_path / "h.onnx", {})
    write_float32(tmp_path / "h.onnx", tmp_path / "r.onnx", rounded=True)
    onnx.checker.check_model(str(tmp_path / "r.onnx"), full_check=True)
    assert {value.dtype for value in initializers(tmp_path / "r.onnx").values()} == {np.dtype(np.float32)}
    assert [half_types(tmp_path / name) for name in ("f.onnx", "h.onnx")] == [frozenset(), {FP16}]


def test_other_targets_load_fp16_files_as_they_are(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(2, 5, K)
    to_fp16(path, tmp_path / "h.onnx", {})
    np.testing.assert_array_equal(
        answer(runtime("onnxruntime"), tmp_path / "h.onnx", x), run(tmp_path / "h.onnx", x)[0]
    )
