"""Tests of target onnxruntime_mobile: its files, the operator list and independence of the processor."""

import logging

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes import onnxruntime_mobile as target
from runtimes.base.protocols import BuildError, BuildOptions, RuntimeUnavailable
from runtimes.onnxruntime import target as onnxruntime

ort = pytest.importorskip("onnxruntime", reason="the extra `cpu` or `gpu` is not installed")

ONE = BuildOptions(threads=1)
# Both sessions run the same kernels on the same fused graph; 1e-6 allows a few roundings of values around one.
SAME = 1e-6


def save(path, nodes, inputs, outputs, weights):
    values = [
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in part]
        for part in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, "small", *values, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def dense(rng):
    """An MLP's first half, which ONNX Runtime fuses: y = gelu(x w + b)."""
    weights = {"w": rng.normal(size=(8, 16)).astype(np.float32), "b": rng.normal(size=16).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Gelu", ["sum"], ["y"]),
    ]
    return nodes, [("x", ["batch", 3, 8])], [("y", ["batch", 3, 16])], weights


def quantized(rng):
    """A MatMul of int8 weights with uint8 activations, as Q and DQ nodes."""
    weights = {
        "w": rng.integers(-127, 128, (8, 16), dtype=np.int8),
        "w_scale": rng.uniform(0.001, 0.02, 16).astype(np.float32),
        "w_zero": np.zeros(16, np.int8),
        "x_scale": np.float32(0.03),
        "x_zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_int8"]),
        helper.make_node("DequantizeLinear", ["x_int8", "x_scale", "x_zero"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], axis=1),
        helper.make_node("MatMul", ["x_float", "w_float"], ["y"]),
    ]
    return nodes, [("x", ["batch", 3, 8])], [("y", ["batch", 3, 16])], weights


def dynamic(rng):
    """A MatMul of int8 weights with dynamically quantized activations."""
    weights = {"w": rng.integers(-127, 128, (8, 16), dtype=np.int8), "scale": np.float32(0.01), "zero": np.int8(0)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x_int8", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["x_int8", "w", "x_zero", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "scale"], ["scales"]),
        helper.make_node("Mul", ["floats", "scales"], ["y"]),
    ]
    return nodes, [("x", ["batch", 3, 8])], [("y", ["batch", 3, 16])], weights


def convolution(rng):
    """A convolution, which the NCHWc optimiser would convert to a layout for this processor's registers."""
    weights = {"w": rng.normal(size=(16, 3, 4, 4)).astype(np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], strides=[4, 4])]
    return nodes, [("x", ["batch", 3, 8, 8])], [("y", ["batch", 16, 2, 2])], weights


@pytest.fixture(params=[dense, quantized, dynamic, convolution], ids=lambda build: build.__name__)
def model(request, tmp_path):
    return save(tmp_path / "model.onnx", *request.param(np.random.default_rng(0)))


def listed(folder):
    """Return domain, version and name of each operator in the list."""
    lines = (folder / target.OPERATORS).read_text().splitlines()
    rows = [line.split(";") for line in lines if not line.startswith("#")]
    return {(domain, int(version), kind) for domain, version, kinds in rows for kind in kinds.split(",")}


def needed(model, tmp_path):
    """Return the same for the graph that ONNX Runtime optimises in memory; the reference."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    opsets = {each.domain: each.version for each in optimised.opset_import}
    operators = set()
    for node in optimised.graph.node:
        standard = onnx.defs.has(node.op_type, node.domain)
        since = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain).since_version if standard else 1
        operators.add((node.domain or "ai.onnx", since, node.op_type))
    return operators


def test_operator_list_equals_the_operators_of_the_optimised_graph(model, tmp_path):
    target.build(model, tmp_path, ONE)
    assert listed(tmp_path) == needed(model, tmp_path)
    assert "com.microsoft.nchwc" not in {domain for domain, _, _ in listed(tmp_path)}


def test_outputs_agree_with_the_portable_file(model, tmp_path):
    size = [each or 2 for each in onnxruntime.load(model, ONE).input_shapes["x"]]
    feeds = {"x": np.random.default_rng(1).normal(size=size).astype(np.float32)}
    with target.load(target.build(model, tmp_path, ONE), ONE) as engine, onnxruntime.load(model, ONE) as portable:
        np.testing.assert_allclose(engine.run(feeds)["y"], portable.run(feeds)["y"], rtol=SAME, atol=SAME)


def test_build_writes_exactly_two_files(model, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    handlers = list(logging.getLogger().handlers)
    assert target.build(model, out, ONE) == out / "model.ort"
    assert sorted(path.name for path in out.iterdir()) == ["model.ort", "required_operators.config"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "out"]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


def test_operator_list_contains_no_path(model, tmp_path):
    target.build(model, tmp_path, ONE)
    assert str(tmp_path) not in (tmp_path / target.OPERATORS).read_text()


def test_int8_stays_int8(tmp_path):
    model = save(tmp_path / "model.onnx", *quantized(np.random.default_rng(0)))
    target.build(model, tmp_path, ONE)
    kinds = {kind for _, _, kind in listed(tmp_path)}
    assert "MatMulIntegerToFloat" in kinds
    assert not kinds & {"MatMul", "DequantizeLinear"}


def test_a_failed_build_leaves_nothing(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    with pytest.raises(BuildError, match=r"^ONNX Runtime cannot convert broken\.onnx: .*\.$"):
        target.build(broken, tmp_path, ONE)
    assert list(tmp_path.iterdir()) == [broken]


def test_cuda_is_refused(model, tmp_path):
    for use in (lambda at: target.build(model, tmp_path, at), lambda at: target.load(tmp_path / target.FILE, at)):
        with pytest.raises(RuntimeUnavailable, match="onnxruntime_mobile runs on cpu; found device 'cuda'"):
            use(BuildOptions(device="cuda"))
