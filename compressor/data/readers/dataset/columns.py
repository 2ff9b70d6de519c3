"""From the columns of a `datasets.Dataset` to samples, according to their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from compressor.data.readers.base import CLASS_ORDER, LabelKind, Samples
from compressor.data.readers.images import pictures
from compressor.data.readers.records import record_samples
from compressor.data.readers.tables import CLASSES, Table, column_name, table_samples
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess


def dataset_samples(dataset: Any, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read the samples of a `datasets.Dataset`, according to the types of its columns."""
    if len(dataset) == 0:
        raise DataError(f"{name} contains no rows; pass another split, of the hub as owner/name:split")
    if preprocess.kind == "image":
        return _image_samples(dataset, name, preprocess)
    if task in ("token-classification", "question-answering") or (
        preprocess.problem_type == "multi_label_classification"
    ):
        return _structured(dataset, name, preprocess, task, seed)
    return table_samples(_table(dataset, name), name, preprocess, task, seed)


def _structured(dataset: Any, name: str, preprocess: Preprocess, task: str, seed: int) -> Samples:
    """Read rows with lists or objects; the numbers in lists of classes become names if the model names its classes."""
    names = {column: _class_names(dataset.features[column]) for column in dataset.column_names}
    named = {column: own for column, own in names.items() if own}
    unnamed = preprocess.class_names is None
    records = [
        {
            column: value if unnamed or column not in named else [named[column][number] for number in value]
            for column, value in row.items()
        }
        for row in dataset.with_format(None)
    ]
    ids = [str(row) for row in range(len(dataset))]
    samples = record_samples(records, ids, name, preprocess, task, seed)
    if not (unnamed and named):
        return samples
    limitation = Limitation(
        CLASS_ORDER,
        f"the model does not name its classes, so those of {', '.join(named)} have the numbers of the data set; the "
        "model must use the same numbers, or its accuracy is wrong",
    )
    return replace(samples, limitations=(*samples.limitations, limitation))


def _class_names(feature: Any) -> list[str]:
    """Return the names of a list of classes; empty for all other columns."""
    inner = getattr(feature, "feature", None) if not isinstance(feature, list) else feature[0]
    return list(getattr(inner, "names", None) or ())


def _image_samples(dataset: Any, name: str, preprocess: Preprocess) -> Samples:
    column = _of_type(dataset, "Image")
    if column is None:
        raise DataError(f"{name} has the columns {', '.join(dataset.column_names)}; expected one with images")
    only_images = dataset.select_columns([column])

    def load(index: int) -> Image.Image:
        image = only_images[index][column]
        if not isinstance(image, Image.Image):
            raise ValueError("no image in this row")
        return image

    ids = tuple(str(row) for row in range(len(dataset)))
    source = pictures(name, ids, load, preprocess)
    label = _label_column(dataset)
    labels, names = (None, None) if label is None else _class_numbers(dataset, label, name)
    kind: LabelKind | None = None if label is None else "class"
    return Samples(
        ids,
        source.feeds,
        f"images {column!r}" + ("" if label is None else f", class {label!r}"),
        labels=labels,
        label_kind=kind,
        faults=source.faults,
        shown=source.shown,
        content=source.content,
        class_names=names,
        own_numbers=label is not None and _names_of(dataset, label) is not None,
        limitations=tuple(_unread(dataset, [column, *([] if label is None else [label])], label)),
        findings=source.findings,
    )


def _unread(dataset: Any, read: Sequence[str], label: str | None) -> Iterator[Limitation]:
    """Yield a limitation for columns that are not read, with the label column if there is one."""
    others = [column for column in dataset.column_names if column not in read]
    if others:
        used = "no column is used as label" if label is None else f"{label!r} is used as label"
        yield Limitation("columns of the data", f"{', '.join(map(repr, others))} not read; {used}")


def _label_column(dataset: Any) -> str | None:
    """Return the first column of type ClassLabel, or else the first with numbers or texts and the name of a label."""
    named = [column for title in CLASSES for column in dataset.column_names if column_name(column) == title]
    return _of_type(dataset, "ClassLabel") or next((column for column in named if _is_label(dataset, column)), None)


def _is_label(dataset: Any, column: str) -> bool:
    return _is_cell(dataset.features[column]) and not dataset.features[column].dtype.startswith("float")


def _names_of(dataset: Any, column: str) -> tuple[str, ...] | None:
    """Return the names that a data set gives to its class numbers; None for a column of another type."""
    names = getattr(dataset.features[column], "names", None)
    return None if names is None else tuple(names)


def _class_numbers(
    dataset: Any, label: str, name: str
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], tuple[str, ...] | None]:
    """Return the labels of all rows, and the class names that they index; None for numbers without names."""
    values = dataset.select_columns([label]).with_format(None)[:][label]
    if any(value is None or value == "" or (not isinstance(value, str) and value < 0) for value in values):
        raise DataError(
            f"{name} has rows without a label in the column {label!r}; pass another split, of the hub as "
            "owner/name:split"
        )
    if isinstance(values[0], str | bool):
        names, labels = np.unique([str(value).strip() for value in values], return_inverse=True)
        return labels.astype(np.int64).reshape(-1), tuple(map(str, names))
    return np.array(values, dtype=np.int64), _names_of(dataset, label)


def _table(dataset: Any, name: str) -> Table:
    columns = [column for column in dataset.column_names if _is_cell(dataset.features[column])]
    if not columns:
        raise DataError(
            f"{name} has the columns {', '.join(dataset.column_names)}; expected texts with optional labels"
        )
    content = dataset.select_columns(columns).with_format(None)[:]
    cells = [["" if value is None else str(value) for value in content[column]] for column in columns]
    ids = tuple(str(row) for row in range(len(dataset)))
    names = {index: _names_of(dataset, column) for index, column in enumerate(columns)}
    return Table(
        tuple(map(column_name, columns)),
        tuple(zip(*cells, strict=True)),
        ids,
        {index: own for index, own in names.items() if own is not None},
    )


def _is_cell(feature: Any) -> bool:
    kind = type(feature).__name__
    return kind == "ClassLabel" or (
        kind == "Value" and bool(re.match("string|large_string|bool|u?int|float", feature.dtype))
    )


def _of_type(dataset: Any, kind: str) -> str | None:
    type_name: Callable[[str], str] = lambda column: type(dataset.features[column]).__name__  # noqa: E731
    return next((column for column in dataset.column_names if type_name(column) == kind), None)
