"""The table of benchmarks/large.py: peak memory and time for a model larger than the memory limit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "large.json"


def large() -> str | None:
    """Return the table of every command, or None without results."""
    return large_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def large_table(found: Mapping[str, Any]) -> str:
    """Return the table of limit, peak and time of every command, then the sizes.

    Args:
        found: the results.
    """
    lines = ["| command | limit | peak | time | written |", "|---|---|---|---|---|"]
    for name, row in found["commands"].items():
        lines.append(
            f"| {name} | {found['limit']} | {row['peak'] / 2**30:.2f} GiB | {row['seconds']:.0f} s | "
            f"{row['written'] / 1e9:.2f} GB |"
        )
    sizes = next(row["sizes"]["baseline"] for row in found["commands"].values() if "sizes" in row)
    parameters = sizes["parameters"]
    facts = (
        f"- {parameters / 1e9:.2f} billion parameters in {found['layers']} blocks: {found['stored'] / 1e9:.2f} GB on "
        f"disk, {parameters * 4 / 1e9:.2f} GB ({parameters * 4 / 2**30:.2f} GiB) in float32; {found['texts']} texts of "
        f"{found['tokens']} tokens; {found['environment']['cores']} cores."
    )
    return "\n".join([*lines, "", facts, *_in_memory(found.get("in_memory"))])


def _in_memory(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines of the table of models that fit into memory; none without results."""
    if found is None:
        return
    yield from (
        "",
        "| in memory | parameters | peak | time | written | the longest steps |",
        "|---|---|---|---|---|---|",
    )
    for name, row in found["commands"].items():
        steps = ", ".join(f"{step['name']} {step['seconds']:.0f} s" for step in row["longest"])
        yield (
            f"| {name} | {row['sizes']['baseline']['parameters'] / 1e6:,.0f} M | {row['peak'] / 2**30:.2f} GiB | "
            f"{row['seconds']:.0f} s | {row['written'] / 1e9:.2f} GB | {steps} |"
        )
