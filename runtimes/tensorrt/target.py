"""Target tensorrt: an engine built by NVIDIA TensorRT (10.12 or newer, 11 included) for the GPU of this machine.

Never run on a GPU: type-checked against the bindings 10.16 and 11.4; the order of its calls, and what it does where one
fails, tested against a stand-in (tests/test_runtimes_tensorrt.py). Whether the real parser takes a file and kernels
exist for it, memory, numbers and speed are open.

The network is strongly typed: TensorRT computes in the types of the ONNX file. Those are float32 or float16, and int8
with float16 around it where the file has been quantized; TF32 is off, so that a float32 model is held to float32. An
engine fits the TensorRT version and the GPU it was built with, and the sizes stated in BuildOptions; a portable one
fits GPUs from Ampere on and later minor versions, with kernels of 48 KiB of shared memory and fewer to choose from.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from runtimes.base.protocols import (
    BuildError,
    BuildOptions,
    Int8Style,
    Layers,
    RuntimesError,
    RuntimeUnavailable,
    first_line,
)
from runtimes.base.registry import installed, need
from runtimes.tensorrt import qdq_rules
from runtimes.tensorrt.engine import Device, Refused, Shape, TensorRTEngine, reason
from runtimes.tensorrt.inspector import summary

if TYPE_CHECKING:
    import tensorrt as trt

T = TypeVar("T")

name = "tensorrt"
description = "NVIDIA TensorRT on CUDA; builds model.engine for this GPU (written without one: never run yet)"
devices = ("cuda",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cuda": ("fp32", "fp16", "int8")}
own = ()
# Its int8 is symmetric, with ranges fixed in the file, and it has int8 convolutions. An int8 product returns the type
# of its scales: with scales in float32 all between the products would be slower than in a model of float16 alone.
int8 = Int8Style(activations="int8", convolutions=True, rest="fp16")

GET = "pip install tensorrt cuda-bindings"
OLDEST = (10, 12)
TIMINGS = "tensorrt.timing"


def missing() -> str | None:
    """Return None where TensorRT and a CUDA device are there, else the reason and what to install."""
    if util.find_spec("tensorrt") is None:
        return f"tensorrt is not installed; on a machine with an NVIDIA GPU: {GET}"
    if not installed("cuda-bindings"):
        return f"cuda-bindings is not installed, which copies data to the GPU; {GET}"
    found = _cuda_devices()
    if found is None:
        return f"there is no NVIDIA driver; install the one for your GPU, then {GET}"
    if found == 0:
        return f"the NVIDIA driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?); once it does: {GET}"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Build `<name of the ONNX file>.engine` in `out` and return its path.

    Beside it lies a file of kernel timings, which makes the next build on this machine quicker.

    Args:
        source: The model; external data lies next to it.
        out: The folder of the engine.
        options: `batches` and `lengths` bound the sizes that the engine will take; `portable` frees it from this GPU.

    Raises:
        RuntimeUnavailable: TensorRT or the GPU is not there.
        BuildError: The file breaks a rule of quantization, or TensorRT refused it.
    """
    _check_ready(options)
    qdq_rules.check(source)
    import tensorrt as trt

    log, said = _log()
    with _stated(f"TensorRT cannot build {source.name}", said):
        builder = trt.Builder(log)
        # The number of this flag is another one in each version, and 11 ignores it.
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = _made(builder.create_network(strong), "it makes no network")
        parser = trt.OnnxParser(network, log)  # owns weights of the network: it must live until the engine is built
        _parse(parser, source)
        config = _config(builder, network, options)
        _use_timings(config, out / TIMINGS)
        plan = _made(builder.build_serialized_network(network, config), "it makes no engine")
        engine = out / f"{source.stem}.engine"
        _write(engine, plan)
        _write(out / TIMINGS, _made(config.get_timing_cache(), "it returns no timings").serialize())
    return engine


def load(path: Path, options: BuildOptions) -> TensorRTEngine:
    """Open an engine that build() wrote.

    Raises:
        RuntimeUnavailable: TensorRT or the GPU is not there.
        BuildError: This is no engine, or it was built for another GPU or TensorRT.
    """
    _check_ready(options)
    import tensorrt as trt

    if not path.is_file():
        raise BuildError(f"There is no engine {path}.")
    log, said = _log()
    held = contextlib.ExitStack()
    with held, _stated(f"TensorRT cannot open {path.name}", said):
        runtime = trt.Runtime(log)
        if options.portable:
            # It brings the runtime of the version that built it, as code to be run: refused unless allowed.
            runtime.engine_host_code_allowed = True
        refused = "it was built for another GPU or TensorRT version, or is damaged: build it again"
        engine = _made(runtime.deserialize_cuda_engine(path.read_bytes()), refused)
        context = _made(engine.create_execution_context(), "it makes no execution context, maybe for want of memory")
        device = Device(held)
        opened = TensorRTEngine(engine, context, device, keep=(log, runtime), said=said)
        device.held = held.pop_all()
    return opened


def layers(path: Path, options: BuildOptions) -> Layers:
    """Return what TensorRT's inspector says of an engine, at the sizes it is quickest at.

    Raises:
        RuntimesError: as load() does, or the inspector says nothing that can be read.
    """
    with load(path, options) as engine:
        return summary(engine.described())


def command_lines(onnx: Path, options: BuildOptions) -> dict[str, str]:
    """Return what builds and times the same engine with TensorRT's own tool, by major version; both run beside `onnx`.

    Types are those of the file in both: 11 knows no other network. 10 copies inputs for each run and waits asleep
    unless told not to, and 11 captures a CUDA graph unless told not to; this package does none of these.

    Args:
        onnx: The model, with its inputs' shapes.
        options: `batches` and `lengths`, as for build().
    """
    import onnx as onnx_package

    graph = onnx_package.load(str(onnx), load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    shapes = {key: tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kinds[key]) for key in kinds}
    ranges = {key: _range(shape, options) for key, shape in shapes.items() if -1 in shape}
    flags = [f"--onnx={onnx.name}", f"--saveEngine={onnx.stem}.engine", f"--timingCacheFile={TIMINGS}", "--noTF32"]
    for place, kind in enumerate(("min", "opt", "max") if ranges else ()):
        sizes = (f"{key}:{'x'.join(map(str, sized[place]))}" for key, sized in ranges.items())
        flags.append(f"--{kind}Shapes={','.join(sizes)}")
    flags.append("--profilingVerbosity=detailed")
    flags += ["--hardwareCompatibilityLevel=ampere+", "--versionCompatible"] if options.portable else []
    own = {"10": ["--stronglyTyped", "--useSpinWait", "--noDataTransfers"], "11": ["--noCudaGraph"]}
    return {version: shlex.join(["trtexec", *flags, *more]) for version, more in own.items()}


def _cuda_devices() -> int | None:
    """Return how many devices the driver shows, None without a driver. Asks the driver itself, the quickest way."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _check_ready(options: BuildOptions) -> None:
    """Raise RuntimeUnavailable unless the package, new enough, and the device asked for are there."""
    need(name, missing(), devices, options)
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:
        raise RuntimeUnavailable(f"TensorRT is installed but cannot be loaded: {first_line(error)}.") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise RuntimeUnavailable(
            f"Found TensorRT {trt.__version__}; expected 10.12 or newer: pip install --upgrade tensorrt."
        )


def _made(value: T | None, otherwise: str) -> T:
    """Return what TensorRT made; its own types do not always say that there may be none."""
    if value is None:
        raise Refused(otherwise)
    return value


@contextlib.contextmanager
def _stated(what: str, said: list[str]) -> Iterator[None]:
    """Turn every failure inside into a BuildError of one sentence that ends with what TensorRT logged."""
    try:
        yield
    except RuntimesError:
        raise
    except Exception as error:  # pybind raises TypeError, RuntimeError and others
        logged = f" (TensorRT: {reason(said, '')})" if said else ""
        raise BuildError(f"{what}: {first_line(error)}{logged}.") from error


def _log() -> tuple[trt.ILogger, list[str]]:
    """Return a logger and the list to which it adds every error; the rest is not shown."""
    import tensorrt as trt

    said: list[str] = []
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]  # Any where TensorRT is not installed
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in errors:
                said.append(msg)

    return Log(), said


def _parse(parser: trt.OnnxParser, onnx: Path) -> None:
    """Read the file into the parser's network; by path, because weights may lie in a file beside it."""
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(place) for place in range(parser.num_errors)]
    texts = [f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}" for error in errors]
    raise Refused("; ".join(" ".join(text.split()) for text in texts) or "its parser gives no reason")


def _config(builder: trt.Builder, network: trt.INetworkDefinition, options: BuildOptions) -> trt.IBuilderConfig:
    """Return the options of the build; memory for it is not limited, which is TensorRT's default."""
    import tensorrt as trt

    config = _made(builder.create_builder_config(), "it makes no builder configuration")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # A float32 model is to be run in float32, or parity with torch would fail for no fault of the model.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    profile = _made(builder.create_optimization_profile(), "it makes no optimization profile")
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise Refused(f"input {tensor.name!r} holds a shape, which cannot be fed from NumPy")
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *_range(tuple(tensor.shape), options))
    free = any(-1 in tuple(tensor.shape) for tensor in inputs)
    if free and config.add_optimization_profile(profile) < 0:
        raise Refused(f"it takes no batches of {options.batches} and lengths of {options.lengths}")
    return config


def _range(shape: Shape, options: BuildOptions) -> tuple[Shape, Shape, Shape]:
    """Return smallest, usual and largest shape: a free first axis is the batch, any other a length."""

    def sized(place: int) -> Shape:
        sizes = (options.batches if axis == 0 else options.lengths for axis in range(len(shape)))
        return tuple(free[place] if size == -1 else size for size, free in zip(shape, sizes, strict=True))

    return sized(0), sized(1), sized(2)


def _use_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Start from the kernel timings of earlier builds if they are of this GPU and TensorRT, else from none."""
    old = path.read_bytes() if path.is_file() else b""
    with contextlib.suppress(Exception):  # a damaged file: pybind raises what it likes
        if config.set_timing_cache(config.create_timing_cache(old), False):
            return
    if not config.set_timing_cache(_made(config.create_timing_cache(b""), "it makes no timing cache"), False):
        raise Refused("it takes no timing cache")


def _write(path: Path, memory: trt.IHostMemory) -> None:
    """Write all or nothing: half an engine would be opened."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(memoryview(memory))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
