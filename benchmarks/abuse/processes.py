"""Commands in processes of their own. Each is forked from a process that has imported torch and the exporters already.

A forked process can be killed, can crash and can wait forever, and the runner goes on. It starts within milliseconds,
so a random moment of a run falls into its work and not into its imports.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LIMIT = 180.0  # seconds until a command counts as hanging
MEMORY = 12 * 2**30  # bytes of address space of a command, so that a wrong size does not take the machine's memory


@dataclass(frozen=True)
class Ended:
    """A command that ended: status (negative: a signal), standard output and error, seconds, whether it hung."""

    status: int
    out: str
    err: str
    seconds: float
    hung: bool = False


@dataclass(frozen=True)
class Running:
    """A command that runs: its process, its output files, and the time of its start."""

    process: int
    out: IO[bytes]
    err: IO[bytes]
    start: float

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for the end of a command; kill it after `limit` seconds."""
        status = self._status(limit)
        if status is None:
            self.send(signal.SIGKILL)
            os.waitpid(self.process, 0)
        seconds = time.monotonic() - self.start
        return Ended(status or 0, _text(self.out), _text(self.err), round(seconds, 2), status is None)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command and to the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, number)

    def _status(self, limit: float) -> int | None:
        """Return the status at the end; None if the command runs longer than `limit` seconds."""
        while True:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - self.start > limit:
                return None
            time.sleep(0.005)


def run(arguments: Sequence[str], folder: Path, limit: float = LIMIT) -> Ended:
    """Run a command in a folder until its end."""
    return start(arguments, folder).wait(limit)


def start(arguments: Sequence[str], folder: Path) -> Running:
    """Start a command in a folder, as the leader of a process group."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - the process outlives this function
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: the process has threads
        process = os.fork()
    if process == 0:
        _command(list(arguments), folder, out, err)
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(process, process)  # the child does it too: whoever is first
    return Running(process, out, err, began)


def _command(arguments: list[str], folder: Path, out: IO[bytes], err: IO[bytes]) -> None:
    """Run a command in a forked process and end the process, as the script `compressor` would."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8", buffering=1)
        sys.argv = ["compressor", *arguments]
        from compressor.cli.main import main

        main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def warm_up(arguments: Sequence[str], folder: Path) -> None:
    """Run a command in this process, so that forked ones need not import what it imports."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from compressor.cli.main import main

    # The exporter makes its table of operators anew in every call, which is half of the time of a small export.
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[assignment]
    with contextlib.chdir(folder), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(list(arguments), standalone_mode=False)
    warnings.simplefilter("default", append=True)  # forget which warnings were shown
