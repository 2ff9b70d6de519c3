"""Private APIs of torch.onnx that `compressor` uses.

They were checked with torch 2.14.1 and 2.15.0. tests/test_internals.py tests that the result is the same without them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

__all__ = ["add_operator", "decomposed_by", "one_registry"]


def add_operator(name: str, *inputs: ir.Value, outputs: int, **attributes: Any) -> Sequence[ir.Value]:
    """Add an operator of ONNX to the graph that is being exported, in the translation of an operator of torch.

    Uses `call_op` of the private `_torchlib.ops.hop`. Without it, a translation cannot contain a Scan.
    """
    return call_op(name, *inputs, _num_outputs=outputs, **attributes)


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


_decompose = _fx_passes.decompose_with_registry


@functools.lru_cache(maxsize=2)
def _table(translated: frozenset[OpOverload], operators: int) -> dict[Any, Callable[..., Any]]:
    return _decomp.create_onnx_friendly_decomposition_table(set(translated))


@contextlib.contextmanager
def decomposed_by(nodes: Callable[[ExportedProgram, Callable[[Any], bool], dict[Any, Any]], bool]) -> Iterator[None]:
    """Decompose the operators that have no translation to ONNX by a function that edits the program in place.

    Replaces `decompose_with_registry`, which traces the whole program again: more than half of the time of an export.
    It still does so if the function returns False. The table of decompositions is built once in a process and for each
    number of known operators (`torch._C._dispatch_get_all_op_names`), which saves another tenth.

    Args:
        nodes: takes a program, whether an operator is left as it is, and the decompositions of the other operators. It
            returns False if it cannot decompose one of them.
    """

    def decomposed(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        translated = frozenset(_decomp.get_onnx_implemented_overloads(registry))
        table = _table(translated, len(torch._C._dispatch_get_all_op_names()))

        def kept(target: Any) -> bool:
            if not isinstance(target, OpOverload):
                return not isinstance(target, HigherOrderOperator)
            composite = _is_cia_op(target) and not _is_preservable_cia_op(target)
            return target in translated and target not in table and not composite

        return program if nodes(program, kept, table) else _decompose(program, registry)

    with mock.patch.object(_fx_passes, "decompose_with_registry", decomposed):
        yield
