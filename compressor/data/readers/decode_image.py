"""Decoding of one image to the channels of a model, with a record of what was converted.

The loader of transformers (`transformers.image_utils.load_image`) applies the EXIF orientation and converts to RGB; the
loaders of timm and torchvision only convert to RGB. Here the orientation is applied for every model. Transparency is
ignored, as in all three. They clip values of more than 8 bits to 255; here such values are scaled by their depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Exif

from compressor.data.readers.base import Array, dims
from compressor.limitations import Limitation

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes by the number of channels of the model
AS_STORED = {4: ("RGBA", "CMYK", "RGBX")}  # modes that are not converted
GREY = ("1", "L", "LA")
SEQUENCES = ("GIF", "PNG", "TIFF", "WEBP")  # formats whose further frames are other images
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 258, 262, 277, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2  # values of PHOTOMETRIC and SAMPLE_FORMAT


class BrokenImageError(Exception):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Depth:
    """The values of an image that does not have 8 bits per channel.

    Attributes:
        kind: description of its numbers.
        top: value that is white.
        largest: largest value of the image.
    """

    kind: str
    top: float
    largest: float


@dataclass(frozen=True)
class Conversion:
    """What was converted in one image.

    Attributes:
        oriented: an EXIF orientation was applied.
        depth: values that were scaled; None for 8 bits.
        transparent: pixels are transparent, and their colours are used as if they were not.
        frames: further frames or pages are not used.
        grey: its colours were converted to grey.
        opaque: the fourth channel is missing, and 255 was used.
        samples: TIFF samples per pixel that Pillow does not read.
    """

    oriented: bool = False
    depth: Depth | None = None
    transparent: bool = False
    frames: bool = False
    grey: bool = False
    opaque: bool = False
    samples: bool = False


@dataclass(frozen=True)
class Decoded:
    """An image of a PIL mode of 8 bits for 1 or 3 channels, else float32 [C, H, W] in 0 to 1; and its conversions."""

    image: Image.Image | Array
    conversion: Conversion

    def shown(self) -> Image.Image:
        """Return an image for display: the first three channels of an array, or the first of less than three."""
        if isinstance(self.image, Image.Image):
            return self.image
        values = np.rint(self.image * 255).astype(np.uint8)
        return Image.fromarray(values[0] if len(values) < 3 else np.ascontiguousarray(values[:3].transpose(1, 2, 0)))


def decode(load: Callable[[], Image.Image | Array], channels: int) -> Decoded:
    """Decode an image and convert it to the channels of the model.

    Args:
        load: opens a PIL image, or returns an array [C, H, W] or [H, W, C].
        channels: number of channels that the model takes.

    Raises:
        BrokenImageError: the image cannot be decoded, has other channels, or values of unknown depth.
    """
    try:
        opened = load()
        if isinstance(opened, np.ndarray):
            return _from_array(opened, channels)
        with opened as image:
            return _from_picture(image, channels)
    # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError and others
    except Exception as error:
        raise BrokenImageError(_reason(error)) from error


def limitations_of(conversions: Collection[Conversion]) -> Iterator[Limitation]:
    """Yield a limitation for each kind of conversion, with the number of images."""
    total = len(conversions)
    depths = Counter((each.depth.kind, each.depth.top) for each in conversions if each.depth is not None)
    for (kind, top), count in depths.items():
        largest = max(each.depth.largest for each in conversions if each.depth is not None and each.depth.top == top)
        yield Limitation(
            "depth of the images",
            f"{count} of {total} hold {kind}; they were scaled by their depth, 0 to {top:,.10g}, and their largest "
            f"value is {largest:,.10g}",
        )
    for attribute, feature, text in _TEXTS:
        count = sum(getattr(each, attribute) for each in conversions)
        if count:
            yield Limitation(f"{feature} of the images", f"{count} of {total} {text}")


_TEXTS = (
    (
        "oriented",
        "orientation",
        "have an EXIF orientation; it was applied, as the loader of transformers does and that of timm does not",
    ),
    (
        "transparent",
        "transparency",
        "have transparent pixels; their colours were used as if they were opaque, as the loaders of timm and "
        "transformers do",
    ),
    ("frames", "frames", "have several frames or pages, of which only the first was used"),
    ("grey", "colours", "have colours, which were converted to grey, because the model takes one channel"),
    ("opaque", "fourth channel", "have none, so it was set to 255"),
    ("samples", "samples", "are TIFF files with more samples per pixel than Pillow reads; the others were not used"),
)


def _from_picture(image: Image.Image, channels: int) -> Decoded:
    oriented = _is_oriented(image)  # Pillow turns a TIFF while it loads it, and finds the tag of a PNG only then
    image.load()
    oriented = oriented or _is_oriented(image)
    frames = int(getattr(image, "n_frames", 1)) if image.format in SEQUENCES else 1
    if channels != 3 and frames == channels > 1 and len(image.getbands()) == 1:
        return _from_pages(image, channels, oriented)
    if channels not in MODES:
        raise ValueError(_wrong_channels(f"{len(image.getbands())} channels", channels))
    depth = _depth(image)
    samples = int(_tag(image, SAMPLES_PER_PIXEL, 1)) > len(image.getbands())
    picture = image if depth is None else Image.fromarray(np.rint(_fractions(image, depth) * 255).astype(np.uint8))
    if depth is not None:  # the new image has no EXIF data
        picture.info["exif"] = image.getexif().tobytes()
    picture = ImageOps.exif_transpose(picture)
    picture, conversion = _with_channels(picture, channels)
    # Pillow multiplies colours by the alpha channel while it resizes, but a model of 4 channels takes each as it is
    converted = picture if channels != 4 else np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255)
    return Decoded(
        converted,
        Conversion(oriented, depth, conversion.transparent, frames > 1, conversion.grey, conversion.opaque, samples),
    )


def _with_channels(picture: Image.Image, channels: int) -> tuple[Image.Image, Conversion]:
    """Convert an image of 8 bits to 1, 3 or 4 channels."""
    if picture.mode in AS_STORED.get(channels, ()):
        return picture, Conversion()
    alpha = picture.has_transparency_data
    full = picture.convert("RGBA") if alpha else picture  # PIL warns about a direct conversion of a palette
    transparent = alpha and full.getchannel("A").getextrema()[0] != 255
    grey = channels == 1 and picture.mode not in GREY and _has_colours(full)
    conversion = Conversion(transparent=transparent and channels != 4, grey=grey, opaque=channels == 4 and not alpha)
    return full.convert(MODES[channels]), conversion


def _has_colours(picture: Image.Image) -> bool:
    red, green, blue = picture.convert("RGB").split()
    return any(ImageChops.difference(red, other).getbbox() is not None for other in (green, blue))


def _from_pages(image: Image.Image, channels: int, oriented: bool) -> Decoded:
    """Read the pages of a TIFF file, or the frames of another file, as the channels of one image."""
    pages, depth = [], None
    for number in range(channels):
        image.seek(number)
        image.load()
        if len(image.getbands()) != 1:
            raise ValueError(f"page {number} has {len(image.getbands())} channels; expected one")
        found = _depth(image)
        depth = found if depth is None or (found is not None and found.largest > depth.largest) else depth
        pages.append(np.asarray(image.convert("L")) / 255 if found is None else _fractions(image, found))
    if len({page.shape for page in pages}) > 1:
        raise ValueError("its pages differ in size")
    return Decoded(np.stack(pages).astype(np.float32), Conversion(oriented, depth))


def _from_array(values: Array, channels: int) -> Decoded:
    """Convert an array to float32 [C, H, W] in 0 to 1."""
    if values.ndim == 2 and channels == 1:
        values = values[None]
    places = [axis for axis in (0, 2) if values.ndim == 3 and values.shape[axis] == channels]
    if len(places) != 1:
        raise ValueError(_wrong_channels(f"the shape {dims(values.shape)}", channels))
    ordered = values if places == [0] else values.transpose(2, 0, 1)
    if ordered.dtype == np.uint8:
        return Decoded(np.asarray(ordered / np.float32(255), dtype=np.float32), Conversion())
    if ordered.dtype.kind not in "uf":
        raise ValueError(f"its values are {ordered.dtype}; expected unsigned integers, or floats from 0 to 1")
    integers = ordered.dtype.kind == "u"
    top = float(np.iinfo(ordered.dtype).max) if integers else 1.0
    kind = f"integers of {ordered.dtype.itemsize * 8} bits" if integers else "floats"
    depth = Depth(kind, top, float(ordered.max()))
    if not integers:
        _check_floats(ordered)
    return Decoded(np.asarray(ordered / top, dtype=np.float32), Conversion(depth=depth if integers else None))


def _wrong_channels(found: str, channels: int) -> str:
    return (
        f"it has {found}, but the model takes {channels}; expected .npy files [{channels}, H, W] or [H, W, {channels}]"
        f"{'' if channels in MODES else f', or TIFF files with {channels} pages'}"
    )


def _depth(image: Image.Image) -> Depth | None:
    """Return the depth of an image whose values are not of 8 bits; None for 8 bits.

    Raises:
        ValueError: the depth is unknown.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = _values(image)
    if image.mode == "F":
        _check_floats(values)
        return Depth("floats", 1.0, float(values.max()))
    if image.mode == "I" and image.format not in ("PNG", "PPM", "TIFF"):
        raise ValueError("its values are integers of unknown depth; save it as PNG or TIFF")
    signed = _tag(image, SAMPLE_FORMAT, UNSIGNED) == SIGNED
    bits = int(_tag(image, BITS_PER_SAMPLE, 16))
    least = int(values.min())
    if least < 0:
        raise ValueError(f"its values start at {least}; expected values from 0")
    return Depth(f"integers of {bits} bits", 2.0 ** (bits - signed) - 1, float(values.max()))


def _values(image: Image.Image) -> Array:
    """Return the stored values; Pillow reads unsigned integers of 32 bits as signed ones."""
    values = np.asarray(image)
    unsigned = image.format == "TIFF" and _tag(image, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED
    return values.view(np.uint32) if unsigned and values.dtype == np.int32 else values


def _fractions(image: Image.Image, depth: Depth) -> Array:
    """Return the values in 0 to 1. Pillow inverts a TIFF whose white is zero only if it has 8 bits."""
    fractions = _values(image) / depth.top
    return 1.0 - fractions if _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO else fractions


def _check_floats(values: Array) -> None:
    least, largest = float(values.min()), float(values.max())
    if not (least >= 0 and largest <= 1):
        raise ValueError(f"its float values are {least:g} to {largest:g}; expected 0 to 1, so scale them")


def _tag(image: Image.Image, tag: int, default: float) -> float:
    """Return the first value of a TIFF tag; `default` for other formats and without the tag."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return float(value[0] if isinstance(value, tuple) else value)


def _is_oriented(image: Image.Image) -> bool:
    return image.getexif().get(Exif.Orientation, 1) in range(2, 9)


def _reason(error: Exception) -> str:
    # The message of PIL contains the absolute path, but the id already names the file
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be identified"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
