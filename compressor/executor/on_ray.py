"""The executor on Ray: workers on this machine or on a cluster.

Each call is a task of Ray. A task whose worker or machine dies runs again on another. Every task computes with one
thread and asks Ray for one core, so that cores are not shared.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import util
from typing import Any, TypeVar

from compressor.choices import AUTO
from compressor.errors import SettingsError
from compressor.executor.base import Executor, ExecutorError, InProcess
from compressor.executor.packed import Bytes, Packed, SharedTensors, packed

Value = TypeVar("Value")
Result = TypeVar("Result")

AHEAD = 2  # calls that wait for each worker, so that it need not wait for the next one
RETRIES = 3  # times that a call runs again after its worker died; more would never end for a call that kills it
REACHED = 5.0  # seconds in which an address has to answer
INSTALL = "pip install 'compressor-ai[ray]' (or pip install ray)"


@contextlib.contextmanager
def executor_for(
    workers: int | None, address: str | None, show: Callable[[str], None] = lambda text: None
) -> Iterator[Executor]:
    """Yield the executor of the options ``--workers`` and ``--ray``; without them, this process.

    Args:
        workers: number of workers; None takes all cores of the cluster.
        address: address of a cluster; None starts Ray on this machine.
        show: called with a line on the workers, their rate and what is left.

    Raises:
        ExecutorError: Ray is not installed, or the cluster cannot be reached.
    """
    if workers is None and address is None:
        yield InProcess()
        return
    if util.find_spec("ray") is None:
        raise ExecutorError(f"--workers and --ray need Ray, which is not installed: {INSTALL}.")
    with _connected(workers, address) as cores:
        yield OnRay(cores if workers is None else workers, show)


@contextlib.contextmanager
def _connected(workers: int | None, address: str | None) -> Iterator[int]:
    """Start Ray on this machine, or connect to a cluster; yield its number of cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if address not in (None, AUTO):
        _check_address(str(address))
    chosen = {"num_cpus": workers, "include_dashboard": False} if address is None else {"address": address}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on future releases of Ray, which users cannot act on
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **chosen)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray sets one of its own
        yield int(ray.cluster_resources().get("CPU", 1))
    except (OSError, RuntimeError, ValueError) as error:
        if ray.is_initialized():
            raise
        place = "start on this machine" if address is None else f"connect to {address}"
        raise ExecutorError(f"Ray cannot {place}: {_sentence(error)}.") from error
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address that nobody listens on; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"found --ray {address}; expected HOST:PORT, as `ray start --head` prints it, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=REACHED).close()
    except OSError as error:
        raise ExecutorError(
            f"--ray {address} cannot be reached ({error.strerror or error}); start a cluster with `ray start --head`, "
            "and give the address that it prints."
        ) from error


class OnRay:
    """Runs calls as tasks of Ray. Handles are references to its object store."""

    def __init__(self, workers: int, show: Callable[[str], None] = lambda text: None) -> None:
        import ray

        self.workers, self.show = workers, show
        self._shared = SharedTensors(ray.put)
        options = {"num_cpus": 1, "max_retries": RETRIES}
        self._task = ray.remote(**options)(_call)
        self._task_of_kept = ray.remote(num_returns=2, **options)(_call_and_tell)
        for _ in range(workers):  # nobody waits for these: the workers import torch while the model is loaded
            self._task.remote(bool)

    def share(self, value: Value) -> Value:
        """Put a value into the object store, and those of its tensors that are not there yet."""
        import ray

        handle: Any = ray.put(self._shared.packed(value))
        return handle  # type: ignore[no-any-return]

    def share_each(self, make: Callable[[], Iterable[Value]]) -> Iterable[Value]:
        """Put each value into the object store."""
        import ray

        handles: list[Any] = [ray.put(packed(value)) for value in make()]
        return handles

    def keep(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Sequence[Result]:
        """Run all calls, and leave their results in the object store."""
        handles = [self._task_of_kept.remote(function, *call) for call in calls]
        for _, done in handles:
            _result(done)
        return [kept for kept, _ in handles]

    def run(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Yield the result of each call, in order, with `AHEAD` calls for each worker on the way."""
        left, waiting, start = collections.deque(calls), collections.deque[Any](), time.perf_counter()
        total = len(left)
        try:
            for done in range(total):
                while left and len(waiting) < AHEAD * self.workers:
                    waiting.append(self._task.remote(function, *left.popleft()))
                result = _value(_result(waiting.popleft()))
                rate = (done + 1) / (time.perf_counter() - start)
                self.show(f"{self.workers} workers, {rate:.1f} shards/s, {total - done - 1} left")
                yield result
        finally:
            _abandon(waiting)


def _result(handle: Any) -> Any:
    """Return the result of a task, or raise the error that it raised.

    Raises:
        ExecutorError: the task did not run, such as on workers that ran out of memory again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(handle)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
    except RayError as error:
        raise ExecutorError(f"a worker of Ray failed {RETRIES + 1} times: {_sentence(error)}.") from error


def _abandon(handles: Sequence[Any]) -> None:
    """Cancel tasks, and wait until none of them computes any more."""
    import ray

    for handle in handles:
        ray.cancel(handle)
    if handles:
        ray.wait(list(handles), num_returns=len(handles), fetch_local=False)


def _sentence(error: BaseException) -> str:
    """Return the message of an error on one line, without the full stop."""
    return " ".join(str(error).split()).rstrip(".")


# --------------------------------------------------------------------------------------------------------- on a worker


def _call(function: Callable[..., Any], *arguments: Any) -> Packed:
    """Call a function on the values of its arguments, with one thread; the values of an iterator become a list."""
    import torch

    torch.set_num_threads(1)
    result = function(*map(_value, arguments))
    return packed(list(result) if isinstance(result, Iterator) else result)


def _call_and_tell(function: Callable[..., Any], *arguments: Any) -> tuple[Packed, None]:
    """Return the result of a call, which stays in the object store, and None, which says that it is there."""
    return _call(function, *arguments), None


def _value(argument: Any) -> Any:
    if not isinstance(argument, Packed):
        return argument
    return _unpacked(argument) if argument.shared else argument.value(lambda arrays: arrays)


@functools.lru_cache(maxsize=16)
def _unpacked(value: Packed) -> Any:
    """Return a shared value; it is unpacked once for many calls."""
    return value.value(_arrays)


@functools.lru_cache(maxsize=64)
def _arrays(handle: Any) -> list[Bytes]:
    """Return arrays of the object store, which all workers of a machine read in place."""
    import ray

    arrays: list[Bytes] = ray.get(handle)
    return arrays
