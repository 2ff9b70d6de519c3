"""The table of benchmarks/linear_kernels.py: linear layers in oneDNN against MKL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "linear_kernels.json"
CALLS = {"pass": "pass", "step": "pass and gradients"}


def linear_kernels() -> str | None:
    """Return the table, or None without results."""
    return linear_kernels_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def linear_kernels_table(found: Mapping[str, Any]) -> str:
    """Return a row for each model, call and number of threads, then the machine.

    Args:
        found: the results.
    """
    lines = ["| model | batch | call | threads | MKL | oneDNN | speed-up |", "|---|---|---|---|---|---|---|"]
    for name, model in found["models"].items():
        shape = " x ".join(map(str, next(iter(model["batch"].values()))))
        for row in model["rows"].values():
            before, after = (f"{row['milliseconds'][each]:.0f} ms" for each in ("MKL", "oneDNN"))
            gain = row["speedup"]
            lines.append(
                f"| {name} | {shape} | {CALLS[row['call']]} | {row['threads']} | {before} | {after} | "
                f"{gain['ratio']:.2f}x ({gain['low']:.2f}–{gain['high']:.2f}) |"
            )
    return "\n".join(
        [*lines, "", f"- {found['environment']['processor']}; torch {found['environment']['packages']['torch']}."]
    )
