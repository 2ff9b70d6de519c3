"""The Pareto front of one search: what speed costs what quality, as JSON, table and picture, with plans."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation, listed
from compressor.quality.evaluate import Evaluation
from compressor.quality.intervals import METRICS
from compressor.report.report import LABELS, brief
from compressor.search.pareto import Point
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from rich.table import Table


VERSION = 1


@dataclass(frozen=True)
class Front:
    """All points of one search, from the model as it is (number 0) on."""

    command: str
    settings: dict[str, Any]
    model: str
    metric: str | None
    data: dict[str, Any]
    points: tuple[Point, ...]
    search: dict[str, Any]
    environment: dict[str, object]
    seconds: float
    limitations: tuple[Limitation, ...] = ()

    def built(self) -> list[Point]:
        """The points that were built and measured."""
        return [point for point in self.points if point.latency is not None]

    def speedup(self, point: Point) -> Any:
        """How many times faster a built point is than the model as it is, with a 95 % interval."""
        start = self.points[0].latency
        assert start is not None
        assert point.latency is not None
        return point.latency.speedup_over(start)

    def to_json(self) -> str:
        """Everything as indented JSON; latencies with their raw samples, in milliseconds."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "points"}
        plain["limitations"] = [asdict(limitation) for limitation in self.limitations]
        return (
            json.dumps(plain | {"version": VERSION, "points": [self._row(point) for point in self.points]}, indent=2)
            + "\n"
        )

    def _row(self, point: Point) -> dict[str, Any]:
        row = {
            key: getattr(point, key)
            for key in ("number", "loss", "divergence", "predicted", "multiply_adds", "efficient")
        }
        row |= {"changes": point.plan.changes, "plan": plan_name(point)}
        if point.latency is not None:
            row |= {"latency": brief(point.latency), "speedup": self.speedup(point)._asdict()}
        for key in ("figure", "test_loss"):
            found = getattr(point, key)
            row[key] = None if found is None else asdict(found)
        row["label_free"] = {key: asdict(value) for key, value in (point.label_free or {}).items()}
        return row

    def table(self) -> Table:
        """The points for a terminal: predicted for all, measured for those that were built, with 95 % intervals."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        label = "" if self.metric is None else LABELS[self.metric][0]
        title = f"{self.model} on {self.settings['target']}, batch {self.settings['batch']}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
        for heading in ("", "last change", "val. loss", "predicted", "measured", label, "loss on test"):
            left = heading == "last change"
            whole = heading == "loss on test"  # an interval stays on one line
            table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=whole)
        for point in self.points:
            table.add_row(*self._cells(point))
        return table

    def _cells(self, point: Point) -> tuple[str, ...]:
        last = point.change or ("as it is", "drop")
        change = last[0] if last[1] == "drop" else f"{last[0]} ({last[1]})"
        measured = "" if point.latency is None else f"{self.speedup(point).ratio:.2f}x"
        value = "" if point.figure is None else f"{point.figure.value:.2f}"
        lost = point.test_loss
        interval = "" if lost is None else f"{lost.value:+.2f}\n[dim]{lost.low:+.2f} to {lost.high:+.2f}[/dim]"
        return (
            f"{point.number}{'*' if point.efficient else ' '}",
            change,
            f"{point.loss:+.2f}",
            f"{point.predicted:.2f}x",
            measured,
            value,
            interval,
        )

    def summary(self) -> str:
        """What the figures mean, and how to export a point."""
        metric = (
            [] if self.metric is None else [f"Quality: {METRICS[self.metric]}; losses in %, ranges are 95 % intervals."]
        )
        stars = "No other point is both faster and better than one with a *, by what was predicted and validated."
        export = "Export a point with --drop FOLDER/plans/NUMBER.json."
        return "\n".join([*metric, stars, export, *listed(self.limitations)])

    def picture(self) -> bytes:
        """Loss against speed-up as a PNG picture: validation of all points, test of those that were built."""
        from matplotlib.figure import Figure as Picture

        figure = Picture(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([point.predicted for point in self.points], [point.loss for point in self.points],
                  "o-", color="0.6", markersize=4, label="predicted speed, validation data")  # fmt: skip
        built = [point for point in self.built() if point.test_loss is not None]
        speeds, losses = [self.speedup(point) for point in built], [point.test_loss for point in built]
        if built:
            axes.errorbar(
                [speed.ratio for speed in speeds],
                [lost.value for lost in losses if lost is not None],
                xerr=_errors([(speed.ratio, speed.low, speed.high) for speed in speeds]),
                yerr=_errors([(lost.value, lost.low, lost.high) for lost in losses if lost is not None]),
                fmt="o", capsize=2, label="measured speed, test data (95 % intervals)",
            )  # fmt: skip
        axes.set_xlabel(f"times faster on {self.settings['target']}")
        axes.set_ylabel("loss, %" if self.metric is None else f"loss of {LABELS[self.metric][0]}, %")
        axes.set_title(self.model, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()


def with_measurements(point: Point, latency: Latency | None, quality: Evaluation | None) -> Point:
    """A point with what was measured of its engine, judged against the model as it is (runner ``0``)."""
    if latency is None:
        return point
    if quality is None:
        return replace(point, latency=latency)
    name = str(point.number)
    figure, lost, free = quality.figure(name), quality.loss("0", name), quality.label_free(name)
    return replace(point, latency=latency, figure=figure, test_loss=lost, label_free=free)


def plan_name(point: Point) -> str:
    """Where a point's plan lies in the folder."""
    return f"plans/{point.number}.json"


def spread(total: int, wanted: int, worth: Sequence[bool]) -> list[int]:
    """Positions of `wanted` points to build: the first, the last, and others evenly between, efficient ones only.

    >>> spread(7, 3, [True] * 7)
    [0, 3, 6]
    """
    worthy = [place for place in range(total) if worth[place] or place == 0]
    if len(worthy) <= wanted:
        return worthy
    return sorted({worthy[round(step * (len(worthy) - 1) / (wanted - 1))] for step in range(wanted)})


def _errors(values: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Distances from values to the ends of their intervals, as matplotlib wants them."""
    return [[max(value - low, 0.0) for value, low, _ in values], [max(high - value, 0.0) for value, _, high in values]]
