"""Write the tables of benchmarks/README.md and of the project's README from the committed results.

    python benchmarks/tables.py

A table is the text between `<!-- NAME -->` and `<!-- /NAME -->`; a test checks that it agrees with the results. Tables
without results are not changed. The script also draws the figure of the criteria.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tables_ablation
import tables_abuse
import tables_budget
import tables_corrections
import tables_coverage
import tables_criteria
import tables_decode
import tables_fusion
import tables_image_tokens
import tables_large
import tables_linear_kernels
import tables_llama_cpp
import tables_llm
import tables_matrix
import tables_scale
import tables_smollm2
import tables_targets
import tables_tensorrt
from tables_tokens import token_methods, tokens, tokens_operators

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "README.md")
UNITS = {"accuracy": "top-1 %", "perplexity": "perplexity", "spearman": "Spearman x 100", "agreement": "agreement %"}

Row = dict[str, Any]


def rows() -> list[Row]:
    """Read the committed results of benchmarks/main_job.py."""
    results: list[Row] = json.loads((HERE / "results" / "main_job.json").read_text())
    return results


def main_job() -> str:
    """Return the table of quality, speed and size of every case."""
    lines = [
        "| model, flags | changed | metric | baseline | result | lost | speed-up | parameters | multiply-adds | file |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        small, large = row["sizes"]["result"], row["sizes"]["baseline"]
        changed = f"{_changed(row)}"
        saved = (f"{1 - small[key] / large[key]:.1%} less" for key in ("parameters", "multiply_adds"))
        size = f"{large['bytes'] / 1e6:.1f} → {small['bytes'] / 1e6:.1f} MB"
        lines.append(f"| {row['name']} | {changed} | {_quality(row)} | {_speed(row)} | {' | '.join(saved)} | {size} |")
    return "\n".join(lines)


def _quality(row: Row) -> str:
    quality = row["quality"]
    if quality is None:
        return "none stated | – | – | –"
    base, result = (quality["figures"][name]["value"] for name in ("baseline", "result"))
    lost = quality["loss"]["baseline"]
    interval = f"{lost['value']:+.2f} ({lost['low']:+.2f} to {lost['high']:+.2f})"
    return f"{UNITS[quality['metric']]} | {base:.2f} | {result:.2f} | {interval}"


def _speed(row: Row) -> str:
    speedup = row["speedup"]["baseline"]
    before, after = (row["latency"][name]["median"] for name in ("baseline", "result"))
    total = row["speedup"].get("original")
    against = f"; {total['ratio']:.2f}x over float" if total else ""
    interval = f"{speedup['low']:.2f}–{speedup['high']:.2f}"
    return f"{speedup['ratio']:.2f}x ({interval}), {before:.2f} → {after:.2f} ms{against}"


def cost() -> str:
    """Return the table of export durations, relative to a forward pass over the calibration data."""
    lines = [
        "| case | total s | sweep s | total / sweep | most memory | the four longest steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows():
        if row["sweep_seconds"] is None:
            continue
        steps = sorted(row["steps"], key=lambda step: -step["seconds"])[:4]
        longest = ", ".join(f"{step['name']} {step['seconds']:.0f} s" for step in steps)
        memory = max(step["peak_memory"] or 0 for step in row["steps"]) / 2**30
        ratio = row["wall_seconds"] / row["sweep_seconds"]
        times = f"{row['wall_seconds']:.0f} | {row['sweep_seconds']:.1f} | {ratio:.1f}"
        lines.append(f"| {row['name']} | {times} | {memory:.1f} GiB | {longest} |")
    return "\n".join(lines)


def _changes(plan: dict[str, Any]) -> str:
    """Describe the changes of a plan in a few words."""
    actions = list(plan["changes"].values())
    merged, dropped = sum(action.startswith("merge:") for action in actions), actions.count("drop")
    counts = {
        "tokens merged at {}": merged,
        "{} dropped": dropped,
        "{} replaced": len(actions) - merged - dropped,
    }
    return ", ".join(
        words.format("1 branch" if count == 1 else f"{count} branches") for words, count in counts.items() if count
    )


def headline() -> str:
    """Return the measured results at the top of the project's README."""
    by_name = {row["name"]: row for row in rows()}
    vision = by_name["DeiT-Tiny, auto, int8"]
    ratio = vision["wall_seconds"] / vision["sweep_seconds"]
    return "\n".join(
        [
            f"- **{_times(vision, 'original')}**: a vision transformer (DeiT-Tiny), {_changes(vision['plan'])}, "
            f"int8; top-1 accuracy {_change(vision, 'original')}. Search, export, int8 and proof "
            f"took {vision['wall_seconds'] / 60:.0f} minutes, {ratio:.0f} forward passes over the calibration data.",
            f"- {tables_matrix.headline()}",
            f"- {tables_decode.headline()}",
            "",
            f"(ONNX Runtime on {vision['environment']['cores']} CPU cores, batch 1, quality on held-out data, "
            "95 % intervals in brackets.)",
        ]
    )


def _changed(row: Row) -> int:
    return len(row["plan"].get("changes", row["plan"]["dropped"]))


def _times(row: Row, over: str) -> str:
    speedup = row["speedup"][over]
    return f"{speedup['ratio']:.2f}x faster ({speedup['low']:.2f}–{speedup['high']:.2f})"


def _change(row: Row, over: str) -> str:
    before, after = (row["quality"]["figures"][name]["value"] for name in (over, "result"))
    lost = row["quality"]["loss"][over]
    return f"{before:.1f} → {after:.1f} ({-lost['high']:+.1f} to {-lost['low']:+.1f} points)"


TABLES = {
    "ablation": tables_ablation.ablation,
    "abuse": tables_abuse.abuse,
    "main_job": main_job,
    "cost": cost,
    "headline": headline,
    "corrections": tables_corrections.corrections,
    "joined": tables_corrections.joined,
    "knapsack": tables_corrections.knapsack,
    "coverage": tables_coverage.coverage,
    "coverage_timm": tables_coverage.coverage_timm,
    "criteria": tables_criteria.criteria,
    "decode": tables_decode.decode,
    "budget": tables_budget.budget,
    "large": tables_large.large,
    "linear_kernels": tables_linear_kernels.linear_kernels,
    "scale": tables_scale.scale,
    "fusion": tables_fusion.fusion,
    "image_tokens": tables_image_tokens.image_tokens,
    "tensorrt": tables_tensorrt.tensorrt,
    "llm": tables_llm.llm,
    "llama_cpp": tables_llama_cpp.llama_cpp,
    "smollm2": tables_smollm2.smollm2,
    "matrix": tables_matrix.matrix,
    "rivals": tables_matrix.rivals,
    "tokens": tokens,
    "tokens_operators": tokens_operators,
    "token_methods": token_methods,
    "targets": tables_targets.targets,
}


def filled(text: str) -> str:
    """Return the text of a page with its tables replaced."""
    for name, make in TABLES.items():
        table = make()
        if table is not None:
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
            text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> None:
    """Write the pages and draw the figure."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    if tables_criteria.RESULTS.exists():
        tables_criteria.draw(json.loads(tables_criteria.RESULTS.read_text())["models"], tables_criteria.PICTURE)


if __name__ == "__main__":
    main()
