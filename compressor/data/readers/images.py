"""Pictures: a folder of files, or anything else that yields PIL images by number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from compressor.data.readers.base import Array, Feeds, LabelKind, Progress, Samples, dims, numbered
from compressor.data.readers.sample_cache import Store
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess

# Not PIL's own table: that also lists formats for which it has stubs only (.h5, .grib) and some that are no pictures.
_COMMON = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
_OTHERS = (".avif", ".bmp", ".gif", ".jp2", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff")
SUFFIXES = frozenset((*_COMMON, *_OTHERS))
PARTS = frozenset({"train", "training", "val", "valid", "validation", "test"})
CHUNK = 64  # pictures prepared at once while checking: 39 MB at 3 x 224 x 224


class BrokenImageError(Exception):
    """A picture that cannot be decoded; the message is the reason."""


@dataclass(frozen=True)
class Pictures:
    """Pictures by position, prepared by the model's own preprocessing, each once as long as the store has room."""

    name: str
    ids: tuple[str, ...]
    load: Callable[[int], Image.Image]
    preprocess: Preprocess
    store: Store

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """The prepared pictures as the model's first input, [rows, C, H, W]."""
        rows = self._prepared(indices)
        for index, row in zip(indices, rows, strict=True):
            if isinstance(row, BrokenImageError):
                raise DataError(f"{self.ids[index]} in {self.name} cannot be decoded any more ({row}); run again")
        first = self.preprocess.inputs[0]
        return {first: np.stack([row for row in rows if not isinstance(row, BrokenImageError)])}

    def shown(self, index: int) -> Image.Image:
        """The picture itself, as it was decoded; BrokenImageError where it cannot be any more."""
        return decoded(partial(self.load, index), self.preprocess.image_mode)

    def faults(self, indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
        """Decode pictures, keep them in the store, and return the reasons of those that cannot be decoded."""
        broken: dict[int, str] = {}
        for start in range(0, len(indices), CHUNK):
            part = indices[start : start + CHUNK]
            rows = zip(part, self._prepared(part), strict=True)
            broken.update((index, str(row)) for index, row in rows if isinstance(row, BrokenImageError))
            if progress is not None:
                progress(start + len(part), len(indices))
        return broken

    def _prepared(self, indices: Sequence[int]) -> list[Array | BrokenImageError]:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._one, indices))

    def _one(self, index: int) -> Array | BrokenImageError:
        if index in self.store:
            return self.store.get(index)
        try:
            picture = decoded(partial(self.load, index), self.preprocess.image_mode)
        except BrokenImageError as fault:
            return fault
        value = _checked(self.preprocess, picture)
        self.store.put(index, value)
        return value


def pictures(name: str, ids: tuple[str, ...], load: Callable[[int], Image.Image], preprocess: Preprocess) -> Pictures:
    """Pictures that are prepared as the model's first input; DataError where the model takes none."""
    if preprocess.kind != "image":
        raise DataError(f"{name} holds images, but the model takes {preprocess.kind} inputs; give --data of that kind")
    if preprocess.image is None:
        raise DataError(
            f"{name} holds images, but the model comes without the preprocessing that makes inputs of them; add its "
            "preprocessor_config.json, or give ready model inputs as .npy"
        )
    example = preprocess.example[preprocess.inputs[0]]
    return Pictures(name, ids, load, preprocess, Store(example.shape[1:], example.dtype))


def decoded(load: Callable[[], Image.Image], mode: str) -> Image.Image:
    """A picture with all its pixels in memory, in the given mode; BrokenImageError with the reason otherwise."""
    try:
        with load() as picture:
            picture.load()
            if picture.mode == "P" and "transparency" in picture.info:
                return picture.convert("RGBA").convert(mode)  # PIL warns about the direct way
            return picture.convert(mode) if picture.mode != mode else picture.copy()
    # PIL's decoders raise whatever their parsers run into: OSError, SyntaxError, ValueError, struct.error, IndexError
    except Exception as error:
        raise BrokenImageError(_reason(error)) from error


def read_folder(folder: Path, name: str, preprocess: Preprocess) -> Samples:
    """An image folder: class subfolders in sorted order are the labels 0..C-1, a flat folder has no labels."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and _is_picture(entry.name))
    _check_layout(name, classes, flat)
    found = [(file, -1) for file in flat] or [
        (file, label) for label, part in enumerate(classes) for file in _files(folder, part)
    ]
    if not found:
        raise DataError(
            f"the folder {name} holds no images; expected image files ({_known()}) or class folders of them"
        )
    ids = tuple(file for file, _ in found)
    source = pictures(name, ids, lambda index: Image.open(folder / ids[index]), preprocess)
    labels = None if flat else np.array([label for _, label in found], dtype=np.int64)
    reading = "flat image folder" if flat else f"image folder, {len(classes)} class folders"
    kind: LabelKind | None = None if flat else "class"
    folders = None if flat else len(classes)
    return Samples(
        ids,
        source.feeds,
        reading,
        labels=labels,
        label_kind=kind,
        class_folders=folders,
        faults=source.faults,
        shown=source.shown,
        limitations=tuple(_limitations(folder, found, classes if not flat else [])),
    )


def _limitations(folder: Path, found: Sequence[tuple[str, int]], classes: Sequence[str]) -> Iterator[Limitation]:
    """List the files that are not read, and the class folders that were numbered."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    others = sorted({path.suffix.lower() or path.name for path in files if not _is_picture(path.name)})
    if len(files) > len(found):
        yield Limitation(
            "files of the data",
            f"{len(files) - len(found)} of {len(files)} not read, by their ending ({', '.join(others[:3])})",
        )
    if classes:
        yield numbered(classes)


def _check_layout(name: str, classes: Sequence[str], flat: Sequence[str]) -> None:
    if classes and flat:
        raise DataError(
            f"the folder {name} holds {len(flat)} images beside {len(classes)} folders; "
            "expected either images or class folders only, so move one of them away"
        )
    if classes and {part.lower() for part in classes} <= PARTS:
        raise DataError(
            f"the folder {name} holds parts of a data set ({', '.join(classes)}); give one of them as --data"
        )


def _files(folder: Path, part: str) -> list[str]:
    found = []
    for root, _, files in os.walk(folder / part):
        found += [(Path(root) / file).relative_to(folder).as_posix() for file in files if _is_picture(file)]
    return sorted(found)


def _is_picture(file: str) -> bool:
    return not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES


def _known() -> str:
    return ", ".join(sorted(SUFFIXES))


def _reason(error: Exception) -> str:
    # PIL puts the absolute path into this one; the id already says which file it is
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be identified"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _checked(preprocess: Preprocess, picture: Image.Image) -> Array:
    assert preprocess.image is not None
    value = preprocess.image(picture)
    example = preprocess.example[preprocess.inputs[0]]
    if value.shape != example.shape[1:]:
        raise DataError(
            f"the model's preprocessing gives an image as {dims(value.shape)}, but the model takes "
            f"{dims(example.shape[1:])}; check the model's preprocessing config"
        )
    return value.astype(example.dtype, copy=False)
