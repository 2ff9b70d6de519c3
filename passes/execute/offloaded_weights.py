"""Offloaded weights: placeholder parameters in a traced model for weights that stay on disk.

A placeholder is a parameter with the shape and type of the weight. All of its elements share one NaN in memory. Code
that reads shapes only can use it like the weight, and any result computed from it by mistake is NaN.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch

from passes.torch_internals import FakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import fx

    from passes.execute.interpreter import Program
    from passes.graph.graph import Graph

READ = "read_from_disk"


def offloaded(weight: torch.Tensor, read: Callable[[], torch.Tensor]) -> torch.nn.Parameter:
    """Return a placeholder parameter for a weight that stays on disk.

    Args:
        weight: tensor with the shape and type of the weight, on any device.
        read: function that reads the values into newly allocated memory.
    """
    nan = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)
    parameter = torch.nn.Parameter(nan, requires_grad=False)
    setattr(parameter, READ, read)
    return parameter


def is_offloaded(value: Any) -> bool:
    """Return whether a value is the placeholder of an offloaded weight."""
    return hasattr(value, READ)


def in_memory(value: Any) -> Any:
    """Read an offloaded weight from disk; return any other value unchanged."""
    return getattr(value, READ)() if is_offloaded(value) else value


def has_offloaded(graph: Graph) -> bool:
    """Return whether any weight of a graph is offloaded."""
    return any(map(is_offloaded, graph.module.parameters()))


@contextlib.contextmanager
def fake_values(program: Program, feeds: Mapping[str, torch.Tensor]) -> Iterator[dict[fx.Node, Any]]:
    """Yield values for `Program.walk` that have shapes and types but no elements, so that nothing is read or computed.

    Args:
        program: program to walk.
        feeds: input name to tensor; only shapes and types are used.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = program.start({name: mode.from_tensor(value) for name, value in feeds.items()})
        yield values | {node: _fake(value, mode) for node, value in program.constants.items()}


def _fake(weight: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype) if is_offloaded(weight) else mode.from_tensor(weight)
