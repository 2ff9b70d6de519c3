"""Images and texts to the inputs of a vision-language model, by its own processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from compressor.models.vision_language.images import Images


def prepare(
    processor: Any, images: Images, inputs: tuple[str, ...], lead: str, image: Image.Image, text: str
) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of one image with its text, without the axis of rows.

    Args:
        processor: the processor of transformers.
        images: the form of the images.
        inputs: names of the inputs that the model takes from the data.
        lead: what stands for an image before a text without its placeholder.
        image: the image.
        text: its text.
    """
    placed = text if str(processor.image_token) in text else f"{lead}{text}"
    found = processor(images=[image], text=[placed], return_tensors="np")
    return {name: _as_input(name, np.asarray(images.row(found, name))) for name in inputs}


def lead_of(processor: Any, config: Any) -> str:
    """Return what stands for an image before a text: its placeholder, between the tokens that enclose it, if any.

    The processor of BLIP-2, which has query tokens, puts them before every text itself.
    """
    if hasattr(processor, "num_query_tokens"):
        return ""
    ids = (getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None))
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or None in ids:
        return str(processor.image_token)
    start, end = tokenizer.convert_ids_to_tokens(ids)
    return f"{start}{processor.image_token}{end}"


def _as_input(name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a value in the type of the model's input: pixels as float32, masks of pixels as bool, tokens as int64."""
    kind = np.float32 if name == "pixel_values" else np.bool_ if name.startswith("pixel") else np.int64
    return value.astype(kind)
