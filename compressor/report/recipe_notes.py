"""A sentence on recipes that lose more than a search would: rankings, schedules of tokens, and branches by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compressor.quality.metrics import METRICS
from passes.plan.plan import merged_tokens

if TYPE_CHECKING:
    from compressor.report.report import Report

MOST = 1.0  # largest loss without a sentence: points of a score, or percent of perplexity


def recipe_notes(report: Report) -> Iterator[str]:
    """Yield what to try in place of a recipe that loses more than `MOST` on test data.

    Recipes are rankings (``block:1``, ``25%``), names of branches, and fixed schedules of merged tokens. A plan.json is
    none, as a search may have made it; nor is a plan of a search, which has a limit of its own.
    """
    settings = report.settings
    drop = str(settings["drop"])
    if report.quality is None or drop == "auto" or drop.endswith(".json") or not report.plan.changes:
        return
    lost = report.quality.lost
    if not lost.value > MOST:
        return
    unit = METRICS[report.quality.metric].loss_unit
    ranked = [name for name, action in report.plan.changes.items() if merged_tokens(action) is None]
    named = {decision.site for decision in report.plan.decisions} & {part.strip() for part in drop.split(",")}
    recipe = f"--drop {drop}" if ranked else f"--tokens {settings['tokens']}"
    better = "--drop auto chooses by the measured effect and keeps to --max-loss"
    if ranked and not named and settings["metric"] != "output":
        better += ", and --metric output ranks by the effect on the output"
    yield (
        f"{recipe} loses {lost.value:.2f} {unit}".rstrip()
        + f" ({lost.low:.2f} to {lost.high:.2f}) on test data; {better}."
    )
