"""Checkpoints of transformers with quantized weights are read as their float values, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from compressor import models
from compressor.models.base import ModelError

SIDE = 32  # rows and columns that share a factor
FP8 = {"quant_method": "fp8", "weight_block_size": [SIDE, SIDE]}


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)).eval()


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in float8, and the factor of each of its blocks."""
    blocks = weight.reshape(weight.shape[0] // SIDE, SIDE, -1, SIDE)
    factors = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / factors[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.reshape(weight.shape), factors


def _unpacked(codes: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    blocks = codes.float().reshape(codes.shape[0] // SIDE, SIDE, -1, SIDE)
    return (blocks * factors[:, None, :, None]).reshape(codes.shape)


def _state(folder: Path, quantization: dict[str, object] | None) -> None:
    """Enter a quantization into the config of a checkpoint; None removes it."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


@pytest.fixture
def float8(tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    """A checkpoint in float8 with a factor for each block of its matrices, and the model of its values."""
    module = _llama()
    module.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if "proj" in name]:
        codes, factors = _packed(stored[name])
        stored |= {name: codes, f"{name}_scale_inv": factors}
        module.get_parameter(name).data = _unpacked(codes, factors)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    _state(tmp_path, FP8)
    return tmp_path, module


def test_float8_is_read_as_its_values_and_said_so(float8: tuple[Path, LlamaForCausalLM]) -> None:
    folder, expected = float8
    model = models.load(folder)
    found = dict(model.module.named_parameters())
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=0.0)
    (said,) = (each for each in model.limitations if each.feature == "weight precision")
    assert "quantized (fp8)" in said.reason
    assert "dequantized to float32" in said.reason
    assert not model.dtypes  # types of the codes and factors are none of the weights


def test_float_weights_say_nothing_of_quantization(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path)
    assert all(each.feature != "weight precision" for each in models.load(tmp_path).limitations)


def test_random_weights_need_no_method(float8: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = float8
    _state(folder, {"quant_method": "of next year"})
    model = models.load(folder, random_weights=True)
    assert all(each.feature != "weight precision" for each in model.limitations)


def test_a_method_that_transformers_would_ignore_is_refused(float8: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = float8
    _state(folder, {"quant_method": "of next year"})
    with pytest.raises(ModelError, match=r"quantized \(of next year\), a method .* pass the checkpoint that they were"):
        models.load(folder)


def test_factors_without_a_method_are_refused(float8: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = float8
    _state(folder, None)
    with pytest.raises(ModelError, match=r"store weights as F8_E4M3 with factors such as .*weight_scale_inv, but its"):
        models.load(folder)


def test_factors_in_a_file_of_torch_are_refused_too(float8: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = float8
    _state(folder, None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"store weights as float8_e4m3fn with factors such as"):
        models.load(folder)


def test_quantized_weights_do_not_stay_on_disk(float8: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = float8
    refusal = f"--max-memory cannot read {folder}: its weights are quantized (fp8); pass the checkpoint"
    with pytest.raises(ModelError, match=re.escape(refusal)):
        models.load(folder, on_disk=True)


def test_a_model_that_computes_with_codes_is_refused(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    _llama().save_pretrained(plain)
    codes = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    LlamaForCausalLM.from_pretrained(plain, quantization_config=codes).save_pretrained(quantized)
    with pytest.raises(ModelError, match=r"cannot be read as floats: its weights are quantized \(torchao\); pass the"):
        models.load(quantized)
