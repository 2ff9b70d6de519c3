"""Whole numbers that a module holds as tensors, as numbers of Python while it is traced.

Codecs of sound, such as EnCodec and Mimi, hold kernel and stride of a convolution as buffers without axes, and compute
paddings from them and the length of a clip. torch.export does not know the elements of a buffer, so it cannot tell the
sizes that follow. For clips of one length, all of them are numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


class Whole(int):
    """A whole number that was a tensor, of which code also asks the device."""

    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> Whole:
        """Return the number of a tensor without axes."""
        number = Whole(tensor.item())
        number.device = tensor.device
        return number


class Rounded:
    """A number that was rounded, with the methods with which code converts a rounded tensor to whole numbers."""

    def __init__(self, number: Any) -> None:
        self.number = number

    def to(self, *_: Any, **__: Any) -> Any:
        """Return the number."""
        return self.number

    int = long = item = to


def holds_numbers(module: torch.nn.Module) -> bool:
    """Return whether a module or one of its parts holds a whole number as a tensor."""
    parts = list(module.modules())
    held = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return any(map(_is_number, [*module.buffers(), *held]))


@contextlib.contextmanager
def whole_numbers(module: torch.nn.Module) -> Iterator[None]:
    """Replace tensors of one whole number in a module and its parts by that number, and round numbers as tensors."""
    with contextlib.ExitStack() as stack:
        for part in module.modules():
            saved = part.state_dict() if any(map(_is_number, part.buffers(recurse=False))) else {}
            for name, value in list(part.named_buffers(recurse=False)):
                if _is_number(value):
                    delattr(part, name)
                    setattr(part, name, Whole.of(value))
                    stack.callback(_restore, part, name, value, persistent=name in saved)
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor) and _is_number(value):
                    stack.callback(setattr, part, name, value)
                    vars(part)[name] = Whole.of(value)
        for name, rounding in (("ceil", math.ceil), ("floor", math.floor)):
            stack.enter_context(mock.patch.object(torch, name, _rounding(rounding, getattr(torch, name))))
        yield


def _is_number(value: torch.Tensor) -> bool:
    """Return whether a tensor is one whole number whose value is known."""
    known = value.device.type != "meta" and value.dtype != torch.bool
    return value.ndim == 0 and known and not value.is_floating_point() and not value.is_complex()


def _restore(part: torch.nn.Module, name: str, value: torch.Tensor, *, persistent: bool) -> None:
    delattr(part, name)
    part.register_buffer(name, value, persistent=persistent)


def _rounding(of_numbers: Callable[[Any], Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rounding of tensors that takes numbers too; torch reads the names of its functions."""

    @wraps(own)
    def rounded(value: Any, **options: Any) -> Any:
        return Rounded(of_numbers(value)) if isinstance(value, NUMBERS) else own(value, **options)

    return rounded
