"""The pairs of images and texts of a folder, as ``datasets`` lays them out: a metadata file beside the images.

See "ImageFolder" in https://huggingface.co/docs/datasets/image_dataset: ``metadata.jsonl`` or ``metadata.csv`` has a
record for each image, with its path in ``file_name``.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from compressor.data.class_folders import visible_files
from compressor.data.readers.base import Skipped
from compressor.data.readers.images import SUFFIXES
from compressor.data.readers.records import json_lines
from compressor.data.readers.texts import HOLDS_NUL, NUL, text_of
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.workspace.special_files import special_kind

FILES = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
TEXTS = ("text", "caption", "sentence", "description")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Pairs:
    """Images with a text each.

    Attributes:
        ids: the paths of the images; the second and further texts of an image have their number after ``#``.
        files: the paths of the images, relative to the folder.
        texts: the texts.
        field: the field that the texts come from.
        skipped: records that cannot be used.
        limitations: images that have no record, and fields that are not read.
    """

    ids: tuple[str, ...]
    files: tuple[str, ...]
    texts: tuple[str, ...]
    field: str
    skipped: tuple[Skipped, ...] = ()
    limitations: tuple[Limitation, ...] = ()


def metadata_of(folder: Path) -> Path | None:
    """Return the file of a folder that gives each image a text; None if it has none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read_pairs(metadata: Path, name: str) -> Pairs:
    """Read the images and texts of a folder.

    Args:
        metadata: its metadata file, see `metadata_of`.
        name: name of the folder in messages.

    Raises:
        DataError: the file cannot be read, or has no usable record.
    """
    records = _records(metadata, f"{metadata.name} of {name}")
    fields = list(dict.fromkeys(field for record in records for field in record))
    field = next((each for each in TEXTS if each in fields), None)
    if FILE_NAME not in fields or field is None:
        raise DataError(
            f"{metadata.name} of {name} has the fields {', '.join(fields) or 'none'}; expected {FILE_NAME}, the path "
            f"of an image, and a text as {', '.join(TEXTS[:-1])} or {TEXTS[-1]}"
        )
    faults = [_fault(record, field, metadata.parent) for record in records]
    usable = [record for record, fault in zip(records, faults, strict=True) if fault is None]
    skipped = tuple(
        Skipped(str(record.get(FILE_NAME) or f"record {row}"), fault)
        for row, (record, fault) in enumerate(zip(records, faults, strict=True))
        if fault is not None
    )
    if not usable:
        first = f" (first: {skipped[0].id}: {skipped[0].reason})" if skipped else ""
        raise DataError(f"{metadata.name} of {name} has no usable record{first}; expected an image and a text for each")
    files = tuple(str(record[FILE_NAME]) for record in usable)
    texts = tuple(str(record[field]).strip() for record in usable)
    others = [each for each in fields if each not in (FILE_NAME, field)]
    limitations = tuple(_limitations(metadata.parent, files, others))
    return Pairs(_ids(files), files, texts, field, skipped, limitations)


def _records(path: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of a metadata file.

    Raises:
        DataError: a line is no JSON object.
    """
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text_of(path, name), newline="")))
    return [record for _, record in json_lines(path, name)]


def _fault(record: Record, field: str, folder: Path) -> str | None:
    """Return why a record cannot be used; None if it can."""
    file, text = record.get(FILE_NAME), record.get(field)
    if not isinstance(file, str) or not file:
        return f"it has no {FILE_NAME}"
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        return "the path leaves the folder"
    if (kind := special_kind(folder / file)) is not None:
        return f"{kind}, not a file"
    if not (folder / file).is_file():
        return "the folder has no such file"
    if not isinstance(text, str) or not text.strip():
        return f"{field} is no text"
    return HOLDS_NUL if NUL in text else None


def _ids(files: Sequence[str]) -> tuple[str, ...]:
    """Return an id for each text: the path of its image, with a number for further texts of the same image."""
    seen: Counter[str] = Counter()
    ids = []
    for file in files:
        seen[file] += 1
        ids.append(file if seen[file] == 1 else f"{file}#{seen[file]}")
    return tuple(ids)


def _limitations(folder: Path, files: Sequence[str], others: Sequence[str]) -> Iterator[Limitation]:
    """Yield limitations for images without a record, and for fields that are not read."""
    images = [path for path in visible_files(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]
    absent = len(
        {path.relative_to(folder).as_posix() for path in images} - {str(PurePosixPath(each)) for each in files}
    )
    if absent:
        yield Limitation("files of the data", f"{absent} of {len(images)} images not read, because they have no text")
    if others:
        yield Limitation("fields of the data", f"{', '.join(map(str, others))} not read")
