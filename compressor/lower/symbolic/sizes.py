"""Functions of Python and torch that keep symbolic sizes while a model is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any
from unittest import mock

import torch

from compressor.internals.transformers import with_names
from passes.torch_internals import is_known

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


@contextlib.contextmanager
def symbolic_windows() -> Iterator[None]:
    """Have torch.div of sizes give a size, and torch.Tensor.as_strided windows of tokens as slices.

    The first makes a tensor, whose value torch.export does not know. Sliding attentions (Longformer) count their blocks
    with it. The strides of the second are fixed by the example in ONNX.
    """
    with (
        mock.patch.object(torch, "div", _divided(torch.div)),
        mock.patch.object(torch.Tensor, "as_strided", _strided),
    ):
        yield


def _divided(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.div that divides sizes as sizes; they are not negative, so both roundings are one."""

    @wraps(own)
    def divided(left: Any, right: Any, *, rounding_mode: str | None = None, **options: Any) -> Any:
        sizes = isinstance(left, torch.SymInt) and isinstance(right, int)
        if sizes and rounding_mode is not None:
            return left // right
        return own(left, right, rounding_mode=rounding_mode, **options)

    return divided


_as_strided = torch.Tensor.as_strided


def _strided(
    values: torch.Tensor, size: Sequence[Any], stride: Sequence[Any], storage_offset: int | None = None
) -> Any:
    """Return what as_strided does, by slices if it makes windows [rows, windows, tokens, width] of tokens.

    The tokens are [rows, tokens, width] or blocks of them, [rows, blocks, tokens, width]. The arguments have the names
    that torch's own code calls as_strided with.
    """
    blocks = _blocks(values, size, stride) if storage_offset is None and len(size) == 4 else None
    if blocks is None:
        return _as_strided(values, size, stride, storage_offset)
    parts = size[2] // blocks.shape[2]
    count = blocks.shape[1] - parts + 1
    if not is_known(count == size[1]):
        return _as_strided(values, size, stride, storage_offset)
    return torch.cat([blocks[:, first : count + first] for first in range(parts)], 2)


def _blocks(values: torch.Tensor, size: Sequence[Any], stride: Sequence[Any]) -> torch.Tensor | None:
    """Return tokens as blocks [rows, blocks, tokens, width] of which strided windows consist; None for other strides.

    The step from one window to the next is a block. Windows that do not overlap are none: torch's own code asks for
    strides of its tensors too, 0 among them.
    """
    known = all(map(_is_number, (*stride[1:], *size[2:]))) and all(stride[1:])
    if not known or values.ndim not in (3, 4) or not values.is_contiguous():
        return None
    width, long = values.shape[-1], size[2]
    step = stride[1] // stride[2]
    if (*stride[1:], size[3]) != (step * width, width, 1, width) or long % step or long == step:
        return None
    if values.ndim == 4:
        return None if values.shape[2] % step else torch.unflatten(values, 2, (-1, step)).flatten(1, 2)
    blocks = size[1] + long // step - 1
    return torch.unflatten(values[:, : blocks * step], 1, (blocks, step))


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
