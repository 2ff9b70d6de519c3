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
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from runtimes.base.ahead_of_time import Progress
from runtimes.base.protocols import BuildError, BuildOptions, Int8Style, LayerCounts, RuntimeUnavailable, first_line
from runtimes.base.registry import check_available, is_installed
from runtimes.tensorrt import qdq_rules
from runtimes.tensorrt.build_steps import build_errors, required, write_engine
from runtimes.tensorrt.engine import Device, TensorRTEngine
from runtimes.tensorrt.inspector import summary
from runtimes.tensorrt.target import cuda_devices
from runtimes.tensorrt_rtx.builder import LIBRARY, Log, Network
from runtimes.tensorrt_rtx.runtime_config import cache_path, runtime_config

if TYPE_CHECKING:
    import tensorrt_rtx as trt

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

    A file beside it holds the kernels of the usual sizes, compiled for this GPU; see `runtime_config`.

    Raises:
        RuntimeUnavailable: The library or the GPU is not available.
        BuildError: The file violates a quantization rule, or the library refused it or the GPU.
    """
    check_available(name, missing(), devices, options)
    path = _built(source, out / f"{source.stem}.engine", options, (PRESENT,), None)
    _compile_kernels(path)
    return path


def build_for(source: Path, out: Path, options: BuildOptions, gpu: str, progress: Progress | None = None) -> Path:
    """Build `<name of the ONNX file>.<gpu>.engine` in `out`, with or without a GPU; see `AheadOfTime.build_for`."""
    names, known = gpu.split("+"), gpus()
    lacking = [name for name in names if name not in known]
    if lacking:
        raise RuntimeUnavailable(
            f"{builder_version()} builds no engine for GPU {lacking[0]!r}; expected one of: {', '.join(known)}."
        )
    capabilities = [name.upper() for name in names]
    return _built(source, out / f"{source.stem}.{gpu}.engine", options, capabilities, progress)


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
    return _opened(path)[0]


def _opened(path: Path) -> tuple[TensorRTEngine, trt.IRuntimeCache]:
    """Return an open engine and its cache of compiled kernels."""
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
        device = Device(resources)  # makes a CUDA context current, which the cache of kernels needs
        config, cache = runtime_config(engine, path)
        no_context = "it created no execution context, possibly for memory"
        context = required(engine.create_execution_context(config), no_context)
        opened = TensorRTEngine(
            engine,
            context,
            device,
            keep=(logger, runtime, config, cache),
            said=log.errors,
            json=trt.LayerInformationFormat.JSON,
        )
        device.held = resources.pop_all()
    return opened, cache


def _compile_kernels(path: Path) -> None:
    """Run an engine once at its usual sizes, on zeros, and write the kernels that this compiled beside it."""
    engine, cache = _opened(path)
    with engine:
        engine.bind({key: np.zeros(engine.usual_shape(key), engine.input_dtypes[key]) for key in engine.inputs})()
        write_engine(cache_path(path), cache.serialize())


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


def _built(
    source: Path, path: Path, options: BuildOptions, capabilities: Sequence[str], progress: Progress | None
) -> Path:
    """Build one engine for compute capabilities by their names in the library, and write it to `path`.

    The file is written outside the block that turns exceptions into a BuildError: an OSError says that a disk is full.
    """
    _check_builder()
    import tensorrt_rtx as trt

    qdq_rules.check(source)
    network = Network.of(source)
    failure = f"{LIBRARY} cannot build {source.name} for {' and '.join(capabilities)}"
    with build_errors(failure, network.log.errors, library=LIBRARY):
        members = [trt.ComputeCapability.__members__[capability] for capability in capabilities]
        engine = network.engine(options, members, progress)
    write_engine(path, engine)
    return path
