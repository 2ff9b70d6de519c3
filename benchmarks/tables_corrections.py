"""The tables of benchmarks/corrections.py: plans of an integer program, replaced branches, joined blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables_tokens import interval

Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results" / "corrections.json"
KNAPSACK = ("knapsack", "knapsack without tokens")


def results() -> dict[str, Any]:
    """Read the results; empty without results."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def knapsack() -> str | None:
    """Return the table of the plans of the integer program, or None without results."""
    parts = {part: results()[part] for part in KNAPSACK if part in results()}
    return knapsack_table(parts) if parts else None


def knapsack_table(parts: Mapping[str, Row]) -> str:
    """Return a row for each plan, and the seconds of each part.

    Args:
        parts: results by part and model.
    """
    head = ("model", "plan", "changed", "multiply-adds", "divergence, lost: search", "divergence, test", "against")
    rows, notes = [], []
    for part, models in parts.items():
        for model, result in models.items():
            found = result["found"]
            label = model + (", no tokens merged" if "without" in part else "")
            rows += [_plan(label, row, found["rows"]) for row in found["rows"].values()]
            seconds = ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items())
            notes.append(f"- {label}: {found['candidates']} candidates; {seconds}. {_verdicts(found['rows'])}")
    return "\n".join([*_head(head, "lost, test"), *rows, "", *notes])


def _plan(label: str, row: Row, rows: Mapping[str, Row]) -> str:
    cells = [label, row["method"], str(len(row["changes"])), f"{row['saved']:.1%} less"]
    cells.append(f"{row['search_divergence']:.4f}, {row['validation_loss']:.2f} %")
    return _line([*cells, *_judged(row, rows)])


def _verdicts(rows: Mapping[str, Row]) -> str:
    """Return how many plans diverge less and more than those that they are compared with, outside the interval."""
    counts: dict[tuple[str, str], list[int]] = {}
    for row in rows.values():
        for other, against in row["against"].items():
            tally = counts.setdefault((row["method"], rows[other]["method"]), [0, 0, 0])
            tally[0] += against["divergence"]["high"] < 0
            tally[1] += against["divergence"]["low"] > 0
            tally[2] += 1
    return "; ".join(
        f"{mine} against {other}: better {better} times, worse {worse} times of {total}"
        for (mine, other), (better, worse, total) in counts.items()
    )


def corrections() -> str | None:
    """Return the table of replaced branches, or None without results."""
    part = results().get("corrections")
    return None if part is None else corrections_table(part)


def corrections_table(models: Mapping[str, Row]) -> str:
    """Return a row for each way to replace the branches of each design.

    Args:
        models: the part `corrections` of the results.
    """
    lines = _head(("model, dropped", "replaced by", "multiply-adds", "divergence", "against"), "lost")
    for model, result in models.items():
        for design, rows in result["found"].items():
            lines += [
                _line([f"{model}, {design}", _way(name, row), *_figures(row, rows)]) for name, row in rows.items()
            ]
    return "\n".join(lines)


def _way(name: str, row: Row) -> str:
    return f"{name}: {', '.join(row['taken'])}" if "taken" in row else name


def joined() -> str | None:
    """Return the table of joined blocks, or None without results."""
    part = results().get("joined")
    return None if part is None else joined_table(part)


def joined_table(models: Mapping[str, Row]) -> str:
    """Return a row for each pair of blocks and each way, by divergence, with how often each way was better.

    Args:
        models: the part `joined` of the results.
    """
    lines, notes = [], []
    for model, result in models.items():
        ways = list(next(iter(result["found"].values())))
        lines += _head((f"{model}: divergence", *ways[:-1]), ways[-1])
        for pair, rows in result["found"].items():
            cells = [f"{row['divergence']['value']:.4f}{_marks(row, ways)}" for row in rows.values()]
            lines.append(_line([pair, *cells]))
        for way in ways:
            for other in result["found"][pair][way]["against"]:
                found = [rows[way]["against"][other]["divergence"] for rows in result["found"].values()]
                better, worse = sum(each["high"] < 0 for each in found), sum(each["low"] > 0 for each in found)
                notes.append(
                    f"- {model}, “{way}” against “{other}”: less divergence outside the interval at {better}, "
                    f"more at {worse} of {len(found)} pairs."
                )
    return "\n".join([*lines, "", *notes])


def _marks(row: Row, ways: Sequence[str]) -> str:
    """Return the positions of the ways that diverge more than this one outside the interval, in brackets."""
    beaten = [str(ways.index(other) + 1) for other, found in row["against"].items() if found["divergence"]["high"] < 0]
    return f" (less than {', '.join(beaten)})" if beaten else ""


def _figures(row: Row, rows: Mapping[str, Row]) -> list[str]:
    return [f"{row['saved']:.1%} less", *_judged(row, rows)]


def _judged(row: Row, rows: Mapping[str, Row]) -> list[str]:
    """Return the divergence, its differences from the other variants, and the loss, on test data."""
    against = "; ".join(
        f"{rows[other].get('method', other)} {_difference(found['divergence'])}"
        for other, found in row["against"].items()
    )
    return [f"{row['divergence']['value']:.4f}", against or "–", interval(row["loss"])]


def _difference(found: Mapping[str, float]) -> str:
    verdict = ", better" if found["high"] < 0 else ", worse" if found["low"] > 0 else ""
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}){verdict}"


def _head(cells: Sequence[str], last: str) -> list[str]:
    return [_line([*cells, last]), "|---" * (len(cells) + 1) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
