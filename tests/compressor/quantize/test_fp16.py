"""fp16: close to float32, weights in 16 bits, and norms, inputs and outputs in 32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from compressor.quantize.fp16 import KEPT, HalfError, to_fp16
from tests.onnx_files import K, initializers, mlp, node, normal, normed, normed_parts, run, save

pytest.importorskip("onnxruntime")

HALF = 2**-11  # a number is off by so much of itself once it is rounded to fp16


def inferred(path: Path) -> dict[str, int]:
    """The element type of every value of a file."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_it_differs_from_float32_by_what_16_bits_explain(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    assert to_fp16(path, tmp_path / "h.onnx") == 3
    exact, half = run(path, x)[0], run(tmp_path / "h.onnx", x)[0]
    error = np.abs(half - exact).max() / np.abs(exact).max()
    # Three products one behind the other, each with both factors and its sum rounded.
    assert HALF / 10 < error < 9 * HALF
    assert half.dtype == np.float32


def test_weights_have_16_bits_and_norms_inputs_and_outputs_32(tmp_path: Path) -> None:
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
    for each in model.graph.node:
        kind = TensorProto.FLOAT if each.op_type == "LayerNormalization" else TensorProto.FLOAT16
        if each.op_type != "Cast":
            assert {types[name] for name in (*each.input, *each.output)} == {kind}, each.op_type


@pytest.mark.parametrize("op", ["Softmax", "ReduceMean", "Pow", "Sqrt", "Exp"])
def test_what_leaves_the_range_of_16_bits_is_computed_in_32(tmp_path: Path, op: str) -> None:
    assert op in KEPT
    inputs = {"ReduceMean": ["a", "axes"], "Pow": ["a", "two"]}.get(op, ["a"])
    nodes = [node("MatMul", ["x", "w"], "a"), node(op, inputs, "b"), node("MatMul", ["b", "w"], "y")]
    weights = {"w": normal(K, K), "axes": np.array([1]), "two": np.array(2, np.float32)}
    used = {name: value for name, value in weights.items() if name in ("w", *inputs)}
    to_fp16(save(tmp_path / "f.onnx", nodes, used, ["y"]), tmp_path / "h.onnx")
    types = inferred(tmp_path / "h.onnx")
    (kept,) = [each for each in onnx.load(str(tmp_path / "h.onnx")).graph.node if each.op_type == op]
    assert types[kept.input[0]] == types[kept.output[0]] == TensorProto.FLOAT


def test_squares_beyond_the_range_of_16_bits_stay_finite(tmp_path: Path) -> None:
    """The norm of values of a thousand: their squares would overflow."""
    nodes, weights = normed_parts()
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), 1000 * normal(4, 5, K)
    to_fp16(path, tmp_path / "h.onnx")
    exact, half = run(path, x)[0], run(tmp_path / "h.onnx", x)[0]
    assert np.abs(half - exact).max() < 9 * HALF * np.abs(exact).max()


def test_a_weight_beyond_the_range_is_clipped_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    w = normal(K, K)
    w[3, 4] = 1e6
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    assert to_fp16(path, tmp_path / "h.onnx") == 1  # warnings are errors here
    half = initializers(tmp_path / "h.onnx")["w"]
    assert np.isfinite(half).all()
    assert half[3, 4] == 65504
    assert capfd.readouterr() == ("", "")


def test_any_batch_and_length_is_taken(tmp_path: Path) -> None:
    path = mlp(tmp_path / "f.onnx")
    assert to_fp16(path, tmp_path / "h.onnx") == 4  # two products, two biases
    for shape in ((1, 1), (7, 3)):
        assert run(tmp_path / "h.onnx", normal(*shape, K))[0].shape[:2] == shape


def test_a_model_without_weights_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(HalfError, match=r"^f\.onnx holds no float32 weight; fp16 has nothing to work on, leave it out"):
        to_fp16(path, tmp_path / "h.onnx")
    assert not (tmp_path / "h.onnx").exists()
