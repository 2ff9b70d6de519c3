"""The table of benchmarks/abuse: bad inputs, kills and edited folders, with the faults of each kind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "abuse.json"
NAMES = {
    "options": "options and outputs",
    "data": "data",
    "models": "models",
    "edits": "edited folders",
    "kills": "kills",
}
# The kinds of faults that have a column; the others share one.
COLUMNS = {
    "traceback": "tracebacks",
    "payload run": "payloads run",
    "half-written folder": "half-written folders",
    "wrong answer with status 0": "wrong answers with status 0",
}


def abuse() -> str | None:
    """Return the table of all groups, or None without results."""
    return abuse_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def abuse_table(found: Mapping[str, Row]) -> str:
    """Return the table of the groups, a sentence on the kills, and a line for each fault that is left.

    Args:
        found: the results by group.
    """
    lines = [
        f"| group | cases | expected | {' | '.join(COLUMNS.values())} | other faults |",
        f"|{'---|' * (len(COLUMNS) + 4)}",
    ]
    lines += [_row(name, found[name]) for name in NAMES if name in found]
    lines += ["", *(_kills(found["kills"]["cases"]) if "kills" in found else ())]
    return "\n".join([*lines, *_left(found)])


def _row(name: str, group: Row) -> str:
    faults = group["faults"]
    others = sum(count for kind, count in faults.items() if kind not in COLUMNS)
    figures = (len(group["cases"]), _expected(group["cases"]), *(faults[kind] for kind in COLUMNS), others)
    return f"| {NAMES[name]} | {' | '.join(map(str, figures))} |"


def _expected(cases: list[Row]) -> str:
    """Return how many cases must be refused, and how many accepted with the right answer."""
    expected = Counter(case["expected"].partition(":")[0] for case in cases if "expected" in case)
    return (
        ", ".join(f"{count} {kind}" for kind, count in sorted(expected.items(), reverse=True)) or "absent or complete"
    )


def _kills(cases: list[Row]) -> Iterator[str]:
    """Yield a sentence on the signals and on the outputs that they left."""
    signals = ", ".join(f"{count} {name}" for name, count in sorted(Counter(case["signal"] for case in cases).items()))
    states = Counter((case["command"], case["state"]) for case in cases)
    outputs = ", ".join(f"{count} {state} after {command}" for (command, state), count in sorted(states.items()))
    again = sum(case["again"] for case in cases)
    yield f"- Signals: {signals}. Outputs: {outputs}. {again} commands were repeated afterwards."


def _left(found: Mapping[str, Row]) -> Iterator[str]:
    """Yield a line for each fault that is left."""
    faulty = [(case["name"], fault) for group in found.values() for case in group["cases"] for fault in case["faults"]]
    for name, fault in faulty:
        yield f"- Left: {name}: {fault['kind']}: {' '.join(fault['text'].split())}"
    if not faulty:
        yield "- No fault is left."
