"""bf16, int4 and fp8 with the real parser and builder. fp8 is not offered, because nothing here writes it."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quantize.convert import convert
from runtimes.base.protocols import BuildError, BuildOptions
from runtimes.tensorrt.engine import Refused
from runtimes.tensorrt_rtx import target
from runtimes.tensorrt_rtx.builder import Network

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
WEIGHT = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
OPTIONS = BuildOptions(device="cuda")


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


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """A float32 file with two products of 512 x 512."""
    folder = tmp_path_factory.mktemp("product")
    torch.manual_seed(0)
    model = models.load(
        torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512)).eval(),
        example_inputs=torch.randn(2, 512),
    )
    return lower(trace(model), model, folder / "model.onnx"), {k: v.numpy() for k, v in model.example.items()}


def converted(product, folder, precision):
    source, feeds = product
    convert(source, folder / f"{precision}.onnx", precision, target.int8, lambda: iter([feeds]))
    return folder / f"{precision}.onnx"


@pytest.mark.parametrize(("precision", "layers"), [("bf16", 5), ("int4", 4)])
def test_what_convert_writes_is_parsed_and_built(tmp_path, product, precision, layers):
    path = converted(product, tmp_path, precision)
    assert target.network_layers(path).precisions[precision] >= layers
    for gpu in ("sm80", "sm120"):
        assert target.build_for(path, tmp_path, OPTIONS, gpu).stat().st_size > 0
    with pytest.raises(BuildError, match=r"SM75"):  # Turing has neither
        target.build_for(path, tmp_path, OPTIONS, "sm75")


def test_int4_weights_are_stored_in_four_bits(tmp_path, product):
    sizes = {
        precision: target.build_for(converted(product, tmp_path, precision), tmp_path, OPTIONS, "sm89").stat().st_size
        for precision in ("fp16", "int4")
    }
    weights = 2 * 512 * 512
    saved = weights * (2 - 0.5 - 2 / 32)  # 16 bits against 4, and an fp16 scale for each 32
    assert sizes["fp16"] - sizes["int4"] > 0.6 * saved  # kernels for int4 are larger


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
