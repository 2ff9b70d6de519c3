"""Reader of image folders, and preprocessing of PIL images from any source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from compressor.data.readers.base import Array, Feeds, LabelKind, Progress, Samples, Skipped, dims
from compressor.data.readers.decode_image import BrokenImageError, Conversion, Decoded, decode, limitations_of
from compressor.data.sample_cache import Store
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess
from compressor.workspace.special_files import special_kind

# PIL's own table also lists formats for which it has only stubs (.h5, .grib), and formats that are not images.
_COMMON = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
_OTHERS = (".avif", ".bmp", ".gif", ".jp2", ".npy", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff")
SUFFIXES = frozenset((*_COMMON, *_OTHERS))
PARTS = frozenset({"train", "training", "val", "valid", "validation", "test"})
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
    """

    name: str
    ids: tuple[str, ...]
    load: Callable[[int], Image.Image | Array]
    preprocess: Preprocess
    store: Store
    conversions: dict[int, Conversion] = field(default_factory=dict)

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
        raise DataError(f"{name} holds images, but the model takes {preprocess.kind} inputs; pass --data of that kind")
    if preprocess.image is None:
        reason = preprocess.no_image or "the model has no image preprocessing; add its preprocessor_config.json"
        raise DataError(f"{name} holds images, but {reason}, or pass preprocessed model inputs as .npy")
    example = preprocess.example[preprocess.inputs[0]]
    return Pictures(name, ids, load, preprocess, Store(example.shape[1:], example.dtype))


def read_folder(folder: Path, name: str, preprocess: Preprocess) -> Samples:
    """Read an image folder: the sorted class folders are the class names; a flat folder has no labels."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir() and _is_image(entry.name))
    _check_layout(name, classes, flat)
    found = [(file, -1) for file in flat] or [
        (file, label) for label, class_folder in enumerate(classes) for file in _files(folder, class_folder)
    ]
    skipped = tuple(_special(folder, [file for file, _ in found]))
    files = [(file, label) for file, label in found if file not in {special.id for special in skipped}]
    if not files:
        unreadable = f" (skipped {skipped[0].id}: {skipped[0].reason})" if skipped else ""
        raise DataError(
            f"the folder {name} holds no images{unreadable}; expected image files ({_suffixes()}) or class folders of "
            "image files"
        )
    ids = tuple(file for file, _ in files)
    source = pictures(name, ids, lambda index: _open(folder / ids[index]), preprocess)
    labels = None if flat else np.array([label for _, label in files], dtype=np.int64)
    reading = "flat image folder" if flat else f"image folder, {len(classes)} class folders"
    kind: LabelKind | None = None if flat else "class"
    return Samples(
        ids,
        source.feeds,
        reading,
        labels=labels,
        label_kind=kind,
        class_names=None if flat else tuple(classes),
        skipped=skipped,
        faults=source.faults,
        shown=source.shown,
        findings=source.findings,
        limitations=tuple(_limitations(folder, files)),
    )


def _special(folder: Path, files: Sequence[str]) -> Iterator[Skipped]:
    """Yield the images that must not be opened, because they are no files."""
    for file in files:
        kind = special_kind(folder / file)
        if kind is not None:
            yield Skipped(file, f"{kind}, not a file")


def _limitations(folder: Path, images: Sequence[tuple[str, int]]) -> Iterator[Limitation]:
    """Yield a limitation for files that are not read."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    others = sorted({path.suffix.lower() or path.name for path in files if not _is_image(path.name)})
    if len(files) > len(images):
        yield Limitation(
            "files of the data",
            f"{len(files) - len(images)} of {len(files)} not read because of their extension ({', '.join(others[:3])})",
        )


def _check_layout(name: str, classes: Sequence[str], flat: Sequence[str]) -> None:
    if classes and flat:
        raise DataError(
            f"the folder {name} holds {len(flat)} images beside {len(classes)} folders; "
            "expected either images or class folders only; move one of the two away"
        )
    if classes and {part.lower() for part in classes} <= PARTS:
        raise DataError(
            f"the folder {name} holds splits of a dataset ({', '.join(classes)}); pass one of them as --data"
        )


def _files(folder: Path, class_folder: str) -> list[str]:
    names = []
    for root, _, files in os.walk(folder / class_folder):
        names += [(Path(root) / file).relative_to(folder).as_posix() for file in files if _is_image(file)]
    return sorted(names)


def _is_image(file: str) -> bool:
    return not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))


def _open(path: Path) -> Image.Image | Array:
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
            f"{dims(example.shape[1:])}; check the model's preprocessing config"
        )
    return value.astype(example.dtype, copy=False)
