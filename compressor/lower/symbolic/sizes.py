"""Functions of Python and torch that keep symbolic sizes while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from compressor.internals.transformers import with_names

MANY = 25  # rows from which torch.cdist multiplies matrices


def symbolic_lengths(module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Have `len` of a tensor return its symbolic size in the files of a module; Python turns it into a number."""

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else len(value)

    return with_names(module, {"len": length})


@contextlib.contextmanager
def symbolic_gathers() -> Iterator[None]:
    """Have torch.take_along_dim keep symbolic sizes, and torch.cdist not branch on one.

    The code of the first turns all of them into numbers. The second multiplies matrices if one side has more than
    `MANY` rows; it asks for those of the first side, and then, in vain, for those of the second.
    """
    with (
        mock.patch.object(torch, "take_along_dim", _taken),
        mock.patch.object(torch.Tensor, "take_along_dim", _taken),
        mock.patch.object(torch, "cdist", _distances),
    ):
        yield


def _taken(values: torch.Tensor, indices: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Return what torch.take_along_dim does, by a gather."""
    if dim is None:
        values, indices, dim = values.flatten(), indices.flatten(), 0
    axis = dim % values.ndim
    pairs = zip(values.shape, indices.shape, strict=True)
    sizes = [left if str(right) == "1" else right for left, right in pairs]  # a comparison would fix a size
    parts = [each.expand(*sizes[:axis], each.shape[axis], *sizes[axis + 1 :]) for each in (values, indices)]
    return parts[0].gather(axis, parts[1])


def _is_number(size: object) -> bool:
    """Return whether a size is a number, not a symbol."""
    return isinstance(size, int)


_cdist = torch.cdist
_USUAL, _PRODUCT = "use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist"


def _distances(left: torch.Tensor, right: torch.Tensor, p: float = 2.0, compute_mode: str = _USUAL) -> torch.Tensor:
    """Return what torch.cdist does, without asking for the rows of one side where those of the other are many."""
    rows = (left.shape[-2], right.shape[-2])
    many = compute_mode == _USUAL and any(_is_number(size) and size > MANY for size in rows)
    return _cdist(left, right, p=p, compute_mode=_PRODUCT if many else compute_mode)
