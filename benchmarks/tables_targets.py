"""The table of benchmarks/targets.py: every target in every precision, and whether the aims were reached."""

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
    """Latency, quality and size of every engine; None where nothing was measured yet."""
    return targets_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def targets_table(found: Mapping[str, Row]) -> str:
    """The engines model by model, what could not be built, and the aims.

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
    lines += [f"- Not there: {who}: {why}" for who, why in _refused(found)]
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
            told = "reached" if reached[best]["ratio"] >= aim else "missed"
            yield f"- {model}, {best}: {_times(reached[best])} over fp32 of the same target; aim {aim}x {told}."
    if "DeiT-Tiny" in found:
        for name, each in found["DeiT-Tiny"]["engines"].items():
            if "int8" in name:
                told = "within" if each["loss"]["value"] <= MOST else "beyond"
                yield f"- DeiT-Tiny, {name}: {interval(each['loss'])} points lost, {told} the {MOST} that are aimed at."


def _refused(found: Mapping[str, Row]) -> Iterator[tuple[str, str]]:
    """What could not be built and why; a target that is missing altogether once, not for every model."""
    told = set()
    for model, row in found.items():
        for who, why in row["refused"].items():
            name = f"{model}, {who}" if " " in who else who
            if name not in told:
                told.add(name)
                yield name, why
