"""The table of benchmarks/targets.py: every target in every precision, and the aims."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables_tokens import interval

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "targets.json"
# Speed-up of int8 over fp32 of the same target, at batch 1.
AIMS = (("ViT-B/16, random weights", "onnxruntime", 2.6), ("ViT-B/16, random weights", "openvino", 2.2))
MOST = 0.5  # points that int8 may lose on DeiT-Tiny


def targets() -> str | None:
    """Return the table of latency, quality and size of every engine, or None without results."""
    return targets_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def targets_table(found: Mapping[str, Row]) -> str:
    """Return the table of the engines, the aims, and the engines that are not available.

    Args:
        found: the results by model.
    """
    lines = [
        "| model | engine | ms | over ONNX Runtime fp32 | over its own fp32 | top-1, lost | file | made by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in found.items():
        lines += [_row(name, engine, each) for engine, each in model["engines"].items()]
    lines += ["", *_aims(found)]
    lines += [f"- Not available: {name}: {reason}" for name, reason in _refused(found)]
    return "\n".join(lines)


def _row(model: str, engine: str, each: Row) -> str:
    size = "–" if each["bytes"] is None else f"{each['bytes'] / 1e6:.1f} MB, {each['seconds']:.0f} s"
    quality = "–" if "figure" not in each else f"{each['figure']['value']:.1f}, {interval(each['loss'])}"
    speeds = (_times(each[key]) for key in ("speedup", "speedup_same"))
    time = f"{each['latency']['median']:.2f}"
    return f"| {' | '.join((model, engine, time, *speeds, quality, size, each['by'] or '–'))} |"


def _times(speedup: Mapping[str, float] | None) -> str:
    return "–" if speedup is None else f"{speedup['ratio']:.2f}x ({speedup['low']:.2f}–{speedup['high']:.2f})"


def _aims(found: Mapping[str, Row]) -> Iterator[str]:
    for model, target, aim in AIMS:
        if model in found:
            engines = found[model]["engines"]
            reached = {name: engines[name]["speedup_same"] for name in engines if name.startswith(f"{target} int8")}
            best = max(reached, key=lambda name: float(reached[name]["ratio"]))
            verdict = "reached" if reached[best]["ratio"] >= aim else "missed"
            yield f"- {model}, {best}: {_times(reached[best])} over fp32 of the same target; aim {aim}x {verdict}."
    if "DeiT-Tiny" in found:
        for name, each in found["DeiT-Tiny"]["engines"].items():
            if "int8" in name:
                verdict = "within" if each["loss"]["value"] <= MOST else "beyond"
                yield f"- DeiT-Tiny, {name}: {interval(each['loss'])} points lost, {verdict} the aim of {MOST}."


def _refused(found: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """Yield engines that could not be built, with reasons; a missing target appears once, not for every model."""
    seen = set()
    for model, row in found.items():
        for engine, reason in row["refused"].items():
            name = f"{model}, {engine}" if " " in engine else engine
            if name not in seen:
                seen.add(name)
                yield name, reason
