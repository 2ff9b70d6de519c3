"""Precisions below float32: support by targets, records of conversions, and the choice of the fastest.

A precision is either written into the ONNX file by this package or applied by the target to the float file
(`Runtime.own`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor.choices import AUTO
from compressor.errors import CompressorError
from runtimes.base.protocols import PRECISIONS, Runtime
from runtimes.base.registry import runtime, targets

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.quantize.int8_search import Quantized
    from compressor.quantize.qdq_rewrite import Kept


class PrecisionError(CompressorError):
    """The target does not support the precision on the device."""


class Source(NamedTuple):
    """An ONNX file or checkpoint and the precision to build its engine in."""

    path: Path
    precision: str = "fp32"


@dataclass(frozen=True)
class Converted:
    """Record of the conversion of a variant to a precision.

    Args:
        precision: the precision.
        by: the quantizer: ``compressor``, ``nncf``, ``onnxruntime``, or the name of the target.
        loss: expected loss against the float engine on validation data in percent; None if not measured.
        quantized: result of this package's int8 quantizer, None for other quantizers.
        tried: loss and latency of each quantizer's file, where several were tried.
        rest: precision of the nodes around int8 products, or around the products with int4 weights.
        float32: layers of an fp16 file that stay in float32, because their values exceed fp16.
        unquantized: layers of an int4 file whose weights stay in float, because of their shape.
        refused: quantizers of other packages that failed, with the reason.
    """

    precision: str
    by: str
    loss: float | None
    quantized: Quantized | None = None
    tried: tuple[dict[str, Any], ...] = ()
    rest: str = "fp32"
    float32: tuple[Kept, ...] = ()
    unquantized: tuple[Kept, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values, with the fields of `quantized` at the top level."""
        inner = {} if self.quantized is None else asdict(self.quantized)
        outer: dict[str, Any] = {"precision": self.precision, "by": self.by, "loss": self.loss}
        outer |= {"tried": list(self.tried)}
        outer |= {"float32": [asdict(kept) for kept in self.float32]}
        outer |= {"unquantized": [asdict(kept) for kept in self.unquantized]} if self.unquantized else {}
        outer |= {"refused": dict(self.refused)} if self.refused else {}
        return inner | outer | ({} if self.rest == "fp32" and self.quantized is None else {"rest": self.rest})


@dataclass(frozen=True)
class Trial:
    """One precision tried on the result: latency, loss against fp32 on validation data, and verdict.

    Args:
        precision: the precision.
        milliseconds: latency of one inference in the quietest burst; None if the engine was not built.
        speedup: fp32 latency divided by this latency.
        loss: loss in percent; None where no quality may be stated.
        verdict: ``chosen``, or the reason against it.
    """

    precision: str
    milliseconds: float | None
    speedup: float | None
    loss: float | None
    verdict: str


def table(trials: Sequence[dict[str, Any]]) -> Table:
    """Return a terminal table of the precisions that ``auto`` tried."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="Precisions tried on the result", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("precision", "ms", "speed-up", "expected loss, %", ""):
        shown.add_column(heading, justify="right" if heading else "left")
    for trial in trials:
        figures = zip(("milliseconds", "speedup", "loss"), ("{:.2f}", "{:.2f}x", "{:.2f}"), strict=True)
        values = ["" if trial[key] is None else form.format(trial[key]) for key, form in figures]
        shown.add_row(trial["precision"], *values, escape(trial["verdict"]))
    return shown


def check_precision(target: Runtime, precision: str, device: str) -> None:
    """Check that the target supports the precision on the device.

    Raises:
        PrecisionError: it does not. The message names the precisions of the target on the device and the targets that
            have this precision.
    """
    supported = target.precisions.get(device, ())
    if precision in (AUTO, "fp32", *supported):  # an unsupported device is reported elsewhere, also for fp32
        return
    others = [name for name in targets() if precision in runtime(name).precisions.get(device, ())]
    elsewhere = f"; {precision} on {device} needs --target {' or '.join(others)}" if others else ""
    there = f"; it has {', '.join(supported)} there" if supported else ""
    raise PrecisionError(f"target {target.name} has no {precision} on {device}{there}{elsewhere}.")


def choose_precision(
    milliseconds: dict[str, float], losses: dict[str, float | None], refused: dict[str, str], limit: float
) -> tuple[str, tuple[Trial, ...]]:
    """Return the fastest precision whose loss is within the limit, and a trial with a verdict for each precision.

    Args:
        milliseconds: latency of each precision that was built, including fp32.
        losses: loss of each of these against fp32 in percent; None where no quality may be stated.
        refused: precisions that could not be built, with the reason.
        limit: largest allowed loss in percent.

    >>> choose_precision({"fp32": 4.0, "int8": 2.0}, {"fp32": 0.0, "int8": 3.0}, {}, 0.5)[0]
    'fp32'
    """
    whole = milliseconds["fp32"]
    fitting = [name for name in milliseconds if (losses[name] or 0.0) <= limit]
    chosen = min(fitting, key=milliseconds.__getitem__)

    def verdict(name: str) -> str:
        if name == chosen:
            return "chosen"
        if name == "fp32":
            return "reference for the other precisions"
        if name not in fitting:
            return f"loses {losses[name]:.2f} %, more than {limit:g} %"
        return "not faster than fp32" if milliseconds[name] >= whole else f"slower than {chosen}"

    trials = [Trial(name, ms, whole / ms, losses[name], verdict(name)) for name, ms in milliseconds.items()]
    trials += [Trial(name, None, None, None, reason) for name, reason in refused.items()]
    return chosen, tuple(sorted(trials, key=lambda trial: PRECISIONS.index(trial.precision)))
