"""Linear layers computed by oneDNN, on processors where the library that torch calls for them is slower.

torch computes float32 products with MKL. On AMD processors MKL keeps to AVX2, while oneDNN, which torch ships too, uses
AVX-512: graphs run 1.5 to 1.8 times as fast, steps of training 1.3 to 1.7 times (benchmarks/linear_kernels.py). The
results differ by the order of the sums.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passes.torch_internals import onednn_linear

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten

LEAST = 2**21  # multiply-adds; a call of oneDNN takes 12 us longer than one of MKL
WIDEST = 2**14  # channels; behind more, oneDNN divides a sum among its threads, and their number changes the result
VENDOR = "AuthenticAMD"
PLAIN = (torch.Tensor, torch.nn.Parameter)  # no fake tensors, and none of a subclass with operators of its own


def kernel_of(target: Any) -> Callable[..., Any]:
    """Return the function that computes an operator: the operator itself, or a faster equivalent on this processor."""
    found: Callable[..., Any] = KERNELS.get(target, target) if prefers_onednn() else target
    return found


@functools.cache
def prefers_onednn() -> bool:
    """Return whether oneDNN computes float32 products faster than MKL here: an AMD processor with AVX-512."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and VENDOR in _processor()


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + b, [..., out].

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out]; None for none.
    """
    if not _suits(x, weight, bias):
        plain: torch.Tensor = aten.linear.default(x, weight, bias)
        return plain
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        found: torch.Tensor = _Linear.apply(x, weight, bias)
        return found
    return onednn_linear(x, weight, bias)


def addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **factors: float) -> torch.Tensor:
    """Return x W + b, [rows, out], of `x` [rows, in] and `weight` [in, out]; `factors` are those of torch."""
    if factors or bias.ndim != 1 or bias.shape[0] != weight.shape[1]:
        plain: torch.Tensor = aten.addmm.default(bias, x, weight, **factors)
        return plain
    return linear(x, weight.t(), bias)


KERNELS = {aten.linear.default: linear, aten.addmm.default: addmm}


def _suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return whether all are float32 tensors in memory of the processor, large enough to gain and not too wide."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if weight.ndim != 2 or x.ndim < 2 or (bias is not None and bias.ndim != 1):
        return False
    if any(type(each) not in PLAIN or each.dtype != torch.float32 or not each.is_cpu for each in tensors):
        return False
    width = x.shape[-1]
    return width == weight.shape[1] and width <= WIDEST and x.numel() * weight.shape[0] >= LEAST


class _Linear(torch.autograd.Function):
    """A linear layer whose gradients are computed by oneDNN too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x W^T + b."""
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias, as far as they are needed."""
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        return (
            onednn_linear(gradient, weight.t(), None) if wanted[0] else None,
            onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )
