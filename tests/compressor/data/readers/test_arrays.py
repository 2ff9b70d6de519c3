"""Arrays of images: what they probably hold, and what is said where they do not fit the preprocessing of the model."""

from pathlib import Path

import numpy as np
import pytest

from compressor.data.splits import Data, load
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

RNG = np.random.default_rng(0)
PIXELS = RNG.random((12, 3, 8, 8), dtype=np.float32)


def normalized(picture: object) -> np.ndarray:
    """Return a picture with values from -1 to 1, as most preprocessing does."""
    values = np.asarray(picture, dtype=np.float32)
    if values.shape[-1] == 3:
        values = values.transpose(2, 0, 1) / 255
    return (values - 0.5) / 0.5


def read(folder: Path, array: np.ndarray) -> Data:
    np.save(folder / "x.npy", array)
    example = {"pixel_values": np.zeros((2, 3, 8, 8), dtype=np.float32)}
    model = Preprocess(("pixel_values",), "image", example, image=normalized)
    return load(str(folder / "x.npy"), model, task="image-classification")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (PIXELS, "and 0.99"),
        (PIXELS * 255, "and 254"),
        (PIXELS * 12 - 6, "between -5.99"),
        (PIXELS * 2 - 1, None),
        (PIXELS * 2.4 - 1.2, None),  # an enlarged picture exceeds its range
    ],
    ids=["0 to 1", "0 to 255", "others", "normalized", "sharpened"],
)
def test_ready_inputs_that_were_not_normalized_are_a_limitation(
    array: np.ndarray, said: str | None, tmp_path: Path
) -> None:
    """Nothing compared them with the preprocessing, so that the agreement was that on images nobody has."""
    found = [str(each) for each in read(tmp_path, array).limitations if each.feature == "values of pixel_values"]
    assert len(found) == (said is not None)
    if said is not None:
        assert said in found[0]
        assert "preprocessing between -1 and 1, so they are probably not normalized" in found[0]


@pytest.mark.parametrize("channels", [3, 4])
def test_one_image_is_not_read_as_many_narrow_ones(channels: int, tmp_path: Path) -> None:
    """Twelve rows of one image became twelve grey images of three pixels in width."""
    one = RNG.integers(0, 256, (12, 20, channels), dtype=np.uint8)
    with pytest.raises(DataError, match=r"which is one image \[H, W, C\] rather than images"):
        read(tmp_path, one)
    assert read(tmp_path, one[None].repeat(3, 0)[..., :3]).reading == "raw uint8 images in an array"
