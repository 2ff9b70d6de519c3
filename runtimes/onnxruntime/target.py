"""Target onnxruntime: the ONNX file is the engine, run by ONNX Runtime on the CPU or on a CUDA device."""

from __future__ import annotations

import contextlib
import io
import tempfile
from importlib import util
from pathlib import Path
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
    Layers,
    RuntimesError,
    RuntimeUnavailable,
    Shapes,
    first_line,
    taken,
)
from runtimes.base.registry import installed, need
from runtimes.onnxruntime.io_binding import Bound, Cache, Several, run_errors
from runtimes.onnxruntime.kv_cache_io import calls, shared
from runtimes.onnxruntime.optimized_graph import summary

name = "onnxruntime"
description = "ONNX Runtime on the CPU or on CUDA; runs model.onnx itself"
devices = ("cpu", "cuda")
source: Literal[".onnx"] = ".onnx"
# On CUDA it would compute Q/DQ in float and leave dynamic quantization to the CPU: there is no kernel for either. The
# CPU has few kernels for 16 bits: it would compute in float and convert before and after.
precisions = {"cpu": ("fp32", "int8", "int8-dynamic", "int4"), "cuda": ("fp32", "fp16")}
own = ()
# Its CPU kernels run a convolution in int8 only if the output is quantized too, and uint8 activations lose less.
int8 = Int8Style(activations="uint8", convolutions=False)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
ERRORS_ONLY = 3
NUMPY_KINDS = frozenset(
    {"bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
)
GET_CUDA = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


def missing() -> str | None:
    """Return None where ONNX Runtime can be used, else the reason and the command that changes it."""
    if util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime (for CUDA: pip install onnxruntime-gpu)"
    if installed("onnxruntime") and installed("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu (CPU alone: onnxruntime)"
        )
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Check that ONNX Runtime opens the model and return its path: for this target the portable file is the engine.

    Nothing is written to `out`: ONNX Runtime optimises while opening, and what it could save fits no other machine.

    Raises:
        RuntimeUnavailable: ONNX Runtime or its CUDA provider is not there.
        BuildError: ONNX Runtime refused the model.
    """
    load(source, options).close()
    return source


def load(path: Path, options: BuildOptions) -> OnnxRuntimeEngine:
    """Open an ONNX file, with all graph optimisations.

    Args:
        path: The model; external data lies next to it.
        options: Device and threads.

    Raises:
        RuntimeUnavailable: ONNX Runtime or its CUDA provider is not there.
        BuildError: ONNX Runtime refused the model.
    """
    need(name, missing(), devices, options)
    if not path.is_file():
        raise BuildError(f"There is no ONNX file {path}.")
    return OnnxRuntimeEngine(_open(path, options), device=options.device)


def layers(path: Path, options: BuildOptions) -> Layers | None:
    """Return the layers of the graph that ONNX Runtime makes of a model for this device.

    None without the package onnx, which reads that graph and which no engine needs.

    Raises:
        RuntimesError: as load() does.
    """
    need(name, missing(), devices, options)
    try:
        import onnx  # noqa: F401
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder, "optimised.onnx")
        _open(path, options, optimised)
        return summary(optimised)


class OnnxRuntimeEngine(Closing[Any]):
    """An open ONNX Runtime session; see runtimes.base.Engine."""

    def __init__(self, session: Any, *, device: str) -> None:
        super().__init__(session)
        self._device = device
        self.inputs: tuple[str, ...] = tuple(value.name for value in session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(value.name for value in session.get_outputs())
        self.input_dtypes: DTypes = {value.name: _dtype(value) for value in session.get_inputs()}
        self.input_shapes: Shapes = {value.name: _shape(value) for value in session.get_inputs()}
        self._shared = shared(session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        session = self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        with run_errors():
            found = [session.run(list(self.outputs), dict(part)) for part in self._parts(feeds)]
        values = found[0] if len(found) == 1 else map(np.concatenate, zip(*found, strict=True))
        return dict(zip(self.outputs, values, strict=True))

    def bind(self, feeds: Feeds) -> Bound | Several:
        """Copy the feeds to the device; each call of the result is one inference on them, its outputs staying there.

        Keys and values are written behind those of the past, in one buffer, where the file allows it.
        """
        self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        parts = [Bound(self._live, self.outputs, part, self._device, self._shared) for part in self._parts(feeds)]
        return parts[0] if len(parts) == 1 else Several(parts)

    def cache(self, rows: int, most: int) -> Cache:
        """An empty cache for so many texts of at most so many tokens; each call of it reads further ones.

        Raises:
            RuntimesError: the file has none that can be written in place, as target onnxruntime_fused makes them.
        """
        self._live()
        if not self._shared:
            raise RuntimesError(
                "This file has no cache that can be written in place; expected a language model, built for "
                "onnxruntime_fused."
            )
        shapes = {past: self.input_shapes[past] for past in self._shared.values()}
        sizes = {past: (rows, shape[1] or 0, most, shape[3] or 0) for past, shape in shapes.items() if shape}
        told = [name for name in self.inputs if name not in sizes]
        dtypes = {name: self.input_dtypes[name] for name in told}
        return Cache(self._live, self._shared, sizes, (dtypes, {name: self.input_shapes[name] for name in told}))

    def _parts(self, feeds: Feeds) -> list[Feeds]:
        """The calls that one inference takes."""
        return [feeds] if self._shared is None else calls(feeds)


def _open(path: Path, options: BuildOptions, optimised: Path | None = None) -> Any:
    """Open a session, and let it write the graph that it runs where that is wanted."""
    import onnxruntime as ort

    if options.device == "cuda":
        _need_cuda(ort)
    try:
        asked = _session_options(ort, options)
        if optimised is not None:
            asked.optimized_model_filepath = str(optimised)
            # Beside it, because protobuf ends at 2 GB.
            weights = "session.optimized_model_external_initializers_file_name"
            asked.add_session_config_entry(weights, f"{optimised.name}.data")
        session = ort.InferenceSession(str(path), asked, providers=_providers(options.device))
    except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
        raise BuildError(f"ONNX Runtime cannot open {path.name}: {first_line(error)}.") from error
    if options.device == "cuda" and session.get_providers()[0] != CUDA:
        # It has logged why and gone on with the CPU: the very thing that must not pass for a CUDA result.
        raise RuntimeUnavailable(
            f"ONNX Runtime could not start its CUDA provider (found {session.get_providers()[0]}); it needs a CUDA "
            "device and the CUDA and cuDNN libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'."
        )
    return session


def _need_cuda(ort: Any) -> None:
    """Raise RuntimeUnavailable unless this ONNX Runtime was built for CUDA; load the CUDA libraries of pip packages."""
    if CUDA not in ort.get_available_providers():
        raise RuntimeUnavailable(f"This ONNX Runtime is built without CUDA; {GET_CUDA}, or use --device cpu.")
    if hasattr(ort, "preload_dlls"):
        # It prints what it does not find; whether the provider starts is checked on the session itself.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _session_options(ort: Any, options: BuildOptions) -> Any:
    result = ort.SessionOptions()
    result.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    result.log_severity_level = ERRORS_ONLY
    result.inter_op_num_threads = 1
    if options.threads is not None:
        result.intra_op_num_threads = options.threads
    result.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    return result


def _providers(device: str) -> list[Any]:
    """Return the providers in order of preference; the CPU follows CUDA for the shape arithmetic that belongs there."""
    # TF32 off: a float32 model is to be run in float32, or parity with torch would fail for no fault of the model.
    return [(CUDA, {"use_tf32": "0"}), CPU] if device == "cuda" else [CPU]


def _dtype(value: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of an ONNX Runtime input, whose type reads "tensor(float)"."""
    kind = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(value.type, value.type[len("tensor(") : -1])
    # Not left to np.dtype: it knows bfloat16 as soon as anyone has imported ml_dtypes, which ONNX Runtime refuses.
    if kind not in NUMPY_KINDS:
        raise BuildError(f"Input {value.name!r} has type {value.type}, which cannot be fed from NumPy.")
    dtype: np.dtype[Any] = np.dtype(kind)
    return dtype


def _shape(value: Any) -> tuple[int | None, ...] | None:
    """Return the axes, None for a symbolic one; an empty list stands for a scalar as well as for an unknown rank."""
    return tuple(size if isinstance(size, int) else None for size in value.shape) or None
