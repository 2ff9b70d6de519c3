"""Reader of images with masks of classes, for semantic segmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data.readers.base import Samples, Targets
from compressor.data.readers.images import read_folder
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess

IMAGES = ("images", "image")
# What is compared with the original where no labels are read, by task.
COMPARED = {
    "depth-estimation": "depth is compared with that of the original",
    "object-detection": "the classes of the object queries are compared with those of the original",
}
MASKS = ("masks", "annotations", "labels", "mask")
NO_CLASS = 255  # of a pixel that does not count
REDUCED = ", of which 0 is no class and the others are one less, as the image processor has do_reduce_labels"
SLACK = 0.05  # share of the pixels by which resizing may change the white part of the test image
MODES = ("L", "P", "I;16", "I", "1")  # of masks: one number per pixel


def mask_folders(path: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of masks, if a folder holds both, such as ``images`` and ``annotations``."""
    images = next((path / name for name in IMAGES if (path / name).is_dir()), None)
    masks = next((path / name for name in MASKS if (path / name).is_dir()), None)
    return None if images is None or masks is None else (images, masks)


def images_beside(path: Path) -> Path | None:
    """Return the folder of images, if a folder holds one beside other folders, such as ``images`` and ``depth``."""
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    images = next((path / name for name in IMAGES if (path / name).is_dir()), None)
    return images if len(folders) > 1 else None


def read_images_alone(images: Path, name: str, preprocess: Preprocess, compared: str) -> Samples:
    """Read a folder of images, and say that the folders beside it, such as those of depth maps or boxes, are not read.

    What is compared instead is a clause.
    """
    samples = read_folder(images, name, preprocess)
    others = sorted(entry.name for entry in images.parent.iterdir() if entry.is_dir() and entry != images)
    limitation = Limitation("labels", f"{', '.join(map(repr, others))} beside {images.name!r} not read; {compared}")
    return dataclasses.replace(samples, limitations=(*samples.limitations, limitation))


def read_masks(images: Path, masks: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read images with a mask of the same file name (without its ending) each.

    A mask holds the number of a class for each pixel, and 255 where there is none. It is resized with nearest-neighbour
    sampling to the size of the model's input, so the processor must not crop. Where the processor reduces labels, as
    those of ADE20K do, 0 is no class and the others are one less.

    Raises:
        DataError: an image has no mask, or a mask is no picture of class numbers.
    """
    samples = read_folder(images, name, preprocess)
    files = {path.stem: path for path in sorted(masks.iterdir()) if path.is_file()}
    missing = [id for id in samples.ids if Path(id).stem not in files]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(samples.ids)} images in {name}, such as {missing[0]}, have no mask in {masks.name}"
            "; expected a mask of the same name for each"
        )
    if _crops(preprocess):
        raise DataError(
            f"the image processor crops or pads images, so the masks in {name} would not lie on them; set "
            "do_center_crop and do_pad to false in preprocessor_config.json, or pass the images without masks"
        )
    height, width = preprocess.example[preprocess.inputs[0]].shape[-2:]
    places = [files[Path(id).stem] for id in samples.ids]

    def targets(indices: Sequence[int]) -> Targets:
        labels = np.stack([_mask(places[index], (width, height)) for index in indices])
        if preprocess.reduces_labels:
            labels = np.where((labels == 0) | (labels == NO_CLASS), NO_CLASS, labels - 1)
        return Targets(labels, np.ones(len(labels), dtype=bool))

    return dataclasses.replace(
        samples,
        targets=targets,
        label_kind="pixels",
        labels=None,
        class_names=None,
        reading=f"images with masks in {masks.name}{REDUCED if preprocess.reduces_labels else ''}",
    )


def _crops(preprocess: Preprocess) -> bool:
    """Return whether the preprocessing removes a part of an image: it is given one whose left fifth is white."""
    assert preprocess.image is not None
    image = np.zeros((preprocess.channels, 200, 400), dtype=np.float32)
    image[:, :, :80] = 1.0
    values = preprocess.image(image)
    bright = (values > (values.min() + values.max()) / 2).mean()
    return bool(abs(bright - 0.2) > SLACK)


def _mask(path: Path, size: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    try:
        with Image.open(path) as mask:
            mask.load()
            if mask.mode not in MODES:
                raise DataError(f"the mask {path.name} has mode {mask.mode}; expected one class number per pixel")
            return np.asarray(mask.resize(size, Image.Resampling.NEAREST)).astype(np.int64)
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise many types
        raise DataError(f"the mask {path.name} cannot be decoded ({first_line(error)}); repair or remove it") from error
