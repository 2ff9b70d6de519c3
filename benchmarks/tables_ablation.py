"""The table of benchmarks/ablation.py: the plan that the search finds with its steps switched on one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "ablation.json"


def ablation() -> str | None:
    """Return the table, or None without results."""
    return ablation_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def ablation_table(found: Row) -> str:
    """Return a row for each model, budget and step of the search."""
    head = (
        "model, budget",
        "search",
        "changed",
        "multiply-adds",
        "divergence, lost: search",
        "divergence, test",
        "against the row before",
        "lost, test",
        "sweeps: effects, fits, validation",
    )
    rows = [
        _line(f"{case}, {budget} %" if not number else "", name, row)
        for case, budgets in found.items()
        for budget, result in budgets.items()
        for number, (name, row) in enumerate(result["rows"].items())
    ]
    swaps = [
        f"- {case}, {budget} %: {row['swap']}."
        for case, budgets in found.items()
        for budget, result in budgets.items()
        for row in result["rows"].values()
        if "swap" in row
    ]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, "", "Swaps:", "", *swaps])


def _line(case: str, name: str, row: Row) -> str:
    lost, sweeps = row.get("loss"), row["sweeps"]
    cells = [
        case,
        name,
        str(len(row["changes"])),
        f"{1.0 - 1.0 / row['speedup']:.1%} less",
        f"{row['search_divergence']:.4f}, {row['validation_loss']:.2f} %",
        f"{row['divergence']:.4f}" if "divergence" in row else "–",
        _change(row),
        "–" if lost is None else f"{lost['value']:+.2f} ({lost['low']:+.2f} to {lost['high']:+.2f})",
        "–" if sweeps is None else ", ".join(f"{sweeps[part]:.0f}" for part in ("effects", "fits", "validation")),
    ]
    return f"| {' | '.join(cells)} |"


def _change(row: Row) -> str:
    """Return the mean difference in divergence from the row before, with its 95 % interval."""
    if "change" not in row:
        return "–"
    change, width = row["change"], 1.96 * row["change_error"]
    return f"{change:+.4f} ({change - width:+.4f} to {change + width:+.4f})"
