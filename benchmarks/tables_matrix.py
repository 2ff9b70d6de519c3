"""The tables of benchmarks/matrix.py: the factorials of compression and int8, and the comparison with other tools."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables_tokens import interval

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "matrix.json"
AGAIN = " (again)"
AIMS = (("DeiT-Tiny", 2.5, 1.5), ("ViT-B/16, random weights", 4.0, None))  # at batch 1 in int8 on ONNX Runtime
WHOLE = "compression"  # the interaction of all changes of the model with int8


def results() -> dict[str, Row]:
    """Read the results by model; empty without results."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def matrix() -> str | None:
    """Return the table of the factorials, or None without results."""
    found = results()
    return matrix_table(found) if found else None


def rivals() -> str | None:
    """Return the table of every engine, or None without results."""
    found = results()
    return rivals_table(found) if found else None


def headline() -> str:
    """Return a sentence on the factorial of the largest model."""
    name, target, batch = "ViT-B/16, random weights", "onnxruntime", 1
    whole = next(each for *key, each in _factorials(results()) if key == [name, target, batch])
    alone, int8, both = (whole["speedup"][part] for part in ("change", "int8", "both"))
    return (
        f"**{both['ratio']:.2f}x faster ({both['low']:.2f}–{both['high']:.2f})**: ViT-B/16 (random weights), "
        f"tokens merged and int8: {alone['ratio']:.2f}x and {int8['ratio']:.2f}x each, together "
        f"{whole['ratio']['ratio']:.0%} of the product."
    )


def matrix_table(found: Mapping[str, Row]) -> str:
    """Return a table with a row for each factorial, then the aims, the repeated measurement and the plans.

    Args:
        found: the results by model.
    """
    headings = ("compression alone", "int8 alone", "both", "both / product", "lost: compression, int8, both")
    lines = [
        f"| model | target, batch | {' | '.join(headings)} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, target, batch, each in _factorials(found):
        speed = (_times(each["speedup"][part]) for part in ("change", "int8", "both"))
        ratio = each["ratio"]
        product = f"{ratio['ratio']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f}) {each['verdict']}"
        lines.append(f"| {name} | {target}, {batch} | {' | '.join(speed)} | {product} | {_lost(each)} |")
    return "\n".join([*lines, "", *_aims(found), *_again(found), "", *_plans(found)])


def _factorials(found: Mapping[str, Row]) -> Iterator[tuple[str, str, int, Row]]:
    """Yield model, target, batch size and the interaction of the whole compression with int8."""
    for name, model in found.items():
        for target, run in model["targets"].items():
            if not target.endswith(AGAIN):
                batches = dict.fromkeys(each["batch"] for each in run["measurements"])
                for batch, factorial in zip(batches, run["factorials"], strict=True):
                    whole = next(each for each in factorial["interactions"] if each["change"] == WHOLE)
                    yield name, target, batch, whole


def _times(speed: Mapping[str, float]) -> str:
    return f"{speed['ratio']:.2f}x ({speed['low']:.2f}–{speed['high']:.2f})"


def _lost(each: Row) -> str:
    if each["loss"] is None:
        return "none stated"
    parts = ", ".join(f"{each['loss'][part]['value']:+.2f}" for part in ("change", "int8", "both"))
    return f"{parts}; beyond the sum {interval(each['excess'])}"


def _aims(found: Mapping[str, Row]) -> Iterator[str]:
    for name, times, points in AIMS:
        for model, target, batch, each in _factorials(found):
            if (model, target, batch) == (name, "onnxruntime", 1):
                reached, lost = each["speedup"]["both"]["ratio"], each["loss"] and each["loss"]["both"]["value"]
                good = reached >= times and (points is None or lost <= points)
                at = "" if points is None else f" at a loss of at most {points:g} points"
                yield f"- Aim {times:g}x{at} on {name}, ONNX Runtime, batch 1: {'reached' if good else 'missed'}" + (
                    f" ({reached:.2f}x)." if points is None else f" ({reached:.2f}x, {lost:+.2f})."
                )


def _again(found: Mapping[str, Row]) -> Iterator[str]:
    """Compare two runs of the same command: is each speed-up within the interval of the other?"""
    for name, model in found.items():
        for target in [target for target in model["targets"] if target.endswith(AGAIN)]:
            first, second = (_speeds(model["targets"][each]) for each in (target.removesuffix(AGAIN), target))
            outside = [
                key for key, one in first.items() if not (_inside(one, second[key]) and _inside(second[key], one))
            ]
            count = "all" if not outside else f"all but {len(outside)}"
            names = "" if not outside else ": " + "; ".join(f"{engine} at batch {batch}" for engine, batch in outside)
            yield (
                f"- Repetition of `compressor bench` for {name}, after all other runs: of {len(first)} speed-ups, "
                f"{count} lie within each other's intervals{names}."
            )


def _speeds(run: Row) -> dict[tuple[str, int], Mapping[str, float]]:
    against = run["against"]
    return {
        (shown(each["engine"]), each["batch"]): each["speedup"]
        for each in run["measurements"]
        if each["engine"] != against
    }


def _inside(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return other["low"] <= one["ratio"] <= other["high"]


def _plans(found: Mapping[str, Row]) -> Iterator[str]:
    for name, model in found.items():
        changes = ", ".join(f"{site} {action}" for site, action in model["plan"].items())
        saved = 1 - model["sizes"]["result"]["multiply_adds"] / model["sizes"]["original"]["multiply_adds"]
        yield f"- {name}: {changes}; {saved:.1%} fewer multiply-adds."


def shown(engine: str) -> str:
    """Return the display name of an engine.

    >>> shown("export/compressed int8"), shown("NNCF int8.onnx"), shown("deit_tiny (eager)")
    ('Compressor, compressed int8', 'NNCF int8', 'torch (eager)')
    """
    if engine.endswith((" (eager)", " (compiled)")):
        return f"torch ({engine.rpartition('(')[2]}"
    return engine.removesuffix(".onnx").replace("export/", "Compressor, ")


def rivals_table(found: Mapping[str, Row]) -> str:
    """Return the table of every engine of every model on each target: latency, quality, file size.

    Args:
        found: the results by model.
    """
    lines = [
        "| model, target | engine | batch 1 | batch 8 | quality | lost | file |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in found.items():
        for target, run in model["targets"].items():
            if not target.endswith(AGAIN):
                lines += _engines(f"{name}, {target}", run)
    return "\n".join(lines)


def _speed(measured: Row | None) -> str:
    return "–" if measured is None else f"{measured['latency']['median']:.1f} ms, {_times(measured['speedup'])}"


def _engines(label: str, run: Row) -> Iterator[str]:
    timed: dict[str, dict[int, Row]] = {}
    for each in run["measurements"]:
        timed.setdefault(each["engine"], {})[each["batch"]] = each
    for engine, times in timed.items():
        facts = run["engines"][engine]
        speeds = " | ".join(_speed(times.get(batch)) for batch in (1, 8))
        figure, lost = facts["figure"], facts["loss"]
        quality = "– | –" if figure is None else f"{figure['value']:.2f} | {interval(lost)}"
        size = "–" if facts["bytes"] is None else f"{facts['bytes'] / 1e6:.1f} MB"
        yield f"| {label} | {shown(engine)} | {speeds} | {quality} | {size} |"
