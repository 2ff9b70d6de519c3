"""Label sets: several labels per sample, as rows of 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from compressor.errors import DataError
from runtimes.base.json_text import JsonTextError, parse

if TYPE_CHECKING:
    from compressor.models.class_names import ClassNames
    from compressor.models.preprocess import Preprocess

LISTS: TypeAdapter[list[str | int]] = TypeAdapter(list[str | int])
SEPARATORS = re.compile(r"\s*[|;,]\s*")
PRESENT = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}


def label_columns(header: Sequence[str], names: ClassNames | None) -> dict[str, int]:
    """Return the column of each label, in the model's order, if every label is the title of a column; else nothing."""
    if names is None:
        return {}
    owners = {names.numbers(title)[0]: index for index, title in enumerate(header) if len(names.numbers(title)) == 1}
    complete = set(owners) == set(range(len(names)))
    return {header[owners[number]]: owners[number] for number in range(len(names))} if complete else {}


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


def sets_of_lists(lists: Sequence[Sequence[object]], preprocess: Preprocess, name: str) -> npt.NDArray[np.int64]:
    """Return [rows, labels] from lists of names or numbers of labels.

    Raises:
        DataError: a label is not one of the model.
    """
    numbers = [[_number(label, preprocess.class_names, name) for label in labels] for labels in lists]
    largest = max((max(row, default=-1) for row in numbers), default=-1)
    width = largest + 1 if preprocess.classes is None else preprocess.classes
    if largest >= width:
        raise DataError(f"{name} holds the label {largest}, but the model has {width} labels, from 0")
    sets = np.zeros((len(numbers), width), dtype=np.int64)
    for row, labels in enumerate(numbers):
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


def _number(label: object, names: ClassNames | None, name: str) -> int:
    """Return the index of a label, given by its number or name."""
    found = names.numbers(label) if names is not None and isinstance(label, str) else ()
    if len(found) == 1:
        return found[0]
    if (isinstance(label, int) and label >= 0) or (isinstance(label, str) and label.isdigit()):
        return int(label)
    known = "the model does not name its labels" if names is None else f"the model has {', '.join(names.known())}"
    raise DataError(f"{name} holds the label {label!r}, but {known}; expected names of the model, or numbers from 0")
