"""The return type of all readers: samples with ids that are prepared later, batch by batch."""

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
SHOWN = 3  # class names in a limitation


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and the reason."""

    id: str
    reason: str


def no_faults(indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
    """Return no faults, for readers whose samples are all valid after reading."""
    return {}


@dataclass(frozen=True)
class Samples:
    """All samples of a source, in an order that depends only on their names.

    Attributes:
        ids: file names relative to the folder, or row numbers from 0.
        feeds: prepares the samples at the given positions, in that order, as new arrays with `rows_per_sample` rows
            per sample.
        reading: description of how the source was interpreted.
        labels: one label per sample.
        label_kind: kind of the labels.
        rows_per_sample: rows of the model inputs per sample.
        class_folders: number of class folders, including empty ones.
        skipped: samples that were skipped while reading.
        faults: decodes the samples at the given positions and returns the reasons of those that cannot be used, by
            position.
        shown: returns the image or text of a sample for display; None for numeric data.
        whole: returns the tokens of a text without padding or truncation, [tokens] by input name; None for other data.
        limitations: expected properties that the source lacks, and assumptions about it.
        lengths: returns the numbers of tokens of the rows of each sample without truncation; None for other data.
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
    lengths: Callable[[Sequence[int]], Sequence[Sequence[int]]] | None = None


def class_order_limitation(names: Sequence[str]) -> Limitation:
    """Return the limitation that class names were numbered in sorted order, which may differ from the model's order.

    >>> print(class_order_limitation(["cat", "dog"]))
    class order: the names in the data are numbered in sorted order (cat = 0, dog = 1); the model must use this order.
    """
    shown = ", ".join(f"{name} = {number}" for number, name in enumerate(names[:SHOWN]))
    more = ", ..." if len(names) > SHOWN else ""
    return Limitation(
        "class order",
        f"the names in the data are numbered in sorted order ({shown}{more}); the model must use this order",
    )


def dims(shape: Sequence[int | str]) -> str:
    """Format a shape.

    >>> dims(("N", 3, 8, 8))
    '[N, 3, 8, 8]'
    """
    return "[" + ", ".join(str(size) for size in shape) + "]"
