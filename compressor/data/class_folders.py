"""Folders of files with a folder for each class, such as those of images and of sound."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressor.data.readers.base import EMPTY_CLASSES
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.workspace.special_files import special_kind

PARTS = frozenset({"train", "training", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class FilesOf:
    """A kind of files.

    Attributes:
        one: its name, such as ``image``.
        suffixes: the extensions, in lower case.
    """

    one: str
    suffixes: frozenset[str]

    def holds(self, file: str) -> bool:
        """Return whether a file has one of the extensions and is not hidden."""
        return not file.startswith(".") and Path(file).suffix.lower() in self.suffixes


@dataclass(frozen=True)
class ClassFolders:
    """The files of a folder.

    Attributes:
        ids: paths relative to the folder; sorted, class by class.
        classes: the sorted names of the class folders, empty ones included; None for files without classes.
        labels: position of the class of each file; None without classes.
        skipped: paths that must not be opened, because they are no files, each with the reason.
        limitations: the files that are not read.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...] | None
    labels: npt.NDArray[np.int64] | None
    skipped: tuple[tuple[str, str], ...]
    limitations: tuple[Limitation, ...]

    def reading(self, kind: FilesOf) -> str:
        """Return a description of how the folder was interpreted."""
        if self.classes is None:
            return f"flat {kind.one} folder"
        return f"{kind.one} folder, {len(self.classes)} class folders"


def find_files(folder: Path, name: str, kind: FilesOf) -> ClassFolders:
    """Find the files of a folder: the sorted class folders are the class names; a flat folder has no labels.

    Args:
        folder: the folder.
        name: its name in messages.
        kind: the files that are read.

    Raises:
        DataError: it has no such files, files beside folders, or the splits of a dataset.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir() and kind.holds(entry.name))
    _check_layout(name, classes, flat, kind)
    found = [(file, -1) for file in flat] or [
        (file, label) for label, class_folder in enumerate(classes) for file in _files(folder, class_folder, kind)
    ]
    skipped = tuple(_special(folder, [file for file, _ in found]))
    files = [(file, label) for file, label in found if file not in dict(skipped)]
    if not files:
        unreadable = f" (skipped {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        suffixes = ", ".join(sorted(kind.suffixes))
        raise DataError(
            f"the folder {name} holds no {kind.one}s{unreadable}; expected {kind.one} files ({suffixes}) or class "
            f"folders of {kind.one} files"
        )
    labels = None if flat else np.array([label for _, label in files], dtype=np.int64)
    return ClassFolders(
        tuple(file for file, _ in files),
        None if flat else tuple(classes),
        labels,
        skipped,
        (*_limitations(folder, len(files), kind), *_links(folder, classes), *_empty(classes, labels, kind)),
    )


def _special(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the samples that must not be opened, because they are no files."""
    for file in files:
        kind = special_kind(folder / file)
        if kind is not None:
            yield file, f"{kind}, not a file"


def _limitations(folder: Path, count: int, kind: FilesOf) -> Iterator[Limitation]:
    """Yield a limitation for files that are not read."""
    files = [path for path in visible_files(folder) if path.is_file()]
    others = sorted({path.suffix.lower() or path.name for path in files if not kind.holds(path.name)})
    if len(files) > count:
        yield Limitation(
            "files of the data",
            f"{len(files) - count} of {len(files)} not read because of their extension ({', '.join(others[:3])})",
        )


def _links(folder: Path, classes: Sequence[str]) -> Iterator[Limitation]:
    """Yield a limitation for links to folders below the class folders, which may form a circle."""
    found = sorted(
        (Path(root) / name).relative_to(folder).as_posix()
        for class_folder in classes
        for root, below, _ in _walk(folder / class_folder)
        for name in below
        if (Path(root) / name).is_symlink()
    )
    if found:
        noun = "is a link to a folder and was" if len(found) == 1 else "are links to folders and were"
        listed = f"{', '.join(found[:3])}{', ...' * (len(found) > 3)}"
        yield Limitation(
            "linked folders", f"{len(found)} {noun} not read ({listed}); link the class folders themselves"
        )


def _empty(classes: Sequence[str], labels: npt.NDArray[np.int64] | None, kind: FilesOf) -> Iterator[Limitation]:
    """Yield a limitation for class folders without files, such as those of a copy that was cut short."""
    filled = set() if labels is None else set(labels.tolist())
    empty = [] if labels is None else [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        yield Limitation(
            EMPTY_CLASSES,
            f"{len(empty):,} of {len(classes):,} hold no {kind.one}s ({', '.join(empty[:3])}"
            f"{', ...' * (len(empty) > 3)}), so the figures say nothing of these classes; complete the copy, or remove "
            "the folders",
        )


def _check_layout(name: str, classes: Sequence[str], flat: Sequence[str], kind: FilesOf) -> None:
    if classes and flat:
        raise DataError(
            f"the folder {name} holds {kind.one}s ({len(flat)}) beside folders ({len(classes)}); "
            f"expected either {kind.one}s or class folders only; move one of the two away"
        )
    if classes and {part.lower() for part in classes} <= PARTS:
        raise DataError(
            f"the folder {name} holds splits of a dataset ({', '.join(classes)}); pass one of them as --data"
        )


def _files(folder: Path, class_folder: str, kind: FilesOf) -> list[str]:
    files = visible_files(folder / class_folder)
    return sorted(path.relative_to(folder).as_posix() for path in files if kind.holds(path.name))


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield what lies in a folder and below it, without hidden files and without what hidden folders hold."""
    return (Path(root) / file for root, _, files in _walk(folder) for file in files if not file.startswith("."))


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the folders, with their folders and files, as `os.walk` does, without hidden folders.

    Tools keep copies of files in such folders, as Jupyter does in ``.ipynb_checkpoints``.
    """
    for root, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        yield root, below, files
