"""Types that the builder takes and that this target does not offer, because nothing here writes or measures them."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes.base.protocols import BuildOptions
from runtimes.tensorrt.engine import Refused
from runtimes.tensorrt_rtx import target
from runtimes.tensorrt_rtx.builder import Network

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
WEIGHT = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])


def tensor(name, kind, array):
    return helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)


def parsed(folder, nodes, tensors, kind):
    ends = [helper.make_tensor_value_info(name, kind, ["batch", size]) for name, size in (("x", 64), ("y", 32))]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "m.onnx")
    return Network.of(folder / "m.onnx")


def built(network, gpu):
    return network.engine(BuildOptions(device="cuda"), trt.ComputeCapability.__members__[gpu], None).nbytes


def dequantized(*inputs, **attributes):
    return helper.make_node("DequantizeLinear", list(inputs), [f"{inputs[0]}f"], **attributes)


def test_bf16(tmp_path):
    weight = tensor("w", TensorProto.BFLOAT16, WEIGHT.astype(ml_dtypes.bfloat16))
    network = parsed(tmp_path, [PRODUCT], [weight], TensorProto.BFLOAT16)
    assert network.layers().precisions == {"bf16": 1}
    assert built(network, "SM80") > 0
    assert "bf16" not in target.precisions["cuda"]


def test_int4_weights(tmp_path):
    steps = np.clip(np.round(2 * WEIGHT), -7, 7).astype(np.int8).ravel().view(np.uint8) & 15
    weight = helper.make_tensor(
        "w", TensorProto.INT4, WEIGHT.shape, (steps[::2] | steps[1::2] << 4).tobytes(), raw=True
    )
    scales = numpy_helper.from_array(np.full((2, 32), 0.5, np.float16), "scale")
    nodes = [dequantized("w", "scale", axis=0, block_size=32), helper.make_node("MatMul", ["x", "wf"], ["y"])]
    network = parsed(tmp_path, nodes, [weight, scales], TensorProto.FLOAT16)
    assert network.layers().precisions == {"int4": 2}
    assert built(network, "SM80") > 0
    assert "int4" not in target.precisions["cuda"]


def test_fp8_from_ada_on(tmp_path):
    kind, dtype = TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn
    constants = [
        tensor("w", kind, WEIGHT.astype(dtype)),
        tensor("zero", kind, np.zeros((), dtype)),
        numpy_helper.from_array(np.float32(0.05), "scale"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        dequantized("xq", "scale", "zero"),
        dequantized("w", "scale", "zero"),
        helper.make_node("MatMul", ["xqf", "wf"], ["y"]),
    ]
    network = parsed(tmp_path, nodes, constants, TensorProto.FLOAT)
    assert network.layers().precisions["fp8"] == 3
    assert built(network, "SM89") > 0
    with pytest.raises(Refused):
        built(network, "SM80")
    assert "fp8" in network.log.errors[-1]
