"""Encoder-decoders that read patches with their places, or an image and a text, generate what transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from compressor import models
from compressor.data.readers.random_inputs import random_samples
from compressor.internals.transformers import quiet
from compressor.lower.cut.encoder_decoder import cut
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import Model
from passes.execute.interpreter import run
from runtimes.base.encoder_decoder import EncoderDecoderEngine, greedy
from runtimes.base.protocols import BuildOptions
from runtimes.onnxruntime.target import load
from tests.encoder_decoders import generated

VOCABULARY, NEW = 40, 6
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
VISION = {
    "hidden_size": 16, "patch_embed_hidden_size": 12, "d_ff": 32, "d_kv": 8, "num_hidden_layers": 1, "seq_len": 32,
    "num_attention_heads": 2,
}  # fmt: skip
TOWER = {
    "embed_dim": [16, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
    "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 2,
    "projection_dim": 16,
}  # fmt: skip
BART = {
    "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


def saved(module: torch.nn.Module, folder: Path) -> str:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with quiet():
        module.save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


def pix2struct(folder: Path) -> Model:
    config = transformers.Pix2StructConfig(
        text_config=TEXT | {"decoder_start_token_id": 0}, vision_config=VISION, decoder_start_token_id=0
    )
    return models.load(saved(transformers.Pix2StructForConditionalGeneration(config).eval(), folder))


def florence(folder: Path) -> Model:
    config = transformers.Florence2Config(
        text_config=BART, vision_config=TOWER, image_token_id=3, decoder_start_token_id=2, pad_token_id=1
    )
    return models.load(saved(transformers.Florence2ForConditionalGeneration(config).eval(), folder))


def patches(rows: int, count: int) -> dict[str, np.ndarray]:
    """Rows of patches in rows of three, the last two of the second being padding."""
    number = np.arange(count)
    places = np.stack([number // 3 + 1, number % 3 + 1], -1)
    values = np.random.default_rng(0).standard_normal((rows, count, VISION["patch_embed_hidden_size"]))
    mask = np.ones((rows, count), np.int64)
    mask[1, -2:] = 0
    found = np.concatenate([np.broadcast_to(places, (rows, count, 2)), values], -1) * mask[..., None]
    return {"flattened_patches": found.astype(np.float32), "attention_mask": mask}


@pytest.mark.parametrize("count", [9, 14])
def test_pix2struct_generates_what_transformers_does(count: int, tmp_path: Path) -> None:
    model = pix2struct(tmp_path / "model")
    assert model.task == "image-to-text"
    assert model.preprocess.inputs == ("flattened_patches", "attention_mask", "decoder_input_ids")
    assert any("arrays by the names of the inputs: flattened_patches" in each.reason for each in model.limitations)
    path = cut(lower(fold_graph(trace(model)), model, tmp_path / "whole.onnx"), tmp_path)
    feeds = patches(3, count)
    with load(path, BuildOptions()) as engine:
        assert isinstance(engine, EncoderDecoderEngine)
        found = greedy(engine, feeds, np.zeros((3, 1), np.int64), NEW)
    np.testing.assert_array_equal(found, generated(model.module, feeds, NEW))


def test_random_patches_keep_their_places(tmp_path: Path) -> None:
    model = pix2struct(tmp_path)
    (found,) = random_samples(model.preprocess, 0).feeds([1])["flattened_patches"]
    example = model.preprocess.example["flattened_patches"][1]
    np.testing.assert_array_equal(found[:, :2], example[:, :2])
    assert not found[example[:, 0] == 0].any()
    assert not np.array_equal(found, example)


def test_florence_takes_images_with_texts_of_any_length(tmp_path: Path) -> None:
    model = florence(tmp_path)
    assert model.preprocess.inputs == ("input_ids", "attention_mask", "pixel_values", "decoder_input_ids")
    graph = trace(model)
    for more in (0, 5):
        ids, mask = model.example["input_ids"][[1, 0, 1]], model.example["attention_mask"][[1, 0, 1]]
        feeds = dict(model.example)
        feeds["input_ids"] = torch.cat([ids, torch.full((3, more), 7)], 1)
        feeds["attention_mask"] = torch.cat([mask, torch.ones(3, more, dtype=torch.int64)], 1)
        feeds = {name: value if len(value) == 3 else value[[1, 0, 1]] for name, value in feeds.items()}
        with torch.inference_mode():
            expected = model.call(model.module, *(feeds[name] for name in model.inputs))
        for name, value, wanted in zip(graph.outputs, run(graph, feeds), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-4, msg=name)


def test_udop_reads_words_with_their_boxes_and_says_that_it_takes_no_image(tmp_path: Path) -> None:
    config = transformers.UdopConfig(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2,
        image_size=32, patch_size=16, decoder_start_token_id=0,
    )  # fmt: skip
    model = models.load(saved(transformers.UdopForConditionalGeneration(config).eval(), tmp_path))
    assert model.preprocess.inputs == ("input_ids", "attention_mask", "bbox", "decoder_input_ids")
    assert any(each.feature == "input pixel_values" and "images" in each.reason for each in model.limitations)
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(10, VOCABULARY, (3, 9)),
        "attention_mask": np.ones((3, 9), np.int64),
        "bbox": np.sort(rng.random((3, 9, 2, 2)), 2).reshape(3, 9, 4).astype(np.float32),
        "decoder_input_ids": rng.integers(10, VOCABULARY, (3, 4)),
    }
    feeds["attention_mask"][1, -2:] = 0
    with torch.inference_mode():
        expected = model.module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits
        tensors = {name: torch.from_numpy(value) for name, value in model.preprocess.complete(feeds).items()}  # type: ignore[misc]
        found = dict(zip(model.outputs, run(trace(model), tensors), strict=False))["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
