"""Multiply-adds of single operators, from closed formulas over operand shapes.

The formulas do not depend on the kernel that a torch release selects: for scaled_dot_product_attention on the CPU,
``FlopCounterMode`` counts no operations in torch 2.14 and all of them in torch 2.15. Operators without a formula are
counted by ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Formula: TypeAlias = "Callable[[Sequence[Any], torch.Size], int]"


def multiply_adds(target: Any, args: Sequence[Any], result: Any) -> int | None:
    """Return the multiply-adds of one call; None for an operator without a formula.

    Args:
        target: an ATen operator.
        args: its positional arguments, tensors on any device.
        result: return value of the call.
    """
    formula = FORMULAS.get(target)
    if formula is None or not isinstance(result, torch.Tensor):
        return None
    count: int = formula(args, result.shape)
    return count


def counted(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Count the multiply-adds of one call by running it; they are half of the floating point operations.

    Args:
        target: an operator without a formula.
        args: its positional arguments, tensors on the meta device.
        kwargs: its keyword arguments.
    """
    with FlopCounterMode(display=False) as counter:
        target(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def _linear(args: Sequence[Any], result: torch.Size) -> int:
    """Count the product of an input [..., K] and a weight [N, K] or [K]."""
    return int(result.numel() * args[1].shape[-1])


def _product(args: Sequence[Any], result: torch.Size) -> int:
    """Count the product of [..., M, K] and [..., K, N]."""
    return int(result.numel() * args[0].shape[-1])


def _added_product(args: Sequence[Any], result: torch.Size) -> int:
    """Count the product of [..., M, K] and [..., K, N], without the addition of the first argument."""
    return int(result.numel() * args[1].shape[-1])


def _attention(args: Sequence[Any], result: torch.Size) -> int:
    """Count L * S * (E + V) per head for queries [..., L, E], keys [..., S, E], values [..., S, V]; ignore masks."""
    queries, keys, values = (operand.shape for operand in args[:3])
    return int(math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1]))


def _convolution(args: Sequence[Any], result: torch.Size) -> int:
    """Count one use of the channel's weight, of [N, C / groups, *kernel], per output value."""
    return int(result.numel() * math.prod(args[1].shape[1:]))


def _transposed_convolution(args: Sequence[Any], result: torch.Size) -> int:
    """Count one use of the channel's weight, of [C, N / groups, *kernel], per input value."""
    return int(math.prod(args[0].shape) * math.prod(args[1].shape[1:]))


def _either_convolution(args: Sequence[Any], result: torch.Size) -> int:
    transposed = bool(args[6])
    return (_transposed_convolution if transposed else _convolution)(args, result)


FORMULAS: Mapping[Any, Formula] = {
    aten.linear.default: _linear,
    aten.mm.default: _product,
    aten.mv.default: _product,
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.scaled_dot_product_attention.default: _attention,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.convolution.default: _either_convolution,
}
