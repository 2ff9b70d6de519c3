"""Weights that a module computes with, though torch does not know them as its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from passes.torch_internals import tree_leaves

ADVICE = (
    "where torch does not find them: they are neither saved nor switched to evaluation. Keep modules in "
    "torch.nn.ModuleList or ModuleDict, and tensors as parameters"
)
_OWN = frozenset(vars(torch.nn.Module()))  # attributes of every module: its registered parts, and its hooks


def unregistered_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that a module keeps in lists, dicts and functions, with the path of the attribute.

    Those that it, or a module in it, has registered besides are left out.
    """
    found = {id(each) for each in module.parameters()}
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            for weight in _parameters(value, set()) if name not in _OWN else ():
                if id(weight) not in found:
                    found.add(id(weight))
                    yield f"{path}.{name}".lstrip("."), weight


def read_by(call: Callable[[], Any], module: torch.nn.Module) -> tuple[str, ...]:
    """Return the attributes of `unregistered_weights` of a module whose weights a call of it computes with."""
    weights = tuple(unregistered_weights(module))
    if not weights:
        return ()
    with _Reads() as reads:
        call()
    return tuple(dict.fromkeys(name for name, weight in weights if id(weight) in reads.found))


class _Reads(TorchFunctionMode):
    """Notes the tensors that operators and functions of torch are called with, by `id`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found.update(id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.nn.Parameter))
        return function(*args, **kwargs)


def _parameters(value: Any, seen: set[int]) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters in a value: in modules, containers, and what a function holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Parameter):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    else:
        for inner in _inside(value):
            yield from _parameters(inner, seen)


def _inside(value: Any) -> Iterator[Any]:
    """Yield what a container or a function holds."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
