"""Images and texts to the inputs of a vision-language model, by its own processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def prepare(processor: Any, inputs: tuple[str, ...], image: Image.Image, text: str) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of one image with its text, without the axis of rows.

    Args:
        processor: the processor of transformers.
        inputs: names of the inputs that the model takes from the data.
        image: the image.
        text: its text; without the placeholder of an image, the image stands before it.
    """
    placed = text if processor.image_token in text else f"{processor.image_token}{text}"
    found = processor(images=[image], text=[placed], return_tensors="np")
    return {name: _as_input(name, np.asarray(found[name][0])) for name in inputs}


def _as_input(name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a value in the type of the model's input: pixels as float32, masks of pixels as bool, tokens as int64."""
    kind = np.float32 if name == "pixel_values" else np.bool_ if name.startswith("pixel") else np.int64
    return value.astype(kind)
