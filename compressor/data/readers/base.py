"""The return type of all readers: samples with ids that are prepared later, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from compressor.errors import DataError
from compressor.limitations import Limitation

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
# A class number; a number; the tokens of the text itself; a set of labels [labels] of 0 and 1; a class for each word;
# spans of answers in a text; a class for each pixel.
LabelKind = Literal["class", "score", "tokens", "labels", "token classes", "spans", "pixels"]
By = Literal["name", "number", "order"]
CLASS_ORDER = "class order"  # the feature of the limitation on names that are numbered without the model's
ONE_CLASS = "classes of the data"  # that of the limitation on data of one class
EMPTY_CLASSES = "class folders"  # that of the limitation on class folders without samples
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Numbering:
    """The class numbers of the class names in the data.

    Attributes:
        numbers: name in the data to class number.
        by: ``name`` if the model's classes have these names, ``number`` if the names are class numbers, ``order`` if
            neither is so and the data, or the order of its names, gives the numbers.
    """

    numbers: Mapping[str, int]
    by: By


def no_faults(indices: Sequence[int], progress: Progress | None) -> Mapping[int, str]:
    """Return no faults, for readers whose samples are all valid after reading."""
    return {}


@dataclass(frozen=True)
class Targets:
    """Labels of a batch that are aligned with its tokens.

    Attributes:
        labels: token labels [rows, tokens], -100 where there is none, or spans [rows, answers, 2]; None without labels.
        scored: positions at which the model is evaluated, bool [rows, tokens].
    """

    labels: Array | None
    scored: Array


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
        largest_class: largest class number of labels that `targets` returns.
        class_names: class names in the data, including those of empty folders, indexed by the labels of the reader;
            None if the labels are numbers.
        own_numbers: the data itself numbers its class names; otherwise the reader numbers them in sorted order.
        numbering: the class numbers of the names, after `compressor.data.class_labels.with_class_numbers`.
        skipped: samples that were skipped while reading.
        faults: decodes the samples at the given positions and returns the reasons of those that cannot be used, by
            position.
        shown: returns the image or text of a sample for display; None for numeric data.
        content: returns a hash of an image or a sound, equal for samples that are equal to the model; None for others.
        whole: returns the tokens of a text without padding or truncation, [tokens] by input name; None for other data.
        pairs: each sample has two texts.
        target_texts: the text that an encoder-decoder is to generate for each sample; None if the data has none.
        targets: returns the labels and the scored positions of the samples at the given positions, for labels that
            depend on the tokenization, see `Targets`.
        limitations: expected properties that the source lacks, and assumptions about it.
        findings: returns the limitations that were found while samples were decoded, such as scaled values.
        lengths: returns the numbers of tokens of the rows of each sample without truncation; None for other data.
        at_once: least number of samples in a batch, if the split has as many: each batch computes the prompts of all
            classes beside them.
        has_texts: each image has a text of its own, whose tokens are among the feeds.
    """

    ids: tuple[str, ...]
    feeds: Callable[[Sequence[int]], Feeds]
    reading: str
    labels: Array | None = None
    label_kind: LabelKind | None = None
    rows_per_sample: int = 1
    largest_class: int | None = None
    class_names: tuple[str, ...] | None = None
    own_numbers: bool = False
    numbering: Numbering | None = None
    skipped: tuple[Skipped, ...] = ()
    faults: Callable[[Sequence[int], Progress | None], Mapping[int, str]] = no_faults
    shown: Callable[[int], Image.Image | str] | None = None
    content: Callable[[int], bytes] | None = None
    whole: Callable[[int], Feeds] | None = None
    pairs: bool = False
    target_texts: Sequence[str] | None = None
    targets: Callable[[Sequence[int]], Targets] | None = None
    limitations: tuple[Limitation, ...] = ()
    findings: Callable[[], tuple[Limitation, ...]] = tuple
    lengths: Callable[[Sequence[int]], Sequence[Sequence[int]]] | None = None
    at_once: int = 1
    has_texts: bool = False


SHOWN = 40  # characters of a wrong label in a message
TOO_LARGE = 2.0**63  # a class label from here on does not fit into int64, and would wrap around to another one


def wrong_class(name: str, label: str) -> DataError:
    """Return the error for a class label that is not a whole number from 0.

    >>> print(wrong_class("x.npz", "-1"))
    x.npz holds the class label -1, which marks samples without a label; remove them, or remove all labels
    """
    if label == "-1":
        return DataError(
            f"{name} holds the class label -1, which marks samples without a label; remove them, or remove all labels"
        )
    size = ", which is too large" if TOO_LARGE <= float(label) < math.inf else ""
    label = label if len(label) <= SHOWN else f"{label[:SHOWN]}..."
    return DataError(f"{name} holds the class label {label}{size}; expected whole numbers from 0")


def other_kind(name: str, held: str, kind: str, inputs: Sequence[str]) -> DataError:
    """Return the error for data of a kind that the model does not take, such as texts for a module of one's own.

    Args:
        name: name of the data.
        held: what it holds.
        kind: the kind of inputs that the model takes.
        inputs: their names.
    """
    if kind != "tensor":
        return DataError(f"{name} holds {held}, but the model takes {kind} inputs; pass --data of that kind")
    arrays = ", ".join(f"{each}=..." for each in inputs)
    return DataError(
        f"{name} holds {held}, but the model takes arrays, and nothing is known that makes them of {held}; pass a .npz "
        f"with them, as np.savez('data.npz', {arrays}) writes it, with labels=... if there are any"
    )


def dims(shape: Sequence[int | str]) -> str:
    """Format a shape.

    >>> dims(("N", 3, 8, 8))
    '[N, 3, 8, 8]'
    """
    return "[" + ", ".join(str(size) for size in shape) + "]"
