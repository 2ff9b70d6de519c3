"""What people see of a sample: a small picture as a data: address, or the beginning of a text."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from compressor.data.readers.images import BrokenImageError
from compressor.data.splits import Split

if TYPE_CHECKING:
    from PIL import Image

    from compressor.quality.intervals import Array

SIDE = 200  # px of the longer side
TINY = 64  # up to this many px a picture is drawn larger, pixel by pixel
LONGEST = 400  # characters of a text


def shown(split: Split, places: Iterable[int]) -> dict[str, str]:
    """Pictures (as data: addresses) and texts of a few samples by id; without those that are numbers only.

    They are read again from the data set: nothing of them is kept during an evaluation.
    """
    found = {split.ids[place]: _shown(split, split.indices[place]) for place in places}
    return {id: seen for id, seen in found.items() if seen is not None}


def _shown(split: Split, index: int) -> str | None:
    samples = split.samples
    if samples.shown is None:
        first = next(iter(samples.feeds([index]).values()))[0]
        return _picture(_pixels(first)) if first.ndim == 3 and first.shape[0] in (1, 3) else None
    try:
        seen = samples.shown(index)
    except BrokenImageError:  # it could be decoded when the data was loaded
        return None
    if isinstance(seen, str):
        return seen if len(seen) <= LONGEST else f"{seen[:LONGEST]} ..."
    return _picture(seen)


def _pixels(values: Array) -> Image.Image:
    """A ready model input [C, H, W] as a picture: from its darkest to its brightest value."""
    from PIL import Image

    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else np.ascontiguousarray(scaled.transpose(1, 2, 0)))


def _picture(picture: Image.Image) -> str:
    from PIL import Image

    small = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    stream, longer = io.BytesIO(), max(picture.size)
    if longer <= TINY:
        factor = SIDE // longer
        size = (picture.width * factor, picture.height * factor)
        small.resize(size, Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
        return _address("png", stream)
    small.thumbnail((SIDE, SIDE))
    small.save(stream, "JPEG", quality=80)
    return _address("jpeg", stream)


def _address(form: str, stream: io.BytesIO) -> str:
    return f"data:image/{form};base64,{base64.b64encode(stream.getvalue()).decode()}"
