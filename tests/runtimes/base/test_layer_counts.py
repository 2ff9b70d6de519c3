"""Tests of layer counts: documented JSON of TensorRT, and real engines of OpenVINO and ONNX Runtime."""

import json
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.lower.write_onnx import lower
from compressor.quantize.convert import convert
from compressor.quantize.half_precision import to_fp16
from compressor.report import engine_layers as report_layers
from runtimes import openvino
from runtimes.base.layer_counts import count_layers, precision_of
from runtimes.base.protocols import BuildError, BuildOptions, LayerCounts, RuntimesError
from runtimes.onnxruntime import target as onnxruntime
from runtimes.tensorrt import inspector as tensorrt_layers
from tests.samples import digits

OPTIONS = BuildOptions(threads=1)
BLOCKS = 6  # blocks of the embedded sample model, each with one attention and four Linear layers


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Row major Int8 format", "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("Int4", "int4"),
        ("Int64", "other"),
        ("Bool", "other"),
        ("u8", "int8"),
        ("f32", "fp32"),
        ("bf16", "bf16"),
        ("float8e4m3fn", "fp8"),
        ("uint8", "int8"),
        ("N/A due to dynamic shapes", "unknown"),
        ("", "unknown"),
    ],
)
def test_type_names_of_each_runtime(text, precision):
    assert precision_of([text]) == precision
    if precision not in ("unknown", "other"):
        assert precision_of(["Int64", text]) == precision


def test_layers_are_counted_most_frequent_first():
    found = count_layers([("a", ["f32"]), ("b", ["f32", "i8"]), ("b", []), ("b", ["i8"])], fused_attention=None)
    assert found == LayerCounts(4, {"int8": 2, "fp32": 1, "unknown": 1}, {"b": 3, "a": 1}, None)
    assert list(found.precisions) == ["int8", "fp32", "unknown"]


# ------------------------------------------------------------------------------------------------------------- TensorRT


def layer(name, kind, reads, *, tactic="", metadata="", split=False):
    """Return a layer in the JSON of TensorRT 10, or with `split`, of 11, which separates format and type."""

    def tensor(text):
        kept = {"Name": "t", "Dimensions": [1, 197, 192]}
        return kept | ({"Format": "Row major linear", "DataType": text} if split else {"Format/Datatype": text})

    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor(text) for text in reads],
        "Outputs": [tensor("Half")],
        "TacticName": tactic,
        "Metadata": metadata,
    }


def summarised(*layers, eleven=False):
    ends = {"I/O Tensors": [{"Name": "x", "DataType": "Float"}]} if eleven else {"Bindings": ["x", "y"]}
    return tensorrt_layers.summary(json.dumps({"Layers": list(layers)} | ends))


@pytest.mark.parametrize("eleven", [False, True])
def test_both_forms_of_the_inspectors_json_are_counted(eleven):
    found = summarised(
        layer("qkv_myl0_16", "gemm", ["Int8", "Int8"], tactic="sm80_xmma_gemm_i8f16_tn", split=eleven),
        layer("__myl_Add_myl0_1", "kgen", ["Half", "Int64"], split=eleven),
        layer("norm", "kgen", ["Float"], split=eleven),
        layer("shapes", "kgen", ["Int64"], split=eleven),
        layer("Reformatting CopyNode for Input Tensor 0 to x", "Reformat", ["N/A due to dynamic shapes"], split=eleven),
        eleven=eleven,
    )
    assert found.count == 5
    assert found.precisions == {"fp16": 1, "fp32": 1, "int8": 1, "other": 1, "unknown": 1}
    assert found.kinds == {"kgen": 3, "Reformat": 1, "gemm": 1}
    assert found.fused_attention is None


SOFTMAX = "[ONNX Layer: node_Softmax_62]"


@pytest.mark.parametrize(
    ("layers", "fused"),
    [
        ([layer("_gemm_mha_v2_myl0_17", "kgen", ["Half"], tactic="_gemm_mha_v2_0x957a", metadata=SOFTMAX)], True),
        ([layer("__mye8037_gemm_mha_v2", "kgen", ["Half"])], True),
        ([layer("block", "kgen", ["Half"], tactic="fmha_v2_flash_attention_fp16_64")], True),
        # Named after ONNX nodes of a module called mha, whose attention is not fused.
        ([layer("/enc/mha/attn/MatMul_myl0_3", "gemm", ["Half"]), layer("s", "SoftMax", ["Half"])], False),
        ([layer("_enc/mha/attn_myl0_3", "gemm", ["Half"])], None),
        ([layer("__myl_MaxSubExpSumDiv_myl0_4", "kgen", ["Half"], metadata=SOFTMAX)], False),
        # A region as one layer, whose operators are not visible.
        ([layer("{ForeignNode[node_Softmax_62...node_add]}", "Myelin", ["Half"], metadata=SOFTMAX)], None),
        (["_gemm_mha_v2_myl0_17"], True),
        (["qkv_myl0_16", "__myl_Add_myl0_1"], None),
        ([layer("classes", "SoftMax", ["Float"]), layer("_gemm_mha_v2_0", "kgen", ["Half"])], True),
        ([layer("a", "kgen", ["Half"], tactic="mhandle_alpha")], None),
        ([], None),
    ],
)
def test_fused_attention_is_detected_by_kernel_names_not_module_names(layers, fused):
    assert summarised(*layers).fused_attention is fused


def test_names_alone_leave_the_precisions_unknown():
    assert summarised("one", "two") == LayerCounts(2, {"unknown": 2}, {"unknown": 2}, None)


@pytest.mark.parametrize("text", ["", "no JSON", "{}", "[]", '{"Layers": 3}', "null"])
def test_invalid_inspector_output_is_one_sentence(text):
    with pytest.raises(RuntimesError, match=r"^TensorRT's description of the engine cannot be read: .*\.$"):
        tensorrt_layers.summary(text)


# ------------------------------------------------------------------------------------------- OpenVINO and ONNX Runtime


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The embedded sample model in float32, int8 and fp16."""
    model, data, graph, _ = digits()
    folder = tmp_path_factory.mktemp("digits")
    float_file = lower(graph, model, folder / "float.onnx")
    feeds = [batch.feeds for batch in data.calibration.batches(8)]
    convert(float_file, folder / "int8.onnx", "int8", onnxruntime.int8, lambda: iter(feeds), calibration="minmax")
    to_fp16(float_file, folder / "half.onnx", {})
    return folder


def attentions(path):
    return sum(node.op_type == "Softmax" for node in onnx.load(path).graph.node)


def check_sums(found):
    assert sum(found.precisions.values()) == sum(found.kinds.values()) == found.count > 0
    assert "unknown" not in found.precisions


def test_onnxruntime_counts_the_optimised_graph(files):
    found = onnxruntime.layers(files / "float.onnx", OPTIONS)
    check_sums(found)
    assert set(found.precisions) == {"fp32", "other"}
    assert found.kinds["Softmax"] == attentions(files / "float.onnx") > 0
    assert found.fused_attention is False
    assert found.count < len(onnx.load(files / "float.onnx").graph.node)
    assert sorted(path.name for path in files.iterdir()) == ["float.onnx", "half.onnx", "int8.onnx"]


def test_onnxruntimes_int8_products_are_counted(files):
    found = onnxruntime.layers(files / "int8.onnx", OPTIONS)
    check_sums(found)
    assert found.precisions["int8"] >= found.kinds["MatMulIntegerToFloat"] > 0
    # The Add after an int8 product, whose result is float, computes in float.
    assert found.precisions["fp32"] >= found.kinds["Add"] + found.kinds["LayerNormalization"]


def test_onnxruntimes_fp16_stays_fp16_between_casts(files):
    found = onnxruntime.layers(files / "half.onnx", OPTIONS)
    check_sums(found)
    assert found.precisions["fp16"] >= found.kinds["Add"]


def test_onnxruntimes_own_attention_counts_as_fused(tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8]) for name in "qkvy"]
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=2)
    graph = helper.make_graph([node], "one", ends[:3], ends[3:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "mha.onnx")
    found = onnxruntime.layers(tmp_path / "mha.onnx", OPTIONS)
    assert found == LayerCounts(1, {"fp32": 1}, {"MultiHeadAttention": 1}, True)


@pytest.fixture
def plain(tmp_path):
    """A model of one MatMul, without attention."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16]) for name in "xy"]
    weight = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "one", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def test_onnxruntime_without_attention_leaves_fusion_unknown(plain):
    assert onnxruntime.layers(plain, OPTIONS) == LayerCounts(1, {"fp32": 1}, {"MatMul": 1}, None)


def test_layers_are_none_without_the_package_onnx(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert onnxruntime.layers(plain, OPTIONS) is None


def test_unreadable_file_is_one_sentence(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BuildError, match=r"^ONNX Runtime cannot open broken\.onnx: .*\.$"):
        onnxruntime.layers(tmp_path / "broken.onnx", OPTIONS)


@pytest.mark.skipif(openvino.missing() is not None, reason="openvino is not installed")
@pytest.mark.parametrize(("name", "precision", "narrow"), [("float", "fp32", "fp32"), ("int8", "int8", "int8")])
def test_openvino_counts_the_compiled_model(files, tmp_path, name, precision, narrow):
    options = BuildOptions(threads=1, precision=precision)
    found = openvino.layers(openvino.build(files / f"{name}.onnx", tmp_path, options), options)
    assert sum(found.precisions.values()) == sum(found.kinds.values()) == found.count > 0
    assert found.precisions[narrow] >= found.kinds["FullyConnected"] > 0
    assert set(found.kinds) & {"Const", "Input", "Output"} == set()
    assert found.fused_attention is True


@pytest.mark.skipif(openvino.missing() is not None, reason="openvino is not installed")
def test_openvino_without_attention_leaves_fusion_unknown(plain, tmp_path):
    found = openvino.layers(openvino.build(plain, tmp_path, OPTIONS), OPTIONS)
    assert found.fused_attention is None
    assert found.kinds["FullyConnected"] == 1


# ----------------------------------------------------------------------------------------------------------- the report


class Mute:
    """A target whose layers() raises an error or returns None."""

    def __init__(self, error=None):
        self.error = error

    def layers(self, path, options):
        if self.error is not None:
            raise self.error


def test_undescribed_engine_is_reported_with_the_reason(tmp_path):
    assert report_layers.layers_of(Mute(), tmp_path, OPTIONS) is None
    found = report_layers.layers_of(Mute(RuntimesError("It makes no inspector.")), tmp_path, OPTIONS)
    assert found == {"unknown": "It makes no inspector."}
    assert list(report_layers.describe_layers({"layers": found})) == [
        "The engine's layers are unknown: It makes no inspector."
    ]
    assert list(report_layers.describe_layers({"layers": None})) == list(report_layers.describe_layers({})) == []


def test_layers_are_one_sentence_and_frequent_kinds_are_rows(plain):
    found = report_layers.layers_of(onnxruntime, plain, OPTIONS)
    assert json.loads(json.dumps(found)) == found
    for fused, words in ((True, "attention is fused."), (False, "attention is not fused."), (None, "is unknown.")):
        (line,) = report_layers.describe_layers({"layers": found | {"fused_attention": fused}})
        assert line.startswith("The engine has 1 layers: 1 fp32; ")
        assert line.endswith(words)
    many = {"kinds": {f"kind {number}": 20 - number for number in range(10)}}
    rows = report_layers.kinds(many)
    assert rows[0] == ["kind 0", "20"]
    assert rows[-1] == ["all others", "23"]
    assert len(rows) == report_layers.KINDS + 1
