"""Precisions below float32: which a target has, what makes them, and which of several is worth it.

A precision is written into the ONNX file here, or made by the target itself from the float file (`Runtime.own`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor.choices import AUTO
from compressor.errors import CompressorError
from runtimes.base.protocols import PRECISIONS, Runtime
from runtimes.base.registry import runtime, targets

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.quantize.int8_search import Quantized

"""What ``--int8`` takes, and the precision that each stands for."""


class PrecisionError(CompressorError):
    """The target does not compute in that precision on that device."""


class Source(NamedTuple):
    """The file that an engine is built from, and the precision it is built in."""

    path: Path
    precision: str = "fp32"


@dataclass(frozen=True)
class Converted:
    """How a variant got its precision.

    Args:
        precision: the precision.
        by: what made it: ``compressor``, ``nncf``, ``onnxruntime``, or the target itself.
        loss: the loss to expect against the float engine on validation data, in percent; None if not measured.
        quantized: what was quantized in the file, where it was done here.
        tried: what other quantizers' files lost and took, where there were several.
        rest: what the nodes around int8 products compute in.
    """

    precision: str
    by: str
    loss: float | None
    quantized: Quantized | None = None
    tried: tuple[dict[str, Any], ...] = ()
    rest: str = "fp32"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, what was quantized among the others."""
        inner = {} if self.quantized is None else asdict(self.quantized)
        outer = {"precision": self.precision, "by": self.by, "loss": self.loss, "tried": list(self.tried)}
        return inner | outer | ({} if self.quantized is None else {"rest": self.rest})


@dataclass(frozen=True)
class Trial:
    """One precision tried on the result: its time, its loss against fp32 on validation data, and what became of it.

    Args:
        precision: the precision.
        milliseconds: of one inference, those of the quietest burst; None where it could not be built.
        speedup: how many times faster than fp32.
        loss: in percent; None where no quality may be stated.
        verdict: ``chosen``, or why not.
    """

    precision: str
    milliseconds: float | None
    speedup: float | None
    loss: float | None
    verdict: str


def table(trials: Sequence[dict[str, Any]]) -> Table:
    """What ``auto`` found of each precision, for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title="Precisions tried on the result", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("precision", "ms", "speed-up", "expected loss, %", ""):
        shown.add_column(heading, justify="right" if heading else "left")
    for trial in trials:
        figures = zip(("milliseconds", "speedup", "loss"), ("{:.2f}", "{:.2f}x", "{:.2f}"), strict=True)
        values = ["" if trial[key] is None else form.format(trial[key]) for key, form in figures]
        shown.add_row(trial["precision"], *values, trial["verdict"])
    return shown


def check(target: Runtime, precision: str, device: str) -> None:
    """Refuse a precision that the target would compute in another, on another device than asked for, or not at all.

    Raises:
        PrecisionError: with what the target can do there, and who else has the precision.
    """
    had = target.precisions.get(device, ())
    if precision in (AUTO, "fp32", *had):  # a device that it lacks is refused as such, with fp32
        return
    others = [name for name in targets() if precision in runtime(name).precisions.get(device, ())]
    elsewhere = f"; {precision} on {device} needs --target {' or '.join(others)}" if others else ""
    there = f"; it has {', '.join(had)} there" if had else ""
    raise PrecisionError(f"target {target.name} has no {precision} on {device}{there}{elsewhere}.")


def judged(
    milliseconds: dict[str, float], losses: dict[str, float | None], refused: dict[str, str], limit: float
) -> tuple[str, tuple[Trial, ...]]:
    """The fastest precision within the budget, and the verdict on each; fp32 where none is faster.

    Args:
        milliseconds: of each precision that was built, fp32 among them.
        losses: of each, against fp32.
        refused: why a precision could not be built.
        limit: most that may be lost, in percent.

    >>> judged({"fp32": 4.0, "int8": 2.0}, {"fp32": 0.0, "int8": 3.0}, {}, 0.5)[0]
    'fp32'
    """
    whole = milliseconds["fp32"]
    fitting = [name for name in milliseconds if (losses[name] or 0.0) <= limit]
    chosen = min(fitting, key=milliseconds.__getitem__)

    def verdict(name: str) -> str:
        if name == chosen:
            return "chosen"
        if name == "fp32":
            return "what the others are held against"
        if name not in fitting:
            return f"loses {losses[name]:.2f} %, more than {limit:g} %"
        return "not faster than fp32" if milliseconds[name] >= whole else f"slower than {chosen}"

    trials = [Trial(name, ms, whole / ms, losses[name], verdict(name)) for name, ms in milliseconds.items()]
    trials += [Trial(name, None, None, None, reason) for name, reason in refused.items()]
    return chosen, tuple(sorted(trials, key=lambda trial: PRECISIONS.index(trial.precision)))
