"""Small vision-language models whose images vary in size, their processors, and their greedy generation."""

import functools
import inspect

import numpy as np
import torch
import transformers
from PIL import Image

from compressor.internals.transformers import quiet
from tests.encoder_decoders import WORDS, tokenizer
from tests.vision_language_models import build_from

PATCH = 4
START, END, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "hyperclovax")
GEMMA = ("gemma4", "gemma4_vision")  # that adds embeddings in layers, and that reads an image in both directions
KINDS = (*GRIDS, "llava_next", "mistral3", *GEMMA)
IMAGE = {"llava_next": "<image>", "mistral3": "[IMG]"} | dict.fromkeys(GEMMA, "<|image|>")
IMAGE |= dict.fromkeys(GRIDS, "<|image_pad|>")
LEAD = IMAGE | dict.fromkeys(GRIDS, f"{START}<|image_pad|>{END}")
SIDE = 8  # of a tile
TOKEN = 4 + len(WORDS)  # id of the placeholder
VOCABULARY = 48
PINPOINTS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]
SIZES = ((24, 40), (48, 16))  # height and width in pixels
INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids", "input_ids", "attention_mask")
# A branch of the vision tower and an attention of the language model.
DROPPED = {
    "qwen2_vl": ("model.visual.blocks.0.mlp", "model.language_model.layers.0.self_attn"),
    "qwen2_5_vl": ("model.visual.blocks.1.attn", "model.language_model.layers.1.self_attn"),
    "qwen3_vl": ("model.visual.blocks.0.attn", "model.language_model.layers.1.self_attn"),
    "glm4v": ("model.visual.blocks.0.mlp", "model.language_model.layers.0.self_attn"),
    "hyperclovax": ("model.vision_model.blocks.0.mlp", "model.language_model.layers.0.self_attn"),
    "llava_next": ("model.vision_tower.encoder.layers.0.mlp", "model.language_model.layers.0.self_attn"),
    "mistral3": ("model.vision_tower.transformer.layers.0.feed_forward", "model.language_model.layers.0.self_attn"),
} | dict.fromkeys(GEMMA, ("model.vision_tower.encoder.layers.0.mlp", "model.language_model.layers.1.self_attn"))
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def config(kind):
    """The config of a small model of a kind."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tokens = {
        "image_token_id": TOKEN, "video_token_id": TOKEN + 1, "vision_start_token_id": TOKEN + 2,
        "vision_end_token_id": TOKEN + 3,
    }  # fmt: skip
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH}
        return transformers.Qwen2VLConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **tokens)
    if kind == "qwen2_5_vl":
        vision = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 4,
            "patch_size": PATCH, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        }  # fmt: skip
        return transformers.Qwen2_5_VLConfig(
            text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **tokens
        )
    if kind == "qwen3_vl":
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 4,
            "patch_size": PATCH, "num_position_embeddings": 16, "deepstack_visual_indexes": [1, 0],
        }  # fmt: skip
        language = _TEXT | {"rope_parameters": rope, "head_dim": 8}
        return transformers.Qwen3VLConfig(text_config=language, vision_config=vision, **tokens)
    if kind == "glm4v":
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 4,
            "patch_size": PATCH, "image_size": 4 * PATCH,
        }  # fmt: skip
        rope = rope | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1]}
        return transformers.Glm4vConfig(text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, **tokens)
    if kind == "hyperclovax":
        vision = config("qwen2_5_vl").vision_config
        return transformers.HyperCLOVAXVisionV2Config(
            text_config=transformers.HyperCLOVAXConfig(**_TEXT), vision_config=vision, **tokens
        )
    if kind == "llava_next":
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": SIDE, "patch_size": PATCH,
        }  # fmt: skip
        return transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**_TEXT),
            image_token_id=TOKEN, image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip
    if kind == "mistral3":
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "patch_size": PATCH, "image_size": 64, "head_dim": 8,
        }  # fmt: skip
        return transformers.Mistral3Config(
            vision_config=transformers.PixtralVisionConfig(**vision), text_config=transformers.MistralConfig(**_TEXT),
            image_token_index=TOKEN, spatial_merge_size=2,
        )  # fmt: skip
    if kind in GEMMA:
        return _gemma4(kind)
    raise ValueError(kind)


def _gemma4(kind):
    text = _TEXT | {"head_dim": 8, "global_head_dim": 16, "sliding_window": 8}
    layers = ["sliding_attention", "full_attention"]
    if kind == "gemma4":  # as E2B
        text |= {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": layers * 2, "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        }  # fmt: skip
    else:  # as 26B-A4B
        text |= {
            "layer_types": layers, "use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 16,
        }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "patch_size": PATCH, "pooling_kernel_size": 2,
        "position_embedding_size": 300, "standardize": kind != "gemma4",
    }  # fmt: skip
    tokens = {f"{name}_token_id": TOKEN + number for number, name in enumerate(("image", "boi", "eoi", "audio", "boa"))}
    return transformers.Gemma4Config(
        text_config=text,
        vision_config=vision,
        **tokens,
        eoa_token_index=TOKEN + 5,
        video_token_id=TOKEN + 6,
        tie_word_embeddings=False,
    )


def build(kind):
    """The model of a kind."""
    return build_from(config(kind))


def processor(kind):
    """The processor of a kind, whose images keep their size if the model allows it."""
    words = tokenizer()
    if kind == "llava_next":
        words.add_special_tokens({"additional_special_tokens": [IMAGE[kind]]})
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        )
        return transformers.LlavaNextProcessor(
            images, words, patch_size=PATCH, num_additional_image_tokens=1, vision_feature_select_strategy="default",
            image_token=IMAGE[kind],
        )  # fmt: skip
    if kind == "mistral3":
        words.add_special_tokens({"additional_special_tokens": [IMAGE[kind], "[IMG_BREAK]", "[IMG_END]"]})
        images = transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=PATCH)
        return transformers.PixtralProcessor(images, words, patch_size=PATCH, spatial_merge_size=2)
    if kind in GEMMA:
        return _processor_of_gemma4(words)
    words.add_special_tokens({"additional_special_tokens": [IMAGE[kind], VIDEO, START, END]})
    images = transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": PATCH**2, "longest_edge": 10000}, patch_size=PATCH
    )
    video = transformers.Qwen2VLVideoProcessor(patch_size=PATCH)
    made = transformers.Qwen2VLProcessor if kind == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    return made(images, words, video)


def _processor_of_gemma4(words):
    extra = {f"{name}_token": f"<|{name}|>" for name in ("image", "boi", "eoi", "audio", "boa", "eoa")}
    words.add_special_tokens({"additional_special_tokens": [*extra.values(), "<|video|>"]})
    names = {name: getattr(words, name) for name in ("bos_token", "pad_token", "eos_token", "unk_token")}
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, model_max_length=256, extra_special_tokens=extra, **names
    )
    images = transformers.Gemma4ImageProcessor(patch_size=PATCH, max_soft_tokens=70, pooling_kernel_size=2)
    sound, video = transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4VideoProcessor()
    return transformers.Gemma4Processor(sound, images, own, video)


@functools.cache
def saved(kind, folder):
    """The folder of a model, with its processor."""
    path = folder / kind
    with quiet():
        build(kind).save_pretrained(path)
    processor(kind).save_pretrained(path)
    return path


def picture(seed, size=SIZES[0]):
    """An image of random pixels, of a height and width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def text(kind, words, seed=0):
    """A text of a number of words behind an image."""
    return f"{LEAD[kind]} " + " ".join(WORDS[(seed + number) % len(WORDS)] for number in range(words))


def inputs(kind, words, size, seed=0):
    """What the processor returns for an image of a size with a text of a number of words."""
    return dict(processor(kind)(images=[picture(seed, size)], text=[text(kind, words, seed)], return_tensors="np"))


def rows(kind, found):
    """The inputs of a graph or an engine from those of the processor for one image."""
    values = {name: np.asarray(found[name]) for name in INPUTS if name in found}
    if "image_grid_thw" in values:
        values["pixel_values"] = values["pixel_values"][None]
    return {name: each if name == "pixel_values" else each.astype(np.int64) for name, each in values.items()}


def generated(module, found, new):
    """Greedy tokens of transformers, so many whatever they are, with its own cache."""
    taken = inspect.signature(module.forward).parameters
    tensors = {name: torch.as_tensor(value) for name, value in found.items() if name in taken}
    with quiet(), torch.inference_mode():
        made = module.generate(
            **tensors, do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=None, pad_token_id=1
        )
    return made.numpy()
