"""Weights that stay on disk: what a traced model holds in their place, and how their values are read.

A stand-in is a parameter of the weight's shape whose elements are all one NaN in memory: whatever only asks for shapes
takes it for the weight, and whatever computes with it by mistake shows.
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
    """A stand-in for a weight that stays on disk.

    Args:
        weight: of the weight's shape and type, on any device.
        read: gives its values, in memory of their own.
    """
    nothing = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)
    parameter = torch.nn.Parameter(nothing, requires_grad=False)
    setattr(parameter, READ, read)
    return parameter


def is_offloaded(value: Any) -> bool:
    """Whether a value is a stand-in."""
    return hasattr(value, READ)


def in_memory(value: Any) -> Any:
    """The values of a weight that stays on disk; anything else as it is."""
    return getattr(value, READ)() if is_offloaded(value) else value


def has_offloaded(graph: Graph) -> bool:
    """Whether any weight of a graph stays on disk."""
    return any(map(is_offloaded, graph.module.parameters()))


@contextlib.contextmanager
def shapes_alone(program: Program, feeds: Mapping[str, torch.Tensor]) -> Iterator[dict[fx.Node, Any]]:
    """Values to walk a program with that have shapes and types and no elements: nothing is read or computed.

    Args:
        program: what is to be walked.
        feeds: input name to tensor; only their shapes count.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = program.start({name: mode.from_tensor(value) for name, value in feeds.items()})
        yield values | {node: _shape_of(value, mode) for node, value in program.constants.items()}


def _shape_of(weight: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype) if is_offloaded(weight) else mode.from_tensor(weight)
