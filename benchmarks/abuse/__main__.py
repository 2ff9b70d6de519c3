"""Run the cases and write results/abuse.json.

    python -m benchmarks.abuse [--group GROUP ...] [--workers N]

Groups that are not run keep their results. `python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compressor.workspace.environment import environment

from . import cases, data, edited_folders, kills, materials, models, options
from .judging import counts
from .processes import run, warm_up

RESULTS = Path(__file__).parents[1] / "results" / "abuse.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The cases of a group, and the function that runs one and returns its result."""

    name: str
    cases: Sequence[Any]
    check: Callable[[Any], Row]

    def run_number(self, number: int) -> Row:
        """Run one case."""
        return self.check(self.cases[number])


def groups(made: materials.Materials, chosen: Sequence[str]) -> Iterator[Group]:
    """Yield the chosen groups."""
    for name, module in (("options", options), ("data", data), ("models", models), ("edits", edited_folders)):
        if name in chosen:
            yield Group(name, tuple(module.cases()), lambda case: cases.check(case, made))
    if "kills" in chosen:
        found = kills.references(made)
        yield Group("kills", kills.kills(), lambda kill: kills.check(kill, made, found[kill.command]))


GROUPS = ("options", "data", "models", "edits", "kills")


def prepared(root: Path) -> materials.Materials:
    """Make the materials. It runs one export in this process, so that forked processes need no imports."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    made = materials.make(root)
    folder = made.workspace(materials.MODULE, materials.MODULE_DATA)
    warm_up(["export", *kills.MODEL, "--drop", "1", "--defer-build"], folder)
    (folder / materials.OUT).rename(made.deferred)
    run(["export", *kills.MODEL, "--drop", "none"], folder)
    (folder / materials.OUT).rename(made.built)
    return made


def measure(group: Group, workers: int) -> dict[str, Any]:
    """Run all cases of a group in forked processes; return their results and the number of faults."""
    start, rows = time.monotonic(), dict[int, Row]()
    context = multiprocessing.get_context("fork")  # the cases hold functions, which are not pickled then
    with _progress() as bars, ProcessPoolExecutor(workers, context, _keep, (group,)) as pool:
        task = bars.add_task(group.name, total=len(group.cases), faults=0)
        waiting = {pool.submit(_check, number): number for number in range(len(group.cases))}
        for done in as_completed(waiting):
            rows[waiting[done]] = row = done.result()
            faulty = sum(bool(each["faults"]) for each in rows.values())
            bars.update(task, advance=1, faults=faulty)
            for fault in row["faults"]:
                bars.console.print(f"{row['name']}: {fault['kind']}: {fault['text']}", markup=False, highlight=False)
    cases = [rows[number] for number in sorted(rows)]
    seconds = round(time.monotonic() - start)
    return {"faults": counts(cases), "seconds": seconds, "environment": environment(), "cases": cases}


def merged(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a group, some of whose cases were run again."""
    again = {case["name"]: case for case in new["cases"]}
    cases = [again.get(case["name"], case) for case in kept["cases"]]
    return kept | {"faults": counts(cases), "environment": new["environment"], "cases": cases}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[faults]} with faults"), console=Console(stderr=True))


_GROUP: list[Group] = []  # of a worker process


def _keep(group: Group) -> None:
    _GROUP[:] = [group]


def _check(number: int) -> Row:
    return _GROUP[0].run_number(number)


@click.command()
@click.option("--group", "chosen", multiple=True, type=click.Choice(GROUPS), default=GROUPS, help="[default: all]")
@click.option("--workers", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True)
@click.option(
    "--only", default="", help="Run the cases whose names match this regular expression; the others keep theirs."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(chosen: tuple[str, ...], workers: int, only: str, output: Path) -> None:
    """Run bad inputs, kills and edited folders; end with status 1 if there is a fault."""
    with tempfile.TemporaryDirectory() as root:
        found = {}
        for group in groups(prepared(Path(root)), chosen):
            matching = [case for case in group.cases if re.search(only, case.name)]
            found[group.name] = measure(replace(group, cases=matching), workers)
            results = json.loads(output.read_text()) if output.exists() else {}
            kept = results.get(group.name) if only else None
            results[group.name] = found[group.name] if kept is None else merged(kept, found[group.name])
            output.write_text(json.dumps(results, indent=1) + "\n")
    raise SystemExit(any(sum(each["faults"].values()) for each in found.values()))


if __name__ == "__main__":
    main()
