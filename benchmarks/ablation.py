"""Switch on the steps of the search one after the other, and measure the plan that each of them finds.

    python benchmarks/ablation.py --data-root ../shared/data [--case NAME ...] [--max-loss 2 ...] [--journals FOLDER]

Each search takes changes as long as the loss on its validation samples is within the budget, and its last plan is
judged on test data that no search has seen, side by side with that of the step before. The last row is a swap
(swaps.py), which no command makes, as it did not help beyond the noise. The cost is in multiply-adds. With
`--journals`, an interrupted search is continued. Results are in benchmarks/results/ablation.json; `python
benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from main_job import sources
from swaps import swapped

from compressor.lower.traced_model import TracedModel, load
from compressor.measure.workload import workload_calls
from compressor.quality.evaluate import evaluate, graph_runner
from compressor.quality.validation_loss import ROUNDING, ValidationLoss
from compressor.search import planner
from compressor.search.cost_model import multiply_add_cost_model
from compressor.search.greedy import Search
from compressor.settings import Settings
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.execute.interpreter import Program
from passes.graph.graph import Graph

RESULTS = Path(__file__).parent / "results" / "ablation.json"
CASES = {"DeiT-Tiny": ("deit", "images"), "MiniLM": ("minilm", "stsb")}
SAMPLES = {"MiniLM": 600}
BUDGETS = (1.0, 2.0)
MAPS = "drop,constant,scale,low-rank,linear,fuse"
AS_IS = "as it is"
SWAPS = "+ a swap"


@dataclass(frozen=True)
class Stage:
    """The search with some of its steps switched on.

    Attributes:
        actions: the actions that it may take.
        again: whether effects are measured again after a change.
    """

    actions: str
    again: bool = True


STAGES = {
    "drop, each effect measured once": Stage("drop", again=False),
    "+ measured again after each change": Stage("drop"),
    "+ fitted maps": Stage(MAPS),
    "+ merged tokens": Stage(f"{MAPS},merge"),
}


def begin(subject: TracedModel, settings: Settings, journal: Journal) -> Search:
    """Prepare a search as an export does, with the cost in multiply-adds."""
    calibration = subject.data.calibration
    measured, fitted = planner._split_calibration(calibration, settings)
    return Search(
        planner.Rewriter(subject.graph, subject.sites, calibration),
        planner.output_divergence(subject, measured, Steps(None)),
        ValidationLoss(subject.graph, subject.model, subject.data.validation, subject.metric),
        multiply_add_cost_model(subject.graph, workload_calls(subject, settings)),
        settings.chosen_actions,
        settings.loss_limit,
        fitting=fitted,
        preview=planner.preview_of(subject, measured, Steps(None)),
        journal=journal,
    )


def run_once(search: Search) -> None:
    """Take changes in the order of their first measurement, all samples, until one exceeds the limit."""
    front = search.front
    front._begin()
    front._measure(list(front.candidates))
    for unit, action in sorted(filter(front.saves, front.candidates), key=front._price):
        before = len(search.steps)
        search._try(unit, action)
        if len(search.steps) == before:
            return


def effort(search: Search, name: str) -> dict[str, float]:
    """Return the forward passes of a search, over the samples of its effects, of its fits and of its validation.

    Those of a search that was interrupted are recorded by its last run; its journal holds those of a complete one.
    """
    sweeps: dict[str, float] = search.journal.recall(f"effort of {name}", lambda: effort_of(search))
    return sweeps


def effort_of(search: Search) -> dict[str, float]:
    """Return the forward passes of this run of a search, by part."""
    return {"effects": search.sweeps, "fits": search.rewriter.sweeps, "validation": search.validation.sweeps}


@torch.inference_mode()
def judge(subject: TracedModel, graphs: Mapping[str, Graph]) -> dict[str, dict[str, Any]]:
    """Evaluate the graph of each stage on test data: loss, divergence, and its change from the stage before."""
    test = planner.output_divergence(subject, subject.data.test, Steps(None))
    _, rows = test.by_row(subject.graph, graphs)
    runners = {name: graph_runner(subject.model, Program(graph).run) for name, graph in graphs.items()}
    runners[AS_IS] = graph_runner(subject.model, Program(subject.graph).run)
    evaluation = evaluate(subject.data.test, runners, head=subject.head, metric=subject.metric, reference=AS_IS)
    found: dict[str, dict[str, Any]] = {}
    for before, name in zip((None, *graphs), graphs, strict=False):
        found[name] = {"loss": asdict(evaluation.loss(AS_IS, name)), "divergence": float(rows[name].mean())}
        if before is not None:
            difference = rows[name] - rows[before]
            error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
            found[name] |= {"change": float(difference.mean()), "change_error": error}
    return found


def measure(subject: TracedModel, settings: Settings, journals: Path | None, case: str) -> dict[str, Any]:
    """Run all stages with one budget, and return what each of them found."""
    rows: dict[str, dict[str, Any]] = {}
    graphs: dict[str, Graph] = {}
    for name, stage in STAGES.items():
        options = Settings(**{**settings.to_dict(), "actions": stage.actions})
        key = f"{case} {settings.max_loss:g} {stage.actions} {stage.again}"
        path = None if journals is None else journals / f"{key.replace(',', '-').replace(' ', '_')}.jsonl"
        search = begin(subject, options, Journal(key, path))
        if stage.again:
            search.run()
        else:
            run_once(search)
        rows[name], graphs[name] = row_of(search) | {"sweeps": effort(search, name)}, search.reduced
        click.echo(f"  {name}: {rows[name]}", err=True)
    rows[SWAPS], graphs[SWAPS] = swap_row(search, rows[name])
    click.echo(f"  {SWAPS}: {rows[SWAPS]}", err=True)
    judged = judge(subject, graphs)
    return {name: row | judged[name] for name, row in rows.items()}


def row_of(search: Search) -> dict[str, Any]:
    """Return the last plan of a search as plain JSON values."""
    last = search.steps[-1] if search.steps else None
    return {
        "speedup": search.speedup,
        "changes": search.changes,
        "search_divergence": last.divergence if last else 0.0,
        "validation_loss": last.loss if last else 0.0,
    }


def swap_row(search: Search, before: Mapping[str, Any]) -> tuple[dict[str, Any], Graph]:
    """Return the row and the graph after a swap; those of the search where none is made, with the reason."""
    spent = effort_of(search)
    found = swapped(search)
    sweeps = {part: before["sweeps"][part] + now - spent[part] for part, now in effort_of(search).items()}
    row = dict(before) | {"sweeps": sweeps}
    if found is None:
        return row | {"swap": "none is better beyond the noise"}, search.reduced
    made = ", ".join(f"{unit} {action}" for unit, action in found.swap.made)
    told = f"{made}: divergence {row['search_divergence']:.4f} to {found.swap.expected:.4f}"
    if found.loss > search.limit + ROUNDING:
        return row | {"swap": f"not made: {told}, but validation loss {found.loss:.2f} %"}, search.reduced
    row |= {"speedup": search.whole / search.cost_model.cost(found.graph), "changes": found.changes, "swap": told}
    return row | {"search_divergence": found.swap.expected, "validation_loss": found.loss}, found.graph


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--case", "chosen", multiple=True, type=click.Choice(list(CASES)), help="Repeatable.  [default: all]")
@click.option("--max-loss", "budgets", multiple=True, type=float, help="Repeatable.  [default: 1, 2]")
@click.option("--journals", type=click.Path(file_okay=False, path_type=Path), help="Folder for values of searches.")
def main(data_root: Path, chosen: tuple[str, ...], budgets: tuple[float, ...], journals: Path | None) -> None:
    """Run the cases and write the results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    where = sources(data_root)
    for case in chosen or CASES:
        model, data = (where[name] for name in CASES[case])
        settings = Settings(model=model, data=data, drop="auto", cost="macs", samples=SAMPLES.get(case))
        subject = load(settings, Steps(None))
        for budget in budgets or BUDGETS:
            click.echo(f"{case}, at most {budget:g} %", err=True)
            limited = Settings(**{**settings.to_dict(), "max_loss": budget})
            rows = measure(subject, limited, journals, case)
            found.setdefault(case, {})[f"{budget:g}"] = {"samples": len(subject.data.test), "rows": rows}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
