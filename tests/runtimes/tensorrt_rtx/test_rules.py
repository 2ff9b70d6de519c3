"""The rules of quantization, each shown with the real parser and builder: refused, misread, or built larger.

Speed needs a GPU. The size of an engine does not: it grows by the kernels that the builder adds, and by weights that it
stores in float.
"""

import pytest

from runtimes.base.protocols import BuildError
from runtimes.tensorrt_rtx import target
from runtimes.tensorrt_rtx.builder import Network
from tests.runtimes.tensorrt.test_target import ACCEPTED, OPTIONS, VIOLATIONS, quantized_model

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

REFUSED = {
    "MatMulInteger": "does not support MatMulInteger",
    "com.microsoft": "Plugin not found",
    "int32 bias": "input has type Int32",
    "zero point": "Non-zero zero point is not supported",
    "computed zero": "zero_point.*not an initializer",
    "scale 0": "must all be positive",
    "scale NaN": "must all be positive",
    "count": "number of scales is not equal to the number of output channels",
    "product of two types": "must have same input types",
    "scalar": "does not support DequantizeLinear",
}
MISREAD = {"uint8", "no zero point"}  # ONNX says uint8; the parser makes it int8
LARGER = {"activation", "axis", "float weight", "bias"}


def engine_bytes(network):
    return network.engine(OPTIONS, [trt.ComputeCapability.SM89], None).nbytes


@pytest.fixture(scope="module")
def conforming(tmp_path_factory):
    return engine_bytes(Network.of(quantized_model(tmp_path_factory.mktemp("conforming"))))


def test_every_rule_is_shown():
    assert set(REFUSED) | MISREAD | LARGER == set(VIOLATIONS)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, monkeypatch, case):
    path = quantized_model(tmp_path, change=VIOLATIONS[case][0])
    monkeypatch.setattr(target.qdq_rules, "check", lambda source: None)  # it would refuse first
    with pytest.raises(BuildError, match=REFUSED[case]):
        target.build_for(path, tmp_path, OPTIONS, "sm89")


@pytest.mark.parametrize("case", sorted(MISREAD))
def test_misread(tmp_path, case):
    network = Network.of(quantized_model(tmp_path, change=VIOLATIONS[case][0])).network
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    (quantize,) = [layer for layer in layers if layer.type == trt.LayerType.QUANTIZE]
    assert quantize.get_output(0).dtype == trt.DataType.INT8


@pytest.mark.parametrize("case", sorted(LARGER))
def test_larger(tmp_path, conforming, case):
    assert engine_bytes(Network.of(quantized_model(tmp_path, change=VIOLATIONS[case][0]))) > conforming


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(tmp_path, case):
    network = Network.of(quantized_model(tmp_path, change=ACCEPTED[case]))
    assert network.layers().precisions["int8"] > 0
    assert engine_bytes(network) > 0
