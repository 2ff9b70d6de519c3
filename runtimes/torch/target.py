"""Target torch: the exported program compiled ahead of time by AOTInductor, in one file that C++ can run too."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    RuntimeUnavailable,
    Shapes,
    first_line,
    quiet,
    taken,
)
from runtimes.base.registry import need
from runtimes.torch.internals import METADATA_FILE, compile_package, open_package, run_package
from runtimes.torch.program import NAMES, Signature, in_int8, in_products, signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

name = "torch"
description = "PyTorch's AOTInductor on the CPU or on CUDA; compiles model.pt2 for this processor (needs g++)"
devices = ("cpu", "cuda")
source: Literal[".pt2"] = ".pt2"
# On CUDA nobody has run it: the project had no such device. int8 there would be another quantizer.
precisions = {"cpu": ("fp32", "bf16", "int8", "int8-dynamic"), "cuda": ("fp32", "fp16", "bf16")}
own = ("fp16", "bf16", "int8", "int8-dynamic")
# No int8 ONNX file is ever written for it; this says what its own int8 is.
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.pt2"
FACTS = "compressor"  # the key of our metadata among those of the package


def missing() -> str | None:
    """Return None where torch is installed, else the command that changes it. Only build() needs a compiler."""
    if util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Compile an exported program for this machine and return the path of the package, `out`/model.pt2.

    It runs on processors and systems of this kind, at any number of threads. Weights are packed for the processor's
    matrix kernels (Inductor's freezing): DeiT-Tiny took 12.7 ms with and 21.9 ms without. On CUDA it was never run.

    Args:
        source: what torch.export.save wrote, with the names of inputs and outputs in its file compressor.json.
        out: the folder for the package.
        options: device, precision and the samples for int8.

    Raises:
        RuntimeUnavailable: torch or the device is not there.
        BuildError: there is no C++ compiler or, for int8, no torchao; or torch refused the program.
    """
    need(name, missing(), devices, options)
    _need_device(options)
    _need_compiler()
    import torch
    from torch.export.passes import move_to_device_pass

    path = out / FILE
    with quiet(), torch.no_grad():
        exported, facts = _read(source)
        try:
            if options.device == "cuda":
                exported = move_to_device_pass(exported, "cuda")
            exported = _in_precision(exported, facts, options)
            compile_package(exported, path, _metadata(facts, options), threads=os.cpu_count() or 1)
        except RuntimesError:
            raise
        except Exception as error:  # Inductor, the C++ compiler and torchao have no common class of errors
            raise BuildError(f"torch cannot compile {source.name}: {first_line(error)}.") from error
    return path


def load(path: Path, options: BuildOptions) -> TorchEngine:
    """Open the package that build() wrote.

    A package is a compiled library, so opening it runs code of whoever made it: open only what you or someone you
    trust has built. What it was built for is read first, from a plain file in it, and another device, system or
    processor refused before anything of it runs.

    Raises:
        RuntimeUnavailable: torch or the device is not there.
        BuildError: it is no such package, or one for another device, system or processor.
    """
    need(name, missing(), devices, options)
    facts = _facts(path)
    if facts["device"] != options.device:
        raise BuildError(
            f"{path.name} was compiled for device {facts['device']!r}, found {options.device!r}; build it again."
        )
    _need_device(options)
    if facts["machine"] != (found := _machine()):
        raise BuildError(f"{path.name} was compiled for {facts['machine']}, found {found}; build it again here.")
    try:
        with quiet():
            opened = open_package(path)
        return TorchEngine(opened, Signature.of_json(facts["signature"]), options)
    except RuntimeError as error:
        raise BuildError(f"torch cannot open {path.name}: {first_line(error)}.") from error


def layers(path: Path, options: BuildOptions) -> None:
    """Return nothing: the package is compiled code, which does not tell what became of the model's layers."""


class TorchEngine(Closing[Any]):
    """An open AOTInductor package; see runtimes.base.Engine.

    The number of threads belongs to the process in torch, so it is set around each run and put back. Values that no
    model takes, such as a token beyond the vocabulary, end the process: compiled code checks them and cannot raise.
    """

    def __init__(self, opened: Any, facts: Signature, options: BuildOptions) -> None:
        super().__init__(opened)
        self._signature, self._device, self._threads = facts, options.device, options.threads
        self.inputs: tuple[str, ...] = tuple(each.name for each in facts.inputs)
        self.outputs: tuple[str, ...] = facts.outputs
        self.input_dtypes: DTypes = {each.name: np.dtype(each.dtype) for each in facts.inputs}
        self.input_shapes: Shapes = {each.name: each.shape for each in facts.inputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        found = self._step(feeds)()
        # Copied, because an output may be a view of a weight or of an input.
        return {key: np.array(value.cpu().numpy()) for key, value in zip(self.outputs, found, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device; each call of the result is one inference on them, its outputs staying there."""
        step = self._step(feeds)

        def run() -> None:
            step()

        return run

    def _step(self, feeds: Feeds) -> Callable[[], list[Any]]:
        import torch

        self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        self._signature.check(feeds)
        tensors = [torch.from_numpy(np.array(feeds[key], order="C")).to(self._device) for key in self.inputs]

        def step() -> list[Any]:
            opened = self._live()
            with torch.inference_mode(), _threads(self._threads):
                try:
                    found = run_package(opened, list(tensors))
                except RuntimeError as error:
                    raise RuntimesError(f"torch stopped: {first_line(error)}.") from error
            if self._device == "cuda":
                torch.cuda.synchronize()
            return found

        return step


def _need_device(options: BuildOptions) -> None:
    if options.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeUnavailable(
            "torch finds no CUDA device here (or is built without CUDA); pip install torch where there is one, "
            "or use --device cpu."
        )


def _need_compiler() -> None:
    """Raise BuildError where torch would find no C++ compiler; the names are those that it looks for."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = shlex.split(os.environ.get("CXX") or usual)[0]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"Target torch compiles with a C++ compiler and found no {compiler}; install it "
            "(Debian: apt-get install g++) or name another one in the variable CXX."
        )


def _read(path: Path) -> tuple[ExportedProgram, Signature]:
    import torch

    extra = {NAMES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        return program, signature(program, json.loads(extra[NAMES]))
    except Exception as error:  # a zip archive, JSON and pickles, each with errors of its own
        raise BuildError(f"{path} is no exported program with named inputs: {first_line(error)}.") from error


def _in_precision(program: ExportedProgram, facts: Signature, options: BuildOptions) -> ExportedProgram:
    if options.precision not in precisions[options.device]:
        can = ", ".join(precisions[options.device])
        raise BuildError(f"Target torch computes in {can} on {options.device}; found precision {options.precision!r}.")
    if options.precision in ("bf16", "fp16"):
        return in_products(program, options.precision)
    if options.precision in ("int8", "int8-dynamic"):
        names = [each.name for each in facts.inputs]
        return in_int8(program, dynamic=options.precision == "int8-dynamic", names=names, samples=options.samples)
    return program


def _metadata(facts: Signature, options: BuildOptions) -> dict[str, str]:
    """What the package is to say of itself."""
    return {FACTS: json.dumps({"signature": facts.to_json(), "device": options.device, "machine": _machine()})}


def _machine() -> str:
    """What a package fits to: it is compiled with all that this processor can do."""
    import torch

    return f"{sys.platform} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _facts(path: Path) -> dict[str, str]:
    """Read our metadata of a package, without opening its library."""
    if not path.is_file():
        raise BuildError(f"There is no compiled package {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (each for each in archive.namelist() if each.endswith(METADATA_FILE))
            found = json.loads(json.loads(archive.read(entry))[FACTS])
        return {key: str(found[key]) for key in ("signature", "device", "machine")}
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise BuildError(f"{path.name} is no package that target torch built; build it again.") from error


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """Let torch use so many threads of the CPU meanwhile."""
    import torch

    before = torch.get_num_threads()
    if wanted in (None, before):
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
