"""The tables of benchmarks/tokens.py: what merging tokens gains and costs, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "tokens.json"
AIMS = ((1.0, 1.4), (2.0, 1.7))  # points of loss, and how many times faster at batch 1 in float
SHOWN = 0.01  # share of a model's time from which an operator gets a line of its own


def results() -> dict[str, Any]:
    """What was measured so far."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def tokens() -> str | None:
    """Quality and speed of every design; None where that was not measured yet."""
    part = results().get("deit")
    return None if part is None else tokens_table(part)


def tokens_table(part: Row) -> str:
    """Quality and speed of every design, and whether the aims were reached.

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
    """A loss with its interval."""
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
    """Which aims the plans of the search have reached, in float at batch 1, by the measured values."""
    found = []
    for points, times in AIMS:
        reached = [
            row
            for row in rows
            if row["precision"] == "float"
            and row["loss"]["float"]["value"] <= points
            and row["speedup"]["1"]["float"]["ratio"] >= times
        ]
        best = max(reached, key=lambda row: row["speedup"]["1"]["float"]["ratio"], default=None)
        said = "missed by every design" if best is None else f"reached by “{best['design']}”"
        found.append(f"{times:g}x at a loss of at most {points:g} on test data: {said}")
    return f"Aims, float at batch 1: {'; '.join(found)}."


def tokens_operators() -> str | None:
    """Multiply-adds saved against time saved, and which operators make the difference; None if not measured yet."""
    part = results().get("large")
    return None if part is None else operators_table(part)


def operators_table(models: Mapping[str, Row]) -> str:
    """A table and an explanation for each model.

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
    lines.append(_line("speed-up if time went with them", [f"{1 / (1 - share):.2f}x" for share in shares]))
    speeds = [row["speedup"] for row in rows]
    lines.append(_line("speed-up measured", [f"{s['ratio']:.2f}x ({s['low']:.2f}–{s['high']:.2f})" for s in speeds]))
    lines.append(_line("latency, ms", [f"{row['latency']['median']:.1f}" for row in rows]))
    times = [row["operators_ms"] for row in rows]
    shown = _shown(times)
    for kind in shown:
        lines.append(_line(f"{kind}, ms", [f"{each.get(kind, 0.0):.2f}" for each in times]))
    rest = [sum(value for kind, value in each.items() if kind not in shown) for each in times]
    lines.append(_line("all other operators, ms", [f"{value:.2f}" for value in rest]))
    explained = [_explained(row, share, times[0]) for row, share in zip(rows[1:], shares[1:], strict=True)]
    return "\n".join([*lines, "", *explained])


def _line(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _shown(times: Sequence[Mapping[str, float]]) -> list[str]:
    """The operators that take a share worth a line in any design, the longest first."""
    kinds = {kind: max(each.get(kind, 0.0) / sum(each.values()) for each in times) for each in times for kind in each}
    return sorted((kind for kind, share in kinds.items() if share >= SHOWN), key=lambda kind: -kinds[kind])


def _explained(row: Row, share: float, before: Mapping[str, float]) -> str:
    """One sentence: time expected, time measured by the profile, and the operators between the two."""
    after = row["operators_ms"]
    whole, now = sum(before.values()), sum(after.values())
    expected = whole * (1.0 - share)
    # Had each operator shrunk as the multiply-adds did, the sum of these would be zero.
    over = {kind: after.get(kind, 0.0) - before.get(kind, 0.0) * (1.0 - share) for kind in {*before, *after}}
    largest = sorted(over, key=lambda kind: (-abs(over[kind]), kind))[:6]
    listed = ", ".join(f"{kind} {over[kind]:+.1f}" for kind in largest)
    new = sum(value for kind, value in after.items() if kind not in before)
    return (
        f"- {row['design']}: in the profile {whole:.1f} → {now:.1f} ms; {expected:.1f} if all operators shrank as the "
        f"multiply-adds do. The difference, {now - expected:+.1f} ms: {listed}; kinds of operators that the model did "
        f"not have before take {new:.1f} ms."
    )
