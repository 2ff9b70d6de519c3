"""Tests of SmoothQuant: unchanged float outputs, the scales of equation 4, and norms with other consumers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from compressor.quantize.qdq_rewrite import QuantizeError
from compressor.quantize.smoothquant import find_norms, smooth
from tests.onnx_files import H, K, feeds_of, initializers, node, normal, normed, normed_parts, outlier, run, save

pytest.importorskip("onnxruntime")

SAME = 1e-5  # relative to the largest output: each product is rounded to float32 once more

Nodes = list[onnx.NodeProto]
Weights = dict[str, npt.NDArray[Any]]


def smoothed(path: Path, *batches: npt.NDArray[np.float32]) -> int:
    return smooth(path, path.with_name("s.onnx"), feeds_of(*batches), path.with_name("work.onnx"))


def agree(path: Path, x: npt.NDArray[np.float32]) -> None:
    for before, after in zip(run(path, x), run(path.with_name("s.onnx"), x), strict=True):
        assert np.abs(after - before).max() <= SAME * np.abs(before).max()


def normalized(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    return np.asarray((wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5))


@pytest.mark.parametrize("cuts", [[], [3], [1, 2]])
def test_channels_are_scaled_by_equation_4_without_a_float_change(tmp_path: Path, cuts: list[int]) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    assert smoothed(path, *np.split(x, cuts)) == 1
    before, after = initializers(path), initializers(tmp_path / "s.onnx")
    activation = np.abs(normalized(x) * before["scale"] + before["shift"]).reshape(-1, K).max(axis=0)
    rows = np.maximum(np.abs(before["w1"]).max(axis=1), np.abs(before["w2"]).max(axis=1))
    scale = np.sqrt(activation / rows)
    # The norm is computed in float32; everything else is exact but for one rounding.
    np.testing.assert_allclose(after["scale"], before["scale"] / scale, rtol=1e-5)
    np.testing.assert_allclose(after["shift"], before["shift"] / scale, rtol=1e-5)
    for name in ("w1", "w2"):
        np.testing.assert_allclose(after[name], before[name] * scale[:, None], rtol=1e-5)
    np.testing.assert_array_equal(after["w3"], before["w3"])
    agree(path, x)


def test_activation_and_weight_maxima_are_equal_in_every_channel(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    smoothed(path, x)
    after = initializers(tmp_path / "s.onnx")
    activation = np.abs(normalized(x) * after["scale"] + after["shift"]).reshape(-1, K).max(axis=0)
    rows = np.maximum(np.abs(after["w1"]).max(axis=1), np.abs(after["w2"]).max(axis=1))
    np.testing.assert_allclose(activation, rows, rtol=1e-5)  # by definition of a strength of 0.5
    wild = np.abs(normalized(x) * initializers(path)["scale"] + after["shift"]).reshape(-1, K).max(axis=0)
    assert activation.max() / np.median(activation) < 0.25 * wild.max() / np.median(wild)


def test_scale_of_an_rms_norm_is_smoothed(tmp_path: Path) -> None:
    path, x = outlier(tmp_path / "f.onnx"), normal(8, 5, K)
    assert smoothed(path, x) == 1
    before, after = initializers(path), initializers(tmp_path / "s.onnx")
    assert after["spread"][0] / np.median(after["spread"]) < 0.1 * before["spread"][0]
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["w2", "spread"]
    agree(path, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_keeps_the_layout_of_its_weight(tmp_path: Path, transposed: bool) -> None:
    w, nodes = normal(K, H, seed=1), normed_parts()[0]
    nodes = [
        node("ReduceMean", ["x", "axes"], "pooled", keepdims=0),
        node("LayerNormalization", ["pooled", "scale", "shift"], "n"),
        node("Gemm", ["n", "w", "b"], "y", transB=int(transposed)),
    ]
    weights = {name: value for name, value in normed_parts()[1].items() if name in ("scale", "shift")}
    weights |= {"w": np.ascontiguousarray(w.T) if transposed else w, "b": normal(H), "axes": np.array([1])}
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), normal(8, 5, K)
    assert smoothed(path, x) == 1
    assert initializers(tmp_path / "s.onnx")["w"].shape == weights["w"].shape
    agree(path, x)


def test_zero_channel_and_zero_weight_row_are_unchanged(tmp_path: Path) -> None:
    nodes, weights = normed_parts()
    weights["scale"][5] = weights["shift"][5] = 0
    weights["w1"][9] = weights["w2"][9] = 0
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), normal(8, 5, K)
    assert smoothed(path, x) == 1
    after = initializers(tmp_path / "s.onnx")
    for name, channel in (("w1", 5), ("w2", 5), ("scale", 9), ("shift", 9)):
        np.testing.assert_array_equal(after[name][channel], weights[name][channel])
    agree(path, x)


def reading(*more: onnx.NodeProto, outputs: tuple[str, ...] = (), **weights: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Return `normed` with more consumers of the tensors that smoothing would change."""
    nodes, stored = normed_parts()
    return [*nodes, *more], {**stored, **weights}, ["y", *outputs]


def branch() -> onnx.NodeProto:
    """Return an If node whose two subgraphs consume the output of the norm."""
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    bodies = [helper.make_graph([helper.make_node(op, ["n"], ["inner"])], op, [], [inner]) for op in ("Abs", "Neg")]
    return node("If", ["yes"], "z", then_branch=bodies[0], else_branch=bodies[1])


UNTOUCHED = {
    "another operator reads the norm": reading(node("Add", ["n", "x"], "z"), outputs=("z",)),
    "the norm is an output": reading(outputs=("n",)),
    "a subgraph reads the norm": reading(branch(), outputs=("z",), yes=np.array(True)),
    "a product of activations reads the norm": reading(
        node("Transpose", ["t"], "turned", perm=[0, 2, 1]),
        node("MatMul", ["turned", "n"], "z"),
        outputs=("z",),
    ),
    "a weight too small for int8 reads the norm": reading(
        node("MatMul", ["n", "small"], "z"), outputs=("z",), small=normal(K, 4)
    ),
    "another Linear shares the weight": reading(node("MatMul", ["x", "w1"], "z"), outputs=("z",)),
    "something else reads the scale": reading(node("Add", ["x", "scale"], "z"), outputs=("z",)),
    "something else reads the shift": reading(node("Add", ["x", "shift"], "z"), outputs=("z",)),
    "the weight is an output": reading(outputs=("w2",)),
}


@pytest.mark.parametrize("why", UNTOUCHED)
def test_norm_with_other_consumers_is_unchanged(tmp_path: Path, why: str) -> None:
    path = save(tmp_path / "f.onnx", *UNTOUCHED[why])
    run(path, normal(2, 5, K))  # the file is valid
    assert find_norms(onnx.load(str(path))) == []
    assert smoothed(path, normal(2, 5, K)) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.onnx"]


def test_tied_embedding_is_unchanged(tmp_path: Path) -> None:
    """The model has MatMul(n, Transpose(table)) and Gather(table)."""
    nodes = [
        node("Gather", ["table", "row"], "e"),
        node("Add", ["x", "e"], "x0"),
        node("LayerNormalization", ["x0", "scale", "shift"], "n"),
        node("Transpose", ["table"], "head", perm=[1, 0]),
        node("MatMul", ["n", "head"], "y"),
    ]
    weights = {"table": normal(K, K), "row": np.array(3), "scale": normal(K), "shift": normal(K)}
    path = save(tmp_path / "f.onnx", nodes, weights, ["y"])
    assert smoothed(path, normal(2, 5, K)) == 0


def test_two_norms_are_scaled_by_their_own_channels(tmp_path: Path) -> None:
    nodes, weights = normed_parts()
    nodes += [
        node("LayerNormalization", ["t", "scale2"], "n2"),
        node("MatMul", ["n2", "w4"], "z"),
    ]
    weights |= {"scale2": np.linspace(0.1, 30, H, dtype=np.float32), "w4": normal(H, H)}
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y", "z"]), normal(4, 5, K)
    assert [norm.activation for norm in find_norms(onnx.load(str(path)))] == ["n", "n2"]
    assert smoothed(path, x) == 2
    agree(path, x)
    spread = initializers(tmp_path / "s.onnx")["scale2"]
    assert spread.max() / spread.min() < 0.2 * 300


def test_missing_data_skips_smoothing_and_a_wrong_batch_raises(tmp_path: Path) -> None:
    path = normed(tmp_path / "f.onnx")
    assert smoothed(path) == 0
    assert not (tmp_path / "s.onnx").exists()
    with pytest.raises(QuantizeError, match="does not run"):
        smoothed(path, normal(2, 5, 7))
