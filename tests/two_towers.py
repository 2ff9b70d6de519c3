"""Small models of images and texts with random weights, and pictures of single colours that one of them can learn."""

import functools

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from compressor.internals.transformers import quiet

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 230), "grey": (128, 128, 128)}
WORDS = ["a", "photo", "of", "this", "is", "the", *COLOURS, "cat", "dog", "."]
SPECIALS = ["<pad>", "<s>", "<unk>"]
SIZE, PATCH, POSITIONS = 16, 8, 24
END = len(SPECIALS) + len(WORDS)  # the largest token, at which CLIP pools
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _TOWER | {"vocab_size": END + 1, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1}
_VISION = _TOWER | {"image_size": SIZE, "patch_size": PATCH}
_ROBERTA = _TEXT | {"max_position_embeddings": POSITIONS + 1, "eos_token_id": END}
CONFIGS = {
    "clip": {
        "text_config": _TEXT | {"eos_token_id": END, "projection_dim": 24},
        "vision_config": _VISION | {"projection_dim": 24},
        "projection_dim": 24,
    },
    "siglip": {"text_config": _TEXT | {"eos_token_id": END}, "vision_config": _VISION},
    "altclip": {"text_config": _ROBERTA | {"project_dim": 32}, "vision_config": _VISION, "projection_dim": 24},
    "chinese_clip": {"text_config": _ROBERTA, "vision_config": _VISION, "projection_dim": 24},
    "clipseg": {"text_config": _TEXT | {"eos_token_id": END}, "vision_config": _VISION, "projection_dim": 24},
}
NAMES = {"clip": "CLIP", "siglip": "Siglip", "altclip": "AltCLIP", "chinese_clip": "ChineseCLIP", "clipseg": "CLIPSeg"}
KINDS = tuple(CONFIGS)


def build(kind):
    """A model whose branches matter."""
    torch.manual_seed(1)
    module = getattr(transformers, f"{NAMES[kind]}Model")(
        getattr(transformers, f"{NAMES[kind]}Config")(**CONFIGS[kind])
    )
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def tokenizer(kind="clip"):
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *WORDS, "</s>"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(each, vocabulary[each]) for each in ("<s>", "</s>")]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids"] if kind == "siglip" else ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=POSITIONS, model_input_names=inputs, **names
    )


def processor():
    size = {"height": SIZE, "width": SIZE}
    return transformers.CLIPImageProcessor(size=size, crop_size=size)


def save(module, folder, kind="clip"):
    """Write a model with its tokenizer and its image processor; return the folder."""
    with quiet():
        module.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@functools.cache
def saved(kind, folder):
    return save(build(kind), folder / kind, kind)


def picture(colour, seed):
    """A picture of one colour with noise."""
    noise = np.random.default_rng(seed).normal(0, 25, (SIZE, SIZE, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def write_pictures(folder, each=8):
    """Write a folder of pictures for each colour; return the folder."""
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for number in range(each):
            picture(colour, number).save(folder / colour / f"{number}.png")
    return folder


def write_captions(folder, each=8):
    """Write pictures with a text each, in the convention of datasets; return the folder."""
    import json

    write_pictures(folder, each)
    files = sorted(folder.rglob("*.png"))
    records = [
        {"file_name": str(file.relative_to(folder)), "text": f"the photo of a {file.parent.name} cat"} for file in files
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(str, map(json.dumps, records))))
    return folder


@functools.cache
def trained(folder):
    """The folder of a CLIP that has learned the names of the colours."""
    torch.manual_seed(0)
    module = transformers.CLIPModel(transformers.CLIPConfig(**CONFIGS["clip"])).train()
    texts = tokenizer()([f"a photo of a {colour}." for colour in COLOURS], padding=True, return_tensors="pt")
    texts.pop("token_type_ids", None)
    pictures = [picture(colour, 100 + number) for number in range(6) for colour in COLOURS]
    pixels = processor()(images=pictures, return_tensors="pt")["pixel_values"]
    labels = torch.arange(len(COLOURS)).repeat(6)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(module(pixel_values=pixels, **texts).logits_per_image, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save(module.eval(), folder / "my_clip")
