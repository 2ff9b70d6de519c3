"""Small vision-language models with random weights, their processors, and their greedy generation in transformers."""

import functools
import json

import numpy as np
import torch
import transformers
from PIL import Image

from compressor.internals.transformers import quiet
from tests.encoder_decoders import WORDS, tokenizer

IMAGE, SIDE, PATCH = "<image>", 8, 4
TOKEN = 4 + len(WORDS)  # id of the placeholder
VOCABULARY = 48
TILED = ("idefics3", "smolvlm")
INPUTS = (
    "pixel_values", "pixel_attention_mask", "qformer_input_ids", "qformer_attention_mask", "input_ids",
    "attention_mask",
)  # fmt: skip
OUTPUTS = ("fc2", "out_proj", "o_proj", "down_proj", "proj")  # last maps of branches
KINDS = ("llava", "idefics3", "smolvlm", "paligemma", "gemma3", "blip_2", "instructblip")
QUERIES = ("blip_2", "instructblip")  # whose processors put the image before every text
GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
# A branch of the vision tower and an attention of the language model.
DROPPED = {
    "llava": ("model.vision_tower.encoder.layers.0.mlp", "model.language_model.layers.0.self_attn"),
    "idefics3": ("model.vision_model.encoder.layers.0.mlp", "model.text_model.layers.0.self_attn"),
    "smolvlm": ("model.vision_model.encoder.layers.0.self_attn", "model.text_model.layers.1.self_attn"),
    "paligemma": ("model.vision_tower.encoder.layers.0.mlp", "model.language_model.layers.0.self_attn"),
    "gemma3": ("model.vision_tower.encoder.layers.1.mlp", "model.language_model.layers.0.self_attn"),
} | dict.fromkeys(QUERIES, ("vision_model.encoder.layers.0.mlp", "language_model.model.decoder.layers.0.self_attn"))
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip


def config(kind):
    """The config of a small model of a kind."""
    if kind == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_VISION), text_config=transformers.LlamaConfig(**_TEXT),
            image_token_id=TOKEN, image_seq_length=4,
        )  # fmt: skip
    if kind in TILED:
        text = {**_TEXT, "model_type": "llama"}
        name = "Idefics3" if kind == "idefics3" else "SmolVLM"
        return getattr(transformers, f"{name}Config")(
            vision_config=_VISION | {"num_hidden_layers": 2}, text_config=text, image_token_id=TOKEN, scale_factor=2,
            tie_word_embeddings=False, pad_token_id=1,
        )  # fmt: skip
    if kind == "paligemma":
        return transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(
                **_VISION | {"num_hidden_layers": 2, "projection_dim": 32, "vision_use_head": False}
            ),
            text_config=_TEXT | {"model_type": "gemma", "head_dim": 8},
            image_token_index=TOKEN, projection_dim=32, hidden_size=32, pad_token_id=1,
        )  # fmt: skip
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return transformers.Gemma3Config(
            vision_config=_VISION | {"num_hidden_layers": 2, "vision_use_head": False},
            text_config=_TEXT | {"head_dim": 8, "sliding_window": 8, "layer_types": layers},
            mm_tokens_per_image=4, image_token_index=TOKEN, boi_token_index=TOKEN + 1, eoi_token_index=TOKEN + 2,
            tie_word_embeddings=False,
        )  # fmt: skip
    if kind in QUERIES:
        text = {name: value for name, value in _TEXT.items() if name != "intermediate_size"}
        made = transformers.Blip2Config if kind == "blip_2" else transformers.InstructBlipConfig
        return made(
            vision_config=_VISION | {"num_hidden_layers": 2},
            qformer_config={name: _VISION[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
            | {"num_hidden_layers": 2, "encoder_hidden_size": 32, "vocab_size": VOCABULARY},
            text_config=text | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            num_query_tokens=4, image_token_index=TOKEN,
        )  # fmt: skip
    raise ValueError(kind)


def build(kind):
    """The model of a kind."""
    return build_from(config(kind))


def write_captions(folder, pictures, texts):
    """Write images and their texts as the package datasets has them; return the folder."""
    folder.mkdir()
    records = []
    for number, (image, text) in enumerate(zip(pictures, texts, strict=True)):
        image.save(folder / f"{number}.png")
        records.append({"file_name": f"{number}.png", "text": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def build_from(config):
    """A model whose branches matter, and whose best token is far from the second best."""
    torch.manual_seed(1)
    module = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def words():
    """A tokenizer of words that knows the placeholder of an image."""
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return found


def processor(kind):
    """The processor of a kind, whose images have the size of the model."""
    if kind == "llava":
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        return transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(**size), words(), patch_size=PATCH, num_additional_image_tokens=1,
            vision_feature_select_strategy="default", image_token=IMAGE,
        )  # fmt: skip
    if kind in TILED:
        side = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
        images = transformers.Idefics3ImageProcessor(**side)
        return transformers.Idefics3Processor(images, words(), image_seq_len=1)
    if kind == "paligemma":
        images = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
        images.image_seq_length = (SIDE // PATCH) ** 2
        return transformers.PaliGemmaProcessor(images, words())
    if kind == "gemma3":
        tokens = tokenizer()
        tokens.add_special_tokens({"additional_special_tokens": [*GEMMA.values()]})
        names = {name: getattr(tokens, name) for name in ("bos_token", "pad_token", "eos_token", "unk_token")}
        own = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokens.backend_tokenizer, model_max_length=64, extra_special_tokens=GEMMA, **names
        )
        images = transformers.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
        return transformers.Gemma3Processor(images, own, image_seq_length=4)
    if kind in QUERIES:
        images = transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
        if kind == "instructblip":
            return transformers.InstructBlipProcessor(images, words(), tokenizer(), num_query_tokens=4)
        return transformers.Blip2Processor(images, words(), num_query_tokens=4)
    raise ValueError(kind)


@functools.cache
def saved(kind, folder):
    """The folder of a model, with its processor."""
    path = folder / kind
    with quiet():
        build(kind).save_pretrained(path)
    if kind != "smolvlm":  # its processor needs num2words
        processor(kind).save_pretrained(path)
    return path


def picture(seed):
    """An image of random pixels, of another size than the model takes."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def inputs(kind, words, rows=2):
    """Inputs of the processor for `rows` images, each with a text of `words` words behind it."""
    texts = [
        f"{IMAGE} " + " ".join(WORDS[(row + number) % len(WORDS)] for number in range(words)) for row in range(rows)
    ]
    own = {"gemma3": GEMMA["boi_token"], **dict.fromkeys(QUERIES, "")}.get(kind, IMAGE)
    texts = [text.replace(IMAGE, own) for text in texts]
    pictures = [[picture(row)] if kind == "gemma3" else picture(row) for row in range(rows)]
    found = processor(kind)(images=pictures, text=texts, return_tensors="np")
    values = {name: np.asarray(found[name]) for name in INPUTS if name in found}
    return {name: value.astype(bool) if "pixel_a" in name else value for name, value in values.items()}


def without(module, names):
    """The module with branches that are zero: the oracle of dropped branches."""
    for name in names:
        branch = module.get_submodule(name)
        (output,) = [getattr(branch, each) for each in OUTPUTS if hasattr(branch, each)]
        for parameter in output.parameters():
            torch.nn.init.zeros_(parameter)
    return module


def generated(module, feeds, new):
    """Greedy tokens of transformers, so many whatever they are, with its own cache."""
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    if module.config.model_type == "paligemma":
        tensors["token_type_ids"] = torch.zeros_like(tensors["input_ids"])  # as its processor returns for a prompt
    if module.config.model_type == "gemma3":
        tensors["token_type_ids"] = (tensors["input_ids"] == TOKEN).long()  # likewise
    with quiet(), torch.inference_mode():
        found = module.generate(
            **tensors, do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=None, pad_token_id=1
        )
    return found.numpy()
