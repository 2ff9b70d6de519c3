"""The tables and the picture of benchmarks/criteria.py: every criterion at four budgets, model by model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "criteria.json"
PICTURE = RESULTS.with_suffix(".png")
OURS = ("ours", "ours, without tokens")
UNITS = {
    "accuracy": "points of top-1",
    "agreement": "points of agreement",
    "fidelity": "points of feature similarity",
    "perplexity": "% of perplexity",
    "spearman": "points of Spearman x 100",
}


def criteria() -> str | None:
    """A table for each model, and in words where ours is ahead; None where nothing was measured yet."""
    return criteria_tables(json.loads(RESULTS.read_text())["models"]) if RESULTS.exists() else None


def criteria_tables(models: Mapping[str, Row]) -> str:
    """A table for each model: losses with intervals and predicted speed-ups.

    Args:
        models: results by model.
    """
    return "\n\n".join(_of_model(name, found) for name, found in models.items())


def _of_model(name: str, found: Row) -> str:
    rows = found["rows"]
    budgets = sorted({row["budget"] for row in rows})
    start = found["original"]["figure"]["value"]
    heading = " | ".join(f"{budget:.0%} saved" for budget in budgets)
    lines = [f"| {name}: {UNITS[found['metric']]} lost of {start:.2f} | {heading} |", "|---" * (len(budgets) + 1) + "|"]
    best = {budget: min(_loss(row) for row in rows if row["budget"] == budget) for budget in budgets}
    for method in dict.fromkeys(row["method"] for row in rows):
        by_budget = {row["budget"]: row for row in rows if row["method"] == method}
        cells = [_cell(by_budget.get(budget), best[budget]) for budget in budgets]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    verdicts = [_verdict(ours, rows, budgets) for ours in OURS if any(row["method"] == ours for row in rows)]
    error = f"Predicted speed-ups: the prices are off by at most {found['prices']['largest_error']:.0%} where timed."
    return "\n".join([*lines, "", " ".join([*verdicts, error])])


def _loss(row: Row) -> float:
    return float(row["loss"]["value"])


def _cell(row: Row | None, best: float) -> str:
    if row is None:
        return "–"
    lost = row["loss"]
    value = f"**{lost['value']:+.2f}**" if lost["value"] <= best else f"{lost['value']:+.2f}"
    return f"{value} ({lost['low']:+.2f} to {lost['high']:+.2f}), {row['predicted_speedup']:.2f}x"


def _verdict(ours: str, rows: Sequence[Row], budgets: Sequence[float]) -> str:
    """Where a method of ours is ahead of the best other one, beyond that one's interval, and where it is not."""
    said: dict[str, list[str]] = {}
    for budget in budgets:
        here = [row for row in rows if row["budget"] == budget]
        mine = next((row for row in here if row["method"] == ours), None)
        others = [row for row in here if row["method"] not in OURS]
        best = min(others, key=_loss, default=None)
        verdict = standing(mine, best)
        name = "" if best is None else f" ({best['method']})"
        said.setdefault(verdict, []).append(f"{budget:.0%}{name}")
    listed = "; ".join(f"{verdict} at {', '.join(places)}" for verdict, places in said.items())
    return f"“{ours[0].upper()}{ours[1:]}” against the best published at each budget (in brackets): {listed}."


def standing(mine: Row | None, best: Row | None) -> str:
    """Where our loss lies against the interval of the best published method's loss."""
    if mine is None:
        return "did not get there"
    if best is None:
        return "the only one that gets there"
    if _loss(mine) < best["loss"]["low"]:
        return "ahead, outside the interval"
    if _loss(mine) > best["loss"]["high"]:
        return "behind, outside the interval"
    side = "ahead" if _loss(mine) < _loss(best) else "behind" if _loss(mine) > _loss(best) else "level"
    return f"{side}, inside the interval"


# --------------------------------------------------------------------------------------------------------- picture


def draw(models: Mapping[str, Row], path: Path) -> None:
    """Loss against multiply-adds saved as a picture, a panel for each model."""
    from matplotlib.figure import Figure

    across = min(2, len(models))
    down = math.ceil(len(models) / across)
    figure = Figure(figsize=(4.2 * across, 3.3 * down + 1.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (name, found) in zip(panels, models.items(), strict=False):
        _panel(axes, name, found)
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    labelled: dict[str, Any] = {}
    for axes in panels[: len(models)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=across, fontsize=8)
    figure.savefig(path, format="png", dpi=160, metadata={"Software": None})


def _panel(axes: Any, name: str, found: Row) -> None:
    """One model: every method a line, ours thick and with intervals."""
    rows = found["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        saved, lost = [row["saved"] * 100.0 for row in mine], [_loss(row) for row in mine]
        if method not in OURS:
            axes.plot(saved, lost, label=_label(method), **_style(method, number))
            continue
        below = [max(_loss(row) - row["loss"]["low"], 0.0) for row in mine]
        above = [max(row["loss"]["high"] - _loss(row), 0.0) for row in mine]
        colour, marker = ("black", "o") if method == OURS[0] else ("tab:red", "s")
        axes.errorbar(saved, lost, yerr=[below, above], fmt=f"{marker}-", color=colour, linewidth=2.2, markersize=5,
                      elinewidth=1.0, capsize=3, zorder=5, label=method)  # fmt: skip
    losses = [abs(_loss(row)) for row in rows]
    if losses and max(losses) > 20.0:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0.0, color="0.5", linewidth=0.6)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("multiply-adds saved, %", fontsize=9)
    axes.set_ylabel(f"lost, {UNITS[found['metric']]}", fontsize=9)
    axes.grid(alpha=0.3)


def _label(method: str) -> str:
    """One entry of the legend for the draws of one method."""
    return method.split(", seed", maxsplit=1)[0]


def _style(method: str, number: int) -> dict[str, Any]:
    """Thin lines that can be told apart without colour; random ones in grey."""
    if method.startswith("random"):
        return {"color": "0.75", "linewidth": 1.0, "marker": ".", "markersize": 4}
    markers = "v^<>DPX*hdp"
    line = {"linewidth": 1.0, "marker": markers[number % len(markers)], "markersize": 4}
    colours = [f"C{each}" for each in range(10) if each != 3]  # red is ours
    return line | {"color": colours[number % len(colours)], "linestyle": ("-", "--", ":")[number % 3]}
