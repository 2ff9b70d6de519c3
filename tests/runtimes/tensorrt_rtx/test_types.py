"""bf16, fp8 and int4, as this project writes them, with the real parser and builder."""

import pytest
import torch

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quantize.convert import convert
from runtimes.base.protocols import BuildError, BuildOptions
from runtimes.tensorrt_rtx import target

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
OPTIONS = BuildOptions(device="cuda")


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


def test_fp8_is_built_from_ada_on(tmp_path, product):
    path = converted(product, tmp_path, "fp8")
    assert target.network_layers(path).precisions["fp8"] >= 6  # two products, each with its Q and two DQ
    for gpu in ("sm89", "sm120"):
        assert target.build_for(path, tmp_path, OPTIONS, gpu).stat().st_size > 2 * 512 * 512
    with pytest.raises(BuildError, match="HW-specific datatypes: fp8"):
        target.build_for(path, tmp_path, OPTIONS, "sm80")
