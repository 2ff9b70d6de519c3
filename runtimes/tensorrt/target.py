"""Target tensorrt: an engine built by NVIDIA TensorRT (10.12 or newer, including 11) for the GPU of this machine.

Not tested on a GPU. The code is type-checked against the bindings 10.16 and 11.4, and its call order and error handling
are tested against a fake (tests/runtimes/tensorrt/test_target.py). Untested are the real parser, the availability of
kernels, memory use, numerical results and latency.

The network is strongly typed: TensorRT computes in the types of the ONNX file. These are float32 or float16, and for a
quantized file int8 with float16 for all other operators. TF32 is off, so a float32 model runs in float32. An engine
works with the TensorRT version and GPU it was built with, and with the sizes of BuildOptions. A portable engine works
with GPUs from Ampere on and with later minor versions; its kernels are limited to 48 KiB of shared memory, and there
are fewer of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from runtimes.base.protocols import (
    BuildError,
    BuildOptions,
    Int8Style,
    LayerCounts,
    RuntimeUnavailable,
    first_line,
)
from runtimes.base.registry import check_available, is_installed
from runtimes.tensorrt import qdq_rules
from runtimes.tensorrt.build_steps import build_errors, parse, profile_of, required, shape_range, write_engine
from runtimes.tensorrt.engine import Device, Refused, TensorRTEngine
from runtimes.tensorrt.inspector import summary

if TYPE_CHECKING:
    import tensorrt as trt

T = TypeVar("T")

name = "tensorrt"
description = "NVIDIA TensorRT on CUDA; builds model.engine for this GPU (not yet tested on a GPU)"
devices = ("cuda",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cuda": ("fp32", "fp16", "int8")}
own = ()
# TensorRT's int8 is symmetric with static ranges, and includes convolutions. An int8 product returns the type of its
# scales: with float32 scales, the operators between products would be slower than in a float16 model.
int8 = Int8Style(activations="int8", convolutions=True, rest="fp16")

GET = "pip install tensorrt cuda-bindings"
OLDEST = (10, 12)
TIMINGS = "tensorrt.timing"


def missing() -> str | None:
    """Return None if TensorRT and a CUDA device are available, else the reason and what to install."""
    if util.find_spec("tensorrt") is None:
        return f"tensorrt is not installed; on a machine with an NVIDIA GPU: {GET}"
    if not is_installed("cuda-bindings"):
        return f"cuda-bindings is not installed; it copies data to the GPU; {GET}"
    count = cuda_devices()
    if count is None:
        return f"there is no NVIDIA driver; install the one for your GPU, then {GET}"
    if count == 0:
        return f"the NVIDIA driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?); once it does: {GET}"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Build `<name of the ONNX file>.engine` in `out` and return its path.

    A timing cache in the same folder makes the next build on this machine faster.

    Args:
        source: The model; external data lies in the same folder.
        out: The folder of the engine.
        options: `batches` and `lengths` bound the input sizes; `portable` builds for GPUs from Ampere on.

    Raises:
        RuntimeUnavailable: TensorRT or the GPU is not available.
        BuildError: The file violates a quantization rule, or TensorRT refused it.
    """
    _check_ready(options)
    qdq_rules.check(source)
    import tensorrt as trt

    log, errors = _log()
    with build_errors(f"TensorRT cannot build {source.name}", errors):
        builder = trt.Builder(log)
        # The value of this flag differs between versions, and version 11 ignores it.
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = required(builder.create_network(strong), "it created no network")
        parser = trt.OnnxParser(network, log)  # owns weights of the network, so it must outlive the build
        parse(parser, source)
        config = _config(builder, network, options)
        _use_timings(config, out / TIMINGS)
        plan = required(builder.build_serialized_network(network, config), "it built no engine")
        engine = out / f"{source.stem}.engine"
        write_engine(engine, plan)
        write_engine(out / TIMINGS, required(config.get_timing_cache(), "it returned no timing cache").serialize())
    return engine


def load(path: Path, options: BuildOptions) -> TensorRTEngine:
    """Open an engine that build() wrote.

    Raises:
        RuntimeUnavailable: TensorRT or the GPU is not available.
        BuildError: The file is no engine, or was built for another GPU or TensorRT version.
    """
    _check_ready(options)
    import tensorrt as trt

    if not path.is_file():
        raise BuildError(f"There is no engine {path}.")
    log, errors = _log()
    resources = contextlib.ExitStack()
    with resources, build_errors(f"TensorRT cannot open {path.name}", errors):
        runtime = trt.Runtime(log)
        if options.portable:
            # A portable engine contains the runtime of its TensorRT version as code, which runs only if allowed.
            runtime.engine_host_code_allowed = True
        refused = "it was built for another GPU or TensorRT version, or is damaged: build it again"
        engine = required(runtime.deserialize_cuda_engine(path.read_bytes()), refused)
        no_context = "it created no execution context, possibly for lack of memory"
        context = required(engine.create_execution_context(), no_context)
        device = Device(resources)
        opened = TensorRTEngine(
            engine, context, device, keep=(log, runtime), said=errors, json=trt.LayerInformationFormat.JSON
        )
        device.held = resources.pop_all()
    return opened


def layers(path: Path, options: BuildOptions) -> LayerCounts:
    """Return the layers that TensorRT's engine inspector reports, at the usual input sizes.

    Raises:
        RuntimesError: load() failed, or the inspector's report cannot be read.
    """
    with load(path, options) as engine:
        return summary(engine.described())


def command_lines(onnx: Path, options: BuildOptions) -> dict[str, str]:
    """Return the trtexec command that builds and times the same engine, by TensorRT major version.

    The commands run in the folder of `onnx`. Both build a strongly typed network, the only kind in version 11. Further
    flags match the behaviour of this package: version 10 would copy inputs in every run and sleep while waiting, and
    version 11 would capture a CUDA graph.

    Args:
        onnx: The model, which states the shapes of its inputs.
        options: `batches` and `lengths`, as for build().
    """
    import onnx as onnx_package

    graph = onnx_package.load(str(onnx), load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    shapes = {key: tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kinds[key]) for key in kinds}
    ranges = {key: shape_range(shape, options) for key, shape in shapes.items() if -1 in shape}
    flags = [f"--onnx={onnx.name}", f"--saveEngine={onnx.stem}.engine", f"--timingCacheFile={TIMINGS}", "--noTF32"]
    for i, kind in enumerate(("min", "opt", "max") if ranges else ()):
        sizes = (f"{key}:{'x'.join(map(str, bounds[i]))}" for key, bounds in ranges.items())
        flags.append(f"--{kind}Shapes={','.join(sizes)}")
    flags.append("--profilingVerbosity=detailed")
    flags += ["--hardwareCompatibilityLevel=ampere+", "--versionCompatible"] if options.portable else []
    own = {"10": ["--stronglyTyped", "--useSpinWait", "--noDataTransfers"], "11": ["--noCudaGraph"]}
    return {version: shlex.join(["trtexec", *flags, *more]) for version, more in own.items()}


def cuda_devices() -> int | None:
    """Return the number of CUDA devices; None without a driver. Calling the driver directly is the fastest way."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _check_ready(options: BuildOptions) -> None:
    """Raise RuntimeUnavailable unless the device and TensorRT 10.12 or newer are available."""
    check_available(name, missing(), devices, options)
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise RuntimeUnavailable(f"TensorRT is installed but cannot be loaded: {first_line(error)}.") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise RuntimeUnavailable(
            f"Found TensorRT {trt.__version__}; expected 10.12 or newer: pip install --upgrade tensorrt."
        )


def _log() -> tuple[trt.ILogger, list[str]]:
    """Return a logger and the list to which it appends error messages; it discards all other messages."""
    import tensorrt as trt

    errors: list[str] = []
    severities = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]  # Any where TensorRT is not installed
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in severities:
                errors.append(msg)

    return Log(), errors


def _config(builder: trt.Builder, network: trt.INetworkDefinition, options: BuildOptions) -> trt.IBuilderConfig:
    """Return the builder configuration; as by default, workspace memory is unlimited."""
    import tensorrt as trt

    config = required(builder.create_builder_config(), "it created no builder configuration")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # A float32 model must run in float32, otherwise the parity check against torch fails.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    profile = profile_of(builder, network, options)
    if profile is not None and config.add_optimization_profile(profile) < 0:
        raise Refused(f"it rejected the profile with batches {options.batches} and lengths {options.lengths}")
    return config


def _use_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Use the timing cache of earlier builds if it matches this GPU and TensorRT version, else an empty one."""
    old = path.read_bytes() if path.is_file() else b""
    with contextlib.suppress(Exception):  # pybind raises various exceptions for a damaged file
        if config.set_timing_cache(config.create_timing_cache(old), False):
            return
    if not config.set_timing_cache(required(config.create_timing_cache(b""), "it created no timing cache"), False):
        raise Refused("it rejected an empty timing cache")
