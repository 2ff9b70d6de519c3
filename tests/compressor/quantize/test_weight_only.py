"""Tests of int8, int4 and int2 weights: the arithmetic against numpy, and the contents of the file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compressor.errors import CompressorError
from compressor.quantize.int8_search import quantize as quantize_int8
from compressor.quantize.weight_only import (
    BLOCK,
    TERNARY,
    TWO_BITS,
    WeightOnly,
    quantize_blocks,
    quantize_two_bits,
    to_int2,
    to_int4,
    to_int4_blocks,
    to_int8,
)
from runtimes.base.protocols import BuildOptions
from runtimes.onnxruntime import target
from tests.onnx_files import H, K, count, initializers, mlp, node, normal, run, save

pytest.importorskip("onnxruntime")

Doubles = npt.NDArray[np.float64]
FLOAT32 = 1e-5  # sums of up to a hundred products


def quantized(path: Path) -> dict[str, onnx.NodeProto]:
    nodes = onnx.load(str(path)).graph.node
    return {n.output[0]: n for n in nodes if n.op_type == "MatMulNBits" and n.domain == "com.microsoft"}


def unpacked(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    return values if bits == 8 else np.stack([values & 15, values >> 4], axis=-1)


def dequantized(path: Path, product: onnx.NodeProto) -> tuple[Doubles, Doubles]:
    """Decode the [K, N] weight of a product from its 8 or 4 bits, scales and zero points; return it and the steps."""
    values = initializers(path)
    sizes = {attribute.name: attribute.i for attribute in product.attribute}
    packed, scale = values[product.input[1]], values[product.input[2]]
    bits = sizes["bits"]
    assert (sizes["block_size"], packed.dtype) == (BLOCK, np.uint8)
    blocks = -(-sizes["K"] // BLOCK)
    assert packed.size == sizes["N"] * blocks * BLOCK * bits // 8  # four bits: two weights in a byte
    levels = unpacked(packed, bits).reshape(sizes["N"], blocks, BLOCK)
    zero = unpacked(values[product.input[3]].reshape(sizes["N"], -1), bits).reshape(sizes["N"], -1)[:, :blocks]
    step = np.repeat(scale.reshape(sizes["N"], blocks, 1).astype(np.float64), BLOCK, axis=2)
    weight = (levels - zero[..., None].astype(np.float64)) * step
    return tuple(part.reshape(sizes["N"], -1)[:, : sizes["K"]].T for part in (weight, step))  # type: ignore[return-value]


def rounding(x: Doubles, weight: Doubles) -> Doubles:
    """Return the error bound of int8 rounding of activation blocks: half a step for each weight of the block."""
    blocks = [slice(start, start + BLOCK) for start in range(0, x.shape[-1], BLOCK)]
    return np.asarray(
        sum(
            np.abs(x[..., block]).max(axis=-1, keepdims=True) / 127 / 2 * np.abs(weight[block]).sum(axis=0)
            for block in blocks
        )
    )


@pytest.mark.parametrize("width", [K, 3 * K, 48])
@pytest.mark.parametrize(("quantize", "bits"), [(to_int8, 8), (to_int4, 4)])
def test_product_equals_numpy_with_the_rounded_weight(
    tmp_path: Path, width: int, quantize: Callable[[Path, Path], WeightOnly], bits: int
) -> None:
    """Some widths leave the last block partly filled."""
    nodes = [
        node("MatMul", ["x", "spread"], "wide"),
        node("MatMul", ["wide", "w"], "y0"),
        node("Add", ["y0", "b"], "y"),
    ]
    weights = {"spread": normal(K, width, seed=1), "w": normal(width, H, seed=2), "b": normal(H, seed=3)}
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y", "wide"]), normal(2, 5, K)
    assert quantize(path, tmp_path / "q.onnx").nodes == 2
    y, wide = run(tmp_path / "q.onnx", x)
    products = quantized(tmp_path / "q.onnx")
    assert len(products) == 2
    for product, value, output, original in (
        (products["wide"], x, wide, weights["spread"]),
        (products["y0"], wide, y - weights["b"], weights["w"]),
    ):
        weight, step = dequantized(tmp_path / "q.onnx", product)
        assert step.max() <= (np.ptp(np.append(original, 0.0)) / (2**bits - 1)) * (1 + FLOAT32)
        # Half a step, and another half from rounding of the zero point.
        assert (np.abs(weight - original) <= 1.001 * step).all()
        assert np.abs(weight - original).max() > 0
        expected = value.astype(np.float64) @ weight
        slack = rounding(value.astype(np.float64), weight) + FLOAT32 * (np.abs(value) @ np.abs(weight))
        assert (np.abs(output - expected) <= slack).all()


def test_int8_weights_keep_what_a_massive_activation_hides_from_dynamic_int8(tmp_path: Path) -> None:
    """One value of a token is 10,000 times the others, as in language models; the others still count."""
    path, x = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": normal(K, H)}, ["y"]), normal(2, 5, K)
    x[0, 0, 0] = 1e4
    exact = run(path, x)[0]
    to_int8(path, tmp_path / "weights.onnx")
    quantize_int8(path, tmp_path / "dynamic.onnx", lambda: iter([{"x": x}]), mode="dynamic", activations="uint8")
    kept, hidden = (
        np.linalg.norm((run(tmp_path / name, x)[0] - exact)[0, 1:]) / np.linalg.norm(exact[0, 1:])
        for name in ("weights.onnx", "dynamic.onnx")
    )
    assert kept < 0.02
    assert hidden > 0.5  # one scale for the whole tensor: the other tokens are rounded to zero


def test_file_size_is_below_a_fifth(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("MatMul", ["x", "w"], "y")], {"w": normal(K, 2048)}, ["y"])
    to_int4(path, tmp_path / "q.onnx")
    # 4 of 32 bits, and a float32 scale and a 4-bit zero point per 32 weights: 0.16, plus the graph itself.
    assert (tmp_path / "q.onnx").stat().st_size < 0.2 * path.stat().st_size


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_with_bias_is_quantized(tmp_path: Path, transposed: bool) -> None:
    w = normal(K, H)
    nodes = [
        node("ReduceMean", ["x", "axes"], "pooled", keepdims=0),
        node("Gemm", ["pooled", "w", "b"], "y", transB=int(transposed)),
    ]
    weights = {"w": np.ascontiguousarray(w.T) if transposed else w, "b": normal(H), "axes": np.array([1])}
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), normal(8, 4, K)
    assert to_int4(path, tmp_path / "q.onnx").nodes == 1
    (product,) = quantized(tmp_path / "q.onnx").values()
    weight, step = dequantized(tmp_path / "q.onnx", product)
    assert (np.abs(weight - w) <= 1.001 * step).all()  # not transposed
    pooled = x.astype(np.float64).mean(axis=1)
    slack = rounding(pooled, weight) + FLOAT32 * (np.abs(pooled) @ np.abs(weight) + 1)
    assert (np.abs(run(tmp_path / "q.onnx", x)[0] - (pooled @ weight + weights["b"])) <= slack).all()
    assert "w" not in initializers(tmp_path / "q.onnx")


def test_tied_embedding_is_quantized_only_for_the_product(tmp_path: Path) -> None:
    table = normal(K, K)
    nodes = [
        node("Gather", ["table", "row"], "e"),
        node("Add", ["x", "e"], "x0"),
        node("Transpose", ["table"], "head", perm=[1, 0]),
        node("MatMul", ["x0", "head"], "y"),
    ]
    path = save(tmp_path / "f.onnx", nodes, {"table": table, "row": np.array(3)}, ["y"])
    assert to_int4(path, tmp_path / "q.onnx").nodes == 1
    np.testing.assert_array_equal(initializers(tmp_path / "q.onnx")["table"], table)
    assert count(tmp_path / "q.onnx", "Transpose") == 0
    weight, step = dequantized(tmp_path / "q.onnx", quantized(tmp_path / "q.onnx")["y"])
    assert (np.abs(weight - table.T) <= 1.001 * step).all()
    x = normal(4, 5, K)
    hidden = (x + table[3]).astype(np.float64)
    slack = rounding(hidden, weight) + FLOAT32 * (np.abs(hidden) @ np.abs(weight))
    assert (np.abs(run(tmp_path / "q.onnx", x)[0] - hidden @ weight) <= slack).all()


def test_activation_products_and_small_weights_are_unchanged(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], "a"),
        node("Transpose", ["a"], "t", perm=[0, 2, 1]),
        node("MatMul", ["a", "t"], "scores"),
        node("MatMul", ["x", "small"], "few"),
        node("Gemm", ["flat", "half"], "scaled", alpha=0.5),
    ]
    nodes.insert(0, node("ReduceMean", ["x", "axes"], "flat", keepdims=0))
    weights = {"w": normal(K, K), "small": normal(K, 8), "half": normal(K, K), "axes": np.array([1])}
    path = save(tmp_path / "f.onnx", nodes, weights, ["scores", "few", "scaled"])
    assert to_int4(path, tmp_path / "q.onnx").nodes == 1
    after = {n.name: n for n in onnx.load(str(tmp_path / "q.onnx")).graph.node}
    for before in nodes:
        assert before.name == "node_a" or after[before.name] == before, f"{before.name} was changed"
    assert set(quantized(tmp_path / "q.onnx")) == {"a"}
    for name in ("small", "half"):
        np.testing.assert_array_equal(initializers(tmp_path / "q.onnx")[name], weights[name])


def test_nodes_without_names_are_distinguished(tmp_path: Path) -> None:
    path = mlp(tmp_path / "f.onnx")
    model = onnx.load(str(path))
    model.graph.initializer.append(numpy_helper.from_array(normal(K, 4), "small"))
    model.graph.node.append(helper.make_node("MatMul", ["x", "small"], ["few"]))
    model.graph.output.append(helper.make_tensor_value_info("few", TensorProto.FLOAT, None))
    for unnamed in model.graph.node:
        unnamed.name = ""
    onnx.save(model, str(path))
    assert to_int4(path, tmp_path / "q.onnx").nodes == 2
    assert set(quantized(tmp_path / "q.onnx")) == {"h0", "y0"}


def test_names_dynamic_axes_and_metadata_are_kept(tmp_path: Path) -> None:
    path = mlp(tmp_path / "f.onnx")
    to_int4(path, tmp_path / "q.onnx")
    before, after = onnx.load(str(path)), onnx.load(str(tmp_path / "q.onnx"))
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.metadata_props) == list(before.metadata_props)
    assert run(tmp_path / "q.onnx", normal(7, 3, K))[0].shape == run(path, normal(7, 3, K))[0].shape


def test_model_without_linears_raises(tmp_path: Path) -> None:
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(
        CompressorError, match=r"f\.onnx has no MatMul .*, so there is nothing to quantize to int4; choose another"
    ):
        to_int4(path, tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_an_error_of_the_tools_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    def broken(_: object) -> None:
        raise ZeroDivisionError("no such block.\nsecond line")

    monkeypatch.setattr(tools.MatMulNBitsQuantizer, "process", broken)
    with pytest.raises(CompressorError) as failed:
        to_int4(mlp(tmp_path / "f.onnx"), tmp_path / "q.onnx")
    assert str(failed.value) == (
        "ONNX Runtime's tools cannot quantize f.onnx to int4: no such block; choose another precision."
    )
    assert not (tmp_path / "q.onnx").exists()


def test_output_is_silent_and_logging_is_restored(tmp_path: Path) -> None:
    """The test runs in a subprocess, because ONNX Runtime's quantizer configures logging on its first import."""
    path = mlp(tmp_path / "f.onnx")
    program = (
        "import logging, sys\nfrom pathlib import Path\nfrom compressor.quantize.weight_only import to_int4\n"
        "state = lambda: (logging.root.level, list(logging.root.handlers), logging.root.manager.disable)\n"
        "logging.disable(5)\nbefore = state()\n"
        f"to_int4(Path({str(path)!r}), Path({str(tmp_path / 'q.onnx')!r}))\nassert state() == before, state()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "q.onnx").is_file()


# ---- blocks of standard ONNX


@pytest.mark.parametrize(("width", "block"), [(K, 32), (3 * K, 32), (48, 16)])
def test_blocks_are_those_of_dequantize_linear(tmp_path: Path, width: int, block: int) -> None:
    """The weight within half a step, or clipped by at most a quarter of the largest of its block."""
    nodes = [node("MatMul", ["x", "spread"], "wide"), node("MatMul", ["wide", "w"], "y")]
    weights = {"spread": normal(K, width, seed=1), "w": normal(width, H, seed=2)}
    path = save(tmp_path / "f.onnx", nodes, weights, ["y"])
    done = to_int4_blocks(path, tmp_path / "q.onnx")
    assert (done.nodes, done.kept) == (2, ())
    model = onnx.load(str(tmp_path / "q.onnx"))
    onnx.checker.check_model(model, full_check=True)
    steps, scale = (initializers(tmp_path / "q.onnx")[f"int8/{name}"] for name in ("w", "w/scale"))
    assert (steps.dtype.name, steps.shape, scale.shape) == ("int4", (width, H), (width // block, H))
    wide, original = steps.astype(np.float32) * scale.repeat(block, axis=0), weights["w"]
    clipped = np.abs(steps.astype(int)) == 7
    limit = np.where(clipped, 0.25 * np.abs(original), 0) + 0.501 * scale.repeat(block, axis=0)
    assert (np.abs(wide - original) <= limit).all()
    (expected,) = ReferenceEvaluator(model).run(None, {"x": (x := normal(2, 5, K))})
    first = initializers(tmp_path / "q.onnx")
    spread = first["int8/spread"].astype(np.float32) * first["int8/spread/scale"].repeat(32, axis=0)
    np.testing.assert_allclose(x @ spread @ wide, expected, rtol=1e-4, atol=1e-3)


def test_clipping_lowers_the_error_of_a_block() -> None:
    weight = normal(320, 64)
    steps, scale = quantize_blocks(weight, BLOCK)
    plain = np.abs(weight.reshape(-1, BLOCK, 64)).max(axis=1).repeat(BLOCK, axis=0) / 7
    error = np.square(steps * scale.repeat(BLOCK, axis=0) - weight)
    unclipped = np.square(np.rint(weight / plain) * plain - weight)
    sums = [each.reshape(-1, BLOCK, 64).sum(axis=1) for each in (error, unclipped)]
    assert (sums[0] <= sums[1] * 1.0001).all()
    assert sums[0].mean() < 0.95 * sums[1].mean()


def test_matrices_without_whole_blocks_stay_in_float_with_the_reason(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "spread"], "wide"), node("MatMul", ["wide", "w"], "y")]
    weights = {"spread": normal(K, 40), "w": normal(40, H)}
    path = save(tmp_path / "f.onnx", nodes, weights, ["y"])
    done = to_int4_blocks(path, tmp_path / "q.onnx")
    assert done.nodes == 1
    assert [(kept.node, kept.reason) for kept in done.kept] == [
        ("node_y", "40 input channels, which blocks of 16 do not divide")
    ]
    np.testing.assert_array_equal(initializers(tmp_path / "q.onnx")["w"], weights["w"])
    (tmp_path / "q.onnx").unlink()
    path = save(tmp_path / "f.onnx", [node("Relu", ["x"], "y")], {}, ["y"])
    with pytest.raises(CompressorError, match="nothing to quantize to int4"):
        to_int4_blocks(path, tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_a_shared_weight_is_stored_and_dequantized_once(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "w"], "y")]
    path = save(tmp_path / "f.onnx", nodes, {"w": normal(K, K)}, ["y"])
    assert to_int4_blocks(path, tmp_path / "q.onnx").nodes == 2
    assert count(tmp_path / "q.onnx", "DequantizeLinear") == 1
    assert set(initializers(tmp_path / "q.onnx")) == {"int8/w", "int8/w/scale"}


def test_small_matrices_are_said_to_stay_in_float(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "small"], "y")]
    path = save(tmp_path / "f.onnx", nodes, {"w": normal(K, K), "small": normal(K, 8)}, ["y"])
    for quantize in (to_int4, to_int4_blocks):
        assert [kept.node for kept in quantize(path, tmp_path / "q.onnx").kept] == ["node_y"]


# ---- two bits


def two_bit_weight(path: Path, product: onnx.NodeProto) -> Doubles:
    """Decode the [K, N] weight of a product from its 2 bits, scales and the default zero point."""
    values, sizes = initializers(path), {attribute.name: attribute.i for attribute in product.attribute}
    packed, scale = values[product.input[1]], values[product.input[2]]
    assert (sizes["bits"], sizes["block_size"], packed.dtype, len(product.input)) == (2, BLOCK, np.uint8, 3)
    assert packed.shape == (sizes["N"], -(-sizes["K"] // BLOCK), BLOCK // 4)  # four weights in a byte
    codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(*packed.shape[:2], BLOCK)
    weight = (codes - 2.0) * scale[..., None].astype(np.float64)
    return np.asarray(weight.reshape(sizes["N"], -1)[:, : sizes["K"]].T)


@pytest.mark.parametrize(("width", "outputs"), [(K, H), (48, H), (128, 256)])  # the last one by look-up table
@pytest.mark.parametrize("steps", [TWO_BITS, TERNARY])
def test_two_bit_product_equals_numpy_with_the_rounded_weight(
    tmp_path: Path, width: int, outputs: int, steps: tuple[int, int]
) -> None:
    nodes = [
        node("MatMul", ["x", "spread"], "wide"),
        node("MatMul", ["wide", "w"], "y0"),
        node("Add", ["y0", "b"], "y"),
    ]
    weights = {"spread": normal(K, width), "w": normal(width, outputs, seed=2), "b": 9 * normal(outputs, seed=3)}
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y", "wide"]), normal(2, 5, K)
    assert to_int2(path, tmp_path / "q.onnx", steps=steps).nodes == 2
    with target.load(tmp_path / "q.onnx", BuildOptions(threads=1)) as engine:
        found = engine.run({"x": x})
    products = quantized(tmp_path / "q.onnx")
    for name, value, output in (("wide", x, found["wide"]), ("y0", found["wide"], found["y"] - weights["b"])):
        weight = two_bit_weight(tmp_path / "q.onnx", products[name])
        exact = value.astype(np.float64)
        slack = rounding(exact, weight) + FLOAT32 * (np.abs(value) @ np.abs(weight) + 30)
        assert (np.abs(output - exact @ weight) <= slack).all()


def test_a_gemm_in_two_bits_keeps_its_bias(tmp_path: Path) -> None:
    weights = {"w": normal(H, K, seed=1), "b": 9 * normal(H, seed=2), "axes": np.array([1])}
    nodes = [
        node("ReduceMean", ["x", "axes"], "pooled", keepdims=0),
        node("Gemm", ["pooled", "w", "b"], "y", transB=1),
    ]
    path, x = save(tmp_path / "f.onnx", nodes, weights, ["y"]), normal(8, 4, K)
    to_int2(path, tmp_path / "q.onnx")
    weight = two_bit_weight(tmp_path / "q.onnx", *quantized(tmp_path / "q.onnx").values())
    assert np.corrcoef(weight.ravel(), weights["w"].T.ravel())[0, 1] > 0.9  # not transposed
    np.testing.assert_allclose(run(tmp_path / "q.onnx", x)[0], x.mean(1) @ weight + weights["b"], atol=0.5)
    assert (tmp_path / "q.onnx").stat().st_size < path.stat().st_size


def test_a_ternary_weight_is_reproduced() -> None:
    """Each block has a scale of its own, as a BitNet weight has one for the whole matrix."""
    steps = np.random.default_rng(0).integers(-1, 2, (64, 24)).astype(np.float32)
    weight = steps * np.repeat(np.abs(normal(2, 24)) + 0.1, BLOCK, axis=0)
    for allowed in (TWO_BITS, TERNARY):
        found, scale = quantize_two_bits(weight, BLOCK, allowed)
        np.testing.assert_array_equal(found * scale.repeat(BLOCK, axis=0), weight)


def test_two_bits_have_less_error_than_three_steps_and_than_half_of_the_largest_weight() -> None:
    weight = normal(320, 64)

    def error(steps: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> float:
        return float(np.square(steps * scale.repeat(BLOCK, axis=0) - weight).mean())

    four, three = (error(*quantize_two_bits(weight, BLOCK, steps)) for steps in (TWO_BITS, TERNARY))
    scale = np.abs(weight.reshape(-1, BLOCK, 64)).max(axis=1) / 2  # ONNX Runtime's quantizer
    steps = np.clip(np.rint(weight / scale.repeat(BLOCK, axis=0)), *TWO_BITS)
    assert four < 0.8 * three
    assert four < 0.9 * error(steps.astype(np.int8), scale)


@pytest.mark.parametrize("release", ["1.23.2", "1.26.0"])
def test_releases_that_lose_the_bias_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    path = mlp(tmp_path / "f.onnx")
    monkeypatch.setattr("onnxruntime.__version__", release)
    with pytest.raises(
        CompressorError, match=rf"^int2 needs ONNX Runtime 1\.27 or newer; found {release}, .*: pip inst"
    ):
        to_int2(path, tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()
    with target.load(path, BuildOptions(threads=1)) as engine:  # other files still run
        assert engine.run({"x": normal(1, 2, K)})["y"].shape == (1, 2, 24)
