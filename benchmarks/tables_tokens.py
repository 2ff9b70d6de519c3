"""The tables of benchmarks/tokens.py: latency and quality of token merging, and the time by operator type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "tokens.json"
AIMS = ((1.0, 1.4), (2.0, 1.7))  # largest loss in points, and speed-up at batch 1 in float
SHOWN = 0.01  # smallest share of a model's time for which an operator type has its own row


def results() -> dict[str, Any]:
    """Read the results; empty without results."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def tokens() -> str | None:
    """Return the table of quality and speed of every design, or None without results."""
    part = results().get("deit")
    return None if part is None else tokens_table(part)


def tokens_table(part: Row) -> str:
    """Return the table of quality and speed of every design, and the aims.

    Args:
        part: the part `deit` of the results.
    """
    lines = [
        "| design | multiply-adds | top-1 % | lost | agreement % | divergence | batch 1 | batch 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = part["rows"][0]["multiply_adds"]
    for row in part["rows"]:
        saved = f"{1 - row['multiply_adds'] / whole:.1%} less"
        cells = [f"{row['design']}, {row['precision']}", saved, f"{row['figure']['value']:.2f}"]
        cells += [interval(row["loss"]["float"]), f"{row['agreement']['value']:.1f}"]
        cells += [f"{row['divergence']['value']:.3f}", _speed(row, "1"), _speed(row, "8")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _aims(part["rows"])])


def interval(value: Mapping[str, float]) -> str:
    """Format a loss with its interval."""
    return f"{value['value']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"


def _speed(row: Row, batch: str) -> str:
    over = row["speedup"][batch]
    ratio, low, high = (over["float"][key] for key in ("ratio", "low", "high"))
    text = f"{row['latency'][batch]['median']:.2f} ms, {ratio:.2f}x ({low:.2f}–{high:.2f})"
    if row["precision"] == "float":
        return text
    same = over["same"]
    return f"{text}; {same['ratio']:.2f}x ({same['low']:.2f}–{same['high']:.2f}) over int8"


def _aims(rows: Sequence[Row]) -> str:
    """Return a sentence on the aims that the designs reached, in float at batch 1."""
    verdicts = []
    for points, times in AIMS:
        reached = [
            row
            for row in rows
            if row["precision"] == "float"
            and row["loss"]["float"]["value"] <= points
            and row["speedup"]["1"]["float"]["ratio"] >= times
        ]
        best = max(reached, key=lambda row: row["speedup"]["1"]["float"]["ratio"], default=None)
        verdict = "missed by every design" if best is None else f"reached by “{best['design']}”"
        verdicts.append(f"{times:g}x at a loss of at most {points:g} on test data: {verdict}")
    return f"Aims, float at batch 1: {'; '.join(verdicts)}."


def token_methods() -> str | None:
    """Return the table of the methods of token reduction, or None without results."""
    part = results().get("methods")
    return None if part is None else methods_table(part)


def methods_table(models: Mapping[str, Row]) -> str:
    """Return the table of methods by model and schedule; what differs from ToMe outside the interval is marked.

    Args:
        models: the part `methods` of the results.
    """
    lines = [
        "| model | tokens removed | method | multiply-adds | divergence | against tome | points lost | against tome |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, part in models.items():
        for row in part["rows"]:
            against = row["divergence_against_base"]
            verdict = ", better" if against["high"] < 0 else ", worse" if against["low"] > 0 else ""
            cells = [model, row["schedule"], row["method"], f"{row['saved']:.1%} less"]
            cells.append(f"{row['divergence']['value']:.4f}")
            cells.append(f"{against['value']:+.4f} ({against['low']:+.4f} to {against['high']:+.4f}){verdict}")
            cells += [interval(row["loss"]), interval(row["loss_against_base"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tokens_operators() -> str | None:
    """Return the tables of multiply-adds against time by operator type, or None without results."""
    part = results().get("large")
    return None if part is None else operators_table(part)


def operators_table(models: Mapping[str, Row]) -> str:
    """Return a table and an explanation for each model.

    Args:
        models: the part `large` of the results.
    """
    return "\n\n".join(_of_model(name, found["rows"]) for name, found in models.items())


def _of_model(model: str, rows: Sequence[Row]) -> str:
    names = [row["design"] for row in rows]
    whole = rows[0]["multiply_adds"]
    shares = [1.0 - row["multiply_adds"] / whole for row in rows]
    lines = [f"| {model} | {' | '.join(names)} |", "|---" * (len(rows) + 1) + "|"]
    lines.append(_line("multiply-adds saved", [f"{share:.1%}" for share in shares]))
    lines.append(_line("speed-up if proportional to them", [f"{1 / (1 - share):.2f}x" for share in shares]))
    speeds = [row["speedup"] for row in rows]
    lines.append(_line("speed-up measured", [f"{s['ratio']:.2f}x ({s['low']:.2f}–{s['high']:.2f})" for s in speeds]))
    lines.append(_line("latency, ms", [f"{row['latency']['median']:.1f}" for row in rows]))
    times = [row["operators_ms"] for row in rows]
    shown = _shown(times)
    for kind in shown:
        lines.append(_line(f"{kind}, ms", [f"{each.get(kind, 0.0):.2f}" for each in times]))
    rest = [sum(value for kind, value in each.items() if kind not in shown) for each in times]
    lines.append(_line("all other operators, ms", [f"{value:.2f}" for value in rest]))
    explanations = [_explanation(row, share, times[0]) for row, share in zip(rows[1:], shares[1:], strict=True)]
    return "\n".join([*lines, "", *explanations])


def _line(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _shown(times: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the operator types with a share of at least `SHOWN` in any design, longest first."""
    kinds = {kind: max(each.get(kind, 0.0) / sum(each.values()) for each in times) for each in times for kind in each}
    return sorted((kind for kind, share in kinds.items() if share >= SHOWN), key=lambda kind: -kinds[kind])


def _explanation(row: Row, share: float, before: Mapping[str, float]) -> str:
    """Return a sentence on expected time, profiled time, and the operator types that cause the difference."""
    after = row["operators_ms"]
    whole, now = sum(before.values()), sum(after.values())
    expected = whole * (1.0 - share)
    # Differences from a time proportional to the multiply-adds.
    over = {kind: after.get(kind, 0.0) - before.get(kind, 0.0) * (1.0 - share) for kind in {*before, *after}}
    largest = sorted(over, key=lambda kind: (-abs(over[kind]), kind))[:6]
    listed = ", ".join(f"{kind} {over[kind]:+.1f}" for kind in largest)
    new = sum(value for kind, value in after.items() if kind not in before)
    return (
        f"- {row['design']}: profiled time {whole:.1f} → {now:.1f} ms; {expected:.1f} ms if it were proportional to "
        f"the multiply-adds. The difference, {now - expected:+.1f} ms: {listed}; operator types that the original "
        f"model lacks take {new:.1f} ms."
    )
