"""Points of quality and speed along a search, and the test for Pareto efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.quality.intervals import Figure
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from passes.plan.plan import Plan


@dataclass(frozen=True)
class Point:
    """One plan along a search: the plan of the previous point and one more change.

    Attributes:
        number: number of changes; 0 is the original.
        plan: the plan.
        loss: loss on validation data, in percent.
        divergence: output divergence from the original on calibration data, in nats.
        predicted: speed-up predicted by the cost model.
        multiply_adds: multiply-adds of the timed inputs.
        efficient: True if no other point has at most this cost and at most this loss, and less of one of them.
        change: unit and action of the last change; None for the original.
        latency: measured latency, if the point was built.
        figure: quality on test data, if the point was built.
        test_loss: loss on test data in percent, if the point was built.
        label_free: metrics on test data that need no labels, if the point was built.
    """

    number: int
    plan: Plan
    loss: float
    divergence: float
    predicted: float
    multiply_adds: int
    efficient: bool
    change: tuple[str, str] | None = None
    latency: Latency | None = None
    figure: Figure | None = None
    test_loss: Figure | None = None
    label_free: dict[str, Figure] | None = None


def efficient(costs: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """Return, for every point, whether it is Pareto-efficient.

    A point is efficient if no other point has at most its cost and at most its loss, and less of one of them.

    >>> efficient([3.0, 2.0, 2.5, 1.0], [0.0, 1.0, 2.0, 4.0])
    [True, True, False, True]
    """
    points = list(zip(costs, losses, strict=True))
    return [
        not any(cost <= mine[0] and loss <= mine[1] and (cost, loss) != mine for cost, loss in points)
        for mine in points
    ]
