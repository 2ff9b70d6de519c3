"""What people see of a few samples: small pictures and short texts, read again for these samples only."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from compressor.data.readers.base import Samples
from compressor.data.readers.images import BrokenImageError
from compressor.data.splits import Split
from compressor.report.pages.sample_previews import LONGEST, SIDE, shown


def split(feed=None, seen=None) -> Split:
    """Three samples in another order than they are stored in."""
    read = []

    def feeds(indices):
        read.extend(indices)
        return {"x": np.stack([np.asarray(feed, dtype=np.float32)] * len(indices))}

    return Split("test", Samples(("a", "b", "c"), feeds, "made up", shown=seen), (2, 0, 1))


def picture_in(address: str, form: str) -> Image.Image:
    head, _, data = address.partition(",")
    assert head == f"data:image/{form};base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_only_the_samples_asked_for_are_read_under_their_own_names() -> None:
    read: list[int] = []
    found = shown(split(seen=lambda index: read.append(index) or f"text {index}"), [0, 2])
    assert found == {"c": "text 2", "b": "text 1"}
    assert read == [2, 1]


def test_photos_become_small_and_keep_their_shape() -> None:
    photo = Image.effect_noise((1200, 600), 80.0).convert("RGBA")
    small = picture_in(shown(split(seen=lambda _: photo), [0])["c"], "jpeg")
    assert small.size == (SIDE, SIDE // 2)


def test_tiny_pictures_are_drawn_larger_without_a_blur() -> None:
    tiny = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    large = picture_in(shown(split(seen=lambda _: tiny), [0])["c"], "png")
    assert large.size == (SIDE, SIDE)
    assert np.array_equal(np.asarray(large)[:: SIDE // 8, :: SIDE // 8], np.asarray(tiny))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_ready_inputs_are_shown_from_dark_to_bright(channels: int, mode: str) -> None:
    values = np.linspace(-2.0, 3.0, channels * 16).reshape(channels, 4, 4)
    seen = picture_in(shown(split(values), [0])["c"], "png")
    assert seen.mode == mode
    assert (np.asarray(seen).min(), np.asarray(seen).max()) == (0, 255)


def test_what_nobody_can_see_is_left_out() -> None:
    def broken(_: int) -> str:
        raise BrokenImageError("cut off")

    assert shown(split(np.zeros(8)), [0]) == {}
    assert shown(split(seen=broken), [0]) == {}
    assert shown(split(np.zeros((5, 4, 4))), [0]) == {}


def test_long_texts_are_cut() -> None:
    found = shown(split(seen=lambda _: "x" * 1000), [0])["c"]
    assert found == "x" * LONGEST + " ..."
