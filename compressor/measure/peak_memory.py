"""Peak memory of an engine: in a process of its own, which holds nothing else and has never loaded torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from compressor.errors import CompressorError
from compressor.workspace.environment import forget_peak_memory, peak_memory
from runtimes.base.protocols import BuildOptions, Feeds
from runtimes.base.registry import runtime

RUNS = 3
LIMIT_SECONDS = 600.0


class PeakMemoryError(CompressorError):
    """The process that should have measured an engine's memory ended without an answer."""


@dataclass(frozen=True)
class Memory:
    """Most memory a process held that opened one engine and ran it, and what it held before, in bytes.

    `before` is Python with NumPy; the rest is the runtime's library, the engine and its work space.
    """

    peak: int
    before: int


def measure(target: str, path: Path, options: BuildOptions, feeds: Feeds) -> Memory | None:
    """The memory of one engine; None where the system does not say.

    Raises:
        PeakMemoryError: the process failed.
    """
    # The child finds the packages where this process did, however they were put on its path.
    places = os.pathsep.join(place for place in sys.path if place)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "compressor.measure.peak_memory"],
            input=pickle.dumps((target, path, options, dict(feeds))),
            capture_output=True,
            check=False,
            timeout=LIMIT_SECONDS,
            env={**os.environ, "PYTHONPATH": places},
        )
    except subprocess.TimeoutExpired as error:
        raise PeakMemoryError(
            f"the process that measures the memory of {path.name} took over {LIMIT_SECONDS:g} s; give smaller --batch."
        ) from error
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise PeakMemoryError(f"the process that measures the memory of {path.name} failed ({last}).")
    found = json.loads(done.stdout)
    return None if found is None else Memory(**found)


def _measured(target: str, path: Path, options: BuildOptions, feeds: Feeds) -> Memory | None:
    """What the child does."""
    forget_peak_memory()
    before = peak_memory()
    with runtime(target).load(path, options) as engine:
        step = engine.bind(feeds)
        for _ in range(RUNS):
            step()
        peak = peak_memory()
    return None if before is None or peak is None else Memory(peak, before)


if __name__ == "__main__":
    measured = _measured(*pickle.load(sys.stdin.buffer))  # from the parent process alone
    print(json.dumps(None if measured is None else asdict(measured)))
