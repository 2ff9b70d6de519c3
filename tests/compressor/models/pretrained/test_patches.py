"""Vision models alone whose images vary in size: their outputs are those of their class, for images of any size."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.pretrained.patches import features_of
from compressor.models.vision_language.padded_rows import own_states
from compressor.models.vision_language.patch_grids import without_padding
from tests.compressor.models.pretrained.test_heads import saved
from tests.varying_images import PATCH, config

CLOSE = 1e-5  # relative; sums in another order
GRIDS = ((1, 8, 4), (2, 4, 4), (1, 4, 12))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def kimi():
    return transformers.AutoConfig.for_model(
        "kimi_k25_vision", patch_size=PATCH, pos_emb_height=4, pos_emb_width=4, **SMALL
    )


def muse():
    return transformers.AutoConfig.for_model(
        "muse_glimmer_vision", patch_size=PATCH, pos_emb_height=4, pos_emb_width=4, **SMALL
    )


def grouped():
    return transformers.AutoConfig.for_model(
        "exaone4_5_vision", patch_size=PATCH, depth=2, hidden_size=32, intermediate_size=48, num_heads=4,
        num_key_value_heads=2, out_hidden_size=32, window_size=4 * PATCH, fullatt_block_indexes=[1],
    )  # fmt: skip


# Config, output, and the square of patches that a feature stands for.
ENCODERS = {
    "windows": (lambda: config("qwen2_5_vl").vision_config, "pooler_output", 2),
    "sampled positions": (lambda: config("glm4v").vision_config, "pooler_output", 2),
    "gathered positions": (lambda: config("qwen3_vl").vision_config, "pooler_output", 2),
    "fewer heads of keys": (grouped, "pooler_output", 2),
    "patches line by line": (muse, "last_hidden_state", 2),
}


@pytest.mark.parametrize("name", [*ENCODERS])
def test_the_file_computes_what_the_class_does(name, tmp_path):
    make, output, merge = ENCODERS[name]
    module = transformers.AutoModel.from_config(make())
    model = models.load(saved(module, tmp_path / "m"))
    assert (model.inputs, model.outputs) == (("pixel_values", "image_grid_thw"), (output,))
    lower(fold_graph(trace(model)), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    grids = torch.tensor(GRIDS)
    if name == "sampled positions":  # transformers takes each frame as an image there
        grids[:, 0] = 1
    pixels = torch.randn(len(GRIDS), 48, model.example["pixel_values"].shape[2], generator=torch.Generator())
    (found,) = session.run(None, {"pixel_values": pixels.numpy(), "image_grid_thw": grids.numpy()})
    with torch.inference_mode():
        named, expected = features_of(module(without_padding(pixels, grids), grid_thw=grids))
    counts = (grids.prod(1) // merge**2).tolist()
    kept = np.concatenate([row[:count] for row, count in zip(found, counts, strict=True)])
    assert named == output
    assert np.abs(kept - expected.numpy()).max() <= CLOSE * expected.abs().max()
    assert not any(row[count:].any() for row, count in zip(found, counts, strict=True))


def test_frames_of_a_clip_are_averaged(tmp_path):
    """Kimi's encoder pools the frames, so a clip has as many features as an image."""
    module = transformers.AutoModel.from_config(kimi())
    model = models.load(saved(module, tmp_path / "m"))
    grids = torch.tensor([[1, 8, 4], [1, 4, 4]])
    pixels = torch.randn(2, 32, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (found,) = model.call(module, pixels, grids)
        _, expected = features_of(module(without_padding(pixels, grids), grid_thw=grids))
    kept = torch.cat([row[:count] for row, count in zip(found, (32, 16), strict=True)])
    assert (kept - expected).abs().max() <= CLOSE * expected.abs().max()


def test_what_is_left_out_is_said(tmp_path):
    said = {}
    for name in ("windows", "gathered positions"):
        module = transformers.AutoModel.from_config(ENCODERS[name][0]())
        said[name] = {each.feature for each in models.load(saved(module, tmp_path / name)).limitations}
    assert said == {
        "windows": {"preprocessing", "windows of the vision tower"},
        "gathered positions": {"preprocessing", "deepstack_features"},
    }


# Height and width of images in patches, smaller and larger than those that are traced.
SHAPES = (((5, 3), (4, 4), (2, 6)), ((7, 8), (1, 5)))


def session_of(module, folder):
    """The loaded model and its file, opened."""
    model = models.load(saved(module, folder))
    lower(fold_graph(trace(model)), model, folder / "model.onnx")
    return model, onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("head", [False, True], ids=["vision tower", "classifier"])
def test_patches_with_a_mask_are_taken_in_any_number(head, tmp_path):
    vision = {**SMALL, "patch_size": PATCH, "num_patches": 16}
    if head:
        config = transformers.Siglip2Config(vision_config=vision, text_config={"vocab_size": 48, **SMALL})
        module = transformers.Siglip2ForImageClassification(config).eval()
    else:
        module = transformers.AutoModel.from_config(transformers.Siglip2VisionConfig(**vision)).eval()
    model, session = session_of(module, tmp_path / "m")
    output = "logits" if head else "last_hidden_state"
    assert (model.inputs, model.outputs) == (("pixel_values", "pixel_attention_mask", "spatial_shapes"), (output,))
    for shapes in map(torch.tensor, SHAPES):
        counts = shapes.prod(1, keepdim=True)
        mask = (torch.arange(int(counts.max()) + 2) < counts).long()  # some patches are padding in every row
        pixels = torch.randn(*mask.shape, 3 * PATCH**2, generator=torch.Generator().manual_seed(1))
        feeds = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        (found,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        with torch.inference_mode():
            expected = module(**feeds)[output]
        assert np.abs(found - expected.numpy()).max() <= CLOSE * expected.abs().max()


def pixtral():
    config = transformers.PixtralVisionConfig(**SMALL, patch_size=PATCH, image_size=16 * PATCH, head_dim=8)
    return transformers.AutoModel.from_config(config).eval()


def test_a_tower_that_joins_images_takes_each_as_a_row(tmp_path):
    """Pixtral's own forward puts the patches of all images behind each other, in a loop."""
    module = pixtral()
    model, session = session_of(module, tmp_path / "m")
    assert (model.inputs, model.outputs) == (("pixel_values", "image_sizes"), ("last_hidden_state",))
    for shapes in map(torch.tensor, SHAPES):
        high, wide = (shapes.amax(0) * PATCH).tolist()
        pixels = torch.randn(len(shapes), 3, high, wide, generator=torch.Generator().manual_seed(1))
        feeds = {"pixel_values": pixels, "image_sizes": shapes * PATCH}
        (found,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        expected = own_states(module, feeds).numpy()
        counts = shapes.prod(1).tolist()
        kept = np.concatenate([row[:count] for row, count in zip(found, counts, strict=True)])
        assert np.abs(kept - expected).max() <= CLOSE * np.abs(expected).max()
        assert not any(row[count:].any() for row, count in zip(found, counts, strict=True))


def test_a_tower_with_another_forward_is_not_taken_for_that_of_pixtral(tmp_path, monkeypatch):
    forward = transformers.PixtralVisionModel.forward
    folder = saved(pixtral(), tmp_path / "m")

    def negated(self, pixel_values, image_sizes=None):
        found = forward(self, pixel_values, image_sizes)
        return {"last_hidden_state": -found.last_hidden_state}

    monkeypatch.setattr(transformers.PixtralVisionModel, "forward", negated)
    assert models.load(folder).inputs == ("pixel_values",)


def test_a_tower_of_the_form_of_gemma_4_takes_patches_with_their_places(tmp_path):
    shape = {"patch_size": PATCH, "head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2}
    module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("gemma4_vision", **SMALL, **shape))
    model = models.load(saved(module, tmp_path / "m"))
    assert (model.inputs, model.outputs) == (("pixel_values", "pixel_position_ids"), ("last_hidden_state",))
    lower(fold_graph(trace(model)), model, tmp_path / "model.onnx")
    rows = {name: value.numpy()[[1, 0, 1]] for name, value in model.example.items()}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, rows)
    counts = (rows["pixel_position_ids"] != -1).all(-1).sum(1) // 4
    assert len(set(counts)) == 2
    expected = own_states(module.eval(), {name: torch.from_numpy(value) for name, value in rows.items()}).numpy()
    kept = np.concatenate([row[:count] for row, count in zip(found, counts, strict=True)])
    np.testing.assert_allclose(kept, expected, atol=CLOSE * np.abs(expected).max())
    assert not found[0, counts[0] :].any()
