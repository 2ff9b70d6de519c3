"""Kill export, sweep and build at random moments: the output is then absent or complete, and can be made again.

Every moment and signal comes from `SEED`. A moment is a share of the time that the command takes without a signal, so
on another machine it falls into the same part of the work.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.workspace.manifest import MANIFEST, check_folder, digest_of

from .judging import HALF, LITTER, STATUS, WRONG, Fault, of_any_end, result
from .materials import MODULE, MODULE_DATA, OUT, Materials, beside
from .processes import Ended, run, start

SEED = 20260101
COUNT = 100
REPEATED = 3  # every third command is repeated afterwards; the output is looked at after every signal
AFTER = 1.05  # largest share of the time of a run at which a signal is sent; some commands then have ended
SIGNALS = (*["SIGKILL"] * 6, "SIGTERM", "SIGTERM", "SIGINT", "SIGINT")
ENDS = {"SIGKILL": (-9, 0), "SIGTERM": (-15, 143, 0), "SIGINT": (130, 0)}
MODEL = (MODULE, "--data", MODULE_DATA, "--rounds", "1", "--quiet", "--output", OUT)
# The cost is in multiply-adds, so that every run makes the same plan.
SEARCH = ("--cost", "macs", "--actions", "drop", "--max-loss", "30", "--search-samples", "4")
COMMANDS = {
    "export": ("export", *MODEL, "--drop", "auto", *SEARCH),
    "sweep": ("sweep", *MODEL, *SEARCH, "--points", "3"),
    "build": ("build", OUT, "--rounds", "1", "--quiet"),
}
WEIGHTS = {"export": 35, "sweep": 25, "build": 40}  # of 100 kills


@dataclass(frozen=True)
class Kill:
    """A signal to a command.

    Attributes:
        name: name of the case.
        command: key of `COMMANDS`.
        signal: name of the signal.
        share: the moment, as a share of the time of the command.
        again: whether the command is repeated afterwards.
    """

    name: str
    command: str
    signal: str
    share: float
    again: bool


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its seconds, the names of its files, and the digests of its plans and models."""

    seconds: float
    files: frozenset[str]
    results: dict[str, str]


def kills(count: int = COUNT) -> tuple[Kill, ...]:
    """Return the kills, the same ones in every run."""
    chance = random.Random(SEED)
    commands = chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
    return tuple(
        Kill(
            f"{number:03} {command}",
            command,
            chance.choice(SIGNALS),
            round(chance.uniform(0.0, AFTER), 4),
            number % REPEATED == 0,
        )
        for number, command in enumerate(commands)
    )


def references(materials: Materials) -> dict[str, Reference]:
    """Run every command once without a signal."""
    found = {}
    for command, arguments in COMMANDS.items():
        folder = _workspace(command, materials)
        ended = run(arguments, folder)
        if ended.status:
            raise RuntimeError(f"{command} ends with status {ended.status} without a signal: {ended.err}")
        found[command] = Reference(ended.seconds, _files(folder / OUT), _results(folder / OUT))
        shutil.rmtree(folder)
    return found


def check(kill: Kill, materials: Materials, reference: Reference) -> dict[str, Any]:
    """Send the signal, look at what is left, and repeat the command. Return the result of the case."""
    began = time.monotonic()
    folder = _workspace(kill.command, materials)
    before = _state(folder / OUT, reference)
    running = start(COMMANDS[kill.command], folder)
    time.sleep(kill.share * reference.seconds)
    running.send(signal.Signals[kill.signal])
    ended = running.wait()
    state, left = _state(folder / OUT, reference), sorted(beside(folder / OUT))
    faults = list(_faults_of_end(kill, ended, left, folder))
    if state not in (before, "complete"):
        faults.append(Fault(HALF, f"the output is {state}; it was {before}"))
    if kill.again:
        faults += _repeated(kill, folder, state, reference)
    shutil.rmtree(folder)
    row = {"status": ended.status, "state": state, "left": [_general(name) for name in left]}
    return asdict(kill) | row | {"faults": result(faults), "seconds": round(time.monotonic() - began, 1)}


def _faults_of_end(kill: Kill, ended: Ended, left: list[str], folder: Path) -> Iterator[Fault]:
    """Yield what is wrong with the end of a command that got a signal."""
    expected = ENDS[kill.signal]
    yield from (fault for fault in of_any_end(ended, folder) if ended.hung or ended.status not in expected)
    if ended.status not in expected:
        yield Fault(STATUS, f"status {ended.status}: {ended.err.strip()[-200:]}")
    litter = [name for name in left if not name.endswith(".journal")]
    if kill.signal != "SIGKILL" and litter:
        yield Fault(LITTER, f"left {', '.join(map(_general, litter))} after {kill.signal}")


def _repeated(kill: Kill, folder: Path, state: str, reference: Reference) -> Iterator[Fault]:
    """Repeat a command, and yield what is wrong then."""
    force = ("--force",) if state == "complete" else ()
    ended = run((*COMMANDS[kill.command], *force), folder)
    if ended.status:
        yield Fault(STATUS, f"the repeated command ends with status {ended.status}: {ended.err.strip()[-200:]}")
        return
    litter = sorted(beside(folder / OUT))
    if litter:
        yield Fault(LITTER, f"the repeated command leaves {', '.join(map(_general, litter))}")
    if _state(folder / OUT, reference) != "complete":
        yield Fault(HALF, "the repeated command leaves an incomplete output")
    elif _results(folder / OUT) != reference.results:
        yield Fault(WRONG, "the repeated command finds another plan or model than an uninterrupted one")


def _state(output: Path, reference: Reference) -> str:
    """Return ``absent``, ``deferred``, ``complete``, or what is wrong with an output folder."""
    if not output.exists():
        return "absent"
    try:
        check_folder(output)
        files = _files(output)
        if files != reference.files:
            return f"incomplete (has {sorted(files)})"
        report = output / "report.json"
        built = not report.exists() or json.loads(report.read_text())["engine"]["state"] == "built"
    except (CompressorError, ValueError, KeyError) as error:
        return f"broken ({error})"
    return "complete" if built else "deferred"


def _files(output: Path) -> frozenset[str]:
    """Return the names of all files of a folder but the manifest, which lists them."""
    files = (path for path in output.rglob("*") if not path.is_dir())
    return frozenset(path.relative_to(output).as_posix() for path in files) - {MANIFEST}


def _results(output: Path) -> dict[str, str]:
    """Return the SHA-256 of the plans and models of a folder, which are equal in every run, by file name."""
    return {path.name: digest_of(path) for ending in ("plan.json", "plans/*", "*.onnx") for path in output.glob(ending)}


def _general(name: str) -> str:
    """Return the name of a temporary file without its random part."""
    stem, *parts, ending = name.split(".")
    return ".".join([stem, *("*" if len(part) == 8 else part for part in parts), ending]) if parts else name


def _workspace(command: str, materials: Materials) -> Path:
    """Return a new folder with what a command needs."""
    folder = materials.workspace(MODULE, MODULE_DATA)
    if command == "build":
        shutil.copytree(materials.deferred, folder / OUT)
    return folder
