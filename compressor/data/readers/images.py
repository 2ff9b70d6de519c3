"""Reader of image folders, and preprocessing of PIL images from any source."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import starmap
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data.class_folders import FilesOf, find_files
from compressor.data.readers.base import Array, Feeds, Progress, Samples, Skipped, dims, other_kind
from compressor.data.readers.decode_image import BrokenImageError, Conversion, Decoded, decode, limitations_of
from compressor.data.sample_cache import Store, digest
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess

# PIL's own table also lists formats for which it has only stubs (.h5, .grib), and formats that are not images.
_COMMON = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
_OTHERS = (".avif", ".bmp", ".gif", ".jp2", ".npy", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff")
SUFFIXES = frozenset((*_COMMON, *_OTHERS))
FILES = FilesOf("image", SUFFIXES)
CHUNK = 64  # images prepared at a time while checking; 39 MB at 3 x 224 x 224


@dataclass(frozen=True)
class Pictures:
    """Images by position, preprocessed for the model; each image once, as long as the store has space.

    Attributes:
        name: name of the data in messages.
        ids: one id per image.
        load: opens the image at a position, or returns it as an array [C, H, W] or [H, W, C].
        preprocess: preprocessing of the model.
        store: the preprocessed images.
        conversions: what was converted in each decoded image, by position.
        digests: hash of each preprocessed image, by position.
    """

    name: str
    ids: tuple[str, ...]
    load: Callable[[int], Image.Image | Array]
    preprocess: Preprocess
    store: Store
    conversions: dict[int, Conversion] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Return the preprocessed images as the model's first input, [rows, C, H, W]."""
        rows = self._prepare_all(indices)
        for index, row in zip(indices, rows, strict=True):
            if isinstance(row, BrokenImageError):
                raise DataError(f"{self.ids[index]} in {self.name} can no longer be decoded ({row}); run again")
        first = self.preprocess.inputs[0]
        return {first: np.stack([row for row in rows if not isinstance(row, BrokenImageError)])}

    def shown(self, index: int) -> Image.Image:
        """Return the decoded image, before preprocessing.

        Raises:
            BrokenImageError: the image can no longer be decoded.
        """
        return self._decode(index).shown()

    def content(self, index: int) -> bytes:
        """Return the hash of a preprocessed image."""
        if index not in self.digests:
            self.feeds([index])
        return self.digests[index]

    def findings(self) -> tuple[Limitation, ...]:
        """Return the limitations of the images that were decoded so far."""
        return tuple(limitations_of(tuple(self.conversions.values())))

    def faults(self, indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
        """Decode and store images; return the reasons of those that cannot be decoded, by position."""
        broken: dict[int, str] = {}
        for start in range(0, len(indices), CHUNK):
            part = indices[start : start + CHUNK]
            rows = zip(part, self._prepare_all(part), strict=True)
            broken.update((index, str(row)) for index, row in rows if isinstance(row, BrokenImageError))
            if progress is not None:
                progress(start + len(part), len(indices))
        return broken

    def _prepare_all(self, indices: Sequence[int]) -> list[Array | BrokenImageError]:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._prepare, indices))

    def _prepare(self, index: int) -> Array | BrokenImageError:
        if index in self.store:
            return self.store.get(index)
        try:
            decoded = self._decode(index)
        except BrokenImageError as fault:
            return fault
        self.conversions[index] = decoded.conversion
        value = _preprocessed(self.preprocess, decoded.image)
        self.digests[index] = digest(value)
        self.store.put(index, value)
        return value

    def _decode(self, index: int) -> Decoded:
        return decode(partial(self.load, index), self.preprocess.channels)


def pictures(
    name: str, ids: tuple[str, ...], load: Callable[[int], Image.Image | Array], preprocess: Preprocess
) -> Pictures:
    """Return the images, to be preprocessed as the model's first input.

    Raises:
        DataError: the model does not take images, or has no image preprocessing.
    """
    if preprocess.kind != "image":
        raise other_kind(name, "images", preprocess.kind, preprocess.inputs)
    if preprocess.image is None:
        reason = preprocess.no_image or "the model has no image preprocessing; add its preprocessor_config.json"
        raise DataError(f"{name} holds images, but {reason}, or pass preprocessed model inputs as .npy")
    example = preprocess.example[preprocess.inputs[0]]
    return Pictures(name, ids, load, preprocess, Store(example.shape[1:], example.dtype))


def read_folder(folder: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read an image folder: the sorted class folders are the class names; a flat folder has no labels."""
    found = find_files(folder, name, FILES)
    source = pictures(name, found.ids, lambda index: open_image(folder / found.ids[index]), preprocess)
    return Samples(
        found.ids,
        source.feeds,
        found.reading(FILES),
        labels=found.labels,
        label_kind=None if found.labels is None else "class",
        class_names=found.classes,
        skipped=tuple(starmap(Skipped, found.skipped)),
        faults=source.faults,
        shown=source.shown,
        content=source.content,
        findings=source.findings,
        limitations=found.limitations,
    )


def open_image(path: Path) -> Image.Image | Array:
    """Open an image file, or read an array of a .npy file; Python objects in it are refused."""
    if path.suffix.lower() != ".npy":
        return Image.open(path)
    array: Array = np.load(path, allow_pickle=False)
    return array


def _preprocessed(preprocess: Preprocess, image: Image.Image | Array) -> Array:
    assert preprocess.image is not None
    example = preprocess.example[preprocess.inputs[0]]
    try:
        value = preprocess.image(image)
    except (RuntimeError, TypeError, ValueError) as error:  # torchvision and transformers raise all three
        raise DataError(
            f"the model's preprocessing fails for an image with {preprocess.channels} channels ({first_line(error)}); "
            "check the model's preprocessing config"
        ) from error
    if value.shape != example.shape[1:]:
        raise DataError(
            f"the model's preprocessing gives an image as {dims(value.shape)}, but the model takes "
            f"{dims(example.shape[1:])}; check the model's preprocessing config, or resize the images where it keeps "
            "their sizes"
        )
    return value.astype(example.dtype, copy=False)
