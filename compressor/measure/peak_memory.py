"""Peak memory of an engine, measured in a separate process that does not import torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from compressor.errors import CompressorError
from compressor.workspace.environment import peak_memory, reset_peak_memory
from runtimes.base.json_text import parse
from runtimes.base.protocols import BuildOptions, Feeds
from runtimes.base.registry import runtime

RUNS = 3
LIMIT_SECONDS = 600.0


class PeakMemoryError(CompressorError):
    """The process that measures the memory of an engine failed or took too long."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process that opens one engine and runs it, in bytes.

    Attributes:
        peak: the peak, with the library of the runtime, the engine and its workspace.
        before: the peak before the engine is opened: Python with NumPy.
    """

    peak: int
    before: int


_MEMORY: TypeAdapter[Memory | None] = TypeAdapter(Memory | None)


def measure(target: str, path: Path, options: BuildOptions, feeds: Feeds) -> Memory | None:
    """Measure the peak memory of one engine; return None if the system does not report it.

    Raises:
        PeakMemoryError: the process failed or took over `LIMIT_SECONDS`.
    """
    # The child process gets the import path of this process, which may differ from PYTHONPATH.
    import_path = os.pathsep.join(folder for folder in sys.path if folder)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "compressor.measure.peak_memory"],
            input=pickle.dumps((target, path, options, dict(feeds))),
            capture_output=True,
            check=False,
            timeout=LIMIT_SECONDS,
            env={**os.environ, "PYTHONPATH": import_path},
        )
    except subprocess.TimeoutExpired as error:
        raise PeakMemoryError(
            f"the process that measures the memory of {path.name} took over {LIMIT_SECONDS:g} s; give a smaller "
            "--batch."
        ) from error
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise PeakMemoryError(f"the process that measures the memory of {path.name} failed ({last}).")
    return parse(done.stdout, _MEMORY)


def _measured(target: str, path: Path, options: BuildOptions, feeds: Feeds) -> Memory | None:
    """Measure the peak memory of this process before and after it runs the engine."""
    reset_peak_memory()
    before = peak_memory()
    with runtime(target).load(path, options) as engine:
        step = engine.bind(feeds)
        for _ in range(RUNS):
            step()
        peak = peak_memory()
    return None if before is None or peak is None else Memory(peak, before)


if __name__ == "__main__":
    measured = _measured(*pickle.load(sys.stdin.buffer))  # the input comes from the parent process only
    print(json.dumps(None if measured is None else asdict(measured)))
