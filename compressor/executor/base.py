"""The `Executor` protocol, and the executor that computes everything in this process.

A measurement is divided into calls of one function, each on one shard of the data. The shards and the order in which
their results are added up are those of the data, so every executor gives the same sums to the bit.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from compressor.errors import CompressorError

Value = TypeVar("Value")
Result = TypeVar("Result")


class ExecutorError(CompressorError):
    """Ray is not installed, its cluster cannot be reached, or its workers fail again and again."""


class UnsharableError(ExecutorError):
    """A value that cannot be sent to workers, such as a function that was made inside another."""


class Executor(Protocol):
    """Runs calls of a function, whose results come in the order of the calls.

    The function is one of a module, which workers import; an iterator that it returns may become a list. What `share`,
    `share_files`, `share_each`, `divide` and `keep` return are handles: to be passed on as arguments of calls only.
    """

    @property
    def workers(self) -> int:
        """Number of calls that run at the same time."""
        ...

    @property
    def threads(self) -> int | None:
        """Number of threads that a call may compute with; None leaves it to the library."""
        ...

    @property
    def peak(self) -> int | None:
        """Largest peak memory of a worker in a call so far, in bytes; None without workers, or where it is unknown."""
        ...

    @property
    def said(self) -> Sequence[str]:
        """What `say` was called with, each sentence once."""
        ...

    def say(self, sentence: str) -> None:
        """Tell the user what does not run on workers, and why."""
        ...

    def share(self, value: Value) -> Value:
        """Make a value an argument of many calls; its tensors are sent to a machine once, and must not change.

        Raises:
            UnsharableError: the value cannot be pickled. Calls raise it where workers cannot import what it needs.
        """
        ...

    def share_files(self, paths: Iterable[Path]) -> Mapping[Path, Path]:
        """Make files an argument of calls: where they lie on the machine of the call, by their paths on this one.

        Files of one folder lie in one folder there. They must not change before the calls are done.
        """
        ...

    def divide(self, values: Iterable[Value], count: int | None = None) -> Iterable[Iterable[Value]]:
        """Divide values into the arguments of few calls, each made when its call is submitted.

        Args:
            values: iterated once.
            count: least number of values; None divides them into one argument for each worker.
        """
        ...

    def ask(self, memory: int) -> None:
        """Run calls from now on only where a worker gets so many bytes of memory, to which they keep."""
        ...

    def share_each(self, make: Callable[[], Iterable[Value]]) -> Iterable[Value]:
        """Make each of several values an argument of calls; `make` returns a new iterator over them."""
        ...

    def keep(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Sequence[Result]:
        """Run all calls and leave their results where they were computed."""
        ...

    def run(
        self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], total: int = 0
    ) -> Iterator[Result]:
        """Yield the result of each call, in order. Calls that nobody asks for any more are abandoned.

        Args:
            function: the function.
            calls: the arguments of each call, iterated as far as calls are submitted.
            total: number of calls, to show how many are left; 0 if it is not known.
        """
        ...


@dataclass
class Batches:
    """Batches of data over which an executor maps functions; see `passes.base.over_batches`.

    Attributes:
        executor: runs the functions.
        make: returns a new iterator over the batches.
        count: least number of batches; None if it is not known.
    """

    executor: Executor
    make: Callable[[], Iterable[Any]]
    count: int | None = None
    _shared: Iterable[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())

    def map(self, function: Callable[[Any], Result]) -> Iterator[Result]:
        """Yield the result of a function for each batch, in order."""
        if self._shared is None:
            self._shared = self.executor.share_each(self.make)
        shared = self.executor.share(function)
        calls = ((shared, batch) for batch in self._shared)
        return self.executor.run(_applied, calls, operator.length_hint(self._shared))

    def map_groups(self, function: Callable[[Iterable[Any]], Iterable[Result]]) -> Iterator[Result]:
        """Yield the results of a function from several batches to a result for each, in order."""
        shared = self.executor.share(function)
        calls = ((shared, group) for group in self.executor.divide(self.make()))
        return itertools.chain.from_iterable(self.executor.run(_applied, calls))


def _applied(function: Callable[[Any], Result], batch: Any) -> Result:
    return function(batch)


class InProcess:
    """Runs one call after the other in this process. Handles are the values themselves."""

    workers = 1
    threads: int | None = None
    peak: int | None = None
    said: tuple[str, ...] = ()

    def say(self, sentence: str) -> None:
        """Do nothing: everything runs here."""

    def share(self, value: Value) -> Value:
        """Return the value."""
        return value

    def share_files(self, paths: Iterable[Path]) -> Mapping[Path, Path]:
        """Return the paths themselves."""
        return {path: path for path in paths}

    def divide(self, values: Iterable[Value], count: int | None = None) -> Iterable[Iterable[Value]]:
        """Return all values as the argument of one call."""
        return (values,)

    def ask(self, memory: int) -> None:
        """Do nothing: this process has the memory that it has."""

    def share_each(self, make: Callable[[], Iterable[Value]]) -> Iterable[Value]:
        """Return an iterable that makes the values anew each time, so that they take no memory in between."""
        return _Repeated(make)

    def keep(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Sequence[Result]:
        """Return the results of all calls."""
        return list(self.run(function, calls))

    def run(
        self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], total: int = 0
    ) -> Iterator[Result]:
        """Run each call when its result is asked for."""
        return itertools.starmap(function, calls)


@dataclass(frozen=True)
class _Repeated:
    make: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())
