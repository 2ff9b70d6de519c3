"""Target onnxruntime: ONNX Runtime on the CPU or on a CUDA device; the ONNX file itself is the engine."""

from __future__ import annotations

import contextlib
import io
import tempfile
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.base.encoder_decoder import EncoderDecoderEngine
from runtimes.base.part_files import open_parts
from runtimes.base.protocols import (
    BuildError,
    BuildOptions,
    Closing,
    DTypes,
    Feeds,
    Int8Style,
    LayerCounts,
    RuntimesError,
    RuntimeUnavailable,
    Shapes,
    check_feeds,
    first_line,
)
from runtimes.base.registry import check_available, is_installed
from runtimes.base.vision_language import VisionLanguageEngine
from runtimes.onnxruntime.io_binding import BoundCall, BoundRows, InPlaceKVCache, run_errors
from runtimes.onnxruntime.kv_cache_io import shared_buffers, split_rows
from runtimes.onnxruntime.optimized_graph import summary

name = "onnxruntime"
description = "ONNX Runtime on the CPU or on CUDA; runs model.onnx itself"
devices = ("cpu", "cuda")
source: Literal[".onnx"] = ".onnx"
# The CUDA provider has no kernels for Q/DQ or dynamic quantization: it would compute the former in float and leave the
# latter to the CPU. The CPU has few 16-bit kernels: it would compute in float and cast before and after.
precisions = {"cpu": ("fp32", "int8", "int8-dynamic", "int8-weight-only", "int4", "int2"), "cuda": ("fp32", "fp16")}
own = ()
# The CPU kernels run a convolution in int8 only if its output is quantized too. uint8 activations lose less quality.
int8 = Int8Style(activations="uint8", convolutions=False)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
ERRORS_ONLY = 3
NUMPY_KINDS = frozenset(
    {"bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
)
# Products with 2-bit weights were tried in releases 1.22 to 1.32: 1.23 and older do not open the file, and 1.24 to 1.26
# leave out the bias by look-up table (onnxruntime#28742).
TWO_BITS_SINCE = (1, 27)
LOOKUP_TABLE = "mlas.use_lut_gemm"  # products of float32 with 2-bit weights alone
GET_CUDA = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


def missing() -> str | None:
    """Return None if ONNX Runtime can be used, else the reason and the command that fixes it."""
    if util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime (for CUDA: pip install onnxruntime-gpu)"
    if is_installed("onnxruntime") and is_installed("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu (CPU alone: onnxruntime)"
        )
    return None


def two_bits_missing() -> str | None:
    """Return None if the installed ONNX Runtime computes products with 2-bit weights, else the reason and the fix."""
    if (reason := missing()) is not None:
        return reason
    import onnxruntime as ort

    if _release(ort) >= TWO_BITS_SINCE:
        return None
    return (
        f"int2 needs ONNX Runtime 1.27 or newer; found {ort.__version__}, which does not open 2-bit weights or leaves "
        "out the bias of their products: pip install --upgrade onnxruntime"
    )


def _release(ort: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in ort.__version__.split(".")[:2])


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Check that ONNX Runtime opens the model and return `source`, which is the engine of this target.

    Nothing is written to `out`: ONNX Runtime optimises when it opens a file, and its optimised graph is specific to
    the machine.

    Raises:
        RuntimeUnavailable: ONNX Runtime or its CUDA provider is not available.
        BuildError: ONNX Runtime refused the model.
    """
    load_file(source, options).close()
    return source


def load(path: Path, options: BuildOptions) -> OnnxRuntimeEngine | EncoderDecoderEngine | VisionLanguageEngine:
    """Open an ONNX file, with all graph optimisations; the first of several files with the others.

    Args:
        path: The model; external data lies in the same folder.
        options: Device and threads.

    Raises:
        RuntimeUnavailable: ONNX Runtime or its CUDA provider is not available.
        BuildError: ONNX Runtime refused the model.
    """
    several = open_parts(path, partial(load_file, options=options))
    return load_file(path, options) if several is None else several


def load_file(path: Path, options: BuildOptions) -> OnnxRuntimeEngine:
    """Open one ONNX file. Raises the errors of load()."""
    check_available(name, missing(), devices, options)
    if not path.is_file():
        raise BuildError(f"There is no ONNX file {path}.")
    return OnnxRuntimeEngine(_open(path, options), device=options.device)


def layers(path: Path, options: BuildOptions) -> LayerCounts | None:
    """Return the layers of ONNX Runtime's optimised graph of a model on this device.

    Return None if the package onnx is not installed; it reads this graph, but engines do not need it.

    Raises:
        RuntimesError: As in load().
    """
    check_available(name, missing(), devices, options)
    try:
        import onnx  # noqa: F401
    except ImportError:
        return None
    # Beside the model, whose folder the caller removes even after a crash; the file is as large as the model.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".layers-") as folder:
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
        self._shared = shared_buffers(session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        session = self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        with run_errors():
            results = [session.run(list(self.outputs), dict(part)) for part in self._parts(feeds)]
        values = results[0] if len(results) == 1 else map(np.concatenate, zip(*results, strict=True))
        return dict(zip(self.outputs, values, strict=True))

    def bind(self, feeds: Feeds) -> BoundCall | BoundRows:
        """Copy the feeds to the device and return a function that runs one inference; outputs stay on the device.

        If the file allows shared buffers, new keys and values are written in place behind the past ones.
        """
        self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        parts = [BoundCall(self._live, self.outputs, part, self._device, self._shared) for part in self._parts(feeds)]
        return parts[0] if len(parts) == 1 else BoundRows(parts)

    def cache(self, rows: int, most: int) -> InPlaceKVCache:
        """Return an empty in-place KV cache; each call of it appends tokens.

        Args:
            rows: The number of sequences in the batch.
            most: The capacity in tokens per row, padding included.

        Raises:
            RuntimesError: The file has no cache that can be updated in place, as target onnxruntime_fused builds it.
        """
        self._live()
        if not self._shared:
            raise RuntimesError(
                "This file has no KV cache that can be updated in place; expected a language model built for "
                "onnxruntime_fused."
            )
        shapes = {past: self.input_shapes[past] for past in self._shared.values()}
        sizes = {past: (rows, shape[1] or 0, most, shape[3] or 0) for past, shape in shapes.items() if shape}
        others = [name for name in self.inputs if name not in sizes]
        dtypes = {name: self.input_dtypes[name] for name in others}
        return InPlaceKVCache(
            self._live, self._shared, sizes, (dtypes, {name: self.input_shapes[name] for name in others})
        )

    def _parts(self, feeds: Feeds) -> list[Feeds]:
        """Split the feeds into the session calls of one inference; see kv_cache_io.calls."""
        return [feeds] if self._shared is None else split_rows(feeds)


def _open(path: Path, options: BuildOptions, optimised: Path | None = None) -> Any:
    """Open a session and, if `optimised` is given, write its optimised graph to that path."""
    import onnxruntime as ort

    if options.device == "cuda":
        _need_cuda(ort)
    try:
        settings = session_options(options)
        if optimised is not None:
            settings.optimized_model_filepath = str(optimised)
            # In a separate file, because protobuf is limited to 2 GB.
            weights = "session.optimized_model_external_initializers_file_name"
            settings.add_session_config_entry(weights, f"{optimised.name}.data")
        session = ort.InferenceSession(str(path), settings, providers=_providers(options.device))
    except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
        raise BuildError(f"ONNX Runtime cannot open {path.name}: {first_line(error)}.") from error
    if options.device == "cuda" and session.get_providers()[0] != CUDA:
        # ONNX Runtime logs the reason and falls back to the CPU; that must not count as a CUDA result.
        raise RuntimeUnavailable(
            f"ONNX Runtime could not start its CUDA provider (found {session.get_providers()[0]}); it needs a CUDA "
            "device and the CUDA and cuDNN libraries: pip install 'onnxruntime-gpu[cuda,cudnn]'."
        )
    return session


def _need_cuda(ort: Any) -> None:
    """Raise RuntimeUnavailable unless this ONNX Runtime supports CUDA; preload the CUDA libraries of pip packages."""
    if CUDA not in ort.get_available_providers():
        raise RuntimeUnavailable(f"This ONNX Runtime is built without CUDA; {GET_CUDA}, or use --device cpu.")
    if hasattr(ort, "preload_dlls"):
        # It prints the libraries it does not find. The session check in _open() decides whether CUDA works.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def session_options(options: BuildOptions) -> Any:
    """Return ONNX Runtime's options of a session, with all graph optimisations and without warnings."""
    import onnxruntime as ort

    result = ort.SessionOptions()
    result.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    result.log_severity_level = ERRORS_ONLY
    result.inter_op_num_threads = 1
    if options.threads is not None:
        result.intra_op_num_threads = options.threads
    result.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    if _release(ort) >= TWO_BITS_SINCE:
        result.add_session_config_entry(LOOKUP_TABLE, "1")
    return result


def _providers(device: str) -> list[Any]:
    """Return the providers in order of preference; after CUDA, the CPU computes shapes."""
    # TF32 off: a float32 model must run in float32, otherwise the parity check against torch fails.
    return [(CUDA, {"use_tf32": "0"}), CPU] if device == "cuda" else [CPU]


def _dtype(value: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of an ONNX Runtime input, whose type is a string such as "tensor(float)"."""
    kind = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(value.type, value.type[len("tensor(") : -1])
    # np.dtype is no sufficient check: it accepts bfloat16 once ml_dtypes is imported, but ONNX Runtime refuses it.
    if kind not in NUMPY_KINDS:
        raise BuildError(f"Input {value.name!r} has type {value.type}, which cannot be fed from NumPy.")
    dtype: np.dtype[Any] = np.dtype(kind)
    return dtype


def _shape(value: Any) -> tuple[int | None, ...] | None:
    """Return the axis sizes, None for a dynamic axis; None for an empty shape, which means a scalar or unknown rank."""
    return tuple(size if isinstance(size, int) else None for size in value.shape) or None
