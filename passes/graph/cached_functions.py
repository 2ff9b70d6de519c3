"""Functions under `functools.lru_cache`, in which a run on tensors without elements must leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHED: type = type(functools.lru_cache(int))
# Their caches hold no tensors of a model, and some keep objects that must exist once.
OTHERS = frozenset({"compressor", "passes", "runtimes", "sympy", "torch", "triton"})


@contextlib.contextmanager
def forget_results() -> Iterator[None]:
    """Clear the caches of functions that computed something inside the block, such as a table of positions.

    Under `FakeTensorMode`, and while a model is traced, such a function returns a tensor without elements, which a
    later call with the same arguments would get in place of values. RT-DETR keeps its positions so.
    """
    before = {function: function.cache_info().misses for function in _cached_functions()}
    try:
        yield
    finally:
        for function in _cached_functions():
            if function.cache_info().misses != before.get(function, 0):
                function.cache_clear()


def _cached_functions() -> list[Any]:
    found: list[Any] = [each for each in gc.get_objects() if type(each) is CACHED]
    return [each for each in found if str(getattr(each, "__module__", "")).split(".")[0] not in OTHERS]
