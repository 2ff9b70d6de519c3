"""What can be wrong with a command, and the result of a case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .processes import Ended

# Kinds of faults; a result counts each.
TRACEBACK, PAYLOAD, HALF, WRONG = "traceback", "payload run", "half-written folder", "wrong answer with status 0"
HANG, STATUS, MESSAGE, LITTER = "hang or crash", "status", "message", "litter"
KINDS = (TRACEBACK, PAYLOAD, HALF, WRONG, HANG, STATUS, MESSAGE, LITTER)
MARKER = "PAYLOAD"  # the file that every payload writes


class Fault(NamedTuple):
    """Something that is wrong: one of `KINDS`, and a text."""

    kind: str
    text: str


def of_any_end(ended: Ended, folder: Path) -> Iterator[Fault]:
    """Yield what no command may do: hang, crash, end in a traceback, or run code of a folder."""
    if ended.hung or (ended.status < 0):
        yield Fault(HANG, "hangs" if ended.hung else f"ends by signal {-ended.status}")
    if "Traceback (most recent call last)" in ended.err + ended.out:
        yield Fault(TRACEBACK, ended.err.strip().splitlines()[-1][:300])
    if any(path.name == MARKER for path in folder.rglob("*")):
        yield Fault(PAYLOAD, "code that the input holds was run")


def of_refusal(ended: Ended, words: str) -> Iterator[Fault]:
    """Yield what is wrong with a refusal: one sentence with the expected words, after click's usage at most."""
    if ended.status == 0:
        yield Fault(WRONG, f"accepted: {ended.out.strip()[:300]}")
        return
    *before, last = ended.err.rstrip("\n").split("\n")
    usage = bool(before) and before[0].startswith("Usage: ")
    if ended.status not in (1, 2):
        yield Fault(STATUS, f"status {ended.status}; expected 1 or 2")
    if not last.startswith("Error: ") or (before and not usage) or ended.out:
        yield Fault(MESSAGE, f"expected one sentence on standard error, found {(ended.out + ended.err)[:300]!r}")
    if words not in ended.err:
        yield Fault(MESSAGE, f"expected {words!r}, found {last[:300]!r}")


def result(faults: Iterable[Fault]) -> list[dict[str, str]]:
    """Return faults as plain JSON values."""
    return [fault._asdict() for fault in faults]


def counts(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Count the faults of each kind."""
    kinds = [fault["kind"] for row in rows for fault in row["faults"]]
    return {kind: kinds.count(kind) for kind in KINDS}
