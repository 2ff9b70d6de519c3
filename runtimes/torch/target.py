"""Target torch: the exported program compiled ahead of time by AOTInductor to one file, which C++ can run too."""

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
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from runtimes.base.json_text import OBJECT, parse
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
    check_feeds,
    first_line,
    suppress_output,
)
from runtimes.base.registry import check_available
from runtimes.torch.internals import METADATA_FILE, compile_package, open_package, run_package
from runtimes.torch.program import NAMES, SIGNATURE_NAMES, Signature, cast_products, quantize_int8, signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

name = "torch"
description = "PyTorch's AOTInductor on the CPU or on CUDA; compiles model.pt2 for this processor (needs g++)"
devices = ("cpu", "cuda")
source: Literal[".pt2"] = ".pt2"
# Not tested on CUDA, for lack of a device. int8 on CUDA would need another quantizer.
precisions = {"cpu": ("fp32", "bf16", "int8", "int8-dynamic"), "cuda": ("fp32", "fp16", "bf16")}
own = ("fp16", "bf16", "int8", "int8-dynamic")
# No int8 ONNX file is written for this target; these values describe its own int8 conversion.
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.pt2"
METADATA_LIMIT = 2**20  # bytes of the metadata of a package
FACTS = "compressor"  # the key of this project in the metadata of the package


class Facts(TypedDict):
    """Metadata of a package: its signature as JSON, and the device and the machine it was compiled for."""

    signature: str
    device: str
    machine: str


_FACTS = TypeAdapter(Facts)


def missing() -> str | None:
    """Return None if torch is installed, else the reason and the fix; only build() needs a compiler."""
    if util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Compile an exported program for this machine and return the path of the package, `out`/model.pt2.

    The package runs on processors and systems of this kind, with any number of threads. Weights are packed for the
    processor's matrix kernels (Inductor's freezing): DeiT-Tiny takes 12.7 ms with and 21.9 ms without packing. CUDA is
    not tested.

    Args:
        source: A program written by torch.export.save, with input and output names in its file compressor.json.
        out: The folder for the package.
        options: Device, precision and calibration samples for int8.

    Raises:
        RuntimeUnavailable: torch or the device is not available.
        BuildError: There is no C++ compiler or, for int8, no torchao; or torch refused the program.
    """
    check_available(name, missing(), devices, options)
    _need_device(options)
    _need_compiler()
    import torch
    from torch.export.passes import move_to_device_pass

    path = out / FILE
    with suppress_output(), torch.no_grad():
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

    A package is a compiled library, and opening it runs its code: open only packages from sources you trust. Its
    metadata is read first, without running code, so that a package for another device, system or processor is refused
    before any of its code runs.

    Raises:
        RuntimeUnavailable: torch or the device is not available.
        BuildError: The file is no package of build(), or it was built for another device, system or processor.
    """
    check_available(name, missing(), devices, options)
    facts = _facts(path)
    if facts["device"] != options.device:
        raise BuildError(
            f"{path.name} was compiled for device {facts['device']!r}; found {options.device!r}: build it again."
        )
    _need_device(options)
    if facts["machine"] != (machine := _machine()):
        raise BuildError(f"{path.name} was compiled for {facts['machine']}; found {machine}: build it again here.")
    try:
        with suppress_output():
            opened = open_package(path)
        return TorchEngine(opened, Signature.of_json(facts["signature"]), options)
    except RuntimeError as error:
        raise BuildError(f"torch cannot open {path.name}: {first_line(error)}.") from error


def layers(path: Path, options: BuildOptions) -> None:
    """Return None: the package is compiled code, which does not describe its layers."""


class TorchEngine(Closing[Any]):
    """An open AOTInductor package; see runtimes.base.Engine.

    In torch the number of threads is a setting of the process, so each run sets and restores it. Invalid values, such
    as a token outside the vocabulary, end the process: compiled code checks them but cannot raise.
    """

    def __init__(self, opened: Any, facts: Signature, options: BuildOptions) -> None:
        super().__init__(opened)
        self._signature, self._device, self._threads = facts, options.device, options.threads
        self.inputs: tuple[str, ...] = tuple(entry.name for entry in facts.inputs)
        self.outputs: tuple[str, ...] = facts.outputs
        self.input_dtypes: DTypes = {entry.name: np.dtype(entry.dtype) for entry in facts.inputs}
        self.input_shapes: Shapes = {entry.name: entry.shape for entry in facts.inputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        outputs = self._step(feeds)()
        # Copied, because an output may be a view of a weight or of an input.
        return {key: np.array(value.cpu().numpy()) for key, value in zip(self.outputs, outputs, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device and return a function that runs one inference; outputs stay on the device."""
        step = self._step(feeds)

        def run() -> None:
            step()

        return run

    def _step(self, feeds: Feeds) -> Callable[[], list[Any]]:
        import torch

        self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        self._signature.check(feeds)
        tensors = [torch.from_numpy(np.array(feeds[key], order="C")).to(self._device) for key in self.inputs]

        def step() -> list[Any]:
            opened = self._live()
            with torch.inference_mode(), _threads(self._threads):
                try:
                    outputs = run_package(opened, list(tensors))
                except RuntimeError as error:
                    raise RuntimesError(f"torch failed while running: {first_line(error)}.") from error
            if self._device == "cuda":
                torch.cuda.synchronize()
            return outputs

        return step


def _need_device(options: BuildOptions) -> None:
    if options.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeUnavailable(
            "torch finds no CUDA device here (or is built without CUDA); pip install torch on a machine with one, "
            "or use --device cpu."
        )


def _need_compiler() -> None:
    """Raise BuildError if there is no C++ compiler under the name that torch looks for."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = shlex.split(os.environ.get("CXX") or default)[0]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"Target torch needs a C++ compiler and found no {compiler}; install it "
            "(Debian: apt-get install g++) or name another one in the environment variable CXX."
        )


def _read(path: Path) -> tuple[ExportedProgram, Signature]:
    import torch

    extra = {NAMES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        return program, signature(program, parse(extra[NAMES], SIGNATURE_NAMES))
    except Exception as error:  # a zip archive, JSON and pickles, which raise different errors
        raise BuildError(f"{path} is no exported program with named inputs: {first_line(error)}.") from error


def _in_precision(program: ExportedProgram, facts: Signature, options: BuildOptions) -> ExportedProgram:
    if options.precision not in precisions[options.device]:
        supported = ", ".join(precisions[options.device])
        raise BuildError(
            f"Target torch supports {supported} on {options.device}; found precision {options.precision!r}."
        )
    if options.precision in ("bf16", "fp16"):
        return cast_products(program, options.precision)
    if options.precision in ("int8", "int8-dynamic"):
        names = [entry.name for entry in facts.inputs]
        return quantize_int8(program, dynamic=options.precision == "int8-dynamic", names=names, samples=options.samples)
    return program


def _metadata(facts: Signature, options: BuildOptions) -> dict[str, str]:
    """Return the metadata of a package: signature, device and machine, as JSON."""
    return {FACTS: json.dumps({"signature": facts.to_json(), "device": options.device, "machine": _machine()})}


def _machine() -> str:
    """Return the system, architecture and vector extensions that a package is compiled for."""
    import torch

    return f"{sys.platform} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _facts(path: Path) -> Facts:
    """Read the metadata of a package without opening its library."""
    if not path.is_file():
        raise BuildError(f"There is no compiled package {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (member for member in archive.namelist() if member.endswith(METADATA_FILE))
            if archive.getinfo(entry).file_size > METADATA_LIMIT:
                raise ValueError("the metadata is too large")
            return parse(str(parse(archive.read(entry), OBJECT)[FACTS]), _FACTS)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise BuildError(f"{path.name} is no package built by target torch; build it again.") from error


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's CPU threads inside the block; None leaves it unchanged."""
    import torch

    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
