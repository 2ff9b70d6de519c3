"""Tests of fp16 and bf16: the rounding error, the range of values and weights, and the rules of ONNX's full checker.

The oracle is ONNX's reference evaluator, which computes in NumPy's float16. ONNX Runtime computes fp16 in float32 on a
CPU, so it hides overflow.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from compressor.quantize.half_precision import BF16_OPSET, KEPT, LARGEST, HalfError, check_file, to_bf16, to_fp16
from compressor.quantize.intermediate_values import absolute_maxima
from compressor.quantize.qdq_rewrite import QuantizeError
from tests.onnx_files import K, feeds_of, initializers, mlp, node, normal, normed, normed_parts, run, save

pytest.importorskip("onnxruntime")

ROUNDING = 2**-11  # relative rounding error of fp16


def inferred(path: Path) -> dict[str, int]:
    """Return the element type of every value of a file."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def in_float16(path: Path, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return the first output as NumPy computes it, in float16 where the file is fp16."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(ReferenceEvaluator(str(path)).run(None, {"x": x})[0])


def maxima_of(path: Path, x: npt.NDArray[np.float32]) -> dict[str, float]:
    return absolute_maxima(path, path.with_name("work.onnx"), feeds_of(x[:3], x[3:]), lambda _: None)


def kinds(path: Path, op: str) -> set[int]:
    """Return the types of the float values around the nodes of an operator."""
    types = inferred(path)
    nodes = [each for each in onnx.load(str(path)).graph.node if each.op_type == op]
    assert nodes
    found = {types[name] for each in nodes for name in (*each.input, *each.output)}
    return found & {TensorProto.FLOAT, TensorProto.FLOAT16}


def test_error_is_that_of_fp16_rounding(tmp_path: Path) -> None:
    path, x = normed(tmp_path / "f.onnx"), normal(8, 5, K)
    assert to_fp16(path, tmp_path / "h.onnx", maxima_of(path, x)).kept == ()
    exact, half = run(path, x)[0], in_float16(tmp_path / "h.onnx", x)
    error = np.abs(half - exact).max() / np.abs(exact).max()
    # Three products in a row, each with rounding of both factors and of the sum.
    assert ROUNDING / 10 < error < 9 * ROUNDING
    assert half.dtype == np.float32


def test_weights_are_fp16_and_norms_inputs_and_outputs_float32(tmp_path: Path) -> None:
    path = normed(tmp_path / "f.onnx")
    to_fp16(path, tmp_path / "h.onnx", {})
    before, after, types = initializers(path), initializers(tmp_path / "h.onnx"), inferred(tmp_path / "h.onnx")
    for name in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(after[name], before[name].astype(np.float16))
    for name in ("scale", "shift"):
        np.testing.assert_array_equal(after[name], before[name])
        assert after[name].dtype == np.float32
    assert types["x"] == types["y"] == TensorProto.FLOAT
    for op in {each.op_type for each in onnx.load(str(tmp_path / "h.onnx")).graph.node} - {"Cast"}:
        kind = TensorProto.FLOAT if op == "LayerNormalization" else TensorProto.FLOAT16
        assert kinds(tmp_path / "h.onnx", op) == {kind}, op


@pytest.mark.parametrize("op", ["Softmax", "ReduceMean", "Pow", "Sqrt", "Exp"])
def test_operators_beyond_the_fp16_range_stay_float32(tmp_path: Path, op: str) -> None:
    assert op in KEPT
    inputs = {"ReduceMean": ["a", "axes"], "Pow": ["a", "two"]}.get(op, ["a"])
    nodes = [node("MatMul", ["x", "w"], "a"), node(op, inputs, "b"), node("MatMul", ["b", "w"], "y")]
    weights = {"w": normal(K, K), "axes": np.array([1]), "two": np.array(2, np.float32)}
    used = {name: value for name, value in weights.items() if name in ("w", *inputs)}
    to_fp16(save(tmp_path / "f.onnx", nodes, used, ["y"]), tmp_path / "h.onnx", {})
    assert kinds(tmp_path / "h.onnx", op) == {TensorProto.FLOAT}


def rms_norm(path: Path) -> Path:
    """Write x / sqrt(mean(x^2) + 1e-5) @ w, with the norm in single operators."""
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Pow", ["a", "two"], "squares"),
        node("ReduceMean", ["squares", "axes"], "mean"),
        node("Add", ["mean", "epsilon"], "shifted"),
        node("Sqrt", ["shifted"], "root"),
        node("Div", ["a", "root"], "b"),
        node("MatMul", ["b", "w"], "y"),
    ]
    scalars = {"two": np.array(2, np.float32), "epsilon": np.array(1e-5, np.float32), "axes": np.array([-1])}
    return save(path, nodes, scalars | {"w": normal(K, K)}, ["y"])


def test_squares_between_float32_nodes_are_never_fp16(tmp_path: Path) -> None:
    """Squares of values around 5,000 overflow in fp16, and so does the fp16 cast between two float32 nodes."""
    path, x = rms_norm(tmp_path / "f.onnx"), 1000 * normal(4, 5, K)
    assert to_fp16(path, tmp_path / "h.onnx", maxima_of(path, x)).kept == ()  # a norm is no exception
    exact, half = run(path, x)[0], in_float16(tmp_path / "h.onnx", x)
    assert np.abs(half - exact).max() < 9 * ROUNDING * np.abs(exact).max()
    for op in ("Pow", "ReduceMean", "Sqrt", "Div"):
        assert kinds(tmp_path / "h.onnx", op) == {TensorProto.FLOAT}
    casts = [each for each in onnx.load(str(tmp_path / "h.onnx")).graph.node if each.op_type == "Cast"]
    assert len(casts) == 4  # the input, the input and the output of the norm, the output


def wide(path: Path) -> Path:
    """Write a network of three layers whose second has values of about 5e5, which its third makes small again."""
    nodes = [
        node("MatMul", ["x", "w1"], "a"),
        node("MatMul", ["a", "w2"], "b"),
        node("Relu", ["b"], "c"),
        node("MatMul", ["c", "w3"], "d"),
        node("MatMul", ["d", "w4"], "y"),
    ]
    for name, each in zip(("first", "second", "act", "third", "last"), nodes, strict=True):
        entry = each.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", str(["", name, "node"])
    weights = {name: normal(K, K, seed=i) / 6 for i, name in enumerate(("w1", "w2", "w3", "w4"))}
    weights["w2"], weights["w3"] = 2e5 * weights["w2"] / 2, weights["w3"] / 1e5
    return save(path, nodes, weights, ["y"])


def test_values_beyond_the_range_stay_float32_and_are_named(tmp_path: Path) -> None:
    path, x = wide(tmp_path / "f.onnx"), normal(8, 5, K)
    maxima = maxima_of(path, x)
    assert maxima["b"] > LARGEST
    # Without the ranges, no row is finite: the arithmetic is that of fp16.
    to_fp16(path, tmp_path / "blind.onnx", {})
    assert not np.isfinite(in_float16(tmp_path / "blind.onnx", x)).all(axis=-1).any()
    kept = to_fp16(path, tmp_path / "h.onnx", maxima).kept
    # The producer, and all that read its values.
    assert [each.module for each in kept] == ["second", "act", "third"]
    assert kept[0].reason == f"largest value {maxima['b']:.2g}"
    exact, half = run(path, x)[0], in_float16(tmp_path / "h.onnx", x)
    assert np.abs(half - exact).max() < 9 * ROUNDING * np.abs(exact).max()
    stored = initializers(tmp_path / "h.onnx")
    assert {name: stored[name].dtype.name for name in stored} == {
        "w1": "float16", "w2": "float32", "w3": "float32", "w4": "float16"
    }  # fmt: skip


def test_values_below_the_range_stay_float32(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("Mul", ["a", "tiny"], "b"), node("Mul", ["b", "large"], "y")]
    scalars = {"tiny": np.array(2.0**-13, np.float32), "large": np.array(2.0**13, np.float32)}
    path, x = save(tmp_path / "f.onnx", nodes, scalars | {"w": normal(K, K) / 100}, ["y"]), normal(8, 5, K)
    kept = to_fp16(path, tmp_path / "h.onnx", maxima_of(path, x)).kept
    assert [each.node for each in kept] == ["node_b", "node_y"]
    assert "below the normal range of fp16" in kept[0].reason
    exact, half = run(path, x)[0], in_float16(tmp_path / "h.onnx", x)
    assert np.abs(half - exact).max() < 4 * ROUNDING * np.abs(exact).max()


@pytest.mark.parametrize(
    ("value", "words"), [(1e6, "largest weight 1e+06"), (1e-7, "largest weight 1e-07, below the normal range of fp16")]
)
def test_weights_beyond_the_range_are_neither_clipped_nor_flushed(tmp_path: Path, value: float, words: str) -> None:
    w = np.full((K, K), value, np.float32) if value < 1 else normal(K, K)
    w[3, 4] = value
    nodes = [node("MatMul", ["x", "v"], "a"), node("MatMul", ["a", "w"], "y")]
    path = save(tmp_path / "f.onnx", nodes, {"v": normal(K, K), "w": w}, ["y"])
    half = to_fp16(path, tmp_path / "h.onnx", {})
    assert [(each.node, each.reason) for each in half.kept] == [("node_y", words)]
    stored = initializers(tmp_path / "h.onnx")
    np.testing.assert_array_equal(stored["w"], w)
    assert stored["v"].dtype == np.float16
    exact, found = run(path, normal(2, 5, K))[0], in_float16(tmp_path / "h.onnx", normal(2, 5, K))
    assert np.abs(found - exact).max() < 4 * ROUNDING * np.abs(exact).max()


def test_model_that_exceeds_the_range_everywhere_raises(tmp_path: Path) -> None:
    w = np.full((K, K), 1e6, np.float32)
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": w}, ["y"])
    message = r"^Every layer of f\.onnx with weights exceeds .*node_y: largest weight 1e\+06"
    with pytest.raises(HalfError, match=message):
        to_fp16(path, tmp_path / "h.onnx", {})
    assert not (tmp_path / "h.onnx").exists()


def test_mask_constants_count_even_if_calibration_masks_nothing(tmp_path: Path) -> None:
    lowest = float(np.finfo(np.float32).min)
    nodes = [
        node("MatMul", ["x", "w"], "scores"),
        node("Shape", ["x"], "shape"),
        node("Greater", ["shape", "hundred"], "long"),
        node("Where", ["long", "lowest", "zero"], "sizes"),
        node("Slice", ["sizes", "from", "to"], "mask"),
        node("Add", ["scores", "mask"], "masked"),
        node("Softmax", ["masked"], "y"),
    ]
    constants: dict[str, npt.NDArray[Any]] = {"hundred": np.array(100), "from": np.array([0]), "to": np.array([1])}
    constants |= {"lowest": np.array(lowest, np.float32), "zero": np.array(0, np.float32)}
    path = save(tmp_path / "f.onnx", nodes, constants | {"w": normal(K, K)}, ["y"])
    maxima = maxima_of(path, normal(4, 5, K))
    assert maxima["mask"] == 0
    kept = to_fp16(path, tmp_path / "h.onnx", maxima).kept
    assert [(each.node, each.reason) for each in kept] == [("node_masked", "largest value 3.4e+38")]
    assert np.isfinite(in_float16(tmp_path / "h.onnx", normal(101, 1, K))).all()


def test_positions_stay_float32(tmp_path: Path) -> None:
    """In fp16, position 4,095 would be 4,096, and its angle would be off by a radian."""
    nodes = [
        node("Shape", ["x"], "length", start=1, end=2),
        node("Squeeze", ["length"], "end"),
        node("Range", ["start", "end", "step"], "positions"),
        node("Cast", ["positions"], "places", to=TensorProto.FLOAT),
        node("Unsqueeze", ["places", "axes"], "column"),
        node("Cos", ["column"], "cosine"),
        node("MatMul", ["x", "w"], "a"),
        node("Mul", ["a", "cosine"], "y"),
    ]
    constants = {"start": np.array(0), "step": np.array(1), "axes": np.array([1]), "w": np.eye(K, dtype=np.float32)}
    path = save(tmp_path / "f.onnx", nodes, constants, ["y"])
    to_fp16(path, tmp_path / "h.onnx", {})
    x = np.ones((1, 5000, K), np.float32)
    expected = np.broadcast_to(np.cos(np.arange(5000))[None, :, None], x.shape)
    np.testing.assert_allclose(in_float16(tmp_path / "h.onnx", x), expected, atol=2 * ROUNDING)
    assert kinds(tmp_path / "h.onnx", "MatMul") == {TensorProto.FLOAT16}


def test_weight_of_float32_and_fp16_nodes_is_stored_in_both_types(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("Pow", ["a", "w"], "b"), node("MatMul", ["b", "w"], "y")]
    w = np.abs(normal(K, K)) + 0.5
    path = save(tmp_path / "f.onnx", nodes, {"w": w}, ["y"])
    to_fp16(path, tmp_path / "h.onnx", {})
    stored = initializers(tmp_path / "h.onnx")
    assert {name: value.dtype.name for name, value in stored.items()} == {"w": "float32", "w/fp16": "float16"}
    np.testing.assert_array_equal(stored["w"], w)


def test_values_that_bodies_of_if_read_stay_float32(tmp_path: Path) -> None:
    def body(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)
        return helper.make_graph([node(op, ["a"], f"{op}_out")], op, [], [output])

    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("If", ["yes"], "b", then_branch=body("Relu"), else_branch=body("Neg")),
        node("MatMul", ["b", "w"], "y"),
    ]
    path = save(tmp_path / "f.onnx", nodes, {"w": normal(K, K), "yes": np.array(True)}, ["y"])
    to_fp16(path, tmp_path / "h.onnx", {})
    exact, half = run(path, normal(2, 5, K))[0], run(tmp_path / "h.onnx", normal(2, 5, K))[0]
    assert np.abs(half - exact).max() < 9 * ROUNDING * np.abs(exact).max()


def test_written_file_has_unique_sorted_nodes_and_its_outputs(tmp_path: Path) -> None:
    """An inner value that is also an output, nodes of one name, and a value that many nodes read."""
    nodes, weights = normed_parts()
    for each in nodes:
        each.name = "same"
    path = save(tmp_path / "f.onnx", nodes, weights, ["t", "y"])
    to_fp16(path, tmp_path / "h.onnx", {})
    onnx.checker.check_model(str(tmp_path / "h.onnx"), full_check=True)  # includes the order of the nodes
    graph = onnx.load(str(tmp_path / "h.onnx")).graph
    assert max(Counter(each.name for each in graph.node).values()) == 1
    assert [value.name for value in graph.output] == ["t", "y"]
    feeds = {"x": normal(2, 5, K)}  # ONNX Runtime refuses the float file, for its names
    exacts, halves = (ReferenceEvaluator(str(each)).run(None, feeds) for each in (path, tmp_path / "h.onnx"))
    for exact, half in zip(exacts, halves, strict=True):
        assert half.dtype == np.float32
        assert np.abs(half - exact).max() < 9 * ROUNDING * np.abs(exact).max()


def test_file_that_the_full_checker_rejects_raises(tmp_path: Path) -> None:
    path = mlp(tmp_path / "f.onnx")
    model = onnx.load(str(path))
    first = model.graph.node[0]
    del model.graph.node[0]
    model.graph.node.append(first)
    onnx.save(model, str(path))
    with pytest.raises(HalfError, match=r"^f\.onnx fails ONNX's checker .*sorted.*choose another precision"):
        check_file(path)


def test_batch_and_length_stay_dynamic(tmp_path: Path) -> None:
    path = mlp(tmp_path / "f.onnx")
    assert to_fp16(path, tmp_path / "h.onnx", {}).nodes == 5
    for shape in ((1, 1), (7, 3)):
        assert run(tmp_path / "h.onnx", normal(*shape, K))[0].shape[:2] == shape


def test_model_without_weights_raises(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(
        HalfError, match=r"^f\.onnx has no float32 weight, so there is nothing to convert to fp16; choose another"
    ):
        to_fp16(path, tmp_path / "h.onnx", {})
    assert not (tmp_path / "h.onnx").exists()


def test_maxima_are_those_of_all_samples(tmp_path: Path) -> None:
    path, x = mlp(tmp_path / "f.onnx"), normal(7, 5, K)
    found, weights = maxima_of(path, x), initializers(path)
    hidden = x @ weights["w1"]
    relu = np.maximum(hidden + weights["b1"], 0)
    expected = {"h0": hidden, "h1": hidden + weights["b1"], "h2": relu, "y0": relu @ weights["w2"]}
    assert set(found) == {*expected, "y"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(np.abs(value).max(), rel=1e-5)
    with pytest.raises(QuantizeError, match="no calibration data; fp16 needs at least one batch"):
        absolute_maxima(path, tmp_path / "work.onnx", feeds_of(), lambda _: None)


# ---- bf16


def test_bf16_keeps_every_layer_whatever_its_values_are(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "kernel"], "c"), node("MatMul", ["c", "w"], "y")]
    weights = {"kernel": 1e6 * normal(5, 5, 1), "w": 1e-7 * normal(K, K)}  # beyond and below fp16
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), normal(6, 5, K)
    with pytest.raises(HalfError, match="Every layer"):
        to_fp16(path, tmp_path / "h.onnx", maxima_of(path, x))
    assert to_bf16(path, tmp_path / "b.onnx").kept == ()
    types = inferred(tmp_path / "b.onnx")
    assert {types[name] for name in ("kernel", "w", "c")} == {TensorProto.BFLOAT16}
    assert types["x"] == types["y"] == TensorProto.FLOAT
    for name, weight in weights.items():
        error = np.abs(initializers(tmp_path / "b.onnx")[name].astype(np.float32) / weight - 1)
        assert 2**-10 < error.max() <= 2**-8  # half a unit of 8 significant bits


def test_bf16_keeps_what_the_parser_of_tensorrt_has_in_fp16_alone(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("HardSwish", ["a"], "b"), node("MatMul", ["b", "w"], "y")]
    path = save(tmp_path / "f.onnx", nodes, {"w": normal(K, K)}, ["y"])
    to_bf16(path, tmp_path / "b.onnx")
    to_fp16(path, tmp_path / "h.onnx", {})
    assert kinds(tmp_path / "b.onnx", "HardSwish") == {TensorProto.FLOAT}
    assert kinds(tmp_path / "h.onnx", "HardSwish") == {TensorProto.FLOAT16}


def test_bf16_keeps_norms_in_float32_and_raises_the_opset(tmp_path: Path) -> None:
    path = normed(tmp_path / "f.onnx")
    to_bf16(path, tmp_path / "b.onnx")
    types, model = inferred(tmp_path / "b.onnx"), onnx.load(str(tmp_path / "b.onnx"))
    norms = [each for each in model.graph.node if each.op_type == "LayerNormalization"]
    assert {types[name] for each in norms for name in (*each.input, *each.output)} == {TensorProto.FLOAT}
    assert types["w1"] == TensorProto.BFLOAT16
    assert [each.version for each in model.opset_import if not each.domain] == [BF16_OPSET]


def test_bf16_keeps_a_mask_at_the_end_of_the_range_finite(tmp_path: Path) -> None:
    """Rows that are masked whole have a uniform softmax; with infinities they would be NaN."""
    lowest = float(np.finfo(np.float32).min)
    nodes = [
        node("MatMul", ["x", "w"], "scores"),
        node("Cast", ["ones"], "flags", to=TensorProto.BOOL),
        node("Where", ["flags", "lowest", "zero"], "mask"),
        node("Add", ["scores", "mask"], "masked"),
        node("Softmax", ["masked"], "p"),
        node("MatMul", ["p", "w"], "y"),
    ]
    nodes.insert(0, node("Shape", ["x"], "shape"))
    nodes.insert(
        1, node("ConstantOfShape", ["shape"], "ones", value=helper.make_tensor("one", TensorProto.INT64, [1], [1]))
    )
    weights = {"w": normal(K, K), "lowest": np.float32(lowest), "zero": np.float32(0)}
    path, x = save(tmp_path / "f.onnx", nodes, {k: np.asarray(v) for k, v in weights.items()}, ["y"]), normal(2, 5, K)
    to_bf16(path, tmp_path / "b.onnx")
    types = inferred(tmp_path / "b.onnx")
    assert types["masked"] == TensorProto.FLOAT
    assert types["scores"] == types["w"] == TensorProto.BFLOAT16
    assert np.isfinite(run(path, x)[0]).all()


def test_bf16_of_a_model_without_weights_raises(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(HalfError, match=r"^f\.onnx has no float32 weight, so there is nothing to convert to bf16;"):
        to_bf16(path, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()
