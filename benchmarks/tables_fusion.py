"""The table of benchmarks/fusion.py: the gain of operator fusion on ONNX Runtime, and the time by operator type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "fusion.json"
PORTABLE = "portable file"
LONGEST = 6  # operator types listed for each profile


def fusion() -> str | None:
    """Return the table, or None without results."""
    return fusion_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def fusion_table(found: Row) -> str:
    """Return the table of every form of every file, then the profiles of the portable files and the fused target."""
    lines = [
        "| model | form | processor time | speed-up | relative output difference |",
        "|---|---|---|---|---|",
    ]
    for case, forms in found["cases"].items():
        for name, row in forms.items():
            ratio = row["speedup"]
            lines.append(
                f"| {case} | {name} | {row['median_ms']:.2f} ms | "
                f"{ratio['ratio']:.2f}x ({ratio['low']:.2f}–{ratio['high']:.2f}) | {row['difference']:.1e} |"
            )
    return "\n".join([*lines, "", *_profiles(found["cases"])])


def _profiles(cases: Row) -> Iterator[str]:
    for case, forms in cases.items():
        for name in (PORTABLE, "onnxruntime_fused"):
            spent = forms[name]["operators_ms"]
            total = sum(spent.values())
            longest = sorted(spent, key=lambda kind: -spent[kind])[:LONGEST]
            parts = ", ".join(f"{kind} {spent[kind] / total:.0%}" for kind in longest)
            yield f"- {case}, {name}: {total:.2f} ms in operators: {parts}"
