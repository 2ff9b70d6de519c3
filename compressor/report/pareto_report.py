"""The Pareto front of one search, loss against speed-up, as JSON, table and chart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation, format_limitations
from compressor.quality.evaluate import Evaluation
from compressor.quality.metrics import METRICS
from compressor.report.report import latency_to_dict
from compressor.search.pareto import Point
from compressor.workspace.journal import resumed
from compressor.workspace.json_files import json_text
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from rich.table import Table


VERSION = 1


@dataclass(frozen=True)
class ParetoFront:
    """The points of one search. Point 0 is the unchanged model; each further point adds one change.

    `notes` are sentences on points whose precision loses more than allowed.
    """

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
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line; the points have all timings."""
        return f"ParetoFront(model={self.model!r}, points={len(self.points)}, built={len(self.built())})"

    def built(self) -> list[Point]:
        """Return the points that were built and measured."""
        return [point for point in self.points if point.latency is not None]

    def speedup(self, point: Point) -> Any:
        """Return the speed-up of a built point over the unchanged model, with its 95 % interval."""
        start = self.points[0].latency
        assert start is not None
        assert point.latency is not None
        return point.latency.speedup_over(start)

    def to_json(self) -> str:
        """Return the front as indented JSON; latencies hold every raw sample, in milliseconds."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "points"}
        plain["limitations"] = [asdict(limitation) for limitation in self.limitations]
        return json_text(plain | {"version": VERSION, "points": [self._row(point) for point in self.points]})

    def _row(self, point: Point) -> dict[str, Any]:
        row = {
            key: getattr(point, key)
            for key in ("number", "loss", "divergence", "predicted", "multiply_adds", "efficient")
        }
        row |= {"changes": point.plan.changes, "plan": plan_name(point)}
        if point.latency is not None:
            row |= {"latency": latency_to_dict(point.latency), "speedup": self.speedup(point)._asdict()}
        for key in ("figure", "test_loss"):
            figure = getattr(point, key)
            row[key] = None if figure is None else asdict(figure)
        row["label_free"] = {key: asdict(value) for key, value in (point.label_free or {}).items()}
        return row

    def table(self) -> Table:
        """Return the points as a table: predicted speed-ups of all, measurements of those that were built.

        Below each loss on test data stands its 95 % interval.
        """
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        label = "" if self.metric is None else METRICS[self.metric].label
        title = f"{escape(self.model)} on {self.settings['target']}, batch {self.settings['batch']}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
        for heading in ("", "last change", "val. loss", "predicted", "measured", label, "test loss"):
            left = heading == "last change"
            whole = heading == "test loss"  # an interval stays on one line
            table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=whole)
        for point in self.points:
            table.add_row(*self._cells(point))
        return table

    def _cells(self, point: Point) -> tuple[str, ...]:
        from rich.markup import escape

        last = point.change or ("unchanged", "drop")
        change = last[0] if last[1] == "drop" else f"{last[0]} ({last[1]})"
        measured = "" if point.latency is None else f"{self.speedup(point).ratio:.2f}x"
        value = "" if point.figure is None else f"{point.figure.value:.2f}"
        loss = point.test_loss
        test_loss = "" if loss is None else f"{loss.value:+.2f}\n[dim]{loss.low:+.2f} to {loss.high:+.2f}[/dim]"
        return (
            f"{point.number}{'*' if point.efficient else ' '}",
            escape(change),
            f"{point.loss:+.2f}",
            f"{point.predicted:.2f}x",
            measured,
            value,
            test_loss,
        )

    def summary(self) -> str:
        """Return the meaning of the figures, how to export a point, and the limitations, one per line."""
        metric = (
            []
            if self.metric is None
            else [f"Quality: {METRICS[self.metric].title}; losses in %, ranges are 95 % intervals."]
        )
        stars = "* marks the points that are Pareto-efficient in predicted speed-up and validation loss."
        export = "Export a point with --drop FOLDER/plans/NUMBER.json."
        return "\n".join(
            [*metric, stars, export, *resumed(self.search), *self.notes, *format_limitations(self.limitations)]
        )

    def picture(self) -> bytes:
        """Return a chart of loss against speed-up as PNG: validation loss of all points, test loss of those built."""
        from matplotlib.figure import Figure as Picture

        figure = Picture(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([point.predicted for point in self.points], [point.loss for point in self.points],
                  "o-", color="0.6", markersize=4, label="predicted speed-up, validation data")  # fmt: skip
        built = [point for point in self.built() if point.test_loss is not None]
        speeds, losses = [self.speedup(point) for point in built], [point.test_loss for point in built]
        if built:
            axes.errorbar(
                [speed.ratio for speed in speeds],
                [loss.value for loss in losses if loss is not None],
                xerr=_errors([(speed.ratio, speed.low, speed.high) for speed in speeds]),
                yerr=_errors([(loss.value, loss.low, loss.high) for loss in losses if loss is not None]),
                fmt="o", capsize=2, label="measured speed-up, test data (95 % intervals)",
            )  # fmt: skip
        axes.set_xlabel(f"speed-up on {self.settings['target']}")
        axes.set_ylabel("loss, %" if self.metric is None else f"loss of {METRICS[self.metric].label}, %")
        axes.set_title(self.model, fontsize=10, parse_math=False)  # a name may hold $
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()


def with_measurements(point: Point, latency: Latency | None, quality: Evaluation | None) -> Point:
    """Add the measurements of a point's engine to the point.

    Args:
        point: the point.
        latency: the latency of its engine; None if it was not built, and the point is returned unchanged.
        quality: the evaluation of all runners, named by the numbers of their points; ``0`` is the unchanged model.
    """
    if latency is None:
        return point
    if quality is None:
        return replace(point, latency=latency)
    name = str(point.number)
    figure, loss, label_free = quality.figure(name), quality.loss("0", name), quality.label_free(name)
    return replace(point, latency=latency, figure=figure, test_loss=loss, label_free=label_free)


def plan_name(point: Point) -> str:
    """Return the path of a point's plan in the output folder."""
    return f"plans/{point.number}.json"


def points_to_build(total: int, wanted: int, worth: Sequence[bool]) -> list[int]:
    """Return the positions of the points to build: the first, the last, and others evenly spaced between them.

    Only efficient points and the first one are candidates.

    Args:
        total: number of points.
        wanted: number of points to build; fewer are returned if there are fewer candidates.
        worth: whether each point is efficient.

    >>> points_to_build(7, 3, [True] * 7)
    [0, 3, 6]
    """
    candidates = [index for index in range(total) if worth[index] or index == 0]
    if len(candidates) <= wanted:
        return candidates
    return sorted({candidates[round(step * (len(candidates) - 1) / (wanted - 1))] for step in range(wanted)})


def _errors(values: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Return the distances from values to the ends of their intervals, in matplotlib's format."""
    return [[max(value - low, 0.0) for value, low, _ in values], [max(high - value, 0.0) for value, _, high in values]]
