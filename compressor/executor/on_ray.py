"""The executor on Ray: workers on this machine or on a cluster.

Each call is a task of Ray. A task whose worker or machine dies runs again on another. Every task computes with one
thread and asks Ray for one core, so that cores are not shared.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import util
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from compressor.choices import AUTO
from compressor.errors import SettingsError
from compressor.executor.base import Executor, ExecutorError, InProcess, UnsharableError
from compressor.executor.packed import Bytes, Packed, SharedTensors, packed
from compressor.executor.shared_files import SharedFiles, bytes_of
from compressor.workspace.environment import own_memory, peak_memory, reset_peak_memory

Value = TypeVar("Value")
Result = TypeVar("Result")

AHEAD = 2  # calls that wait for each worker, so that it need not wait for the next one
AT_ONCE = 4  # most values of `divide` in a call, which are in memory together
BYTES = 2**26  # of these values, of which those of all calls on the way are in the object store
RETRIES = 3  # times that a call runs again after its worker died; more would never end for a call that kills it
REACHED = 5.0  # seconds in which an address has to answer
MEMORY = 2**30  # bytes that the first calls ask for; torch and the libraries take most of it
SPARE = 1.25  # factor on the memory that calls took, for the next ones
STEP = 2**28  # bytes by which the memory that is asked for grows
INSTALL = "pip install 'compressor-ai[ray]' (or pip install ray)"


@contextlib.contextmanager
def executor_for(
    workers: int | None,
    address: str | None,
    show: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[Executor]:
    """Yield the executor of the options ``--workers`` and ``--ray``; without them, this process.

    Args:
        workers: number of workers; None takes all cores of the cluster.
        address: address of a cluster; None starts Ray on this machine.
        show: called with a line on the workers, their rate and what is left.
        warn: called with a sentence on what does not run on them.

    Raises:
        ExecutorError: Ray is not installed, or the cluster cannot be reached.
    """
    if workers is None and address is None:
        yield InProcess()
        return
    if util.find_spec("ray") is None:
        raise ExecutorError(f"--workers and --ray need Ray, which is not installed: {INSTALL}.")
    with _connected(workers, address) as (cores, alone):
        executor = OnRay(cores if workers is None else workers, show, warn, alone=alone)
        yield executor
        if not executor.calls:
            warn("nothing ran on the workers, as this command had nothing to run over the data; leave them out.")


@contextlib.contextmanager
def _connected(workers: int | None, address: str | None) -> Iterator[tuple[int, bool]]:
    """Start Ray on this machine, or connect to a cluster; yield its number of cores, and whether it is this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if address not in (None, AUTO):
        _check_address(str(address))
    if ray.is_initialized():  # by the program that calls Compressor
        present = ray.get_runtime_context().gcs_address
        if address not in (None, AUTO, present):
            raise ExecutorError(f"this program is connected to Ray at {present}, not at {address}; leave out --ray.")
        yield _cores(), False
        return
    # "local": without an address, Ray would look for a cluster of this machine first.
    alone = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    chosen = alone if address is None else {"address": address}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on future releases of Ray, which users cannot act on
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **chosen)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray sets one of its own
        yield _cores(), address is None
    except (OSError, RuntimeError, ValueError) as error:
        if ray.is_initialized():
            raise
        place = "start on this machine" if address is None else f"connect to {address}"
        raise ExecutorError(f"Ray cannot {place}: {_sentence(error)}{_way_round(error, address)}.") from error
    finally:
        ray.shutdown()


def _way_round(error: Exception, address: str | None) -> str:
    """Return what to do where no cluster answers, which Ray does not say, as the end of a sentence."""
    if address is None or not isinstance(error, ConnectionError):
        return ""
    if address == AUTO:
        return "; start a cluster with `ray start --head`, or give --workers"
    return "; where the cluster asks for a token, as Ray's do by default, set RAY_AUTH_MODE=token"


def _cores() -> int:
    import ray

    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


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
    """Runs calls as tasks of Ray. Handles are references to its object store.

    Ray starts a task where a core and its `memory` are free: what the calls before it took, and some more. `alone` says
    that no other machine can join. `calls` is how many were submitted.
    """

    threads: int | None = 1

    def __init__(
        self,
        workers: int,
        show: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
        *,
        alone: bool = False,
    ) -> None:
        import ray

        self.workers, self.show, self.warn, self.memory, self.alone = workers, show, warn, MEMORY, alone
        self.said: list[str] = []
        self.calls = 0
        self.peak: int | None = None
        self.spare = SPARE
        self._shared = SharedTensors(ray.put)
        self._task = ray.remote(num_cpus=1, num_returns=2, max_retries=RETRIES)(_call)
        # The workers import torch while the model is loaded. The first results are waited for, so that no worker still
        # starts while something is timed.
        self._starting = [self._task.remote(bool)[0] for _ in range(workers)]

    def say(self, sentence: str) -> None:
        """Warn, once of each thing."""
        if sentence not in self.said:
            self.said.append(sentence)
            self.warn(sentence)

    def share(self, value: Value) -> Value:
        """Put a value into the object store, and those of its tensors that are not there yet."""
        import ray

        try:
            parts = self._shared.packed(value)
        except Exception as error:  # what cannot be pickled raises errors without a common base
            raise _unsharable(error) from error
        handle: Any = ray.put(parts)
        return handle  # type: ignore[no-any-return]

    def share_files(self, paths: Iterable[Path]) -> Mapping[Path, Path]:
        """Put the files into the object store, unless all workers are on this machine.

        Calls are taken to hold as many bytes as the files have.
        """
        import ray

        files = {path: path.absolute() for path in paths}  # workers have another working directory
        self._need(MEMORY + sum(path.stat().st_size for path in files.values()))
        contents = None if self.alone else ray.put([bytes_of(path) for path in files])
        handle: Any = SharedFiles(files, _machine(), contents)
        return handle  # type: ignore[no-any-return]

    def divide(self, values: Iterable[Value], count: int | None = None) -> Iterable[Iterable[Value]]:
        """Yield a few values at a time, fewer where that leaves no worker without a call."""
        if count is None:
            values = whole = list(values)
            most = max(math.ceil(len(whole) / self.workers), 1)
        else:
            most = min(max(math.ceil(count / self.workers), 1), AT_ONCE)
        left = iter(values)
        while part := list(islice(left, 1)):
            size = len(packed(part).pickled)
            part += islice(left, (most if count is None else min(most, max(BYTES // size, 1))) - 1)
            handle: Any = packed(part)
            yield handle

    def share_each(self, make: Callable[[], Iterable[Value]]) -> Iterable[Value]:
        """Put each value into the object store."""
        import ray

        handles: list[Any] = [ray.put(packed(value)) for value in make()]
        return handles

    def ask(self, memory: int) -> None:
        """Ask for so much memory for each call; where that is for fewer workers at a time, say so.

        Raises:
            ExecutorError: no machine has as much.
        """
        self.memory, self.spare = memory, 1.0
        found = self._check_memory()
        at_once = sum(int(each // memory) for each in found)
        if at_once < self.workers:
            there = " + ".join(f"{each / 2**30:.3g}" for each in found)
            self.say(
                f"{self.workers} workers need {self.workers} times {memory / 2**30:.3g} GiB, but the cluster has "
                f"{there} GiB for workers, so at most {at_once} compute at the same time."
            )

    def keep(self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]]) -> Sequence[Result]:
        """Run all calls, and leave their results in the object store."""
        self._wait_for_workers()
        handles = [self._submitted(function, call) for call in calls]
        for _, taken in handles:
            self._note(_result(taken))
        kept: list[Any] = [result for result, _ in handles]
        return kept

    def run(
        self, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], total: int = 0
    ) -> Iterator[Result]:
        """Yield the result of each call, in order, with `AHEAD` calls for each worker on the way."""
        self._wait_for_workers()
        left, waiting, start = iter(calls), collections.deque[tuple[Any, Any]](), time.perf_counter()
        done = 0
        try:
            while True:
                for call in islice(left, AHEAD * self.workers - len(waiting)):
                    waiting.append(self._submitted(function, call))
                if not waiting:
                    return
                handle, taken = waiting.popleft()
                result = _value(_result(handle))
                self._note(_result(taken))
                done += 1
                rate = done / (time.perf_counter() - start)
                self.show(f"{self.workers} workers, {rate:.1f} shards/s" + (f", {total - done} left" if total else ""))
                yield result
        finally:
            _abandon([handle for handle, _ in waiting])

    def _wait_for_workers(self) -> None:
        while self._starting:
            _result(self._starting.pop())

    def _submitted(self, function: Callable[..., Any], call: tuple[Any, ...]) -> tuple[Any, Any]:
        """Submit a call; return the handles of its result and of the memory that its worker took."""
        self.calls += 1
        task = self._task.options(memory=self.memory)
        result, taken = task.remote(function, *call)
        return result, taken

    def _note(self, memory: Taken) -> None:
        """Ask for the memory that a worker took from now on.

        Raises:
            ExecutorError: no machine has as much, so that the next call would wait for ever.
        """
        if memory.peak is not None:
            self.peak = max(memory.peak, self.peak or 0)
        if memory.own is not None:
            self._need(memory.own * self.spare)

    def _need(self, memory: float) -> None:
        """Ask for at least so much memory from now on."""
        if memory > self.memory:
            self.memory = math.ceil(memory / STEP) * STEP
            self._check_memory()

    def _check_memory(self) -> list[float]:
        """Return the bytes that each machine with cores has for workers; raise if that is too little for one."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        found = [float(resources.get("memory", 0.0)) for resources in machines]
        most, less = max(found, default=0.0), "fewer --workers" if self.spare > 1.0 else "a smaller --max-memory"
        if self.memory > most:
            raise ExecutorError(
                f"a worker takes {self.memory / 2**30:.2g} GiB, but no machine of the cluster has more than "
                f"{most / 2**30:.2g} GiB for workers; use machines with more memory, or {less}."
            )
        return found


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


def _unsharable(error: Exception) -> UnsharableError:
    return UnsharableError(f"the model cannot be sent to workers ({_sentence(error)}); leave out --workers and --ray.")


def _sentence(error: BaseException) -> str:
    """Return the message of an error on one line, without the full stop."""
    return " ".join(str(error).split()).rstrip(".")


# --------------------------------------------------------------------------------------------------------- on a worker


class Taken(NamedTuple):
    """Bytes of memory of a worker in a call, None where they are unknown.

    Attributes:
        own: what it had for itself, at the end or at a value of an iterator.
        peak: the peak, with what it shares with others.
    """

    own: int | None
    peak: int | None


def _call(function: Callable[..., Any], *arguments: Any) -> tuple[Packed, Taken]:
    """Call a function on the values of its arguments, with one thread; the values of an iterator become a list."""
    import torch

    torch.set_num_threads(1)
    reset_peak_memory()
    with contextlib.ExitStack() as until_the_end:
        result = function(*(_opened(argument, until_the_end) for argument in arguments))
        taken = own_memory()
        if isinstance(result, Iterator):
            result, memory = _consumed(result)
            taken = memory if taken is None or memory is None else max(taken, memory)
    return packed(result), Taken(taken, peak_memory())


def _consumed(values: Iterator[Any]) -> tuple[list[Any], int | None]:
    """Return all values, and the most memory that this process alone had when one was computed."""
    found, most = [], own_memory()
    for value in values:
        found.append(value)
        memory = own_memory()
        most = memory if most is None or memory is None else max(most, memory)
    return found, most


def _opened(argument: Any, stack: contextlib.ExitStack) -> Any:
    """Return the value of an argument; files stay until the stack ends."""
    if isinstance(argument, SharedFiles):
        import ray

        return stack.enter_context(argument.on(_machine(), ray.get))
    return _value(argument)


def _machine() -> str:
    """Return the name that Ray gives the machine of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _value(argument: Any) -> Any:
    if not isinstance(argument, Packed):
        return argument
    return _unpacked(argument) if argument.shared else argument.value(lambda arrays: arrays)


@functools.lru_cache(maxsize=8)
def _unpacked(value: Packed) -> Any:
    """Return a shared value; it is unpacked once for many calls.

    Raises:
        UnsharableError: this process cannot import what the value needs, such as code of a hub repository.
    """
    try:
        return value.value(_arrays)
    except (ImportError, AttributeError) as error:
        raise _unsharable(error) from error


@functools.lru_cache(maxsize=8)
def _arrays(handle: Any) -> list[Bytes]:
    """Return arrays of the object store, which all workers of a machine read in place.

    Only the last ones are held, as what is held here cannot leave the store.
    """
    import ray

    arrays: list[Bytes] = ray.get(handle)
    return arrays
