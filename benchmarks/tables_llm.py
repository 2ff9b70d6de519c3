"""The tables of benchmarks/llm.py: published plans against the search, by perplexity and time per token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables_tokens import interval

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "llm.json"
NEAR = 0.05  # largest relative difference of two times per token that count as equal


def llm() -> str | None:
    """Return the tables, or None without results."""
    return llm_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def llm_table(found: Row) -> str:
    """Return the table of every plan, then that of published plans against the nearest search step.

    Args:
        found: the results.
    """
    lines = [
        "| plan | changes | perplexity | lost, % | divergence | each further token | prompt | cache per token |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, found["rows"]),
        "",
        "| published plan | ours, nearest in time per token | speed-up of ours | perplexity of ours, % | |",
        "|---|---|---|---|---|",
        *(f"| {name} | {each['point']} | {_times(each['speedup'])} | {interval(each['loss'])} | {standing(each)} |"
          for name, each in found["nearest"].items()),
        "",
        *_facts(found),
    ]  # fmt: skip
    return "\n".join(lines)


def _row(row: Row) -> str:
    divergence = row.get("divergence")
    cells = (
        row["name"],
        str(len(row["changes"])),
        f"{row['figure']['value']:.3f}",
        interval(row["loss"]),
        "–" if divergence is None else f"{divergence['value']:.4f}",
        *(f"{row[part]['median']:.3f} ms, {_times(row[f'{part}_speedup'])}" for part in ("token", "first")),
        f"{row['cache_bytes_per_token']:,} B",
    )
    return f"| {' | '.join(cells)} |"


def _times(speedup: Mapping[str, float]) -> str:
    return f"{speedup['ratio']:.2f}x ({speedup['low']:.2f}–{speedup['high']:.2f})"


def standing(each: Row) -> str:
    """Compare a plan of ours with a published one: perplexity alone decides only at equal time per token.

    >>> standing({"speedup": {"ratio": 1.02}, "loss": {"value": -3.0, "low": -4.0, "high": -2.0}})
    'ahead at equal time'
    >>> standing({"speedup": {"ratio": 0.8}, "loss": {"value": -3.0, "low": -4.0, "high": -2.0}})
    'better, but slower'
    """
    ratio, loss = each["speedup"]["ratio"], each["loss"]
    apart = loss["low"] > 0 or loss["high"] < 0
    better = loss["value"] < 0
    if abs(ratio - 1.0) <= NEAR:
        if not apart:
            return "level at equal time"
        return "ahead at equal time" if better else "behind at equal time"
    quality = ("better" if better else "worse") if apart else "level"
    faster = ratio > 1.0
    if quality == "level":
        return "level, and faster" if faster else "level, but slower"
    return f"{quality}, {'and' if faster == better else 'but'} {'faster' if faster else 'slower'}"


def _facts(found: Row) -> Iterator[str]:
    verdicts = [standing(each) for each in found["nearest"].values()]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in dict.fromkeys(verdicts))
    yield f"Ours against {len(verdicts)} published plans: {counts}. Times within {NEAR:.0%} count as equal."
    yield ""
    yield from (
        f"- {row['name']}: {', '.join(f'{site} {action}' for site, action in row['changes'].items())}"
        for row in found["rows"]
        if row["name"] in _last_of_each(found["rows"])
    )


def _last_of_each(rows: list[Row]) -> set[str]:
    """Return the name of the longest plan of each family, of which the shorter plans are prefixes."""
    return set({row["family"]: row["name"] for row in rows if row["family"]}.values())
