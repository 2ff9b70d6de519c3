"""What every reader gives back: samples that are named now and prepared later, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from compressor.limitations import Limitation

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
LabelKind = Literal["class", "score", "tokens"]
Progress = Callable[[int, int], None]
SHOWN = 3  # class names that a sentence shows


@dataclass(frozen=True)
class Skipped:
    """One sample that cannot be used, and why."""

    id: str
    reason: str


def no_faults(indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
    """The check of a reader that has nothing left to find out after reading."""
    return {}


@dataclass(frozen=True)
class Samples:
    """All samples of a source, in an order that depends on their names only.

    `feeds` prepares the samples with the given positions, in that order, as fresh arrays with
    `rows_per_sample` rows each. `faults` really decodes the given samples and returns the reasons of those that
    cannot be used, by position. `labels` has one entry a sample. `reading` says in words how the source was understood.
    `class_folders` counts the subfolders that labels were taken from, those without a picture included. `shown` is
    what people see of one sample: a picture or a text; None where there is nothing but numbers. `whole` gives the
    tokens of a text as they are, [tokens] by input name, neither padded nor cut; None for all else. `limitations` are
    what was expected of the source and not found, and what was assumed.
    """

    ids: tuple[str, ...]
    feeds: Callable[[Sequence[int]], Feeds]
    reading: str
    labels: Array | None = None
    label_kind: LabelKind | None = None
    rows_per_sample: int = 1
    class_folders: int | None = None
    skipped: tuple[Skipped, ...] = ()
    faults: Callable[[Sequence[int], Progress | None], Mapping[int, str]] = no_faults
    shown: Callable[[int], Image.Image | str] | None = None
    whole: Callable[[int], Feeds] | None = None
    limitations: tuple[Limitation, ...] = ()


def numbered(names: Sequence[str]) -> Limitation:
    """The limitation that class names were numbered in sorted order, whatever the model's own order is.

    >>> print(numbered(["cat", "dog"]))
    class order: the names in the data are numbered in sorted order (cat = 0, dog = 1); the model's must be the same.
    """
    shown = ", ".join(f"{name} = {number}" for number, name in enumerate(names[:SHOWN]))
    more = ", ..." if len(names) > SHOWN else ""
    return Limitation(
        "class order",
        f"the names in the data are numbered in sorted order ({shown}{more}); the model's must be the same",
    )


def dims(shape: Sequence[int | str]) -> str:
    """A shape as people write it.

    >>> dims(("N", 3, 8, 8))
    '[N, 3, 8, 8]'
    """
    return "[" + ", ".join(str(size) for size in shape) + "]"
