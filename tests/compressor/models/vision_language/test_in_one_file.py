"""Language models that read an image by other means than placeholders, exported in one file without their cache."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.traced_model import load
from compressor.lower.write_onnx import lower
from compressor.models import ModelError
from compressor.models.base import UndetectedCacheError
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from tests.vision_language_models import build_from

CLOSE = 1e-5  # relative; sums in another order
VOCABULARY, SIDE, IMAGE, ACTIONS = 48, 8, 7, 6
_SHARED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGES = {"image_size": SIDE, "patch_size": 4, "embed_dim": 32}


def blip():
    """Its text decoder attends to the states of the image."""
    text = {**_SHARED, "vocab_size": VOCABULARY, "encoder_hidden_size": 32, "is_decoder": True, "pad_token_id": 1}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
    return build_from(transformers.BlipConfig(text_config=text, vision_config=_SHARED | _IMAGES))


def idefics():
    """Its gated layers attend to the images that a mask names for each token."""
    config = transformers.IdeficsConfig(
        **_SHARED, vocab_size=VOCABULARY, additional_vocab_size=2, vision_config=_SHARED | _IMAGES, pad_token_id=1,
        alpha_initializer="ones", cross_layer_interval=1, use_resampler=False, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return build_from(config)


MODELS = {
    "blip": (blip, ("pixel_values", "input_ids", "attention_mask")),
    "idefics": (idefics, ("input_ids", "attention_mask", "pixel_values", "image_attention_mask")),
}


def feeds(names, rows, tokens):
    """Inputs of some rows, of which the second is padded, each with an image."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, tokens, dtype=torch.int64)
    mask[1, -2:] = 0
    images = (rows, 1) if "image_attention_mask" in names else (rows,)
    every = {
        "input_ids": torch.randint(3, VOCABULARY, (rows, tokens), generator=generator),
        "attention_mask": mask,
        "pixel_values": torch.randn(*images, 3, SIDE, SIDE, generator=generator),
        "image_attention_mask": (torch.arange(tokens) > 2).long().expand(rows, tokens)[..., None].clone(),
    }
    return {name: every[name] for name in names}


@pytest.mark.parametrize("name", [*MODELS])
def test_the_file_computes_what_the_class_does(name, tmp_path):
    make, names = MODELS[name]
    module = make()
    module.save_pretrained(tmp_path / "m")
    with pytest.raises(UndetectedCacheError, match=r"has no image_token_id in its config.*; pass --no-cache to export"):
        models.load(str(tmp_path / "m"))
    settings = Settings(model=str(tmp_path / "m"), data="random", drop="none", tokens="none", cache=False)
    subject = load(settings, Steps(None))
    model = subject.model
    assert (model.inputs, model.outputs, model.task) == (names, ("logits",), "feature-extraction")
    assert {"KV cache", "preprocessing"} <= {each.feature for each in model.limitations}
    assert ("images" in {each.feature for each in model.limitations}) == (name == "idefics")
    lower(fold_graph(subject.graph), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for tokens in (5, 11):
        given = feeds(names, 3, tokens)
        (found,) = session.run(["logits"], {key: value.numpy() for key, value in given.items()})
        with torch.inference_mode():
            expected = module(**given, use_cache=False).logits.numpy()
        kept = given["attention_mask"].bool().numpy()
        assert np.abs(found - expected)[kept].max() <= CLOSE * np.abs(expected[kept]).max()


def test_a_model_that_reads_neither_is_refused_by_its_reason(tmp_path):
    """Without a way in one file, the refusal is that of the parts."""
    module = idefics()
    torch.nn.init.zeros_(module.model.gated_cross_attn_layers[0].alpha_cross_attn)
    torch.nn.init.zeros_(module.model.gated_cross_attn_layers[1].alpha_cross_attn)
    module.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"has no image_token_id in its config, but takes image_attention_mask; exp"):
        models.load(str(tmp_path / "m"))
    with pytest.raises(ModelError, match=r"gives no logits of arrays of images and texts .*: leave --no-cache out"):
        models.load(str(tmp_path / "m"), cache=False)


def policy():
    """A small PI0: a vision-language model reads the image, and another decoder the actions of a robot."""
    text = {**_SHARED, "vocab_size": VOCABULARY, "head_dim": 8, "num_key_value_heads": 2, "model_type": "gemma"}
    vision = {**_SHARED, "image_size": SIDE, "patch_size": 4, "projection_dim": 32, "vision_use_head": False}
    vlm = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**vision), text_config=text, image_token_index=IMAGE,
        projection_dim=32, hidden_size=32,
    )  # fmt: skip
    config = transformers.PI0Config(
        vlm_config=vlm, dit_config=text, chunk_size=ACTIONS, max_action_dim=3, max_state_dim=5
    )
    torch.manual_seed(0)
    return transformers.PI0ForConditionalGeneration(config).eval()


def test_a_policy_of_a_robot_reads_an_image_by_the_tokens_of_its_part(tmp_path):
    module = policy()
    module.save_pretrained(tmp_path / "m")
    settings = Settings(model=str(tmp_path / "m"), data="random", drop="none", tokens="none")
    subject = load(settings, Steps(None))
    model = subject.model
    names = ("state", "noise", "timestep", "input_ids", "pixel_values", "pixel_attention_mask", "attention_mask")
    assert (model.inputs, model.outputs) == (names, ("logits",))
    assert "KV cache" not in {each.feature for each in model.limitations}
    batch = next(iter(subject.data.test.batches(2)))
    assert ((batch.feeds["input_ids"] == IMAGE).sum(1) == 4).all()
    lower(fold_graph(subject.graph), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    given = {name: torch.from_numpy(np.concatenate([batch.feeds[name]] * 2)[:3]) for name in names}
    given["noise"] = torch.randn(3, ACTIONS, 3, generator=torch.Generator().manual_seed(2))
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
    with torch.inference_mode():
        expected = module(**given).logits.numpy()
        other = module(**given | {"pixel_values": given["pixel_values"] + 1}).logits.numpy()
    assert found.shape == (3, ACTIONS, 3)
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()
    assert np.abs(other - expected).max() > CLOSE * np.abs(expected).max()  # the image matters
