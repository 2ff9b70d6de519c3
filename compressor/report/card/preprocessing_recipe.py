"""How an exported folder's inputs are made without Compressor: read from the files that lie in the folder.

Only recipes that Pillow, NumPy and the tokenizers package follow exactly are given; None stands for any other. Nothing
here needs torch, timm or transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# Image processors of transformers that resize, crop, rescale and normalise as their config says, and nothing else.
PLAIN = ("ViT", "DeiT", "Bit", "CLIP", "Siglip", "Beit")
FILTERS = ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING")  # Pillow's, by number
UNLIMITED = 10**6  # tokenizers of transformers that know no limit give a number far above this
LONGEST = 2048  # as compressor.models.transformers cuts where nothing else limits a text


@dataclass(frozen=True)
class Picture:
    """From a picture to numbers: resize, crop in the middle, scale to [0, 1], normalise.

    `resize` is the length of the shorter side, or [width, height]; `crop` is [width, height].
    """

    mode: str
    resize: int | tuple[int, int] | None
    filter: str
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Tokenizer:
    """From texts to token ids: the longest row, and what fills shorter ones."""

    longest: int
    pad_id: int
    pad_token: str
    side: str


def picture(folder: Path) -> Picture | None:
    """The preprocessing of images, by timm's config.json or transformers' preprocessor_config.json."""
    processor = _read(folder / "preprocessor_config.json")
    return _processor(processor) if processor else _timm(_read(folder / "config.json").get("pretrained_cfg") or {})


def tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer, where the folder holds one that the tokenizers package reads."""
    content, options, config = (_read(folder / f"{name}.json") for name in ("tokenizer", "tokenizer_config", "config"))
    if not content:
        return None
    limits = [options.get("model_max_length"), config.get("max_position_embeddings")]
    limits.append(_read(folder / "sentence_bert_config.json").get("max_seq_length"))
    longest = int(min(limit or math.inf for limit in limits) if any(limits) else LONGEST)
    # A model without a token to pad with is padded with the one that ends texts.
    token = options.get("pad_token") or options.get("eos_token")
    text = token.get("content", "") if isinstance(token, Mapping) else str(token)
    known = {entry["content"]: entry["id"] for entry in content.get("added_tokens", ())}
    known |= {text: place} if (place := _place(content, text)) is not None else {}
    longest = longest if longest < UNLIMITED else LONGEST
    return Tokenizer(longest, int(known.get(text, 0)), text, options.get("padding_side", "right"))


def licence(folder: Path) -> str | None:
    """The licence of the weights, where the model's config names it (timm)."""
    found = (_read(folder / "config.json").get("pretrained_cfg") or {}).get("license")
    return found if isinstance(found, str) else None


def ends(folder: Path) -> tuple[int, ...]:
    """Tokens that end a generated text."""
    for name in ("generation_config.json", "config.json"):
        found = _read(folder / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def start(folder: Path) -> int:
    """The token that begins a text; 0 where the config names none."""
    found = _read(folder / "config.json").get("bos_token_id")
    return found if isinstance(found, int) else 0


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of a sample and NumPy type of each input of a module of one's own."""
    inputs = _read(folder / "config.json").get("inputs") or {}
    return {name: (tuple(each["shape"]), each["dtype"].removeprefix("torch.")) for name, each in inputs.items()}


def _read(path: Path) -> Json:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _timm(config: Mapping[str, Any]) -> Picture | None:
    """As ``timm.data.create_transform`` for evaluation has it (timm/data/transforms_factory.py)."""
    if not {"input_size", "mean", "std"} <= config.keys():
        return None
    channels, height, width = config["input_size"]
    mode, share = config.get("crop_mode") or "center", config.get("crop_pct") or 0.875
    size = math.floor(width / share), math.floor(height / share)
    chosen = str(config.get("interpolation", "bicubic")).upper()
    if mode not in ("center", "squash") or (mode == "center" and width != height) or chosen not in FILTERS:
        return None
    resize = size[0] if mode == "center" else size
    colours = "L" if channels == 1 else "RGB"
    return Picture(colours, resize, chosen, (width, height), tuple(config["mean"]), tuple(config["std"]))


def _processor(config: Mapping[str, Any]) -> Picture | None:
    """As transformers' image processors have it: resize, center crop, rescale, normalise, each only if asked for."""
    kind = str(config.get("image_processor_type", config.get("feature_extractor_type", "")))
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    known = kind.startswith(tuple(f"{name}ImageProcessor" for name in PLAIN)) and not config.get("do_pad")
    resizes, crops = config.get("do_resize", True), config.get("do_center_crop", "crop_size" in config)
    fits = set(size) in ({"height", "width"}, {"shortest_edge"}) and (not crops or set(crop) == {"height", "width"})
    scaled = config.get("do_rescale", True) and math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255)
    if not (known and fits and scaled and config.get("resample", 2) in range(len(FILTERS))):
        return None
    normal = config.get("do_normalize", True)
    return Picture(
        "RGB",
        None if not resizes else size["shortest_edge"] if "shortest_edge" in size else (size["width"], size["height"]),
        FILTERS[config.get("resample", 2)],
        (crop["width"], crop["height"]) if crops else None,
        tuple(config["image_mean"]) if normal else (0.0, 0.0, 0.0),
        tuple(config["image_std"]) if normal else (1.0, 1.0, 1.0),
    )


def _place(content: Mapping[str, Any], token: str) -> int | None:
    """A token's number in the vocabulary of a tokenizer.json."""
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, Mapping):
        return vocabulary.get(token)
    return next((place for place, entry in enumerate(vocabulary or ()) if entry[0] == token), None)
