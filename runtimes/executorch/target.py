"""Target executorch: an exported program as a .pte file for phones and boards, with XNNPACK kernels on the CPU.

ExecuTorch plans its memory during the build, so every dynamic axis gets an upper bound: the largest of
`BuildOptions.batches` for the first axis, the largest of `BuildOptions.lengths` for the others. An engine accepts all
sizes up to this bound.

The Python runtime has one thread pool for the whole process, and open engines keep its address. `BuildOptions.threads`
sets its size while no engine is open. With an open engine, load() refuses another number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import io
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
from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from runtimes.base.json_text import parse
from runtimes.base.protocols import (
    BuildError,
    BuildOptions,
    Closing,
    DTypes,
    Feeds,
    Int8Style,
    RuntimesError,
    Shapes,
    check_feeds,
    first_line,
)
from runtimes.base.registry import check_available
from runtimes.executorch.internals import reset_threads, thread_count
from runtimes.executorch.program import FACTS, lower_to_pte, opened

name = "executorch"
description = "ExecuTorch with XNNPACK on the CPU, for phones and boards; writes model.pte with a largest batch size"
devices = ("cpu",)
source: Literal[".pt2"] = ".pt2"
precisions = MappingProxyType({"cpu": ("fp32", "int8", "int8-dynamic")})
own = ("int8", "int8-dynamic")
int8 = Int8Style(activations="int8", convolutions=False)

FILE = "model.pte"


@with_config(ConfigDict(extra="allow"))
class Facts(TypedDict):
    """Names of inputs and outputs, and by input the NumPy type, the fixed sizes and the largest sizes."""

    inputs: list[str]
    outputs: list[str]
    dtypes: dict[str, str]
    shapes: dict[str, list[int | None]]
    largest: dict[str, list[int]]


_FACTS = TypeAdapter(Facts)


def missing() -> str | None:
    """Return None if ExecuTorch can be used, else the reason and the command that fixes it."""
    if util.find_spec("executorch") is None:
        return "executorch is not installed; pip install executorch"
    if util.find_spec("torchao") is None:
        return "torchao is not installed; executorch needs it for quantization; pip install torchao"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Lower a saved torch.export program to `out`/model.pte in the precision of `options` and return its path.

    int8 quantizes the inputs, weights and outputs of Linear layers; other operators stay in float32. Weights are
    symmetric with one scale per output channel. Inputs and outputs have one scale and zero point each, calibrated on
    `options.samples`; outputs are included because XNNPACK has no static int8 product with a float32 result.
    int8-dynamic quantizes inputs and weights only, the inputs with one scale per row, computed at run time.

    Raises:
        RuntimeUnavailable: ExecuTorch or the device is not available.
        BuildError: The file is not an exported program, ExecuTorch refused it, or int8 has no calibration samples.
    """
    check_available(name, missing(), devices, options)
    if options.precision not in precisions["cpu"]:
        supported = ", ".join(precisions["cpu"])
        raise BuildError(f"Target {name} has no precision {options.precision!r}; expected one of: {supported}.")
    if options.precision == "int8" and options.samples is None:
        raise BuildError("int8 needs calibration samples; found none.")
    with _quiet():
        program, names = opened(source)
        try:
            content = lower_to_pte(program, names, options)
        except Exception as error:  # ExecuTorch's errors have no common base
            raise BuildError(f"ExecuTorch cannot build {source.name}: {first_line(error)}.") from error
    path = out / FILE
    path.write_bytes(content)
    return path


def load(path: Path, options: BuildOptions) -> ExecutorchEngine:
    """Open the file that build() wrote.

    Raises:
        RuntimeUnavailable: ExecuTorch or the device is not available.
        RuntimesError: An open engine uses the thread pool with another number of threads.
        BuildError: The file was not written by build(), or ExecuTorch cannot open it.
    """
    check_available(name, missing(), devices, options)
    if not path.is_file():
        raise BuildError(f"There is no ExecuTorch program {path}.")
    with _quiet():
        try:
            from executorch.runtime import Runtime

            _resize(_pool(), options.threads)
            program = Runtime.get().load_program(path)
            if not {FACTS, "forward"} <= program.method_names:
                raise BuildError(
                    f"{path.name} was not written by this target: it does not name its inputs; build it again."
                )
            facts = parse(program.load_method(FACTS).execute([])[0], _FACTS)
            engine = ExecutorchEngine(program, program.load_method("forward"), facts)
        except (RuntimeError, ImportError, ValueError, KeyError, TypeError) as error:
            raise BuildError(f"ExecuTorch cannot open {path.name}: {first_line(error)}.") from error
    _pool().engines.add(engine)
    return engine


def layers(path: Path, options: BuildOptions) -> None:
    """Return None: a .pte file does not describe its layers after lowering."""


class ExecutorchEngine(Closing[Any]):
    """A loaded ExecuTorch method; see runtimes.base.Engine. Sizes above the planned bounds raise RuntimesError."""

    def __init__(self, program: Any, method: Any, facts: Facts) -> None:
        super().__init__((method, program))
        self.inputs: tuple[str, ...] = tuple(facts["inputs"])
        self.outputs: tuple[str, ...] = tuple(facts["outputs"])
        self.input_dtypes: DTypes = {key: np.dtype(facts["dtypes"][key]) for key in self.inputs}
        self.input_shapes: Shapes = {key: tuple(facts["shapes"][key]) for key in self.inputs}
        self._largest: dict[str, tuple[int, ...]] = {key: tuple(facts["largest"][key]) for key in self.inputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        outputs = self._execute(self._tensors(feeds))
        return {key: value.numpy() for key, value in zip(self.outputs, outputs, strict=True)}  # ExecuTorch copied them

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds into tensors and return a function that runs one inference on them."""
        tensors = self._tensors(feeds)

        def step() -> None:
            self._execute(tensors)

        return step

    def _tensors(self, feeds: Feeds) -> list[Any]:
        import torch

        self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        for key, value in feeds.items():
            if any(size > most for size, most in zip(value.shape, self._largest[key], strict=True)):
                raise RuntimesError(
                    f"Input {key!r}: found shape {list(value.shape)}; expected at most {list(self._largest[key])}, "
                    "the largest shape the file was built for."
                )
        tensors = [torch.from_numpy(np.array(feeds[key], order="C")) for key in self.inputs]
        # NumPy gives an empty array, such as a KV cache without tokens, strides of 0, on which ExecuTorch aborts.
        return [tensor if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]

    def _execute(self, tensors: list[Any]) -> list[Any]:
        method, _ = self._live()
        try:
            return list(method.execute(tensors))
        except RuntimeError as error:
            raise RuntimesError(f"ExecuTorch failed while running: {first_line(error)}.") from error


@dataclass(frozen=True)
class _Pool:
    """The thread pool of the process: its initial size and the engines that use it."""

    initial: int
    engines: weakref.WeakSet[ExecutorchEngine] = field(default_factory=weakref.WeakSet)


@functools.cache
def _pool() -> _Pool:
    """Return the record of the thread pool, which ExecuTorch would replace even while engines use it."""
    return _Pool(thread_count())


def _resize(pool: _Pool, threads: int | None) -> None:
    """Resize the pool to `threads`, or to its initial size for None.

    While an engine is open, None keeps the pool.

    Raises:
        RuntimesError: An open engine uses the pool with another number of threads.
    """
    current = thread_count()
    target_count = pool.initial if threads is None else threads
    if current == target_count:
        return
    if not any(engine._opened is not None for engine in pool.engines):
        reset_threads(target_count)
    elif threads is not None:
        raise RuntimesError(
            f"Found threads={threads} while an open engine uses {current}; executorch has one thread pool per process: "
            "close the engine first, or use the same number of threads."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's warnings, log and native messages, such as those about processor files."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _muted(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):  # some native messages are printed through Python
                yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Redirect file descriptor 2, which native code writes to directly, to a temporary file."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
