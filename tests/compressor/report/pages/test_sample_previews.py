"""Tests of sample previews: small images and short texts, read for the requested samples only."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from compressor.data.readers.base import Samples
from compressor.data.readers.images import BrokenImageError
from compressor.data.splits import Split
from compressor.report.pages.sample_previews import LONGEST, SIDE, previews


def split(feed=None, preview=None) -> Split:
    """Return a split of three samples in another order than they are stored in."""

    def feeds(indices):
        return {"x": np.stack([np.asarray(feed, dtype=np.float32)] * len(indices))}

    return Split("test", Samples(("a", "b", "c"), feeds, "synthetic", shown=preview), (2, 0, 1))


def picture_in(address: str, form: str) -> Image.Image:
    head, _, data = address.partition(",")
    assert head == f"data:image/{form};base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_only_the_requested_samples_are_read() -> None:
    read: list[int] = []
    texts = previews(split(preview=lambda index: read.append(index) or f"text {index}"), [0, 2])
    assert texts == {"c": "text 2", "b": "text 1"}
    assert read == [2, 1]


def test_large_images_are_shrunk_and_keep_their_aspect_ratio() -> None:
    photo = Image.effect_noise((1200, 600), 80.0).convert("RGBA")
    small = picture_in(previews(split(preview=lambda _: photo), [0])["c"], "jpeg")
    assert small.size == (SIDE, SIDE // 2)


def test_tiny_images_are_enlarged_without_interpolation() -> None:
    tiny = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    large = picture_in(previews(split(preview=lambda _: tiny), [0])["c"], "png")
    assert large.size == (SIDE, SIDE)
    assert np.array_equal(np.asarray(large)[:: SIDE // 8, :: SIDE // 8], np.asarray(tiny))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_model_inputs_are_scaled_from_black_to_white(channels: int, mode: str) -> None:
    values = np.linspace(-2.0, 3.0, channels * 16).reshape(channels, 4, 4)
    image = picture_in(previews(split(values), [0])["c"], "png")
    assert image.mode == mode
    assert (np.asarray(image).min(), np.asarray(image).max()) == (0, 255)


def test_samples_that_are_neither_image_nor_text_have_no_preview() -> None:
    def broken(_: int) -> str:
        raise BrokenImageError("cut off")

    assert previews(split(np.zeros(8)), [0]) == {}
    assert previews(split(preview=broken), [0]) == {}
    assert previews(split(np.zeros((5, 4, 4))), [0]) == {}


def test_long_texts_are_cut() -> None:
    preview = previews(split(preview=lambda _: "x" * 1000), [0])["c"]
    assert preview == "x" * LONGEST + " ..."
