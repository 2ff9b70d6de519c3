"""The factorial: what compression and a precision gain and lose alone and together, and whether the gains multiply.

Cells are named by what was done to the model and its precision, such as ``compressed int8``. ``dense`` is the model as
it is; ``changes`` is the compressed one before its tokens are merged, where the plan merges any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compressor.quality.evaluate import Evaluation
from compressor.quality.intervals import Figure
from compressor.report.report import brief, dim
from runtimes.base.timing import Latency, Speedup, resampled_medians

if TYPE_CHECKING:
    from rich.table import Table

FORMS = ("dense", "changes", "compressed")
FLOAT = "float"
START = f"{FORMS[0]} {FLOAT}"
# What is held against the precision: the name, and the forms before and after it.
STEPS = (
    ("compression", "dense", "compressed"),
    ("compression without merging", "dense", "changes"),
    ("merging tokens", "changes", "compressed"),
)


def cells_of(reduced: str) -> tuple[str, ...]:
    """The cells in order, for a precision below float.

    >>> cells_of("int8")[:2]
    ('dense float', 'dense int8')
    """
    return tuple(f"{form} {precision}" for form in FORMS for precision in (FLOAT, reduced))


def word(precision: str) -> str:
    """What cells call a precision: int8 whether its ranges are fixed or found at run time.

    >>> word("int8-dynamic"), word("int4")
    ('int8', 'int4')
    """
    return precision.partition("-")[0]


@dataclass(frozen=True)
class Interaction:
    """A change and a precision (Q), each alone and both together.

    Attributes:
        change: what is held against the precision.
        cells: the engines as they were before, with the change, with the precision, with both.
        speed: speed-ups by the change, by the precision and by both, over the first cell.
        ratio: S_both / (S_change x S_Q); 1 where speed-ups multiply.
        loss: what the change, the precision and both lost against the first cell; None where no quality may be stated.
        excess: loss_both - (loss_change + loss_Q); 0 where losses add up.
    """

    change: str
    cells: tuple[str, str, str, str]
    speed: tuple[Speedup, Speedup, Speedup]
    ratio: Speedup
    loss: tuple[Figure, Figure, Figure] | None
    excess: Figure | None

    @property
    def precision(self) -> str:
        """The precision that the change is held against."""
        return self.cells[2].rpartition(" ")[2]

    @property
    def verdict(self) -> str:
        """``multiplicative`` where the interval of the ratio holds 1, else ``less`` or ``more``."""
        if self.ratio.high < 1.0:
            return "less"
        return "more" if self.ratio.low > 1.0 else "multiplicative"

    @property
    def additive(self) -> str | None:
        """``additive`` where the interval of the excess holds 0, else ``less`` or ``more``; None without quality."""
        if self.excess is None:
            return None
        if self.excess.high < 0.0:
            return "less"
        return "more" if self.excess.low > 0.0 else "additive"

    def sentence(self, where: str) -> str:
        """The conclusion in words."""
        says = {
            "multiplicative": "The speed-ups of {} and {} multiply",
            "less": "{} and {} together gain less than the product of their speed-ups",
            "more": "{} and {} together gain more than the product of their speed-ups",
        }[self.verdict].format(self.change, self.precision)
        alone, reduced, both = (f"{each.ratio:.2f}x" for each in self.speed)
        return (
            f"{says[0].upper()}{says[1:]} {where}: {alone} and {reduced} alone, {both} together, "
            f"{self.ratio.ratio:.3f} of the product ({self.ratio.low:.3f}–{self.ratio.high:.3f})."
        ) + self._losses()

    def _losses(self) -> str:
        if self.loss is None or self.excess is None or self.additive is None:
            return ""
        says = {
            "additive": "Their losses add up",
            "less": "Together they lose less than the sum",
            "more": "Together they lose more than the sum",
        }[self.additive]
        alone, reduced, both = (f"{each.value:+.2f} %" for each in self.loss)
        beyond = f"{self.excess.value:+.2f} % beyond the sum ({self.excess.low:+.2f} to {self.excess.high:+.2f})"
        return f" {says}: {alone} and {reduced} alone, {both} together, {beyond}."

    def to_dict(self) -> dict[str, Any]:
        """The interaction as plain JSON values."""
        names = ("change", self.precision, "both")
        return {
            "change": self.change,
            "precision": self.precision,
            "cells": list(self.cells),
            "speedup": {name: each._asdict() for name, each in zip(names, self.speed, strict=True)},
            "ratio": self.ratio._asdict(),
            "verdict": self.verdict,
            "loss": None if self.loss is None else dict(zip(names, map(asdict, self.loss), strict=True)),
            "excess": None if self.excess is None else asdict(self.excess),
            "additive": self.additive,
        }


@dataclass(frozen=True)
class Factorial:
    """All cells of one model, measured in one interleaved run.

    `where` says at which batch on which target; `files` where each cell's ONNX file lies in the output folder.
    """

    where: str
    files: Mapping[str, str]
    latency: Mapping[str, Latency]
    speed: Mapping[str, Speedup]
    figures: Mapping[str, Figure]
    losses: Mapping[str, Figure]
    interactions: tuple[Interaction, ...]

    @property
    def conclusion(self) -> tuple[str, ...]:
        """One sentence or two on each interaction, the whole compression first."""
        return tuple(each.sentence(self.where) for each in self.interactions)

    def to_dict(self) -> dict[str, Any]:
        """The factorial as plain JSON values, latencies with every raw sample."""
        return {
            "where": self.where,
            "cells": {name: self._cell(name) for name in self.latency},
            "interactions": [each.to_dict() for each in self.interactions],
            "conclusion": list(self.conclusion),
        }

    def _cell(self, name: str) -> dict[str, Any]:
        return {
            "file": self.files[name],
            "speedup": self.speed[name]._asdict() if name in self.speed else None,
            "figure": asdict(self.figures[name]) if name in self.figures else None,
            "loss": asdict(self.losses[name]) if name in self.losses else None,
            "latency": brief(self.latency[name]),
        }

    def table(self) -> Table:
        """The cells as a table, 80 columns wide."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = f"Each alone and both together, {self.where}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for heading in ("latency, ms", "speed-up", *(("quality", "loss, %") if self.figures else ())):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows():
            table.add_row(*row[: len(table.columns)])
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Two lines for each cell: its figures, and their intervals below."""
        for name in self.latency:
            speed, figure, lost = self.speed.get(name), self.figures.get(name), self.losses.get(name)
            yield (
                name,
                f"{self.latency[name].median:.2f}",
                f"{speed.ratio:.2f}x" if speed else "",
                f"{figure.value:.2f}" if figure else "",
                f"{lost.value:+.2f}" if lost else "",
            )
            ranges = (
                "",
                "",
                f"{speed.low:.2f}–{speed.high:.2f}" if speed else "",
                f"{figure.low:.2f}–{figure.high:.2f}" if figure else "",
                f"{lost.low:+.2f} to {lost.high:+.2f}" if lost else "",
            )
            yield tuple(dim(text) for text in ranges)


def factorial(
    latency: Mapping[str, Latency], evaluation: Evaluation | None, files: Mapping[str, str], where: str
) -> Factorial:
    """Work out every effect from what was measured of the cells.

    Args:
        latency: by cell, of one interleaved run: bursts of one round are drawn together. Without the cells of
            ``changes`` there are two factors.
        evaluation: quality by cell, on the same samples; None where none may be stated.
        files: by cell, where its ONNX file lies.
        where: at which batch on which target.
    """
    reduced = next(name for name in latency if not name.endswith(FLOAT)).rpartition(" ")[2]
    names = [name for name in cells_of(reduced) if name in latency]
    medians = dict(zip(names, resampled_medians([latency[name] for name in names]), strict=True))

    def speedup(before: str, after: str) -> Speedup:
        return Speedup.of(latency[before].median / latency[after].median, medians[before] / medians[after])

    def interaction(change: str, before: str, after: str) -> Interaction:
        start, low, one, both = (f"{form} {precision}" for form in (before, after) for precision in (FLOAT, reduced))
        # S_both / (S_one x S_low) = (start / both) / ((start / one) x (start / low)) = one x low / (start x both)
        point = latency[one].median * latency[low].median / (latency[start].median * latency[both].median)
        ratio = Speedup.of(point, medians[one] * medians[low] / (medians[start] * medians[both]))
        speed = (speedup(start, one), speedup(start, low), speedup(start, both))
        cells = (start, one, low, both)
        if evaluation is None:
            return Interaction(change, cells, speed, ratio, None, None)
        loss = (evaluation.loss(start, one), evaluation.loss(start, low), evaluation.loss(start, both))
        return Interaction(change, cells, speed, ratio, loss, evaluation.excess(*cells))

    others = names[1:]
    return Factorial(
        where=where,
        files=files,
        latency={name: latency[name] for name in names},
        speed={name: speedup(START, name) for name in others},
        figures={} if evaluation is None else {name: evaluation.figure(name) for name in names},
        losses={} if evaluation is None else {name: evaluation.loss(START, name) for name in others},
        interactions=tuple(
            interaction(*step) for step in STEPS if all(f"{form} float" in latency for form in step[1:])
        ),
    )


def place(target: str, batch: int, threads: int | None = None) -> str:
    """At which batch on which target, in words.

    >>> place("onnxruntime", 1), place("openvino", 8, 2)
    ('at batch 1 on onnxruntime', 'at batch 8 on openvino, threads 2')
    """
    return f"at batch {batch} on {target}" + ("" if threads is None else f", threads {threads}")
