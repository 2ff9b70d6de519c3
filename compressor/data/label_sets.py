"""Label sets: several labels per sample, as rows of 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from compressor.errors import DataError
from runtimes.base.json_text import JsonTextError, parse

LISTS: TypeAdapter[list[str | int]] = TypeAdapter(list[str | int])
SEPARATORS = re.compile(r"\s*[|;,]\s*")
PRESENT = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}


def label_columns(header: Sequence[str], class_names: Sequence[str]) -> dict[str, int]:
    """Return the column of each label if every label of the model is the title of a column; else an empty dict."""
    columns = {_plain(title): index for index, title in enumerate(header)}
    found = {name: columns[_plain(name)] for name in class_names if _plain(name) in columns}
    return found if class_names and len(found) == len(class_names) else {}


def sets_of_columns(rows: Sequence[Sequence[str]], columns: Mapping[str, int], name: str) -> npt.NDArray[np.int64]:
    """Return [rows, labels] from one column of 0 and 1 for each label.

    Raises:
        DataError: a cell is neither.
    """
    for title, column in columns.items():
        wrong = next((row[column] for row in rows if row[column].strip().lower() not in PRESENT), None)
        if wrong is not None:
            raise DataError(f"{name} holds {wrong!r} in the column of the label {title!r}; expected 0 or 1")
    cells = [[PRESENT[row[column].strip().lower()] for column in columns.values()] for row in rows]
    return np.array(cells, dtype=np.int64).reshape(len(rows), len(columns))


def sets_of_lists(lists: Sequence[Sequence[object]], class_names: Sequence[str], name: str) -> npt.NDArray[np.int64]:
    """Return [rows, labels] from lists of names or numbers of labels.

    Raises:
        DataError: a label is unknown, or the model does not name its labels and numbers are missing.
    """
    numbers = [[_number(label, class_names, name) for label in labels] for labels in lists]
    width = len(class_names) or max((max(row, default=-1) for row in numbers), default=-1) + 1
    sets = np.zeros((len(numbers), width), dtype=np.int64)
    for row, labels in enumerate(numbers):
        if labels and max(labels) >= width:
            raise DataError(f"{name} holds the label {max(labels)}, but the model has {width} labels, from 0")
        sets[row, labels] = 1
    return sets


def listed(cell: str) -> list[object]:
    """Return the labels of a cell: a JSON list, or names separated by a comma, semicolon or vertical bar.

    >>> listed('["a", "b"]'), listed("a|b"), listed("a, b"), listed("")
    (['a', 'b'], ['a', 'b'], ['a', 'b'], [])
    """
    text = cell.strip()
    if text.startswith("["):
        try:
            return [*parse(text, LISTS)]
        except JsonTextError as error:
            raise DataError(f"the labels {text[:60]!r} are no JSON list of names or numbers ({error})") from error
    return [part for part in SEPARATORS.split(text) if part]


def _number(label: object, class_names: Sequence[str], name: str) -> int:
    """Return the index of a label, given by its number or name."""
    plain = [_plain(known) for known in class_names]
    if isinstance(label, str) and _plain(label) in plain:
        return plain.index(_plain(label))
    if isinstance(label, int) or (isinstance(label, str) and label.isdigit()):
        return int(label)
    known = f"the model has {', '.join(class_names[:5])}" if class_names else "the model does not name its labels"
    raise DataError(f"{name} holds the label {label!r}, but {known}; expected names of the model, or numbers from 0")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())
