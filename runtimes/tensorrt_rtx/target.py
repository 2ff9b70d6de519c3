"""Target tensorrt_rtx: engines built by NVIDIA TensorRT for RTX (1.4 or newer), for GPUs that need not be present.

An engine holds the graph in the form that the compute capability can run; the kernels are compiled on the device when
the engine is opened. Building takes seconds and needs no GPU and no driver; opening an engine needs both. The builder
and its parser run in the tests of this project. Opening and running an engine never did: that part is the code of
target tensorrt, which is tested against a fake.

The network is strongly typed, as in target tensorrt: float32, float16, bfloat16, int8 or float8 with float16 for all
other operators, or float16 with int4 weights. Compute capability 7.5 has neither float32 products, bfloat16 nor int4,
and float8 needs 8.9 or newer.
"""

from __future__ import annotations

import contextlib
from importlib import util
from pathlib import Path
from typing import Literal

from runtimes.base.ahead_of_time import Progress
from runtimes.base.protocols import BuildError, BuildOptions, Int8Style, LayerCounts, RuntimeUnavailable, first_line
from runtimes.base.registry import check_available, is_installed
from runtimes.tensorrt import qdq_rules
from runtimes.tensorrt.build_steps import build_errors, required, write_engine
from runtimes.tensorrt.engine import Device, TensorRTEngine
from runtimes.tensorrt.inspector import summary
from runtimes.tensorrt.target import cuda_devices
from runtimes.tensorrt_rtx.builder import LIBRARY, Log, Network

name = "tensorrt_rtx"
description = "NVIDIA TensorRT for RTX on CUDA; also builds engines for GPUs that are not here (never run on one)"
devices = ("cuda",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cuda": ("fp32", "fp16", "bf16", "fp8", "int8", "int4")}
own = ()
int8 = Int8Style(activations="int8", convolutions=True, rest="fp16", int4="DequantizeLinear")

PACKAGE = "tensorrt-rtx-cu12"
GET = f"pip install {PACKAGE} cuda-bindings"
PRESENT = "CURRENT"  # the library's name for the GPU of this machine
NOT_A_GPU = frozenset({"NONE", PRESENT})


def missing() -> str | None:
    """Return None if engines can be built and run here, else the reason and what to install."""
    reason = missing_builder()
    if reason is not None:
        return reason
    if not is_installed("cuda-bindings"):
        return f"cuda-bindings is not installed; it copies data to the GPU; {GET}"
    if not cuda_devices():
        return f"there is no NVIDIA GPU or no driver for it; with both: {GET}"
    return None


def missing_builder() -> str | None:
    """Return None if engines can be built here, with or without a GPU, else what to install."""
    if util.find_spec("tensorrt_rtx") is None:
        return f"{LIBRARY} is not installed; pip install {PACKAGE}"
    return None


def builder_version() -> str:
    """Return the name and the version of the library, such as "TensorRT for RTX 1.7.1.116".

    Raises:
        RuntimeUnavailable: The library is not installed.
    """
    _check_builder()
    import tensorrt_rtx as trt

    return f"{LIBRARY} {trt.__version__}"


def gpus() -> tuple[str, ...]:
    """Return the compute capabilities that the installed release builds for, in ascending order, such as "sm89".

    Raises:
        RuntimeUnavailable: The library is not installed.
    """
    _check_builder()
    import tensorrt_rtx as trt

    known = [member for key, member in trt.ComputeCapability.__members__.items() if key not in NOT_A_GPU]
    return tuple(member.name.lower() for member in sorted(known, key=int))


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Build `<name of the ONNX file>.engine` for the GPU of this machine in `out` and return its path.

    Raises:
        RuntimeUnavailable: The library or the GPU is not available.
        BuildError: The file violates a quantization rule, or the library refused it or the GPU.
    """
    check_available(name, missing(), devices, options)
    return _built(source, out / f"{source.stem}.engine", options, PRESENT, None)


def build_for(source: Path, out: Path, options: BuildOptions, gpu: str, progress: Progress | None = None) -> Path:
    """Build `<name of the ONNX file>.<gpu>.engine` in `out`, with or without a GPU; see `AheadOfTime.build_for`."""
    known = gpus()
    if gpu not in known:
        raise RuntimeUnavailable(
            f"{builder_version()} builds no engine for GPU {gpu!r}; expected one of: {', '.join(known)}."
        )
    return _built(source, out / f"{source.stem}.{gpu}.engine", options, gpu.upper(), progress)


def network_layers(source: Path) -> LayerCounts:
    """Return the layers of a file after parsing; see `AheadOfTime.network_layers`."""
    _check_builder()
    qdq_rules.check(source)
    return Network.of(source).layers()


def load(path: Path, options: BuildOptions) -> TensorRTEngine:
    """Open an engine on the GPU of this machine.

    Raises:
        RuntimeUnavailable: The library or the GPU is not available.
        BuildError: The file is no engine, or was built for another GPU or version.
    """
    check_available(name, missing(), devices, options)
    _check_builder()
    import tensorrt_rtx as trt

    if not path.is_file():
        raise BuildError(f"There is no engine {path}.")
    log, resources = Log(), contextlib.ExitStack()
    with resources, build_errors(f"{LIBRARY} cannot open {path.name}", log.errors, library=LIBRARY):
        logger = log.logger()
        runtime = trt.Runtime(logger)
        refused = "it was built for another GPU or another version, or is damaged: build it again"
        engine = required(runtime.deserialize_cuda_engine(path.read_bytes()), refused)
        context = required(engine.create_execution_context(), "it created no execution context, possibly for memory")
        device = Device(resources)
        opened = TensorRTEngine(
            engine,
            context,
            device,
            keep=(logger, runtime),
            said=log.errors,
            json=trt.LayerInformationFormat.JSON,
        )
        device.held = resources.pop_all()
    return opened


def layers(path: Path, options: BuildOptions) -> LayerCounts:
    """Return the layers of an engine as its inspector reports them, at the usual input sizes; needs the GPU."""
    with load(path, options) as engine:
        return summary(engine.described())


def _check_builder() -> None:
    """Raise RuntimeUnavailable unless the library is installed and can be loaded."""
    reason = missing_builder()
    if reason is not None:
        raise RuntimeUnavailable(f"Target {name} cannot build here: {reason}.")
    try:
        import tensorrt_rtx  # noqa: F401
    except (ImportError, OSError) as error:
        raise RuntimeUnavailable(f"{LIBRARY} is installed but cannot be loaded: {first_line(error)}.") from error


def _built(source: Path, path: Path, options: BuildOptions, capability: str, progress: Progress | None) -> Path:
    """Build an engine for a compute capability by its name in the library, and write it to `path`.

    The file is written outside the block that turns exceptions into a BuildError: an OSError says that a disk is full.
    """
    _check_builder()
    import tensorrt_rtx as trt

    qdq_rules.check(source)
    network = Network.of(source)
    with build_errors(f"{LIBRARY} cannot build {source.name} for {capability}", network.log.errors, library=LIBRARY):
        engine = network.engine(options, trt.ComputeCapability.__members__[capability], progress)
    write_engine(path, engine)
    return path
