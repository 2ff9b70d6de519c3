"""Sources of encoder-decoders that read images in another form than pixels alone: patches, or beside a text."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from compressor.models.encoder_decoder.parts import SOURCE_TOKENS, Source
from compressor.models.pretrained.image import INPUT, channels_of, configured_size
from runtimes.base.vision_language import FLATTENED

IDS, MASK, BOXES = "input_ids", "attention_mask", "bbox"

COLUMNS = 4  # patches in a row of the example
FIRST = 10  # token id of a text, behind those of images


def other_image_source(module: Any) -> Source | None:
    """Return what the encoder reads, with an axis of patches or of tokens of any length; None for pixels alone.

    Of a document, these are its words and their boxes: UDOP reads an image too, but picks its patches for each row by
    the values of the boxes, which no graph holds.
    """
    taken = inspect.signature(module.forward).parameters
    if FLATTENED in taken:
        return _patches(module)
    if IDS in taken and BOXES in taken:
        return _words_and_boxes(module)
    if INPUT in taken and IDS in taken and image_token(module) is not None:
        return _pixels_and_text(module, int(image_token(module)))  # type: ignore[arg-type]
    return None


def image_token(module: Any) -> int | None:
    """Return the token that stands for a feature of an image; None without one."""
    token = getattr(module.config, "image_token_id", None)
    return token if isinstance(token, int) else None


def _patches(module: Any) -> Source:
    """Return patches with their places (Pix2Struct), [rows, patches, 2 + values]; the second row ends in padding."""
    values = module.config.vision_config.patch_embed_hidden_size
    number = torch.arange(SOURCE_TOKENS)
    places = torch.stack([number // COLUMNS + 1, number % COLUMNS + 1], -1).float()
    pixels = torch.randn(2, SOURCE_TOKENS, values, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, SOURCE_TOKENS, dtype=torch.int64)
    mask[1, SOURCE_TOKENS * 3 // 4 :] = 0
    patches = torch.cat([places.expand(2, -1, -1), pixels], -1) * mask[..., None]
    example = {FLATTENED: patches, MASK: mask}
    return Source(example, {name: {0: "batch", 1: "patches"} for name in example})


def _words_and_boxes(module: Any) -> Source:
    """Return words with their boxes on a page, [rows, tokens, 4] in 0 to 1; the second row ends in padding."""
    seeded = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST, module.config.get_text_config().vocab_size, (2, SOURCE_TOKENS), generator=seeded)
    mask = torch.ones_like(ids)
    mask[1, SOURCE_TOKENS * 3 // 4 :] = 0
    corners = torch.rand(2, SOURCE_TOKENS, 2, 2, generator=seeded).sort(2)[0]  # left and top before right and bottom
    example = {IDS: ids, MASK: mask, BOXES: corners.flatten(2)}
    return Source(example, {name: {0: "batch", 1: "sequence"} for name in example})


def _pixels_and_text(module: Any, token: int) -> Source:
    """Return images of the size in the config, and texts that begin with a token for each feature (Florence-2)."""
    pixels = torch.randn(2, channels_of(module), *configured_size(module), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = module.get_image_features(pixels, return_dict=True).pooler_output
    vocabulary = module.config.get_text_config().vocab_size
    text = torch.randint(FIRST, vocabulary, (2, SOURCE_TOKENS), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.full((2, len(features[0])), token), text * (text != token)], 1)
    mask = torch.ones_like(ids)
    mask[1, -SOURCE_TOKENS // 4 :] = 0
    axes = {IDS: {0: "batch", 1: "sequence"}, MASK: {0: "batch", 1: "sequence"}, INPUT: {0: "batch"}}
    return Source({IDS: ids, MASK: mask, INPUT: pixels}, axes)
