"""The table of benchmarks/tensorrt_engines.py: what TensorRT for RTX parses and builds of the small architectures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "tensorrt.json"


def tensorrt() -> str | None:
    """Return the table, or None without results."""
    return tensorrt_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def tensorrt_table(found: Row) -> str:
    """Return a row for each architecture with a cell for each form, then the reasons of those that were refused."""
    architectures = found["architectures"]
    forms = list(dict.fromkeys(form for rows in architectures.values() for form in rows))
    lines = [f"| {found['builder']}, {found['gpu']} | {' | '.join(forms)} |", f"|---|{'---|' * len(forms)}"]
    for name, rows in architectures.items():
        lines.append(f"| {name} | {' | '.join(_cell(rows.get(form, {})) for form in forms)} |")
    results = [row for rows in architectures.values() for row in rows.values() if "parsed" in row]
    built = sum(row["built"] for row in results)
    lines += ["", f"{built} of {len(results)} files are built, of {len(architectures)} architectures."]
    for name, rows in architectures.items():
        lines += [f"- {name}, {form}: {row['reason']}" for form, row in rows.items() if "reason" in row]
        lines += [f"- {name}: {rows['fp32']['not_written']}"] if "not_written" in rows.get("fp32", {}) else []
    return "\n".join(lines)


def _cell(row: Row) -> str:
    """Return seconds, size and the layers by precision of one engine; why there is none otherwise."""
    if not row or "not_written" in row:
        return "–"
    if not row["built"]:
        return "parsed, not built" if row["parsed"] else "not parsed"
    layers = ", ".join(f"{count} {name}" for name, count in row["layers"]["precisions"].items() if name != "other")
    return f"{row['seconds']:.1f} s, {row['bytes'] / 1e6:.1f} MB; {layers}"
