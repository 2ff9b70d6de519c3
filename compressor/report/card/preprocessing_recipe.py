"""The preprocessing of a model's inputs, read from the configuration files in an exported folder.

A recipe is returned only if Pillow, NumPy and the tokenizers package reproduce it exactly, else None. The module needs
neither torch nor timm nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from compressor.report.card.config_schema import read_config

# Image processors of transformers that only resize, crop, rescale and normalise, as configured.
PLAIN = ("ViT", "DeiT", "Bit", "CLIP", "Siglip", "Beit")
FILTERS = ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING")  # Pillow's, by number
UNLIMITED = 10**6  # transformers writes a far larger number for a tokenizer without a maximum length
LONGEST = 2048  # the length at which compressor.models.pretrained.text truncates texts without another limit
# Names of the number of positions in configs of transformers.
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
# Options of generation that change a greedy choice, with the value at which they change nothing.
RULES = {
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "sequence_bias": None,
}


@dataclass(frozen=True)
class Picture:
    """The preprocessing of an image: resize, center crop, scale to [0, 1], normalise.

    `resize` is the length of the shorter side, or [width, height]; `crop` is [width, height]. `rounding` is the
    function that rounds the place of the crop: timm rounds to the nearest pixel, transformers towards zero.
    """

    mode: str
    resize: int | tuple[int, int] | None
    filter: str
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounding: str


@dataclass(frozen=True)
class Tokenizer:
    """The truncation and padding of token ids.

    Attributes:
        longest: maximum length.
        cut: side on which longer texts are cut, ``right`` or ``left``.
        pad_id, pad_token: padding token.
        side: padding side, ``right`` or ``left``.
    """

    longest: int
    cut: str
    pad_id: int
    pad_token: str
    side: str


def picture(folder: Path) -> Picture | None:
    """Return the preprocessing of images from transformers' preprocessor_config.json or timm's config.json."""
    processor = read_config(folder, "preprocessor_config.json")
    if processor:
        return _processor(processor) if channels(folder) == 3 else None
    return _timm(read_config(folder, "config.json").get("pretrained_cfg") or {})


def channels(folder: Path) -> int:
    """Return the number of channels of the images in the config of a model of transformers; 3 without it."""
    config = read_config(folder, "config.json")
    number = (config.get("vision_config") or config).get("num_channels", 3)
    return number if isinstance(number, int) else 3


def tokenizer(folder: Path) -> Tokenizer | None:
    """Return the options of the tokenizer, or None if the folder holds no tokenizer.json."""
    content, options, config = (
        read_config(folder, f"{name}.json") for name in ("tokenizer", "tokenizer_config", "config")
    )
    if not content:
        return None
    stated = [options.get("model_max_length"), positions(folder)]
    stated.append(read_config(folder, "sentence_bert_config.json").get("max_seq_length"))
    longest = int(min((limit for limit in stated if limit is not None and limit > 0), default=LONGEST))
    # A tokenizer without a padding token pads with the end-of-text token.
    token = options.get("pad_token") or options.get("eos_token")
    text = token.get("content", "") if isinstance(token, Mapping) else str(token)
    ids = {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())}
    ids |= {text: index} if (index := _index(content, text)) is not None else {}
    longest = longest if longest < UNLIMITED else LONGEST
    # A decoder that classifies compares with the id in the config, which can differ from that of the tokenizer.
    stated_id = config.get("pad_token_id")
    pad_id = stated_id if isinstance(stated_id, int) and stated_id >= 0 else int(ids.get(text, 0))
    cut, side = (options.get(f"{name}_side", "right") for name in ("truncation", "padding"))
    return Tokenizer(longest, cut, pad_id, text, side)


def prompt(folder: Path) -> str:
    """Return the text in front of every text of a sentence embedding, by its sentence-transformers config."""
    settings = read_config(folder, "config_sentence_transformers.json")
    text = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    return text if isinstance(text, str) else ""


def licence(folder: Path) -> str | None:
    """Return the licence of the weights if the model's config states it (timm)."""
    name = (read_config(folder, "config.json").get("pretrained_cfg") or {}).get("license")
    return name if isinstance(name, str) else None


def ends(folder: Path) -> tuple[int, ...]:
    """Return the ids of the tokens that end a generated text."""
    for name in ("generation_config.json", "config.json"):
        tokens = read_config(folder, name).get("eos_token_id")
        if tokens is not None:
            listed = tokens if isinstance(tokens, list) else [tokens]
            return tuple(token for token in listed if type(token) is int)
    return ()


def ruled_out(folder: Path) -> tuple[list[int], list[int]]:
    """Return the tokens that generation_config.json rules out: at every place, and at the first one besides.

    transformers does not take an end token for a bad word.
    """
    stated = read_config(folder, "generation_config.json")
    bad = [word[0] for word in stated.get("bad_words_ids") or () if len(word) == 1]
    always = [*(stated.get("suppress_tokens") or ()), *(set(bad) - set(ends(folder)))]
    first = stated.get("begin_suppress_tokens") or ()
    return sorted({token for token in always if token >= 0}), sorted({token for token in first if token >= 0})


def other_rules(folder: Path) -> list[str]:
    """Return the options of generation_config.json that choose other tokens than the most probable ones."""
    stated = read_config(folder, "generation_config.json")
    samples = ("do_sample",) if stated.get("do_sample") else ()
    long = [word for word in stated.get("bad_words_ids") or () if len(word) > 1]
    named = [name for name, neutral in RULES.items() if stated.get(name) not in (None, False, neutral)]
    return [*samples, *named, *(["bad_words_ids"] if long else [])]


def positions(folder: Path) -> int | None:
    """Return the number of positions of a model of texts; None if its config states none."""
    config = read_config(folder, "config.json")
    for stated in (config, config.get("text_config") or {}):
        for name in POSITIONS:
            if isinstance(number := stated.get(name), int) and number > 0:
                return number
    return None


def start(folder: Path) -> int:
    """Return the id of the token that begins a text; 0 if the config has none."""
    token = read_config(folder, "config.json").get("bos_token_id")
    return token if isinstance(token, int) else 0


def decoder_prompt(folder: Path) -> list[int]:
    """Return the tokens with which a decoder starts: the start token, and the first one that is always generated."""
    found = []
    for key in ("decoder_start_token_id", "forced_bos_token_id"):
        stated = (read_config(folder, name).get(key) for name in ("generation_config.json", "config.json"))
        found.append(next((token for token in stated if isinstance(token, int)), None))
    return [token for token in found if token is not None]


def transcript_prompt(folder: Path) -> list[int]:
    """Return the start token of a decoder of speech, and those of language and task behind it.

    The tokenizer of Whisper puts them before a text; without one, only the start token is known.
    """
    found = decoder_prompt(folder)
    template = read_config(folder, "tokenizer.json").get("post_processor") or {}
    before = takewhile(lambda piece: "SpecialToken" in piece, template.get("single", ()))
    listed = template.get("special_tokens", {})
    names = [piece["SpecialToken"]["id"] for piece in before]
    prompt = [token for name in names if name in listed for token in listed[name]["ids"]]
    return prompt if found and prompt[:1] == found[:1] else found


def processes_images_and_texts(folder: Path) -> bool:
    """Return whether the folder holds a processor of transformers for images and texts."""
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape of a sample and the NumPy type of each input of a user's module."""
    inputs = read_config(folder, "config.json").get("inputs")
    if not isinstance(inputs, Mapping) or not all(map(_is_input, inputs.values())):
        return {}
    return {name: (tuple(entry["shape"]), entry["dtype"].removeprefix("torch.")) for name, entry in inputs.items()}


def _is_input(entry: Any) -> bool:
    """Return whether an entry has a shape and a type's name, and nothing else: both are written into code."""
    return (
        isinstance(entry, Mapping)
        and _are_sizes(entry.get("shape"))
        and re.fullmatch(r"torch\.[a-z]+\d*", str(entry.get("dtype"))) is not None
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int for value in values)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)


def _timm(config: Mapping[str, Any]) -> Picture | None:
    """Return the transform of ``timm.data.create_transform`` for evaluation (timm/data/transforms_factory.py)."""
    if not {"input_size", "mean", "std"} <= config.keys():
        return None
    if not (_are_sizes(config["input_size"]) and _are_numbers([*config["mean"], *config["std"]])):
        return None
    channels, height, width = config["input_size"]
    mode, share = config.get("crop_mode") or "center", config.get("crop_pct") or 0.875
    size = math.floor(width / share), math.floor(height / share)
    resampling = str(config.get("interpolation", "bicubic")).upper()
    if mode not in ("center", "squash") or (mode == "center" and width != height) or resampling not in FILTERS:
        return None
    resize = size[0] if mode == "center" else size
    if channels not in (1, 3) or {len(config["mean"]), len(config["std"])} != {channels}:
        return None
    colours = "L" if channels == 1 else "RGB"
    return Picture(colours, resize, resampling, (width, height), tuple(config["mean"]), tuple(config["std"]), "round")


def _processor(config: Mapping[str, Any]) -> Picture | None:
    """Return the steps that a transformers image processor has enabled: resize, center crop, rescale, normalise."""
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    plain = kind.startswith(tuple(f"{name}ImageProcessor" for name in PLAIN)) and not config.get("do_pad")
    resizes, crops = config.get("do_resize", True), config.get("do_center_crop", "crop_size" in config)
    fits = set(size) in ({"height", "width"}, {"shortest_edge"}) and (not crops or set(crop) == {"height", "width"})
    scaled = config.get("do_rescale", True) and math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255)
    normal = config.get("do_normalize", True)
    normalises = not normal or (config.get("image_mean") and config.get("image_std"))
    sizes = [*(size.values() if resizes else ()), *(crop.values() if crops else ())]
    known = normalises and _are_sizes(sizes) and config.get("resample", 2) in range(len(FILTERS))
    if not (plain and fits and scaled and known):  # all is written into code
        return None
    return Picture(
        "RGB",
        None if not resizes else size["shortest_edge"] if "shortest_edge" in size else (size["width"], size["height"]),
        FILTERS[config.get("resample", 2)],
        (crop["width"], crop["height"]) if crops else None,
        tuple(config["image_mean"]) if normal else (0.0, 0.0, 0.0),
        tuple(config["image_std"]) if normal else (1.0, 1.0, 1.0),
        "int",
    )


def _index(content: Mapping[str, Any], token: str) -> int | None:
    """Return the id of a token in the vocabulary of a tokenizer.json."""
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, Mapping):
        return vocabulary.get(token)
    return next((index for index, entry in enumerate(vocabulary or ()) if entry[0] == token), None)
