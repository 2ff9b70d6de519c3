"""Draw docs/images/report.svg: what a report states, from the committed results of benchmarks/main_job.py.

python docs/scripts/report_picture.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results" / "main_job.json"
PICTURE = DOCS / "images" / "report.svg"
CASE = "DeiT-Tiny, auto, int8"
VARIANTS = {"original": "original, fp32", "baseline": "int8 alone", "result": "compressed, int8"}
COLOURS = {"original": "#afb8c1", "baseline": "#afb8c1", "result": "#0969da"}
KEPT, DROPPED, MERGED = "#d0d7de", "#cf222e", "#0969da"


def case() -> dict[str, Any]:
    """Return the committed result that is drawn."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())
    return next(row for row in rows if row["name"] == CASE)


def latency(axes: Axes, row: dict[str, Any]) -> None:
    """Draw the median of each variant as a bar and the median of each burst as a dot."""
    for place, (variant, label) in enumerate(VARIANTS.items()):
        found = row["latency"][variant]
        axes.barh(label, found["median"], color=COLOURS[variant], height=0.6)
        axes.plot(found["burst_medians_ms"], [place] * len(found["burst_medians_ms"]), "|", color="#1f2328")
        axes.text(
            0.2, place, f"{found['median']:.2f} ms", va="center", color="#ffffff" if variant == "result" else None
        )
    speedup = row["speedup"]["original"]
    axes.set_title(f"Latency: {speedup['ratio']:.2f}x faster ({speedup['low']:.2f}–{speedup['high']:.2f})")
    axes.set_xlabel("ms at batch 1; bar: median, strokes: bursts")
    axes.invert_yaxis()


def quality(axes: Axes, row: dict[str, Any]) -> None:
    """Draw top-1 accuracy on test data with its 95 % interval."""
    for variant, label in VARIANTS.items():
        found = row["quality"]["figures"][variant]
        axes.plot([found["low"], found["high"]], [label] * 2, color=COLOURS[variant], linewidth=4)
        axes.plot(found["value"], label, "o", color="#1f2328")
        axes.annotate(f"{found['value']:.1f}", (found["value"], label), (0, 7), textcoords="offset points", ha="center")
    lost = row["quality"]["loss"]["original"]
    axes.set_title(f"Accuracy lost: {lost['value']:+.1f} points ({lost['low']:+.1f} to {lost['high']:+.1f})")
    axes.set_xlabel(f"top-1 in % on {row['sizes_of_data']['test']} test images; bar: 95 % interval")
    axes.margins(y=0.25)
    axes.invert_yaxis()
    axes.set_yticks([])


def plan(axes: Axes, row: dict[str, Any]) -> None:
    """Draw what was done to each branch along the depth."""
    changes, kinds = row["plan"]["changes"], ("attn", "mlp")
    blocks = row["sites"] // len(kinds)
    for height, kind in enumerate(kinds):
        for block in range(blocks):
            action = changes.get(f"blocks.{block}.{kind}")
            colour = KEPT if action is None else DROPPED if action == "drop" else MERGED
            axes.barh(height, 0.9, left=block - 0.45, height=0.8, color=colour)
            if action is not None:
                text = action.replace("merge:", "merge\n")
                axes.text(block, height, text, ha="center", va="center", color="#ffffff", fontsize=8)
    saved = 1 - row["sizes"]["result"]["multiply_adds"] / row["sizes"]["original"]["multiply_adds"]
    axes.set_title(f"{len(changes)} of {row['sites']} branches changed; {100 * saved:.0f} % fewer multiply-adds")
    axes.set_yticks(range(len(kinds)), ["attention", "MLP"])
    axes.set_xticks(range(blocks))
    axes.set_xlabel("block")
    axes.invert_yaxis()


def picture() -> Figure:
    """Return the three parts as one figure."""
    row = case()
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    parts = figure.subplot_mosaic([["latency", "quality"], ["plan", "plan"]], height_ratios=[1.1, 1.0])
    for name, draw in (("latency", latency), ("quality", quality), ("plan", plan)):
        draw(parts[name], row)
        parts[name].spines[["top", "right", "left"]].set_visible(False)
        parts[name].tick_params(length=0)
    cores = row["environment"]["cores"]
    figure.suptitle(f"{row['model']} on ONNX Runtime, {cores} CPU cores", fontsize=11)
    return figure


if __name__ == "__main__":
    # Text stays text, and nothing in the file depends on when it was drawn.
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif", "axes.titlesize": 10}
    with mpl.rc_context(style):
        picture().savefig(PICTURE, metadata={"Date": None})
