"""Numbering of labels: from the class names in the data to the class numbers of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from compressor.data.readers.base import CLASS_ORDER, Array, By, Numbering, Samples
from compressor.errors import DataError
from compressor.limitations import Limitation

if TYPE_CHECKING:
    from compressor.models.class_names import ClassNames

SHOWN = 3  # pairs of a name and its class in a limitation
LISTED = 5  # names in an error
_WHOLE = re.compile(r"\d+")
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers calls the classes of a model that does not name them


def with_class_numbers(samples: Samples, names: ClassNames | None, source: str) -> Samples:
    """Replace the labels of a classifier's data by the class numbers of the model.

    Class names in the data get the numbers of the model's classes with these names (see `ClassNames.numbers`). If the
    model has none of them, or names no class, they keep the reader's numbers, and a limitation states the pairs. Whole
    numbers are class numbers, unless they are names of the model's classes, and so are ``LABEL_0``, ``LABEL_1``, ...

    Args:
        samples: the samples of a reader.
        names: names of the model's classes; None if the model does not name them.
        source: name of the data in messages.

    Raises:
        DataError: the model has only some of the names, a name belongs to several classes, names and numbers are
            mixed, or the config of the model contradicts itself.
    """
    if samples.label_kind != "class" or samples.labels is None:
        return samples
    if samples.class_names is None:
        return _of_numbers(samples, names)
    used = [samples.class_names[number] for number in np.unique(samples.labels)]
    numbers = {} if names is None else _matched(used, names, source)
    if numbers:
        return _renumbered(samples, numbers, "name")
    if not samples.own_numbers and all(map(_PLACEHOLDER.fullmatch, used)):
        return _renumbered(samples, {name: int(name.rpartition("_")[2]) for name in used}, "number")
    whole = [name for name in used if _WHOLE.fullmatch(name)]
    if samples.own_numbers or not whole:
        own = {name: number for number, name in enumerate(samples.class_names)}
        return replace(
            samples,
            numbering=Numbering(own, "order"),
            limitations=(*samples.limitations, _class_order(samples, names)),
        )
    if len(whole) < len(used):
        others = [name for name in used if name not in whole]
        raise DataError(
            f"{source} has both numbers ({listed(whole)}) and names ({listed(others)}) as class labels; expected class "
            "numbers only, or names of the model's classes only"
        )
    as_numbers = _renumbered(samples, {name: int(name) for name in whole}, "number")
    return replace(as_numbers, limitations=(*samples.limitations, *_sorted_as_text(used)))


def _matched(used: Sequence[str], names: ClassNames, source: str) -> dict[str, int]:
    """Return the class numbers of all names, or an empty dict if the model has none of them."""
    candidates = {name: names.numbers(name) for name in used}
    unknown = [name for name, numbers in candidates.items() if not numbers]
    if len(unknown) == len(used):
        return {}
    if unknown and all(map(_WHOLE.fullmatch, used)):  # class numbers, some of which are also names
        return {}
    if names.contradiction is not None:
        raise DataError(
            f"{source} has class names, which the model cannot number, because {names.contradiction}; correct its "
            "config.json, or give class numbers instead of names"
        )
    if unknown:
        known = [name for name in used if name not in unknown]
        unnamed = sum(not each for each in names.names)
        remedy = (
            f"{unnamed} of its {len(names)} classes have no name, so complete its id2label, or give class numbers"
            if unnamed
            else "rename or remove the others"
        )
        raise DataError(
            f"{source} has {len(unknown)} class names that the model does not have ({listed(unknown)}), beside "
            f"{len(known)} that it has ({listed(known)}); expected names of the model's classes, such as "
            f"{listed(list(names.id2label().values()))}; {remedy}"
        )
    for name, numbers in candidates.items():
        if len(numbers) > 1:
            raise DataError(
                f"{source} has the class name {name!r}, which is a name of {len(numbers)} classes of the model "
                f"({', '.join(map(str, numbers))}); give class numbers, or names that differ"
            )
    return {name: numbers[0] for name, numbers in candidates.items()}


def _of_numbers(samples: Samples, names: ClassNames | None) -> Samples:
    """Keep class numbers, unless all of them are names of other classes, such as the stars of a rating from 1."""
    assert samples.labels is not None
    used = np.unique(samples.labels)
    candidates = {int(number): () if names is None else names.numbers(str(number)) for number in used}
    numbers = {number: found[0] for number, found in candidates.items() if len(found) == 1}
    if len(numbers) < len(used) or all(number == found for number, found in numbers.items()):
        return samples
    pairs = ", ".join(f"{number} = class {found}" for number, found in list(numbers.items())[:SHOWN])
    limitation = Limitation(
        "label numbers", f"they are names of the model's classes ({pairs}), so they are not read as class numbers"
    )
    lookup = np.vectorize(numbers.__getitem__, otypes=[np.int64])
    return replace(samples, labels=lookup(samples.labels), limitations=(*samples.limitations, limitation))


def _renumbered(samples: Samples, numbers: Mapping[str, int], by: By) -> Samples:
    """Replace labels that index `samples.class_names` by the numbers of these names."""
    assert samples.class_names is not None
    assert samples.labels is not None
    lookup: Array = np.array([numbers.get(name, -1) for name in samples.class_names], dtype=np.int64)
    reading = f"{samples.reading}, classes by name" if by == "name" else samples.reading
    return replace(samples, labels=lookup[samples.labels], numbering=Numbering(numbers, by), reading=reading)


def _class_order(samples: Samples, names: ClassNames | None) -> Limitation:
    """Return the limitation that class names have the reader's numbers, which may not be those of the model."""
    assert samples.class_names is not None
    order = "the numbers of the data set" if samples.own_numbers else "numbers in sorted order"
    reason = (
        "the model does not name the classes of the data"
        if names is None
        else "the model has none of the data's class names"
    )
    own = {name: number for number, name in enumerate(samples.class_names)}
    return Limitation(
        CLASS_ORDER,
        f"{reason}, so they have {order} ({format_pairs(own, names)}); the model must use the "
        "same numbers, or its accuracy is wrong",
    )


def format_pairs(numbers: Mapping[str, int], names: ClassNames | None) -> str:
    """Format the first class names of the data with their numbers, and the model's names of these classes.

    >>> format_pairs({"cat": 0, "dog": 1}, None)
    'cat = 0, dog = 1'
    """
    pairs = []
    for name, number in list(numbers.items())[:SHOWN]:
        own = None if names is None else names.first(number)
        pairs.append(f"{name} = {number}" + ("" if own is None else f', the model\'s "{own}"'))
    return (", " if names is None else "; ").join([*pairs, *(["..."] if len(numbers) > SHOWN else [])])


def _sorted_as_text(used: Sequence[str]) -> tuple[Limitation, ...]:
    """Return the limitation that numbers as names of classes have another order than as text, as 10 and 2 do."""
    if sorted(used) == sorted(used, key=int):
        return ()
    return (
        Limitation(
            CLASS_ORDER,
            "the class names in the data are numbers, which are read as class numbers; a model that was trained on "
            "folders sorted as text, as torchvision's ImageFolder does, has other numbers",
        ),
    )


def listed(names: Sequence[str]) -> str:
    """Return the first names."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
