"""Previews of samples: a small image as a data: URL, or the beginning of a text."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from compressor.data.readers.decode_image import BrokenImageError
from compressor.data.splits import Split

if TYPE_CHECKING:
    from PIL import Image

    from compressor.quality.intervals import Array

SIDE = 200  # px, longer side of a preview
TINY = 64  # px; images up to this size are enlarged without interpolation
LONGEST = 400  # characters; longer texts are cut


def previews(split: Split, places: Iterable[int]) -> dict[str, str]:
    """Return previews of a few samples by their ids: data: URLs of images, and texts.

    Samples that are neither an image nor a text have no preview. The samples are read again from the data set, as an
    evaluation does not keep them.

    Args:
        split: the split with the samples.
        places: indices of the samples in the split.
    """
    found = {split.ids[place]: _preview(split, split.indices[place]) for place in places}
    return {id: preview for id, preview in found.items() if preview is not None}


def _preview(split: Split, index: int) -> str | None:
    samples = split.samples
    if samples.shown is None:
        first = next(iter(samples.feeds([index]).values()))[0]
        return _picture(_pixels(first)) if first.ndim == 3 and first.shape[0] in (1, 3) else None
    try:
        content = samples.shown(index)
    except BrokenImageError:  # the file has changed since the data was loaded
        return None
    if isinstance(content, str):
        return content if len(content) <= LONGEST else f"{content[:LONGEST]} ..."
    return _picture(content)


def _pixels(values: Array) -> Image.Image:
    """Convert a model input [C, H, W] to an image, with its smallest value black and its largest white."""
    from PIL import Image

    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else np.ascontiguousarray(scaled.transpose(1, 2, 0)))


def _picture(picture: Image.Image) -> str:
    """Encode a small copy of an image as a data: URL: PNG if it is tiny, else JPEG."""
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
