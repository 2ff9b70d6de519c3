"""Points of a search between quality and speed, and which of them are Pareto-efficient."""

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
    """One plan of the front, that of the point before with one more `change`: a site and what happens to it.

    `loss` is what is lost on validation data in percent, `predicted` the speed-up by the prices of the search,
    `multiply_adds` those of the timed inputs. `efficient` says that no other point is both cheaper and better.
    Points that were built also have their measured `latency`, quality on test data (`figure`) and loss (`test_loss`).
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
    """Which points no other one beats: none is at most as dear and as bad, and better in one of the two.

    >>> efficient([3.0, 2.0, 2.5, 1.0], [0.0, 1.0, 2.0, 4.0])
    [True, True, False, True]
    """
    points = list(zip(costs, losses, strict=True))
    return [
        not any(cost <= mine[0] and loss <= mine[1] and (cost, loss) != mine for cost, loss in points)
        for mine in points
    ]
