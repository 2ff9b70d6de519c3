"""The Runtime and Engine protocols that every target implements, with build options, errors and input checks."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from runtimes.base.freed_memory import return_freed_memory

DEVICES = ("cpu", "cuda")
# The precision of an engine's matrix products. fp8 is E4M3 with scales as in int8; int8-dynamic computes activation
# ranges at run time; int8-weight-only, int4 and int2 quantize only weights. All other operators compute in float: 16
# bits for fp16 and bf16, otherwise that of `Int8Style.rest`.
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int8-dynamic", "int8-weight-only", "int4", "int2")

Feeds: TypeAlias = Mapping[str, npt.NDArray[Any]]
DTypes: TypeAlias = Mapping[str, "np.dtype[Any]"]
# The size of each axis of every input; None for a dynamic axis. None instead of a tuple means unknown rank.
Shapes: TypeAlias = Mapping[str, "tuple[int | None, ...] | None"]

PAST = "past_input_ids"  # tokens before input_ids, for engines that keep the KV cache themselves

Opened = TypeVar("Opened")
Self = TypeVar("Self", bound="Closing[Any]")


class RuntimesError(Exception):
    """Base class of the errors of this package; the message is one sentence for the user."""


class RuntimeUnavailable(RuntimesError):
    """The target or the requested device is not available on this machine."""


class BuildError(RuntimesError):
    """The engine could not be built from the source file, or its file could not be opened."""


@dataclass(frozen=True)
class BuildOptions:
    """Device, precision and input sizes of an engine.

    A runtime with dynamic shapes ignores the sizes. A runtime that plans memory and kernels ahead optimises for the
    usual size and refuses sizes outside the range.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads for one inference; None leaves the number to the runtime, which uses all physical cores.
        spinning: Let threads busy-wait between runs. This is faster for one engine; turn it off for several open
            engines, which would compete for the cores.
        batches: Smallest, usual and largest size of a dynamic first axis, the batch.
        lengths: Smallest, usual and largest size of every other dynamic axis, such as the token axis or the length of
            the KV cache, which is empty at first.
        precision: The precision to build in. Unless the target converts to it itself, the source file already has it.
        samples: Returns a new iterator over calibration batches, for targets that quantize the model themselves.
        portable: Build an engine that also runs on other GPUs and with other versions, at some cost in speed.

    Raises:
        RuntimesError: An option has a value that no runtime supports.
    """

    device: str = "cpu"
    threads: int | None = None
    spinning: bool = True
    batches: tuple[int, int, int] = (1, 1, 8)
    lengths: tuple[int, int, int] = (1, 128, 512)
    precision: str = "fp32"
    samples: Callable[[], Iterator[Feeds]] | None = field(default=None, compare=False)
    portable: bool = False

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise RuntimesError(f"Unknown device {self.device!r}; expected one of: {', '.join(DEVICES)}.")
        if self.precision not in PRECISIONS:
            raise RuntimesError(f"Unknown precision {self.precision!r}; expected one of: {', '.join(PRECISIONS)}.")
        if self.threads is not None and self.threads < 1:
            raise RuntimesError(f"Found threads={self.threads}; expected at least 1, or no value for all cores.")
        for name, sizes, least in (("batches", self.batches, 1), ("lengths", self.lengths, 0)):
            if not least <= sizes[0] <= sizes[1] <= sizes[2]:
                raise RuntimesError(
                    f"Found {name}={sizes}; expected three sizes of at least {least}: smallest, usual and largest."
                )


@dataclass(frozen=True)
class Int8Style:
    """The form of a quantized ONNX file that a target requires: of int8, and of int4 where it has that.

    Attributes:
        activations: "uint8" with a zero point, or symmetric "int8".
        convolutions: Whether convolutions get int8 inputs too.
        quantizers: The quantizers to try: this package, and others whose file may be faster on this target.
        rest: The float type of scales and of all other operators; norms and softmax stay in fp32. It applies to static
            quantization, and to int4 in blocks.
        int4: The operator that holds int4 weights: MatMulNBits of ONNX Runtime, or DequantizeLinear with blocks.
    """

    activations: Literal["uint8", "int8"]
    convolutions: bool
    quantizers: tuple[str, ...] = ("compressor",)
    rest: Literal["fp32", "fp16"] = "fp32"
    int4: Literal["MatMulNBits", "DequantizeLinear"] = "MatMulNBits"


@dataclass(frozen=True)
class LayerCounts:
    """Counts of an engine's layers after fusion, as the runtime reports them.

    Attributes:
        count: Number of layers, without constants, inputs and outputs.
        precisions: Number of layers by precision, which is the narrowest input type of a layer: "other" for layers
            without float or quantized inputs, "unknown" if the runtime reports no type.
        kinds: Number of layers by kind, in the runtime's own terms.
        fused_attention: Whether the engine has fused attention kernels; None if this cannot be determined, as in a
            model without attention.
    """

    count: int
    precisions: Mapping[str, int]
    kinds: Mapping[str, int]
    fused_attention: bool | None


class Engine(Protocol):
    """A loaded model that runs inferences; a context manager that frees its threads and memory on exit.

    Feeds must contain all `inputs` with the stated dtypes and shapes; additional entries are ignored. Other feeds raise
    RuntimesError, and so does any use after close().
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input names in the order of the ONNX file."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Output names in the order of the ONNX file."""

    @property
    def input_dtypes(self) -> DTypes:
        """The dtype of each input."""

    @property
    def input_shapes(self) -> Shapes:
        """The shape of each input, with None for a dynamic axis."""

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device and return a function that runs one complete inference on them."""

    def close(self) -> None:
        """Free threads and memory. Closing twice is allowed."""

    def __enter__(self) -> Engine:
        """Return the engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""


@runtime_checkable
class HoldsCache(Protocol):
    """An engine that keeps the KV cache itself, so that none of its inputs and outputs holds it.

    Where attention_mask is longer than input_ids, its feeds hold the tokens before them as `PAST`, [rows, tokens].
    """

    def cache_bytes(self, rows: int, tokens: int) -> int:
        """Return the bytes of the keys and values of so many tokens in each of so many rows."""


class Closing(Generic[Opened]):
    """Base class of engines that holds the library's session until close() and refuses any use afterwards."""

    def __init__(self, opened: Opened) -> None:
        self._opened: Opened | None = opened

    def close(self) -> None:
        """Free threads and memory. Closing twice is allowed."""
        if self._opened is not None:
            self._opened = None
            return_freed_memory()

    def __enter__(self: Self) -> Self:
        """Return the engine itself."""
        self._live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
        self.close()

    def _live(self) -> Opened:
        if self._opened is None:
            raise RuntimesError("This engine is closed; load the model again to use it.")
        return self._opened


class Runtime(Protocol):
    """The module-level attributes and functions of a target."""

    @property
    def name(self) -> str:
        """The name of the module, which is the value that `--target` takes."""

    @property
    def description(self) -> str:
        """A one-line description for `compressor targets`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The supported devices, the preferred one first."""

    @property
    def source(self) -> Literal[".onnx", ".pt2", "/config.json", ".gguf"]:
        """The kind of source file: ONNX, a saved torch.export.ExportedProgram, a checkpoint folder, or float GGUF."""

    @property
    def precisions(self) -> Mapping[str, tuple[str, ...]]:
        """The supported precisions by device, fp32 first; precisions that a device only emulates are left out."""

    @property
    def own(self) -> tuple[str, ...]:
        """The precisions that build() converts a float file to; for all others the source file is already converted."""

    @property
    def int8(self) -> Int8Style:
        """The form of int8 ONNX file that the target requires."""

    def missing(self) -> str | None:
        """Return None if the target can be used, else the reason and what to install; imports no engine library."""

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        """Build an engine from a file of the kind that the property `source` states and return its path.

        Args:
            source: The model; external data lies in the same folder.
            out: The output folder. A target that runs the ONNX file itself writes nothing.
            options: Device, precision and sizes of the engine.

        Raises:
            RuntimeUnavailable: This machine lacks the runtime or the device.
            BuildError: The runtime refused the model.
        """

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """Open the engine at the path that build() returned. Raises the errors of build()."""

    def layers(self, path: Path, options: BuildOptions) -> LayerCounts | None:
        """Return the layers of an engine at its usual sizes; None if the runtime does not report them.

        Raises:
            RuntimesError: load() failed, or the runtime's report cannot be read.
        """


def check_feeds(feeds: Feeds, dtypes: DTypes, shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
    """Return the feeds named in `dtypes`, after checking their dtypes and shapes; drop all others.

    A pruned model can have fewer inputs than the data, such as no KV cache for a removed attention. Engines react
    differently to a wrong input (convert, crash, read out of bounds), so all of them use this check.

    Raises:
        RuntimesError: An input is missing, or has another dtype or shape.
    """
    if not set(dtypes) <= set(feeds):
        raise RuntimesError(f"Found inputs {_names(feeds)}; the engine expects {_names(dtypes)}.")
    for name in dtypes:
        _check_feed(name, feeds[name], dtypes[name], shapes[name])
    return {name: feeds[name] for name in dtypes}


def _check_feed(name: str, value: object, dtype: npt.DTypeLike, shape: tuple[int | None, ...] | None) -> None:
    if not isinstance(value, np.ndarray):
        raise RuntimesError(f"Input {name!r}: found {type(value).__name__}; expected a NumPy array.")
    if value.dtype != dtype:
        raise RuntimesError(f"Input {name!r}: found dtype {value.dtype}; expected {dtype}.")
    if shape is not None and not _fits(value.shape, shape):
        raise RuntimesError(f"Input {name!r}: found shape {_shape(value.shape)}; expected {_shape(shape)}.")


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress the log messages, warnings and stderr output of a library; errors are raised as usual."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message without its final period, for use inside a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected, strict=True))


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "(none)"


def _shape(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
