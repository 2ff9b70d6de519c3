"""The factorial experiment: speed-ups and losses of compression and of a precision, separately and combined.

A cell is named by the form of the model and its precision, such as ``compressed int8``. ``dense`` is the unchanged
model, ``compressed`` the model with the whole plan. ``changes`` is the model with the plan except for token merging; it
exists only if the plan merges tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compressor.quality.evaluate import Evaluation
from compressor.quality.intervals import Figure
from compressor.report.report import dim, latency_to_dict
from runtimes.base.timing import Latency, Speedup, resampled_medians

if TYPE_CHECKING:
    from rich.table import Table

FORMS = ("dense", "changes", "compressed")
FLOAT = "float"
START = f"{FORMS[0]} {FLOAT}"
# The changes that are combined with the precision: name, form before and form after the change.
STEPS = (
    ("compression", "dense", "compressed"),
    ("compression without merging", "dense", "changes"),
    ("merging tokens", "changes", "compressed"),
)


def cells_of(reduced: str) -> tuple[str, ...]:
    """Return the names of all cells in order, for a precision below float.

    >>> cells_of("int8")[:2]
    ('dense float', 'dense int8')
    """
    return tuple(f"{form} {precision}" for form in FORMS for precision in (FLOAT, reduced))


def cell_precision(precision: str) -> str:
    """Return the name of a precision in cells: all forms of int8 are ``int8``.

    >>> cell_precision("int8-dynamic"), cell_precision("int4")
    ('int8', 'int4')
    """
    return precision.partition("-")[0]


@dataclass(frozen=True)
class Interaction:
    """The interaction of a change with a precision (Q).

    Attributes:
        change: the name of the change.
        cells: the cells with neither, with the change, with the precision, and with both.
        speed: speed-ups over the first cell of the change, of the precision and of both.
        ratio: S_both / (S_change x S_Q); 1 if the speed-ups multiply.
        loss: losses against the first cell of the change, of the precision and of both; None if no quality may be
            stated.
        excess: loss_both - (loss_change + loss_Q); 0 if the losses add up.
    """

    change: str
    cells: tuple[str, str, str, str]
    speed: tuple[Speedup, Speedup, Speedup]
    ratio: Speedup
    loss: tuple[Figure, Figure, Figure] | None
    excess: Figure | None

    @property
    def precision(self) -> str:
        """The precision that is combined with the change."""
        return self.cells[2].rpartition(" ")[2]

    @property
    def verdict(self) -> str:
        """``multiplicative`` if the interval of the ratio contains 1, else ``less`` or ``more``."""
        if self.ratio.high < 1.0:
            return "less"
        return "more" if self.ratio.low > 1.0 else "multiplicative"

    @property
    def additive(self) -> str | None:
        """``additive`` if the interval of the excess contains 0, else ``less`` or ``more``; None without quality."""
        if self.excess is None:
            return None
        if self.excess.high < 0.0:
            return "less"
        return "more" if self.excess.low > 0.0 else "additive"

    def sentence(self, where: str) -> str:
        """Return the conclusion in one or two sentences.

        Args:
            where: the conditions of the measurement, such as ``at batch 1 on onnxruntime``.
        """
        verdict = {
            "multiplicative": "The speed-ups of {} and {} multiply",
            "less": "{} and {} together gain less than the product of their speed-ups",
            "more": "{} and {} together gain more than the product of their speed-ups",
        }[self.verdict].format(self.change, self.precision)
        alone, reduced, both = (f"{speedup.ratio:.2f}x" for speedup in self.speed)
        return (
            f"{verdict[0].upper()}{verdict[1:]} {where}: {alone} and {reduced} alone, {both} together, "
            f"{self.ratio.ratio:.3f} of the product ({self.ratio.low:.3f}–{self.ratio.high:.3f})."
        ) + self._losses()

    def _losses(self) -> str:
        if self.loss is None or self.excess is None or self.additive is None:
            return ""
        verdict = {
            "additive": "Their losses add up",
            "less": "Together they lose less than the sum",
            "more": "Together they lose more than the sum",
        }[self.additive]
        alone, reduced, both = (f"{loss.value:+.2f} %" for loss in self.loss)
        beyond = f"{self.excess.value:+.2f} % beyond the sum ({self.excess.low:+.2f} to {self.excess.high:+.2f})"
        return f" {verdict}: {alone} and {reduced} alone, {both} together, {beyond}."

    def to_dict(self) -> dict[str, Any]:
        """Return the interaction as plain JSON values."""
        names = ("change", self.precision, "both")
        return {
            "change": self.change,
            "precision": self.precision,
            "cells": list(self.cells),
            "speedup": {name: speedup._asdict() for name, speedup in zip(names, self.speed, strict=True)},
            "ratio": self.ratio._asdict(),
            "verdict": self.verdict,
            "loss": None if self.loss is None else dict(zip(names, map(asdict, self.loss), strict=True)),
            "excess": None if self.excess is None else asdict(self.excess),
            "additive": self.additive,
        }


@dataclass(frozen=True)
class Factorial:
    """All cells of one model, measured in one interleaved run.

    Attributes:
        where: the conditions of the measurement, such as ``at batch 1 on onnxruntime``.
        files: the path of each cell's ONNX file in the output folder.
        latency: the latency of each cell.
        speed: the speed-up of each cell over ``dense float``.
        figures: the quality of each cell; empty if none may be stated.
        losses: the loss of each cell against ``dense float``.
        interactions: the interactions, that of the whole compression first.
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
        """The conclusion on each interaction, that on the whole compression first."""
        return tuple(interaction.sentence(self.where) for interaction in self.interactions)

    def to_dict(self) -> dict[str, Any]:
        """Return the factorial as plain JSON values; latencies hold every raw sample."""
        return {
            "where": self.where,
            "cells": {name: self._cell(name) for name in self.latency},
            "interactions": [interaction.to_dict() for interaction in self.interactions],
            "conclusion": list(self.conclusion),
        }

    def _cell(self, name: str) -> dict[str, Any]:
        return {
            "file": self.files[name],
            "speedup": self.speed[name]._asdict() if name in self.speed else None,
            "figure": asdict(self.figures[name]) if name in self.figures else None,
            "loss": asdict(self.losses[name]) if name in self.losses else None,
            "latency": latency_to_dict(self.latency[name]),
        }

    def table(self) -> Table:
        """Return the cells as a table that fits 80 columns; every row compares its cell with ``dense float``."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = f"Compression and precision, separately and combined, {self.where}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for heading in ("latency, ms", "speed-up", *(("quality", "loss, %") if self.figures else ())):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows():
            table.add_row(*row[: len(table.columns)])
        return table

    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Yield two rows for each cell: its figures, and their intervals."""
        for name in self.latency:
            speed, figure, loss = self.speed.get(name), self.figures.get(name), self.losses.get(name)
            yield (
                name,
                f"{self.latency[name].median:.2f}",
                f"{speed.ratio:.2f}x" if speed else "",
                f"{figure.value:.2f}" if figure else "",
                f"{loss.value:+.2f}" if loss else "",
            )
            intervals = (
                "",
                "",
                f"{speed.low:.2f}–{speed.high:.2f}" if speed else "",
                f"{figure.low:.2f}–{figure.high:.2f}" if figure else "",
                f"{loss.low:+.2f} to {loss.high:+.2f}" if loss else "",
            )
            yield tuple(dim(text) for text in intervals)


def compute_factorial(
    latency: Mapping[str, Latency], evaluation: Evaluation | None, files: Mapping[str, str], where: str
) -> Factorial:
    """Compute speed-ups, losses and interactions from the measurements of the cells.

    Args:
        latency: the latency of each cell, from one interleaved run; the bootstrap draws the bursts of one round
            together. Without the cells of ``changes`` there is one interaction.
        evaluation: the quality of each cell on the same samples; None if none may be stated.
        files: the path of each cell's ONNX file.
        where: the conditions of the measurement, such as ``at batch 1 on onnxruntime``.
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


def conditions(target: str, batch: int, threads: int | None = None) -> str:
    """Describe the batch, the target and the number of threads.

    >>> conditions("onnxruntime", 1), conditions("openvino", 8, 2)
    ('at batch 1 on onnxruntime', 'at batch 8 on openvino, threads 2')
    """
    return f"at batch {batch} on {target}" + ("" if threads is None else f", threads {threads}")
