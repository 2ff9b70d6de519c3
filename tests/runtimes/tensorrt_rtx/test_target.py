"""Tests of target tensorrt_rtx with the real parser and builder, which need no GPU. Engines are never opened here."""

import errno
import importlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes.base.ahead_of_time import ahead_of_time
from runtimes.base.protocols import BuildError, BuildOptions, RuntimeUnavailable
from runtimes.base.registry import runtime
from runtimes.tensorrt import build_steps
from runtimes.tensorrt.engine import Refused
from runtimes.tensorrt_rtx import target
from runtimes.tensorrt_rtx.builder import Network

OPTIONS = BuildOptions(device="cuda", batches=(1, 2, 4), lengths=(1, 8, 16))
TURING = "sm75"
WEIGHT = 16 * 16 * 4  # bytes of the weight of linear()


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def save(path, nodes, weights, *, scopes=None, inputs=("batch", 16), outputs=("batch", 16)):
    """Write a model with input x and output y; `scopes` are the torch modules around the last node."""
    if scopes is not None:
        entry = nodes[-1].metadata_props.add()
        entry.key, entry.value = build_steps.SCOPES, str(scopes)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", inputs), ("y", outputs))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def linear(path, **more):
    weight = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    return save(path, [helper.make_node("MatMul", ["x", "w"], ["y"], name="node_linear")], {"w": weight}, **more)


def quantized(path):
    """Write one int8 product of 16 by 16, its input and its weight symmetric."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "scales", "zeros"], ["wd"], name="dqw", axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="node_linear"),
    ]
    weights = {
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
        "w": np.ones((16, 16), np.int8),
        "scales": np.full(16, 0.1, np.float32),
        "zeros": np.zeros(16, np.int8),
    }
    return save(path, nodes, weights)


def test_without_the_library_every_entry_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(target.util, "find_spec", lambda name: None)
    assert "pip install tensorrt-rtx-cu12" in target.missing()
    for use in (
        target.gpus,
        target.builder_version,
        lambda: target.network_layers(tmp_path / "x.onnx"),
        lambda: target.build_for(tmp_path / "x.onnx", tmp_path, OPTIONS, "sm89"),
    ):
        with pytest.raises(RuntimeUnavailable, match="pip install tensorrt-rtx-cu12"):
            use()


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setattr(target.util, "find_spec", lambda name: object())
    monkeypatch.setitem(importlib.sys.modules, "tensorrt_rtx", None)
    with pytest.raises(RuntimeUnavailable, match="installed but cannot be loaded"):
        target.gpus()


def test_it_builds_ahead_of_time_and_others_do_not():
    assert ahead_of_time(runtime("tensorrt_rtx")) is target
    assert ahead_of_time(runtime("onnxruntime")) is None
    assert ahead_of_time(runtime("tensorrt")) is None


def test_gpus_are_the_members_of_the_library(trt):
    members = {name.lower() for name in trt.ComputeCapability.__members__} - {"none", "current"}
    assert set(target.gpus()) == members
    assert list(target.gpus()) == sorted(members, key=lambda name: int(name[2:]))
    assert trt.__version__ in target.builder_version()


def test_an_engine_for_every_gpu(trt, tmp_path):
    source, gpus = linear(tmp_path / "model.onnx"), [gpu for gpu in target.gpus() if gpu != TURING]
    built = [target.build_for(source, tmp_path, OPTIONS, gpu) for gpu in gpus]
    assert [path.name for path in built] == [f"model.{gpu}.engine" for gpu in gpus]
    contents = [path.read_bytes() for path in built]
    assert all(len(content) > WEIGHT for content in contents)
    assert len(set(contents)) == len(built)  # each for a compute capability of its own


def test_several_gpus_share_one_engine_with_one_copy_of_the_weights(trt, tmp_path):
    source, names = linear(tmp_path / "model.onnx"), "sm86+sm89+sm120"
    shared = target.build_for(source, tmp_path, OPTIONS, names)
    assert shared.name == f"model.{names}.engine"
    alone = [target.build_for(source, tmp_path, OPTIONS, gpu) for gpu in names.split("+")]
    content, weight = shared.read_bytes(), np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    assert content.count(weight.tobytes()) == 1
    assert content not in [path.read_bytes() for path in alone]
    assert len(content) < sum(path.stat().st_size for path in alone)
    with pytest.raises(BuildError, match=r"for SM75 and SM89: .*FP32 GEMM"):
        target.build_for(source, tmp_path, OPTIONS, "sm75+sm89")
    with pytest.raises(RuntimeUnavailable, match="no engine for GPU 'sm90'"):
        target.build_for(source, tmp_path, OPTIONS, "sm89+sm90")


def test_turing_has_no_float32_product(trt, tmp_path):
    with pytest.raises(BuildError, match=r"cannot build model\.onnx for SM75: .*FP32 GEMM is not supported"):
        target.build_for(linear(tmp_path / "model.onnx"), tmp_path, OPTIONS, TURING)


def test_progress_reports_phases_and_their_steps(trt, tmp_path):
    seen = []
    target.build_for(linear(tmp_path / "model.onnx"), tmp_path, OPTIONS, "sm89", lambda *step: seen.append(step))
    assert "Building engine" in {phase for phase, _, _ in seen}
    assert all(0 <= done <= steps for _, done, steps in seen)
    assert any(done == steps for phase, done, steps in seen if phase == "Building engine")


def test_messages_reach_the_build_that_caused_them(trt, tmp_path):
    """The library keeps the first logger of a process: a later build must not write into the log of an earlier one."""
    first = Network.of(quantized(tmp_path / "first.onnx"))
    second = Network.of(linear(tmp_path / "second.onnx"))
    with pytest.raises(Refused):
        second.engine(OPTIONS, [trt.ComputeCapability.SM75], None)
    assert first.log.errors == []
    assert "FP32 GEMM" in second.log.errors[-1]


def test_an_interrupt_during_the_build_ends_it_and_leaves_nothing(trt, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    source = linear(tmp_path / "model.onnx")
    with pytest.raises(KeyboardInterrupt):
        target.build_for(source, tmp_path, OPTIONS, "sm89", interrupt)
    assert list(tmp_path.iterdir()) == [source]


def test_a_gpu_that_the_release_lacks_is_refused_with_those_it_has(trt, tmp_path):
    with pytest.raises(RuntimeUnavailable, match=r"1\.\d.* no engine for GPU 'sm90'; expected one of: sm75, .*sm121"):
        target.build_for(linear(tmp_path / "model.onnx"), tmp_path, OPTIONS, "sm90")


def test_the_error_of_an_unknown_operator_names_the_layer_of_the_model(trt, tmp_path):
    node = helper.make_node("Bernoulli", ["x"], ["y"], name="node_bernoulli")
    source = save(tmp_path / "model.onnx", [node], {}, scopes=["", "blocks.0.drop", "bernoulli"])
    with pytest.raises(BuildError, match=r"layer blocks\.0\.drop, node 'node_bernoulli' .*does not support Bernoulli"):
        target.network_layers(source)
    with pytest.raises(BuildError, match=r"blocks\.0\.drop"):
        target.build_for(source, tmp_path, OPTIONS, "sm89")
    assert list(tmp_path.iterdir()) == [source]


def test_a_file_without_module_names_is_refused_by_its_node(trt, tmp_path):
    source = save(tmp_path / "model.onnx", [helper.make_node("Bernoulli", ["x"], ["y"], name="alone")], {})
    with pytest.raises(BuildError, match=r"cannot parse model\.onnx: node 'alone' \(Bernoulli\)"):
        target.network_layers(source)


def test_int8_products_count_as_int8(trt, tmp_path):
    counts = target.network_layers(quantized(tmp_path / "model.onnx"))
    assert counts.kinds["MATRIX_MULTIPLY"] == 1
    assert "CONSTANT" not in counts.kinds
    assert counts.precisions["int8"] >= 3  # the product and the two dequantizations
    floats = target.network_layers(linear(tmp_path / "float.onnx"))
    assert floats.precisions == {"fp32": floats.count}


def test_an_engine_of_fixed_sizes_needs_no_profile(trt, tmp_path):
    fixed = linear(tmp_path / "fixed.onnx", inputs=(2, 16), outputs=(2, 16))
    assert target.build_for(fixed, tmp_path, OPTIONS, "sm89").stat().st_size > WEIGHT


def test_a_full_disk_during_the_write_leaves_nothing_and_keeps_its_error(trt, tmp_path, monkeypatch):
    def full(path, memory):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    source = linear(tmp_path / "model.onnx")
    monkeypatch.setattr(build_steps.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left") as caught:
        target.build_for(source, tmp_path, OPTIONS, "sm89")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [source]


def test_a_broken_file_is_refused(trt, tmp_path):
    source = tmp_path / "broken.onnx"
    source.write_bytes(b"this is not an ONNX file")
    with pytest.raises(BuildError, match=r"broken\.onnx"):
        target.build_for(source, tmp_path, OPTIONS, "sm89")


def test_opening_without_a_gpu_says_so(monkeypatch, trt, tmp_path):
    monkeypatch.setattr(target, "cuda_devices", lambda: None)
    monkeypatch.setattr(target, "is_installed", lambda name: True)
    with pytest.raises(RuntimeUnavailable, match="there is no NVIDIA GPU or no driver"):
        target.load(tmp_path / "model.engine", OPTIONS)
