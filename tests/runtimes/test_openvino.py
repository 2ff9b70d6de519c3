"""Tests of target openvino beyond the contract: it computes in the requested precision."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.lower.write_onnx import lower
from compressor.models.text.kv_cache import positions
from runtimes import openvino as target
from runtimes.base.protocols import BuildError, BuildOptions, RuntimeUnavailable
from tests.compressor.models.text.test_kv_cache import NEW, greedy, llama, needs_llama, prompts

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The IR of y = x w, with weights that float16 cannot represent."""
    folder = tmp_path_factory.mktemp("openvino")
    weight = np.full((64, 64), 1 + 2**-20, np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    tensors = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "small", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx")
    return target.build(folder / "m.onnx", folder, BuildOptions())


def test_weights_are_stored_in_float32(built):
    assert built.with_suffix(".bin").stat().st_size >= 64 * 64 * 4


def test_products_are_computed_in_float32(built):
    x = np.zeros((1, 64), np.float32)
    x[0, 0] = 1 + 2**-20  # bfloat16 has 8 bits of mantissa, float16 11: either would round this to 1
    with target.load(built, BuildOptions(threads=1)) as engine:
        (y,) = engine.run({"x": x}).values()
    np.testing.assert_allclose(y, np.full((1, 64), (1 + 2**-20) ** 2), rtol=2**-23)


def test_masks_are_no_int8(tmp_path):
    """OpenVINO keeps booleans in bytes, which its description calls u8, as it does quantized values."""
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64]),
        helper.make_tensor_value_info("mask", TensorProto.BOOL, ["batch", 64]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64]),
    ]
    tensors = [
        numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"),
        numpy_helper.from_array(np.arange(63, -1, -1), "reversed"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Gather", ["mask", "reversed"], ["other"], axis=1),
        helper.make_node("Where", ["other", "product", "x"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "masked", ends[:2], ends[2:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    path = target.build(tmp_path / "m.onnx", tmp_path, BuildOptions())
    found = target.layers(path, BuildOptions(threads=1)).precisions
    assert "int8" not in found
    assert found["fp32"] > 0
    assert found["other"] > 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """y = x w with random weights: the ONNX file, x, w and |x| |w|."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("wide") / "m.onnx"
    weight, x = rng.standard_normal((64, 64)).astype(np.float32), rng.standard_normal((8, 64)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    tensors = [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "wide", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    # Rounding errors of the factors are relative to the sum of the absolute products, |x| |w|.
    return path, x, weight, np.abs(x) @ np.abs(weight)


def difference(path, wide, threads=1):
    _, x, weight, size = wide
    with target.load(path, BuildOptions(threads=threads)) as engine:
        (y,) = engine.run({"x": x}).values()
    assert y.dtype == np.float32
    return (np.abs(y - x.astype(np.float64) @ weight) / size).max()


def test_fp16_stores_16_bits_and_can_be_moved(wide, tmp_path):
    full = target.build(wide[0], tmp_path, BuildOptions()).with_suffix(".bin").stat().st_size
    built = target.build(wide[0], tmp_path, BuildOptions(precision="fp16"))
    assert built.with_suffix(".bin").stat().st_size <= full / 2 + 64
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved")) / built.name
    # Each weight is rounded to 11 bits, half a unit in the last place; a device with fp16 arithmetic rounds x as well.
    assert 2**-20 < difference(moved, wide) < 2 * 2**-11


@pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 arithmetic")
def test_bf16_computes_in_bf16_also_after_a_move(wide, tmp_path):
    (tmp_path / "fp32").mkdir()
    full = target.build(wide[0], tmp_path / "fp32", BuildOptions())
    assert difference(full, wide) < 2**-20  # sums of 64 float32 products
    (tmp_path / "bf16").mkdir()
    built = target.build(wide[0], tmp_path / "bf16", BuildOptions(precision="bf16"))
    moved = (tmp_path / "bf16").rename(tmp_path / "elsewhere") / built.name
    # Both factors and the sum are rounded to 8 bits of mantissa.
    assert 2**-14 < difference(moved, wide) < 2**-7


def test_bf16_is_refused_without_bfloat16_arithmetic(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(RuntimeUnavailable, match=r"^This processor has no bfloat16 arithmetic; use fp32 or int8\.$"):
        target.build(wide[0], tmp_path, BuildOptions(precision="bf16"))
    assert list(tmp_path.iterdir()) == []
    target.build(wide[0], tmp_path, BuildOptions(precision="fp16"))


def test_ir_without_recorded_precision_runs_in_float32(wide, tmp_path):
    openvino.save_model(openvino.Core().read_model(str(wide[0])), str(tmp_path / "other.xml"), compress_to_fp16=False)
    assert difference(tmp_path / "other.xml", wide) < 2**-20


def test_unreadable_file_is_one_sentence(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BuildError, match=r"^OpenVINO cannot read broken\.onnx: .*\.$") as caught:
        target.build(tmp_path / "broken.onnx", tmp_path, BuildOptions())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / target.FILE).exists()


@pytest.mark.slow
@needs_llama
def test_language_model_generates_the_same_tokens_as_transformers(tmp_path):
    """Generate 128 tokens for ten prompts greedily, passing the KV cache from call to call."""
    model, graph, _ = llama()
    path = target.build(lower(graph, model, tmp_path / "model.onnx"), tmp_path, BuildOptions())
    step = every = prompts()
    with target.load(path, BuildOptions(threads=1)) as engine:
        heads = {name: shape for name, shape in engine.input_shapes.items() if name.startswith("past")}
        state = {name: np.zeros((len(step), shape[1], 0, shape[3]), np.float32) for name, shape in heads.items()}
        for _ in range(NEW):
            mask = np.ones(every.shape, np.int64)
            feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions(mask, step.shape[1])}
            found = engine.run(feeds | state)
            state = {name: found[name.replace("past_key_values", "present")] for name in state}
            step = found["logits"][:, -1].argmax(-1)[:, None]
            every = np.concatenate([every, step], 1)
    np.testing.assert_array_equal(every, greedy(model.module, prompts()))
