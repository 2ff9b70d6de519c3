"""The small architectures of the tests, parsed and built by TensorRT for RTX in every precision; no GPU is needed."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quantize.convert import convert
from compressor.quantize.half_precision import to_fp16
from passes.base import apply
from passes.graph.sites import find_sites
from passes.merge_tokens.token_merging import ReduceTokens
from runtimes.base.protocols import BuildError, BuildOptions
from runtimes.tensorrt_rtx import target
from runtimes.tensorrt_rtx.builder import Network
from tests.architectures import TIMM
from tests.zoo_files import FORMS, NAMES, UNBUILT, UNPARSED, write_forms

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

OPTIONS = BuildOptions(device="cuda", batches=(1, 2, 8), lengths=(0, 8, 16))
USUAL = ("vit", "hf_bert", "decoder Llama")


PRECISIONS = ("fp32", "fp16", "int8")
# Why an architecture lacks a form: no tokens to merge, no matrix to quantize, or no map to fit.
LACKS = re.compile("track tokens|attention|tokens|no MatMul or Gemm|map|masks|features")


def check(name, folder, *, forms=FORMS, build=FORMS):
    """Write every form of an architecture, parse all and build some; each computes in its precision."""
    for form, file in write_forms(name, folder, target.int8, forms=forms):
        if isinstance(file, str):
            assert form not in PRECISIONS, (form, file)
            assert LACKS.search(file), (form, file)
            continue
        counts = target.network_layers(file)
        assert counts.precisions[form.partition(",")[0]] > 0, (form, counts)
        if form in build and (name, form) not in UNBUILT:
            assert target.build_for(file, folder, OPTIONS, "sm89").stat().st_size > 0


@pytest.mark.parametrize("name", USUAL)
def test_one_architecture_of_each_kind(tmp_path, name):
    check(name, tmp_path, forms=PRECISIONS, build=("int8",))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNPARSED])
def test_every_architecture_in_every_form(tmp_path, name):
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "operator"), UNPARSED.items())
def test_what_cannot_be_parsed_says_so(tmp_path, name, operator):
    with pytest.raises(BuildError, match=f"its parser does not support {operator}"):
        check(name, tmp_path, forms=("fp32",))


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A small vision transformer with a token merged behind each attention, in float32 and in fp16."""
    folder = tmp_path_factory.mktemp("merged")
    model = next(each for each in TIMM if each.name == "vit").load()
    graph = trace(model)
    sites = [site for site in find_sites(graph) if site.kind == "attention"]
    with torch.no_grad():
        apply(ReduceTokens(tuple((site.name, 1) for site in sites)), graph)
    path = lower(fold_graph(graph), model, folder / "fp32.onnx")
    to_fp16(path, folder / "fp16.onnx", {})
    return path, folder / "fp16.onnx"


def test_constants_of_merged_tokens_are_not_narrowed(merged):
    """The bound below a norm, 1e-6, would vanish in fp16, so it stays in float32 and the parser warns of nothing."""
    for path in merged:
        network = Network.of(path)
        assert network.log.warnings == []
    bounds = [node for node in onnx.load(merged[1]).graph.node if node.op_type == "Clip"]
    assert bounds
    types = {tensor.name: tensor.data_type for tensor in onnx.load(merged[1]).graph.initializer}
    assert {types[node.input[1]] for node in bounds} == {onnx.TensorProto.FLOAT}


def test_engines_hold_each_weight_once_in_its_type(tmp_path):
    """int8 weights are not also stored in float, and each is stored once; the rest of an engine is its kernels."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).eval()
    model = models.load(module, example_inputs=torch.randn(2, 256))
    path = lower(trace(model), model, tmp_path / "model.onnx")
    feeds = {key: value.numpy() for key, value in model.example.items()}
    convert(path, tmp_path / "int8.onnx", "int8", target.int8, lambda: iter([feeds]), calibration="minmax")
    content = target.build_for(tmp_path / "int8.onnx", tmp_path, OPTIONS, "sm89").read_bytes()
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    weights = [value for value in stored if value.size == 256 * 512]
    assert [value.dtype for value in weights] == [np.int8, np.int8]
    for value in weights:
        assert content.count(value.tobytes()) == 1
        for wider in (np.float32, np.float16):
            assert value.astype(wider).tobytes() not in content
