"""Values of truth that a module asks for in Python, as constants while it is traced.

Longformer asks whether any token attends to all others, ``(mask > 0).any().item()``, which no mask of padding says.
torch.export does not know the value, so it follows neither side of a branch on it. A value that is the same in all
trial calls is taken for a constant; the branch is then stated as a limitation.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from compressor.models.base import Model

Place = tuple[str, int]  # a file and a line
ASKED = ("item", "__bool__")


@dataclass(frozen=True)
class FixedTruth:
    """A value of truth that was the same in all trial calls, and the line of code that asks for it."""

    file: str
    line: int
    value: bool

    def __str__(self) -> str:
        """Return the value with its place, such as ``a value that is False (modeling_longformer.py:1175)``."""
        return f"a value that is {self.value} ({Path(self.file).name}:{self.line})"


@dataclass(frozen=True)
class Truths:
    """The values of truth of the trial calls by their places, and those that were asked for since.

    Attributes:
        found: the values at each place.
        used: the places whose value was taken for a constant.
    """

    found: dict[Place, set[bool]] = field(default_factory=dict)
    used: dict[Place, bool] = field(default_factory=dict)

    @property
    def fixed(self) -> tuple[FixedTruth, ...]:
        """Return the values that were taken for constants."""
        return tuple(FixedTruth(*place, value) for place, value in self.used.items())

    def record(self, place: Place, value: bool) -> bool:
        """Keep a value of a trial call, and return it."""
        self.found.setdefault(place, set()).add(value)
        return value

    def constant(self, place: Place) -> bool | None:
        """Return the value at a place if it was the same in all trial calls."""
        values = self.found.get(place, set())
        if len(values) != 1:
            return None
        (self.used[place],) = values
        return self.used[place]


def truths_of(model: Model) -> Truths:
    """Return the values of truth that a model asks for in calls with its example and with changes of it.

    The changes are other values, rows that end in padding, and a row alone.
    """
    truths = Truths()

    def recorded(own: Callable[[Any], Any], value: torch.Tensor, place: Place) -> Any:
        return truths.record(place, bool(own(value)))

    with _asking(recorded), torch.inference_mode():
        for feeds in _trials(model.example):
            model.call(model.module, *(feeds[name] for name in model.inputs))
    return truths


@contextlib.contextmanager
def constant_truths(truths: Truths) -> Iterator[Truths]:
    """Have a module that asks for a value of truth get the one of all trial calls.

    Raises:
        ValueError: no trial call asked for any.
    """
    if not truths.found:
        raise ValueError("no value of truth was asked for")

    def constant(own: Callable[[Any], Any], value: torch.Tensor, place: Place) -> Any:
        known = truths.constant(place)
        return own(value) if known is None else known

    with _asking(constant):
        yield truths


@contextlib.contextmanager
def _asking(answer: Callable[[Callable[[Any], Any], torch.Tensor, Place], Any]) -> Iterator[None]:
    """Have `answer` say what a tensor of one value of truth is, given torch's own function, the tensor and the line."""
    with contextlib.ExitStack() as stack:
        for name in ASKED:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _answered(answer, getattr(torch.Tensor, name))))
        yield


def _answered(
    answer: Callable[[Callable[[Any], Any], torch.Tensor, Place], Any], own: Callable[[Any], Any]
) -> Callable[[torch.Tensor], Any]:
    def answered(value: torch.Tensor) -> Any:
        if value.dtype != torch.bool:
            return own(value)
        frame = inspect.currentframe()
        asking = None if frame is None else frame.f_back
        if asking is None:
            return own(value)
        return answer(own, value, (asking.f_code.co_filename, asking.f_lineno))

    return answered


def _trials(example: Mapping[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield the example, one with other values, one whose last row ends in padding, and its first row alone."""
    yield example
    masks = {name for name in example if name.endswith("mask")}
    yield {name: value if name in masks else _other(value) for name, value in example.items()}
    if masks:
        yield {name: _padded(value) if name in masks else value for name, value in example.items()}
    yield {name: value[:1] for name, value in example.items()}


def _other(value: torch.Tensor) -> torch.Tensor:
    """Return other values in the range of those of an input: negative floats, and whole numbers in another order."""
    return -value if value.is_floating_point() else value.flip(-1)


def _padded(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask [rows, ..., tokens] in which the second half of the last row is padding."""
    mask = mask.clone()
    mask[-1, ..., mask.shape[-1] - mask.shape[-1] // 2 :] = 0
    return mask
