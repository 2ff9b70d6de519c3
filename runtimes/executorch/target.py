"""Target executorch: an exported program as a .pte file for phones and boards, with XNNPACK's kernels on the CPU.

ExecuTorch plans its memory while building, so every free axis gets an upper bound there: the largest of
`BuildOptions.batches` for the first axis, of `BuildOptions.lengths` for the others. All sizes up to that run.

Its Python runtime has one pool of threads for the whole process, which open engines hold on to. `BuildOptions.threads`
sets it while no engine is open; an engine that asks for another number beside an open one is refused.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import (
    BuildError,
    BuildOptions,
    Closing,
    DTypes,
    Feeds,
    Int8Style,
    RuntimesError,
    Shapes,
    first_line,
    taken,
)
from runtimes.base.registry import need
from runtimes.executorch.internals import reset_threads, thread_count
from runtimes.executorch.program import FACTS, lowered, opened

name = "executorch"
description = (
    "ExecuTorch with XNNPACK on the CPU, for phones and boards; writes model.pte, batch up to the largest stated"
)
devices = ("cpu",)
source: Literal[".pt2"] = ".pt2"
precisions = MappingProxyType({"cpu": ("fp32", "int8", "int8-dynamic")})
own = ("int8", "int8-dynamic")
int8 = Int8Style(activations="int8", convolutions=False)

FILE = "model.pte"


def missing() -> str | None:
    """Return None where ExecuTorch can be used, else the reason and the command that changes it."""
    if util.find_spec("executorch") is None:
        return "executorch is not installed; pip install executorch"
    if util.find_spec("torchao") is None:
        return "torchao is not installed, which executorch quantizes with; pip install torchao"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Lower a saved torch.export program to `out`/model.pte in the precision asked for, and return its path.

    int8 quantizes the inputs, weights and outputs of Linear layers, all else stays in float32. Weights are symmetric
    with a scale per output channel; inputs and outputs have one scale and zero point each, from `options.samples`,
    because XNNPACK has no static int8 product with a float32 result. int8-dynamic quantizes inputs and weights only,
    the inputs with a scale per row, found at run time.

    Raises:
        RuntimeUnavailable: ExecuTorch or the device is not there.
        BuildError: The file is no such program, ExecuTorch refused it, or int8 was asked for without samples.
    """
    need(name, missing(), devices, options)
    if options.precision not in precisions["cpu"]:
        known = ", ".join(precisions["cpu"])
        raise BuildError(f"Target {name} has no precision {options.precision!r}; expected one of: {known}.")
    if options.precision == "int8" and options.samples is None:
        raise BuildError("int8 needs samples to calibrate with; found none.")
    with _quiet():
        program, names = opened(source)
        try:
            written = lowered(program, names, options)
        except Exception as error:  # its errors have no common base
            raise BuildError(f"ExecuTorch cannot build {source.name}: {first_line(error)}.") from error
    path = out / FILE
    path.write_bytes(written)
    return path


def load(path: Path, options: BuildOptions) -> ExecutorchEngine:
    """Open the file that build() wrote.

    Raises:
        RuntimeUnavailable: ExecuTorch or the device is not there.
        RuntimesError: Open engines hold a pool with another number of threads.
        BuildError: The file is none that build() wrote.
    """
    need(name, missing(), devices, options)
    if not path.is_file():
        raise BuildError(f"There is no ExecuTorch program {path}.")
    with _quiet():
        try:
            from executorch.runtime import Runtime

            _resize(_pool(), options.threads)
            program = Runtime.get().load_program(path)
            if not {FACTS, "forward"} <= program.method_names:
                raise BuildError(f"{path.name} was not written by this target: it does not name its inputs.")
            facts = json.loads(program.load_method(FACTS).execute([])[0])
            engine = ExecutorchEngine(program, program.load_method("forward"), facts)
        except (RuntimeError, ImportError, ValueError) as error:
            raise BuildError(f"ExecuTorch cannot open {path.name}: {first_line(error)}.") from error
    _pool().engines.add(engine)
    return engine


def layers(path: Path, options: BuildOptions) -> None:
    """Return nothing: the package is compiled code, which does not tell what became of the model's layers."""


class ExecutorchEngine(Closing[Any]):
    """A loaded ExecuTorch method; see runtimes.base.Engine. Sizes beyond those planned for raise RuntimesError."""

    def __init__(self, program: Any, method: Any, facts: dict[str, Any]) -> None:
        super().__init__((method, program))
        self.inputs: tuple[str, ...] = tuple(facts["inputs"])
        self.outputs: tuple[str, ...] = tuple(facts["outputs"])
        self.input_dtypes: DTypes = {key: np.dtype(facts["dtypes"][key]) for key in self.inputs}
        self.input_shapes: Shapes = {key: tuple(facts["shapes"][key]) for key in self.inputs}
        self._largest: dict[str, tuple[int, ...]] = {key: tuple(facts["largest"][key]) for key in self.inputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        found = self._execute(self._tensors(feeds))
        return {key: value.numpy() for key, value in zip(self.outputs, found, strict=True)}  # ExecuTorch made a copy

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds into tensors; each call of the result is one inference on them."""
        tensors = self._tensors(feeds)

        def step() -> None:
            self._execute(tensors)

        return step

    def _tensors(self, feeds: Feeds) -> list[Any]:
        import torch

        self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        for key, value in feeds.items():
            if any(size > most for size, most in zip(value.shape, self._largest[key], strict=True)):
                raise RuntimesError(
                    f"Input {key!r}: found shape {list(value.shape)}; expected at most {list(self._largest[key])}, "
                    "which the file was built for."
                )
        return [torch.from_numpy(np.array(feeds[key], order="C")) for key in self.inputs]

    def _execute(self, tensors: list[Any]) -> list[Any]:
        method, _ = self._live()
        try:
            return list(method.execute(tensors))
        except RuntimeError as error:
            raise RuntimesError(f"ExecuTorch failed while running: {first_line(error)}.") from error


@dataclass(frozen=True)
class _Pool:
    """The process's pool of threads: its first size, and the engines that hold its address."""

    first: int
    engines: weakref.WeakSet[ExecutorchEngine] = field(default_factory=weakref.WeakSet)


@functools.cache
def _pool() -> _Pool:
    """The record of the one pool there is: ExecuTorch replaces it under engines that still use it."""
    return _Pool(thread_count())


def _resize(pool: _Pool, threads: int | None) -> None:
    """Give the pool the number of threads asked for, or that it began with; an open engine's is left alone."""
    found = thread_count()
    wanted = pool.first if threads is None else threads
    if found == wanted:
        return
    if not any(engine._opened is not None for engine in pool.engines):
        reset_threads(wanted)
    elif threads is not None:
        raise RuntimesError(
            f"Found threads={threads} beside an open engine with {found}; executorch has one pool for the process: "
            "close that engine first, or give both the same number."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings, log and native messages about processor files from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _muted(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):  # some of its native messages take the way through Python
                yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Point file descriptor 2 elsewhere: native code writes to it without asking Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as aside:
            os.dup2(aside.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
