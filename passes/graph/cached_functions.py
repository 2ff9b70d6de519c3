"""Functions under `functools.lru_cache`, in which a run on tensors without elements must leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

CACHED: type = type(functools.lru_cache(int))
# Packages of many models or of none: of these, only the files that define a part of the module are searched.
LARGE = frozenset({"builtins", "compressor", "passes", "timm", "torch", "transformers"})


@contextlib.contextmanager
def forget_results(module: torch.nn.Module) -> Iterator[None]:
    """Clear the caches in the files of a module whose functions computed something inside the block.

    Under `FakeTensorMode`, and while a model is traced, a function such as one for a table of positions returns a
    tensor without elements, which a later call with the same arguments would get in place of values. RT-DETR keeps its
    positions so.

    Args:
        module: the model. Functions are found in the files of its classes, and in the other files of their package.
    """
    before = {function: function.cache_info().misses for function in _cached_functions(module)}
    try:
        yield
    finally:
        for function in _cached_functions(module):
            if function.cache_info().misses != before.get(function, 0):
                function.cache_clear()


def _cached_functions(module: torch.nn.Module) -> set[Any]:
    defining = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    packages = {name.split(".")[0] for name in defining} - LARGE
    files = [
        file
        for name, file in list(sys.modules.items())
        if (name in defining and not name.startswith("torch.")) or name.split(".")[0] in packages
    ]
    return {found for file in files for found in _in_namespace(getattr(file, "__dict__", {}))}


def _in_namespace(namespace: dict[str, Any]) -> Iterator[Any]:
    """Yield the cached functions of a file and of its classes."""
    for value in list(namespace.values()):
        yield from _of_value(value)
        if isinstance(value, type) and value.__module__ == namespace.get("__name__"):
            for attribute in list(vars(value).values()):
                yield from _of_value(attribute)


def _of_value(value: Any) -> Iterator[Any]:
    """Yield a cached function, also one that a method or a wrapper, such as that of transformers, calls."""
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    cells = function.__closure__ if isinstance(function, FunctionType) else None
    for each in (function, *(cell.cell_contents for cell in cells or () if _is_filled(cell))):
        if type(each) is CACHED:
            yield each


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
