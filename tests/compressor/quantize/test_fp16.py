"""Tests of fp16: outputs close to float32, fp16 weights, and float32 norms, inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from compressor.quantize.fp16 import KEPT, HalfError, to_fp16
from tests.onnx_files import K, initializers, mlp, node, normal, normed, normed_parts, run, save

pytest.importorskip("onnxruntime")

HALF = 2**-11  # relative rounding error of fp16


def inferred(path: Path) -> dict[str, int]:
    """Return the element type of every value of a file."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_error_is_that_of_fp16_rounding(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    assert to_fp16(path, tmp_path / "h.onnx") == 3
    exact, half = run(path, x)[0], run(tmp_path / "h.onnx", x)[0]
    error = np.abs(half - exact).max() / np.abs(exact).max()
    # Three products in a row, each with rounding of both factors and of the sum.
    assert HALF / 10 < error < 9 * HALF
    assert half.dtype == np.float32


def test_weights_are_fp16_and_norms_inputs_and_outputs_float32(tmp_path: Path) -> None:
    path = normed(tmp_path / "f.onnx")
    to_fp16(path, tmp_path / "h.onnx")
    before, after, types = initializers(path), initializers(tmp_path / "h.onnx"), inferred(tmp_path / "h.onnx")
    for name in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(after[name], before[name].astype(np.float16))
    for name in ("scale", "shift"):
        np.testing.assert_array_equal(after[name], before[name])
        assert after[name].dtype == np.float32
    assert types["x"] == types["y"] == TensorProto.FLOAT
    model = onnx.load(str(tmp_path / "h.onnx"))
    for computed in model.graph.node:
        kind = TensorProto.FLOAT if computed.op_type == "LayerNormalization" else TensorProto.FLOAT16
        if computed.op_type != "Cast":
            assert {types[name] for name in (*computed.input, *computed.output)} == {kind}, computed.op_type


@pytest.mark.parametrize("op", ["Softmax", "ReduceMean", "Pow", "Sqrt", "Exp"])
def test_operators_beyond_the_fp16_range_stay_float32(tmp_path: Path, op: str) -> None:
    assert op in KEPT
    inputs = {"ReduceMean": ["a", "axes"], "Pow": ["a", "two"]}.get(op, ["a"])
    nodes = [node("MatMul", ["x", "w"], "a"), node(op, inputs, "b"), node("MatMul", ["b", "w"], "y")]
    weights = {"w": normal(K, K), "axes": np.array([1]), "two": np.array(2, np.float32)}
    used = {name: value for name, value in weights.items() if name in ("w", *inputs)}
    to_fp16(save(tmp_path / "f.onnx", nodes, used, ["y"]), tmp_path / "h.onnx")
    types = inferred(tmp_path / "h.onnx")
    (kept,) = [each for each in onnx.load(str(tmp_path / "h.onnx")).graph.node if each.op_type == op]
    assert types[kept.input[0]] == types[kept.output[0]] == TensorProto.FLOAT


def test_squares_beyond_the_fp16_range_stay_finite(tmp_path: Path) -> None:
    """The norm of values around 1000, whose squares overflow in fp16."""
    nodes, weights = normed_parts()
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), 1000 * normal(4, 5, K)
    to_fp16(path, tmp_path / "h.onnx")
    exact, half = run(path, x)[0], run(tmp_path / "h.onnx", x)[0]
    assert np.abs(half - exact).max() < 9 * HALF * np.abs(exact).max()


def test_weight_beyond_the_range_is_clipped_silently(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    w = normal(K, K)
    w[3, 4] = 1e6
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    assert to_fp16(path, tmp_path / "h.onnx") == 1  # warnings are errors here
    half = initializers(tmp_path / "h.onnx")["w"]
    assert np.isfinite(half).all()
    assert half[3, 4] == 65504
    assert capfd.readouterr() == ("", "")


def test_batch_and_length_stay_dynamic(tmp_path: Path) -> None:
    path = mlp(tmp_path / "f.onnx")
    assert to_fp16(path, tmp_path / "h.onnx") == 4  # two products, two biases
    for shape in ((1, 1), (7, 3)):
        assert run(tmp_path / "h.onnx", normal(*shape, K))[0].shape[:2] == shape


def test_model_without_weights_raises(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(
        HalfError, match=r"^f\.onnx has no float32 weight, so there is nothing to convert to fp16; choose another"
    ):
        to_fp16(path, tmp_path / "h.onnx")
    assert not (tmp_path / "h.onnx").exists()
