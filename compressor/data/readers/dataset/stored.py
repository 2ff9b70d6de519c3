"""Readers of data sets in files: Parquet, the format of the hub's files, and folders written by `save_to_disk`."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compressor.data.class_folders import visible_files
from compressor.data.readers.base import Samples
from compressor.data.readers.dataset.columns import dataset_samples
from compressor.data.readers.dataset.library import SPLITS, datasets_library, described, preferred_split
from compressor.data.readers.images import FILES as IMAGES
from compressor.errors import DataError
from compressor.models.base import first_line
from compressor.models.preprocess import Preprocess

PARQUET = ".parquet"
SAVED, SAVED_SPLITS = ("state.json", "dataset_info.json"), ("dataset_dict.json",)  # a data set, and one with splits
SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")  # the number of a file among those of a split
SYNONYMS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}
SHOWN = 3  # folders that an error names


def is_stored(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`, or holds Parquet files and no images."""
    if _is_saved(folder):
        return True
    found = False
    for path in visible_files(folder):
        if IMAGES.holds(path.name):
            return False
        found = found or path.suffix.lower() == PARQUET
    return found


def _is_saved(path: Path) -> bool:
    return any(all((path / file).is_file() for file in files) for files in (SAVED, SAVED_SPLITS))


def read_stored(path: Path, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read a Parquet file, a folder of them, or a folder of `save_to_disk`; no code in it is run.

    Of several splits, that of `preferred_split` is read, which the reading of the samples states.

    Raises:
        DataError: the library is missing, the files cannot be read, or a folder holds several data sets.
    """
    library = datasets_library(f"{name} holds a data set; to read it")
    split, files = (None, [path]) if path.is_file() else _of_one_split(path, name)
    with _reading(name):
        filled = _with_rows(files)
    if files and not filled:
        raise DataError(f"{name} contains no rows; pass another file or folder")
    with _reading(name):
        dataset = library.Dataset.from_parquet(list(map(str, filled))) if files else library.load_from_disk(str(path))
    if isinstance(dataset, dict):
        split = preferred_split(dataset)
        dataset = dataset[split]
    plain = dataset.with_format(None)
    if preprocess.kind == "image":
        plain = _with_images(library, plain)
    return described(dataset_samples(plain, name, preprocess, task, seed), "data set", split)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises its own errors and those of pyarrow and the file system
        raise DataError(f"the data set {name} cannot be read ({first_line(error)}); check the files") from error


def _with_rows(files: Sequence[Path]) -> list[Path]:
    """Return the Parquet files with rows; datasets 5.2 fails on those without."""
    parquet = importlib.import_module("pyarrow.parquet")
    return [file for file in files if parquet.read_metadata(file).num_rows]


def _of_one_split(folder: Path, name: str) -> tuple[str | None, list[Path]]:
    """Return the preferred split of a folder's Parquet files by their names, and its files in sorted order.

    A folder of `save_to_disk` has none.
    """
    if _is_saved(folder):
        return None, []
    files = sorted(path for path in visible_files(folder) if path.suffix.lower() == PARQUET)
    splits = [_split_of(path.relative_to(folder)) for path in files]
    named = [split for split in splits if split is not None]
    split = preferred_split(named) if named else None
    kept = [path for path, own in zip(files, splits, strict=True) if own == split]
    _check_one_folder(sorted({path.parent.relative_to(folder).as_posix() for path in kept}), name)
    return split, kept


def _split_of(path: Path) -> str | None:
    """Return the split that a file or one of its folders is named after, the innermost first; None without one.

    >>> _split_of(Path("data/train-00000-of-00002.parquet")), _split_of(Path("dev/0.parquet")), _split_of(Path("x"))
    ('train', 'validation', None)
    >>> _split_of(Path("mnli/validation_matched-00000-of-00001.parquet"))
    'validation_matched'
    """
    for part in reversed(path.with_suffix("").parts):
        name = SHARD.sub("", part.lower())
        first, rest = re.match(r"([a-z]*)(.*)", name).groups()  # type: ignore[union-attr]
        first = SYNONYMS.get(first, first)
        if first in SPLITS:
            return f"{first}{rest}"
    return None


def _check_one_folder(folders: Sequence[str], name: str) -> None:
    if len(folders) > 1:
        shown = f"{', '.join(folders[:SHOWN])}{', ...' * (len(folders) > SHOWN)}"
        raise DataError(
            f"the folder {name} holds Parquet files of one split in {len(folders)} folders ({shown}); pass one of the "
            "folders, because data sets may differ in their columns and labels"
        )


def _with_images(library: Any, dataset: Any) -> Any:
    """Return the data set with encoded images as images: Parquet files of other tools do not name the type.

    Such a column holds bytes, or objects with the fields ``bytes`` and ``path``.
    """
    for column, feature in dataset.features.items():
        fields = set(feature) if isinstance(feature, dict) else set()
        if fields == {"bytes", "path"} or getattr(feature, "dtype", None) in ("binary", "large_binary"):
            dataset = dataset.cast_column(column, library.Image())
    return dataset
