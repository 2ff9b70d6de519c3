"""The `Executor` protocol, and the executor that computes everything in this process.

A measurement is divided into calls of one function, each on one shard of the data. The shards and the order in which
their results are added up are those of the data, so every executor gives the same sums to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from compressor.errors import CompressorError

Value = TypeVar("Value")
Result = TypeVar("Result")


class ExecutorError(CompressorError):
    """Ray is not installed, its cluster cannot be reached, or its workers fail again and again."""


class Executor(Protocol):
    """Runs calls of a function, whose results come in the order of the calls.

    The function is one of a module, which workers import. What `share`, `share_each` and `keep` return are handles: to
    be passed on as arguments of calls only.
    """

    @property
    def workers(self) -> int:
        """Number of calls that run at the same time."""
        ...

    def share(self, value: Value) -> Value:
        """Make a value an argument of many calls; its tensors are sent to a machine once, and must not change."""
        ...

    def share_each(self, make: Callable[[], Iterable[Value]]) -> Iterable[Value]:
        """Make each of several values an argument of calls; `make` returns a new iterator over them."""
        ...

    def keep(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Sequence[Result]:
        """Run all calls and leave their results where they were computed."""
        ...

    def run(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Yield the result of each call, in order. Calls that nobody asks for any more are abandoned."""
        ...


@dataclass
class Batches:
    """Batches of data over which an executor maps functions; see `passes.base.over_batches`.

    Attributes:
        executor: runs the functions.
        make: returns a new iterator over the batches.
    """

    executor: Executor
    make: Callable[[], Iterable[Any]]
    _shared: Iterable[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())

    def map(self, function: Callable[[Any], Result]) -> Iterator[Result]:
        """Yield the result of a function for each batch, in order."""
        if self._shared is None:
            self._shared = self.executor.share_each(self.make)
        shared = self.executor.share(function)
        return self.executor.run(_applied, ((shared, batch) for batch in self._shared))


def _applied(function: Callable[[Any], Result], batch: Any) -> Result:
    return function(batch)


class InProcess:
    """Runs one call after the other in this process. Handles are the values themselves."""

    workers = 1

    def share(self, value: Value) -> Value:
        """Return the value."""
        return value

    def share_each(self, make: Callable[[], Iterable[Value]]) -> Iterable[Value]:
        """Return an iterable that makes the values anew each time, so that they take no memory in between."""
        return _Repeated(make)

    def keep(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Sequence[Result]:
        """Return the results of all calls."""
        return list(self.run(function, calls))

    def run(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Run each call when its result is asked for."""
        return itertools.starmap(function, calls)


@dataclass(frozen=True)
class _Repeated:
    make: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())
