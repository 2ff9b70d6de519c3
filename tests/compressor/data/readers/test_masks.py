"""Folders of images beside folders of labels: depth maps are neither images nor classes of a depth model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor import models
from compressor.data.readers import read


def folder_of(path: Path, *folders: str) -> Path:
    for folder in folders:
        (path / folder).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((8, 8), 40 * index, np.uint8)).save(path / folder / f"{index}.png")
    return path


@pytest.mark.parametrize("name", ["images", "image"])
def test_depth_maps_beside_images_are_said_and_not_read(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "scenes", name, "depth", "valid")
    samples = read(str(folder), models.load(None).preprocess, task="depth-estimation", seed=0, revision=None)
    assert samples.ids == ("0.png", "1.png", "2.png", "3.png")
    assert samples.label_kind is None
    (limitation,) = samples.limitations
    assert str(limitation) == (
        f"labels: 'depth', 'valid' beside '{name}' not read; depth is compared with that of the original."
    )


def test_a_folder_of_images_alone_has_nothing_to_say(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "scenes" / "images", "")
    samples = read(str(folder), models.load(None).preprocess, task="depth-estimation", seed=0, revision=None)
    assert (len(samples.ids), samples.limitations) == (4, ())


def test_the_same_folders_are_classes_of_a_classifier(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "scenes", "images", "depth")
    samples = read(str(folder), models.load(None).preprocess, task="image-classification", seed=0, revision=None)
    assert (len(samples.ids), samples.label_kind) == (8, "class")
