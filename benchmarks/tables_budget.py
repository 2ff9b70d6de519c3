"""The table of benchmarks/budget.py: how often the loss on data that was not given exceeds the budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "budget.json"


def budget() -> str | None:
    """Return the table, or None without results."""
    return budget_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def budget_table(found: Row) -> str:
    """Return a row for each case, number of given samples, budget and rule."""
    lines = [
        "| case | given | budget, % | searches x draws | rule | exceed it | mean loss, % | speed-up in multiply-adds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in found.items():
        for row in rows.values():
            counts = f"{row['searches']} x {row['draws'] // row['searches']}"
            for rule, values in row["rules"].items():
                lines.append(
                    f"| {case} | {row['given']} | {row['budget']:g} | {counts} | {rule} | {values['exceeding']:.0%} | "
                    f"{values['measured']:+.2f} | {values['speedup']:.2f}x |"
                )
    return "\n".join(lines)
