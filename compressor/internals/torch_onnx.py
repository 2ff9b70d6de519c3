"""Private APIs of torch.onnx that `compressor` uses.

They were checked with torch 2.14.1 and 2.15.0. tests/test_internals.py tests that the result is the same without them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

__all__ = ["one_registry"]

_build = ONNXRegistry.from_torchlib


@functools.cache
def _registry(opset_version: int, operators: int) -> ONNXRegistry:
    return _build(opset_version=opset_version)


def _copy_of_registry(opset_version: int) -> ONNXRegistry:
    """Return a registry that shares the translations of operators; those added to it do not come into the next."""
    operators = len(torch._C._dispatch_get_all_op_names())  # a library that is imported later may add some
    registry = ONNXRegistry()
    registry.__dict__.update(_registry(opset_version, operators).__dict__)
    registry.functions = {name: list(known) for name, known in registry.functions.items()}
    return registry


@contextlib.contextmanager
def one_registry() -> Iterator[None]:
    """Build the table of translations of operators once in a process and for each number of known operators.

    Replaces `ONNXRegistry.from_torchlib`, and reads `torch._C._dispatch_get_all_op_names`. Without it, each call of
    `torch.onnx.export` builds the table and analyses the functions in it again: a tenth of the time of an export.
    """

    def from_torchlib(*_: Any, opset_version: int) -> ONNXRegistry:
        return _copy_of_registry(opset_version)

    with mock.patch.object(ONNXRegistry, "from_torchlib", from_torchlib):
        yield
