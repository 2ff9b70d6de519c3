"""What every target promises: the Runtime and Engine protocols, their options and errors, and how targets are found."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

DEVICES = ("cpu", "cuda")
# What an engine computes its matrix products in. int8-dynamic finds the ranges of activations at run time, int4 has
# weights of 4 bits only. The rest of a model stays in float: in 16 bits with fp16 and bf16, else in 32.
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4")

Feeds: TypeAlias = Mapping[str, npt.NDArray[Any]]
DTypes: TypeAlias = Mapping[str, "np.dtype[Any]"]
# Per input the size of each axis, None for an axis of any size. None in place of the tuple: the file does not say.
Shapes: TypeAlias = Mapping[str, "tuple[int | None, ...] | None"]

Opened = TypeVar("Opened")
Self = TypeVar("Self", bound="Closing[Any]")


class RuntimesError(Exception):
    """Something asked of a runtime cannot be done; the message is one sentence for the user."""


class RuntimeUnavailable(RuntimesError):
    """The target, or the device asked of it, does not exist on this machine."""


class BuildError(RuntimesError):
    """The engine could not be built from the ONNX file, or opened."""


@dataclass(frozen=True)
class BuildOptions:
    """Where an engine runs, and on which sizes.

    A runtime that takes any size ignores the sizes; one that plans its memory and kernels ahead is quickest at the
    middle one and refuses what lies outside.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads for one inference; None leaves it to the runtime, which takes all physical cores.
        spinning: Let threads wait actively between runs. Quicker for one engine, but several open ones then take the
            cores from each other: turn it off for those.
        batches: Smallest, usual and largest size of a free first axis, the batch.
        lengths: Smallest, usual and largest size of every other free axis, such as the tokens of a text, or of its
            cache, which is empty at first.
        precision: The precision to build in. One that the target does not make itself is that of the file already.
        samples: Gives a fresh stream of calibration batches to a target that quantizes by itself.
        portable: Build an engine that runs on other GPUs and with other versions too, at some cost in speed.

    Raises:
        RuntimesError: An option has a value that no runtime takes.
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
            raise RuntimesError(f"Found threads={self.threads}; expected at least 1, or none given for all cores.")
        for name, sizes, least in (("batches", self.batches, 1), ("lengths", self.lengths, 0)):
            if not least <= sizes[0] <= sizes[1] <= sizes[2]:
                raise RuntimesError(
                    f"Found {name}={sizes}; expected three sizes of at least {least}: smallest, usual and largest."
                )


@dataclass(frozen=True)
class Int8Style:
    """How an int8 file has to be written for a target.

    Attributes:
        activations: "uint8" with a zero point, or symmetric "int8".
        convolutions: Whether convolutions get int8 inputs too.
        quantizers: What writes the file: this package, and others whose file may be quicker there.
        rest: What everything else computes in, scales included; norms and softmax stay in fp32. Of ranges fixed in the
            file only.
    """

    activations: Literal["uint8", "int8"]
    convolutions: bool
    quantizers: tuple[str, ...] = ("compressor",)
    rest: Literal["fp32", "fp16"] = "fp32"


@dataclass(frozen=True)
class Layers:
    """What a runtime made of the model: its layers after fusion, by its own account.

    Attributes:
        count: How many there are, constants and the ends left out.
        precisions: How many there are of each precision: the narrowest type that a layer reads, "other" for those that
            read no floats, "unknown" where the runtime does not tell.
        kinds: How many there are of each kind, in the runtime's words.
        fused_attention: Whether there are kernels for a whole attention; None where that cannot be told, as in a model
            without attention.
    """

    count: int
    precisions: Mapping[str, int]
    kinds: Mapping[str, int]
    fused_attention: bool | None


class Engine(Protocol):
    """An opened executable; a context manager, so that its threads and memory are gone when the block ends.

    Feeds must hold all `inputs`, with the dtype and shape stated for each; others are not looked at. Anything else
    raises RuntimesError, and so does every use after close().
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
        """The shape of each input, None for an axis of any size."""

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to where the engine runs; each call of the result is one complete inference on them."""

    def close(self) -> None:
        """Give back threads and memory. Closing twice is allowed."""

    def __enter__(self) -> Engine:
        """Return the engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""


class Closing(Generic[Opened]):
    """The closing half of an engine: holds what its library opened until close(), and refuses every use after that."""

    def __init__(self, opened: Opened) -> None:
        self._opened: Opened | None = opened

    def close(self) -> None:
        """Give back threads and memory. Closing twice is allowed."""
        self._opened = None

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
    """What a target file defines at module level: its facts and three functions."""

    @property
    def name(self) -> str:
        """The file's name, and what `--target` takes."""

    @property
    def description(self) -> str:
        """One line for `compressor targets`."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices it can run on, the preferred one first."""

    @property
    def source(self) -> Literal[".onnx", ".pt2", "/config.json"]:
        """What it builds from: an ONNX file, a saved torch.export.ExportedProgram, or a folder with a checkpoint."""

    @property
    def precisions(self) -> Mapping[str, tuple[str, ...]]:
        """Those in which it computes on each device, fp32 first; what it would only emulate there is left out."""

    @property
    def own(self) -> tuple[str, ...]:
        """The precisions that it makes itself, from the float file; others are written into the file."""

    @property
    def int8(self) -> Int8Style:
        """How an int8 file is written for it."""

    def missing(self) -> str | None:
        """Return None where the target can be used, else the reason and what to install; imports no engine."""

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        """Make an engine from a file of the kind it wants and return its path.

        Args:
            source: The model; external data lies next to it.
            out: The folder for what has to be written. A target that runs the ONNX file itself writes nothing.
            options: Where the engine will run, and in which precision.

        Raises:
            RuntimeUnavailable: This machine lacks the runtime or the device.
            BuildError: The runtime refused the model.
        """

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """Open what build() returned. Raises like build()."""

    def layers(self, path: Path, options: BuildOptions) -> Layers | None:
        """Describe what build() returned, at its usual sizes; None where the runtime does not tell.

        Raises:
            RuntimesError: as load() does, or what the runtime tells cannot be read.
        """


def taken(feeds: Feeds, dtypes: DTypes, shapes: Shapes) -> dict[str, npt.NDArray[Any]]:
    """The feeds of the stated names, each with its dtype and shape; what else there is stays out.

    A model that lost layers takes less than the data gives, such as no cache for an attention that is gone. Engines
    differ in what they do with a wrong input (convert, crash, read beyond the end), hence one check for all.

    Raises:
        RuntimesError: one is missing, or of another dtype or shape.
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
def quiet() -> Iterator[None]:
    """Keep a library, torch above all, from logging, warning and printing: what matters is in its error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, for use inside a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(found) == len(expected) and all(e is None or f == e for f, e in zip(found, expected, strict=True))


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "(none)"


def _shape(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
