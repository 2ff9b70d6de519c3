"""The tables and the figure of benchmarks/criteria.py: every criterion at four budgets, model by model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "criteria.json"
PICTURE = RESULTS.with_suffix(".png")
OURS = ("ours", "ours, without tokens", "ours, by time")
BY_TIME = OURS[-1]  # its budgets are shares of latency: comparable at equal latency only
UNITS = {
    "accuracy": "points of top-1",
    "agreement": "points of agreement",
    "fidelity": "points of feature similarity",
    "perplexity": "% of perplexity",
    "spearman": "points of Spearman x 100",
}


def criteria() -> str | None:
    """Return the tables of all models, or None without results."""
    return criteria_tables(json.loads(RESULTS.read_text())["models"]) if RESULTS.exists() else None


def criteria_tables(models: Mapping[str, Row]) -> str:
    """Return a table for each model (losses with intervals, measured speed-ups) and a summary in words.

    Args:
        models: results by model.
    """
    return "\n\n".join(_of_model(name, found) for name, found in models.items())


def _of_model(name: str, found: Row) -> str:
    rows = found["rows"]
    budgets = sorted({row["budget"] for row in rows if row["method"] != BY_TIME})
    start = found["original"]["value"]
    heading = " | ".join(f"{budget:.0%} saved" for budget in budgets)
    lines = [f"| {name}: {UNITS[found['metric']]} lost of {start:.2f} | {heading} |", "|---" * (len(budgets) + 1) + "|"]
    compared = [row for row in rows if row["method"] != BY_TIME]
    best = {budget: min(_loss(row) for row in compared if row["budget"] == budget) for budget in budgets}
    for method in dict.fromkeys(row["method"] for row in rows):
        by_budget = {row["budget"]: row for row in rows if row["method"] == method}
        cells = [_cell(by_budget.get(budget), -math.inf if method == BY_TIME else best[budget]) for budget in budgets]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    verdicts = [_verdict(ours, rows, budgets) for ours in OURS if any(row["method"] == ours for row in rows)]
    return "\n".join([*lines, "", " ".join([*verdicts, _exact(found), _prediction_error(rows)])])


def _exact(found: Row) -> str:
    speedup = found["exact"]["speedup"]
    interval = f"{speedup['low']:.2f}–{speedup['high']:.2f}"
    return (
        f"The original model takes {found['latency_ms']:.2f} ms; the exact rewrites alone are {speedup['ratio']:.2f}x "
        f"({interval}) faster."
    )


def _prediction_error(rows: Sequence[Row]) -> str:
    errors = [abs(row["predicted_speedup"] / row["speedup"]["ratio"] - 1.0) for row in rows]
    return f"The speed-ups predicted by the cost model have a median error of {median(errors):.0%}."


def _loss(row: Row) -> float:
    return float(row["loss"]["value"])


def _cell(row: Row | None, best: float) -> str:
    if row is None:
        return "–"
    lost = row["loss"]
    value = f"**{lost['value']:+.2f}**" if lost["value"] <= best else f"{lost['value']:+.2f}"
    return f"{value} ({lost['low']:+.2f} to {lost['high']:+.2f}), {row['speedup']['ratio']:.2f}x"


def _verdict(ours: str, rows: Sequence[Row], budgets: Sequence[float]) -> str:
    """Compare a search of Compressor with the best published method at each budget and at equal latency, in words."""
    published = [row for row in rows if row["method"] not in OURS]
    mine = {row["budget"]: row for row in rows if row["method"] == ours}
    equal_work = {budget: [row for row in published if row["budget"] == budget] for budget in budgets}
    equal_time = {
        budget: [row for row in published if row["speedup"]["ratio"] >= mine[budget]["speedup"]["ratio"]]
        for budget in mine
    }
    name, timed = f"“{ours[0].upper()}{ours[1:]}”", _standings(mine, equal_time)
    if ours == BY_TIME:
        return f"{name} against the best published method that is measured at least as fast: {timed}."
    return (
        f"{name} against the best published method at each budget (in brackets): {_standings(mine, equal_work)}. "
        f"Against the best published method that is measured at least as fast: {timed}."
    )


def _standings(mine: Mapping[float, Row], others: Mapping[float, Sequence[Row]]) -> str:
    by_verdict: dict[str, list[str]] = {}
    for budget, rivals in others.items():
        best = min(rivals, key=_loss, default=None)
        name = "" if best is None else f" ({best['method']})"
        by_verdict.setdefault(standing(mine.get(budget), best), []).append(f"{budget:.0%}{name}")
    return "; ".join(f"{verdict} at {', '.join(budgets)}" for verdict, budgets in by_verdict.items())


def standing(mine: Row | None, best: Row | None) -> str:
    """Return the rank of a loss relative to the best published one, inside or outside of the latter's interval."""
    if mine is None:
        return "budget not reached"
    if best is None:
        return "the only method to reach the budget"
    if _loss(mine) < best["loss"]["low"]:
        return "ahead, outside the interval"
    if _loss(mine) > best["loss"]["high"]:
        return "behind, outside the interval"
    side = "ahead" if _loss(mine) < _loss(best) else "behind" if _loss(mine) > _loss(best) else "level"
    return f"{side}, inside the interval"


# ---------------------------------------------------------------------------------------------------------- figure


AXES = {
    "multiply-adds saved, %": lambda row: row["saved"] * 100.0,
    "measured speed-up": lambda row: row["speedup"]["ratio"],
}


def draw(models: Mapping[str, Row], path: Path) -> None:
    """Draw loss against multiply-adds saved and against measured speed-up, one row of panels for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.3 * len(models) + 1.6), layout="constrained")
    panels = figure.subplots(len(models), len(AXES), squeeze=False, sharey="row")
    for line, (name, found) in zip(panels, models.items(), strict=True):
        for axes, (label, value) in zip(line, AXES.items(), strict=True):
            _panel(axes, found, value)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel(label, fontsize=9)
        line[0].set_ylabel(f"lost, {UNITS[found['metric']]}", fontsize=9)
    labelled: dict[str, Any] = {}
    for axes in panels.ravel():
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


def _panel(axes: Any, found: Row, value: Callable[[Row], float]) -> None:
    """Draw one model: a line for each method, thick and with intervals for those of Compressor."""
    rows = found["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        x, lost = [value(row) for row in mine], [_loss(row) for row in mine]
        if method not in OURS:
            axes.plot(x, lost, label=_label(method), **_style(method, number))
            continue
        below = [max(_loss(row) - row["loss"]["low"], 0.0) for row in mine]
        above = [max(row["loss"]["high"] - _loss(row), 0.0) for row in mine]
        colour, marker = dict(zip(OURS, (("black", "o"), ("tab:red", "s"), ("tab:blue", "D")), strict=True))[method]
        axes.errorbar(x, lost, yerr=[below, above], fmt=f"{marker}-", color=colour, linewidth=2.2, markersize=5,
                      elinewidth=1.0, capsize=3, zorder=5, label=method)  # fmt: skip
    losses = [abs(_loss(row)) for row in rows]
    if losses and max(losses) > 20.0:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0.0, color="0.5", linewidth=0.6)
    axes.grid(alpha=0.3)


def _label(method: str) -> str:
    """Return the legend label, the same for all seeds of a method."""
    return method.split(", seed", maxsplit=1)[0]


def _style(method: str, number: int) -> dict[str, Any]:
    """Return the style of a thin line, distinct without colour too; random methods are grey."""
    if method.startswith("random"):
        return {"color": "0.75", "linewidth": 1.0, "marker": ".", "markersize": 4}
    markers = "v^<>DPX*hdp"
    line = {"linewidth": 1.0, "marker": markers[number % len(markers)], "markersize": 4}
    colours = [f"C{each}" for each in range(10) if each != 3]  # red marks a method of Compressor
    return line | {"color": colours[number % len(colours)], "linestyle": ("-", "--", ":")[number % 3]}
