"""The report: JSON is the truth, the terminal table is derived from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compressor.evaluate import METRICS, Evaluation, Figure
from compressor.steps import Step
from runtimes.timing import Latency

if TYPE_CHECKING:
    from rich.table import Table

    from passes.plan import Plan

VERSION = 1
LOWER_IS_BETTER = {"perplexity"}


@dataclass(frozen=True)
class Size:
    """Parameters, multiply-adds for one sample, and bytes of the ONNX file."""

    parameters: int
    multiply_adds: int
    bytes: int


@dataclass(frozen=True)
class Quality:
    """Metric, each variant's figure on test data, and what the result lost against baseline and original."""

    metric: str
    figures: dict[str, Figure]
    loss: dict[str, Figure]

    @staticmethod
    def of(evaluation: Evaluation) -> Quality:
        """Figures and paired losses of an evaluation that holds ``result`` and what it is compared with."""
        names = list(evaluation.columns)
        losses = {name: evaluation.loss(name, "result") for name in names if name != "result"}
        return Quality(evaluation.metric, {name: evaluation.figure(name) for name in names}, losses)


@dataclass(frozen=True)
class Report:
    """Everything measured in one export, and everything needed to repeat it.

    The variants are ``original`` (unpruned float, only where the result is int8), ``baseline`` (unpruned, same target
    and precision as the result) and ``result``. `quality` is None, with the reason, where none may be stated.
    """

    command: str
    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    plan: Plan
    sizes: dict[str, Size]
    quality: Quality | None
    no_quality_because: str | None
    latency: dict[str, Latency]
    parity: dict[str, float]
    int8: dict[str, Any]
    search: dict[str, Any]
    steps: tuple[Step, ...]
    environment: dict[str, object]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; latencies with every raw sample, in milliseconds."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {
            "version": VERSION,
            "plan": {
                "rule": self.plan.rule,
                "metric": self.plan.metric,
                "dropped": list(self.plan.order or self.plan.dropped),
            },
            "sizes": {name: asdict(size) for name, size in self.sizes.items()},
            "quality": None if self.quality is None else asdict(self.quality),
            "latency": {name: _latency(latency) for name, latency in self.latency.items()},
            "speedup": {name: self.speedup(name)._asdict() for name in self.latency if name != "result"},
            "steps": [asdict(step) for step in self.steps],
            "seconds": sum(step.seconds for step in self.steps),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def speedup(self, over: str = "baseline") -> Any:
        """How many times faster the result is than another variant, with a 95 % interval."""
        return self.latency["result"].speedup_over(self.latency[over])

    def table(self) -> Table:
        """The headline figures for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.model['name']} on {self.settings['target']}", title_justify="left")
        table.add_column("")
        variants = list(self.latency)
        for name in variants:
            table.add_column(name, justify="right")
        if self.quality is not None:
            table.add_row(METRICS[self.quality.metric], *(_interval(self.quality.figures[name]) for name in variants))
            table.add_row("  lost by the result", *(_loss(self.quality.loss.get(name)) for name in variants))
        batch = self.settings["batch"]
        table.add_row(f"latency in ms, batch {batch}", *(f"{self.latency[name].median:.2f}" for name in variants))
        table.add_row("  speed-up of the result", *(self._speedup_cell(name) for name in variants))
        table.add_row("parameters", *(f"{self.sizes[name].parameters / 1e6:.2f} M" for name in variants))
        table.add_row("multiply-adds", *(f"{self.sizes[name].multiply_adds / 1e9:.3f} G" for name in variants))
        table.add_row("model.onnx", *(f"{self.sizes[name].bytes / 1e6:.2f} MB" for name in variants))
        return table

    def _speedup_cell(self, name: str) -> str:
        if name == "result":
            return ""
        speedup = self.speedup(name)
        return f"{speedup.ratio:.2f}x ({speedup.low:.2f}–{speedup.high:.2f})"

    def summary(self) -> str:
        """What was dropped and what to read with care, as lines of text."""
        dropped = self.plan.order or self.plan.dropped
        sites = f"Dropped {len(dropped)} of {len(self.plan.decisions)} sites: {', '.join(dropped) or 'none'}."
        quality = [] if self.no_quality_because is None else [f"No quality stated: {self.no_quality_because}."]
        return "\n".join([sites, *quality, *self.notes])


def _latency(latency: Latency) -> dict[str, Any]:
    return {
        "median": latency.median,
        "p90": latency.p90,
        "p99": latency.p99,
        "n": latency.n,
        "samples_ms": [list(burst) for burst in latency.samples_ms],
    }


def _interval(figure: Figure) -> str:
    return f"{figure.value:.2f} ({figure.low:.2f}–{figure.high:.2f})"


def _loss(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:+.2f} ({figure.low:+.2f} to {figure.high:+.2f})"
