"""Decoding: values are scaled by their depth, other conversions are those of the loader of transformers."""

import io
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from compressor.data.readers.decode_image import BrokenImageError, decode, limitations_of
from compressor.data.splits import load
from compressor.models.preprocess import Preprocess

VALUES = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2114  # up to 61,306
PHOTOMETRIC, SAMPLE_FORMAT, ORIENTATION = 262, 339, 0x0112


def encoded(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pgm(top, values):
    return f"P5 {values.shape[1]} {values.shape[0]} {top}\n".encode() + values.astype(">u2").tobytes()


def unsigned(content):
    """Replace the sample format of a TIFF file, because Pillow writes integers of 32 bits as signed ones."""
    signed, changed = (struct.pack("<HHIHH", SAMPLE_FORMAT, 3, 1, value, 0) for value in (2, 1))
    assert content.count(signed) == 1
    return content.replace(signed, changed)


def opened(content):
    return lambda: Image.open(io.BytesIO(content))


DEEP = Image.fromarray(VALUES)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8))
INT32 = Image.fromarray((VALUES.astype(np.int64) * 2**15).astype(np.int32))


@pytest.mark.parametrize(
    ("content", "fractions"),
    [
        (encoded(DEEP, "PNG"), VALUES / 65535),
        (encoded(DEEP, "TIFF"), VALUES / 65535),
        (encoded(DEEP, "JPEG2000"), VALUES / 65535),
        (encoded(DEEP, "TIFF", tiffinfo={PHOTOMETRIC: 0}), 1 - VALUES / 65535),
        (pgm(65535, VALUES), VALUES / 65535),
        (pgm(4095, VALUES // 16), (VALUES // 16) / 4095),
        (encoded(INT32, "TIFF"), VALUES * 2.0**15 / (2**31 - 1)),
        (unsigned(encoded(INT32, "TIFF")), VALUES * 2.0**15 / (2**32 - 1)),
        (encoded(Image.fromarray((VALUES / 65535).astype(np.float32)), "TIFF"), VALUES / 65535),
    ],
    ids=["png", "tiff", "jpeg2000", "white is zero", "pgm", "pgm 12 bits", "signed", "unsigned", "floats"],
)
def test_values_are_scaled_by_their_depth(content, fractions):
    found = decode(opened(content), 3)
    assert found.image.mode == "RGB"
    wanted = np.rint(fractions * 255)
    # Pillow scales the 12 bits of a PGM file to 16 bits first, which may round to the next level
    np.testing.assert_allclose(np.asarray(found.image)[..., 0], wanted, atol=1 if b"4095" in content[:16] else 0)
    assert found.conversion.depth is not None
    assert len(np.unique(np.asarray(found.image))) > 14  # neither white nor black


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(VALUES.astype(np.float32)), "its float values are 0 to 61306; expected 0 to 1"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "float values are nan"),
        (Image.fromarray(np.full((2, 2), -3, np.int32)), "values start at -3"),
    ],
)
def test_values_without_a_depth_are_refused(image, reason):
    with pytest.raises(BrokenImageError, match=reason):
        decode(opened(encoded(image, "TIFF")), 3)
    if image.mode == "I":
        with pytest.raises(BrokenImageError, match="unknown depth"):
            decode(lambda: image, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "deep"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_that_of_the_loader_of_transformers(tmp_path, form, orientation):
    image = DEEP if form == "deep" else PHOTO.convert("RGB")
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "photo"
    image.save(path, "PNG" if form == "deep" else form, exif=exif)
    found = decode(partial(Image.open, path), 3)
    assert found.conversion.oriented == (orientation > 1)
    wanted = load_image(str(path))
    assert found.image.size == wanted.size
    if form != "deep":  # it clips 16 bits
        np.testing.assert_array_equal(np.asarray(found.image), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_the_loader_of_transformers_does(mode):
    image = PHOTO.convert("RGB").convert("L").convert("LA") if mode == "LA" else PHOTO.convert("RGB").convert(mode)
    image = PHOTO if mode == "RGBA" else image
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
        with pytest.warns(UserWarning, match="Palette images with Transparency"):
            wanted = load_image(image)
    else:
        wanted = load_image(image)
    found = decode(lambda: image, 3)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(wanted))
    assert found.conversion.transparent == (mode in ("RGBA", "P"))
    assert found.conversion.depth is None


def test_one_and_four_channels():
    grey = decode(lambda: PHOTO.convert("RGB"), 1)
    np.testing.assert_array_equal(np.asarray(grey.image), np.asarray(PHOTO.convert("RGB").convert("L")))
    assert grey.conversion.grey
    assert not decode(lambda: PHOTO.convert("L").convert("RGB"), 1).conversion.grey
    four = decode(lambda: PHOTO, 4)
    np.testing.assert_allclose(four.image, np.asarray(PHOTO).transpose(2, 0, 1) / 255, rtol=1e-6)  # float32
    assert not four.conversion.transparent
    assert not four.conversion.opaque
    inks = PHOTO.convert("RGB").convert("CMYK")
    np.testing.assert_array_equal(np.rint(decode(lambda: inks, 4).image * 255), np.asarray(inks).transpose(2, 0, 1))
    opaque = decode(lambda: PHOTO.convert("RGB"), 4)
    assert opaque.conversion.opaque
    assert set(np.unique(opaque.image[3])) == {1.0}


def test_twelve_channels_are_pages_or_arrays(tmp_path):
    bands = np.random.default_rng(0).integers(0, 65536, (12, 5, 6), dtype=np.uint16)
    pages = [Image.fromarray(band) for band in bands]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    wanted = (bands / 65535).astype(np.float32)
    for load_bands in (partial(Image.open, tmp_path / "x.tif"), lambda: bands, lambda: bands.transpose(1, 2, 0)):
        found = decode(load_bands, 12)
        np.testing.assert_allclose(found.image, wanted, rtol=1e-6)  # float32
        assert found.conversion.depth.largest == bands.max()
    assert found.shown().mode == "RGB"
    np.testing.assert_array_equal(decode(lambda: wanted, 12).image, wanted)
    for wrong, reason in (
        (lambda: PHOTO, "it has 4 channels, but the model takes 12"),
        (lambda: bands[:11], r"the shape \[11, 5, 6\], but the model takes 12"),
        (lambda: bands.astype(np.int64), "its values are int64"),
        (lambda: wanted * 300, "float values"),
    ):
        with pytest.raises(BrokenImageError, match=reason):
            decode(wrong, 12)
    assert decode(partial(Image.open, tmp_path / "x.tif"), 3).conversion.frames


def test_a_folder_states_what_was_converted(tmp_path: Path):
    for number in range(4):
        DEEP.save(tmp_path / f"deep{number}.png")
        PHOTO.save(tmp_path / f"clear{number}.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    PHOTO.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    np.save(tmp_path / "array.npy", np.asarray(PHOTO.convert("RGB")))
    PHOTO.save(tmp_path / "moving.gif", save_all=True, append_images=[PHOTO.transpose(Image.Transpose.ROTATE_180)])
    example = {"pixel_values": np.zeros((2, 3, 5, 5), np.float32)}
    preprocess = Preprocess(("pixel_values",), "image", example, image=lambda image: np.zeros((3, 5, 5), np.float32))
    data = load(str(tmp_path), preprocess, task="image-classification")
    stated = {each.feature: each.reason for each in data.limitations}
    assert stated["depth of the images"].startswith("4 of 11 hold integers of 16 bits; they were scaled by their depth")
    assert stated["depth of the images"].endswith("0 to 65,535, and their largest value is 61,306")
    assert stated["orientation of the images"].startswith("1 of 11 have an EXIF orientation; it was applied")
    assert stated["transparency of the images"].startswith("5 of 11 ")
    assert stated["frames of the images"].startswith("1 of 11 ")
    assert data.calibration.samples.shown(data.calibration.indices[0]).mode == "RGB"
    assert list(limitations_of([decode(lambda: PHOTO.convert("RGB"), 3).conversion])) == []


@pytest.mark.parametrize("shape", [(6, 5, 6), (6, 5, 6, 1), (6, 5, 6, 3)])
def test_uint16_arrays_are_raw_images(tmp_path, shape):
    values = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    np.save(tmp_path / "x.npy", values)
    seen = []

    def image(picture):
        array = np.asarray(picture, np.float32)
        seen.append(array.transpose(2, 0, 1) / 255 if isinstance(picture, Image.Image) else array)
        return seen[-1]

    example = {"pixel_values": np.zeros((2, 3, 5, 6), np.float32)}
    data = load(
        str(tmp_path / "x.npy"),
        Preprocess(("pixel_values",), "image", example, image=image),
        task="image-classification",
    )
    batch = next(data.test.batches(1))
    wanted = np.broadcast_to(values.reshape(6, 5, 6, -1)[int(batch.ids[0])], (5, 6, 3)).transpose(2, 0, 1) / 65535
    np.testing.assert_allclose(batch.feeds["pixel_values"][0], wanted, atol=0.5 / 255)  # grey is rounded to 8 bits
    assert [each.feature for each in data.limitations] == ["depth of the images"]
