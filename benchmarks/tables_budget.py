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
    """Return a row for each case, number of given samples and budget, and a sentence for cases without any change."""
    lines, unchanged = [], []
    for case, rows in found.items():
        if all(values["speedup"] == 1.0 for row in rows.values() for values in row["rules"].values()):
            unchanged.append(case)
            continue
        lines += [_line(case, row) for row in rows.values()]
    if not lines:
        return _unchanged(unchanged)
    rules = next(iter(next(iter(found.values())).values()))["rules"]
    head = ["case", "given", "budget, %", "searches x draws", *rules]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, *_unchanged(unchanged).splitlines()])


def _line(case: str, row: Row) -> str:
    counts = f"{row['searches']} x {row['draws'] // row['searches']}"
    cells = [
        f"{values['exceeding']:.0%}; {values['measured']:+.2f}; {values['speedup']:.2f}x"
        for values in row["rules"].values()
    ]
    start = [case, str(row["given"]), f"{row['budget']:g}", counts]
    return f"| {' | '.join([*start, *cells])} |"


def _unchanged(cases: list[str]) -> str:
    return f"\nNo search changed anything: {', '.join(cases)}." if cases else ""
