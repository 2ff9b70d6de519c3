"""A bad input: what is prepared, which command runs, and what is expected of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.workspace.manifest import check_folder

from .judging import HALF, LITTER, STATUS, WRONG, Fault, of_any_end, of_refusal, result
from .materials import OUT, Materials, beside
from .processes import Ended, run

Answer = Callable[[Path, Ended, Materials], "str | None"]


def nothing(folder: Path) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """A command on bad input.

    Attributes:
        name: the group of the case and what is bad.
        arguments: the command and its arguments.
        words: what the refusal must say; for an accepted input, the answer that is expected, in words.
        uses: materials in the folder of the case.
        prepare: makes the bad input in that folder.
        answer: None if the input must be refused; otherwise what returns why the answer is wrong, or None.
    """

    name: str
    arguments: tuple[str, ...]
    words: str = ""
    uses: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = nothing
    answer: Answer | None = None

    @property
    def expectation(self) -> str:
        """Return what is expected, in words."""
        kind = "accepted" if self.answer is not None else "refused"
        return f"{kind}: {self.words}" if self.words else kind


def check(case: Case, materials: Materials) -> dict[str, Any]:
    """Run a case in a folder of its own and return its result."""
    began = time.monotonic()
    folder = materials.workspace(*case.uses)
    case.prepare(folder)
    before = _content(folder)
    ended = run(case.arguments, folder)
    faults = [*of_any_end(ended, folder)]
    if not faults:
        faults += _accepted(case, ended, folder, materials) if case.answer else of_refusal(ended, case.words)
    if case.answer is None:
        faults += (Fault(LITTER, f"{name!r} is changed or left") for name in sorted(_content(folder) ^ before)[:3])
    shutil.rmtree(folder, ignore_errors=True)
    facts = {"expected": case.expectation, "status": ended.status, "said": said(ended, folder)}
    command = " ".join(case.arguments)
    seconds = round(time.monotonic() - began, 1)
    return {"name": case.name, "command": command, **facts, "faults": result(faults), "seconds": seconds}


def _accepted(case: Case, ended: Ended, folder: Path, materials: Materials) -> Iterator[Fault]:
    """Yield what is wrong with a command that must end with status 0, a complete output and the stated answer."""
    assert case.answer is not None
    if ended.status:
        yield Fault(STATUS, f"status {ended.status}: {ended.err.strip()[-300:]}")
        return
    output = folder / (f"{OUT}.json" if case.arguments[0] == "bench" else OUT)
    if case.arguments[0] in ("export", "sweep"):
        try:
            check_folder(output)
        except CompressorError as error:
            yield Fault(HALF, str(error))
    if beside(output):
        yield Fault(LITTER, f"left {', '.join(sorted(beside(output)))}")
    wrong = case.answer(folder, ended, materials)
    if wrong is not None:
        yield Fault(WRONG, wrong)


def said(ended: Ended, folder: Path) -> str:
    """Return what a command said last on standard error, without the place of its folder."""
    lines = ended.err.strip().splitlines() or [""]
    return lines[-1].replace(str(folder), ".")[:300]


def _content(folder: Path) -> set[tuple[str, int]]:
    """Return name and size of everything in a folder."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {(path.relative_to(folder).as_posix(), path.lstat().st_size * (not path.is_dir())) for path in paths}


def command(name: str, rest: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments of a command with its output in the folder of the case, and without progress."""
    where = () if name == "build" or "--output" in rest else ("--output", f"{OUT}.json" if name == "bench" else OUT)
    return (name, *rest, *where, "--quiet")


# ------------------------------------------------------------------------------------------------- answers


def report_of(folder: Path) -> dict[str, Any]:
    """Return the report of the output of a case."""
    report: dict[str, Any] = json.loads((folder / OUT / "report.json").read_text())
    return report


def figures_of(report: dict[str, Any]) -> dict[str, float] | None:
    """Return the quality of the variants of a report."""
    quality = report["quality"]
    return None if quality is None else {name: figure["value"] for name, figure in quality["figures"].items()}
