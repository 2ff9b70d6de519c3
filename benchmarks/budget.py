"""Measure how often the loss of an export exceeds its budget on data that was not given to it.

    python benchmarks/budget.py --data-root ../shared/data [--case NAME ...] [--searches 2] [--splits 40] [--most 1000]
        [--workers N] [--ray ADDRESS]

For each case and number of given samples, searches run up to the largest budget on a random half of the given samples,
and every plan along their paths is evaluated on all samples. The decision is then repeated for many random draws of
the other samples that it is given. A search is shared by all draws and budgets: the draws are not part of it, and the
plans of a smaller budget are the first of its path. The plan of each rule is judged on every sample that was not given.
The speed-up is in multiply-adds. Results are in benchmarks/results/budget.json; `python benchmarks/tables.py` writes
the table.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from main_job import sources

from compressor.data.splits import Batch, Split
from compressor.executor.on_ray import executor_for
from compressor.lower.traced_model import TracedModel, load
from compressor.measure.workload import workload_calls
from compressor.models.base import EvaluatedOutput
from compressor.quality.budget import Budget, upper_bound
from compressor.quality.evaluate import BATCH, Measured, Part, graph_runner, join, loss, metric_value
from compressor.quality.intervals import Array, Columns
from compressor.quality.validation_loss import ROUNDING, Loss, ValidationLoss
from compressor.search import planner
from compressor.search.cost_model import multiply_add_cost_model
from compressor.search.decision import ERRORS, expected_loss
from compressor.search.greedy import Search
from compressor.search.pareto import efficient
from compressor.settings import Settings
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.execute.interpreter import Program

RESULTS = Path(__file__).parent / "results" / "budget.json"
CASES = {
    "digits": (None, None),
    "DeiT-Tiny": ("deit", "images"),
    "MiniLM": ("minilm", "stsb"),
    "Llama 260k": ("llama", "tokens"),
}
GIVEN = (100, 200, 400)
BUDGETS = (0.5, 1.0, 2.0, 5.0)
CONFIDENCE = 0.9


@dataclasses.dataclass(frozen=True)
class SearchPath:
    """The plans along one search, each evaluated on all samples.

    Attributes:
        budget: the loss that is bounded.
        columns: columns of each plan on all samples; the first is the original.
        validation: loss of each plan on the validation samples of the search, in percent.
        costs: multiply-adds of each plan.
        used: samples that the search has seen.
    """

    budget: Budget
    columns: list[Columns]
    validation: Array
    costs: Array
    used: frozenset[int]

    def loss(self, number: int, rows: Array) -> float:
        """Return the loss of a plan on some samples, as `--budget accuracy` bounds it, in percent."""
        return self.budget.loss(self._part(0, rows), self._part(number, rows))

    def measured(self, number: int, rows: Array) -> float:
        """Return the loss of the reported metric of a plan on some samples, in percent."""
        return loss(self.budget.metric, self._metric(0, rows), self._metric(number, rows))

    def held(self, number: int, rows: Array, fresh: float) -> float:
        """Return what the default decision holds to the budget, in percent; `fresh` is the loss on the rows."""
        changed = self._part(number, rows)
        if self.budget.sample_losses(changed) is None:
            return fresh + ERRORS * self.budget.standard_error(self._part(0, rows), changed) - ROUNDING
        validated = Loss(float(self.validation[number]), len(self.used) // 2)
        return max(fresh, expected_loss(Loss(fresh, len(rows)), validated)) - ROUNDING

    def bound(self, number: int, rows: Array) -> float:
        """Return the upper confidence bound of a plan in percent; infinity where there is none."""
        losses = self.budget.sample_losses(self._part(number, rows))
        return float("inf") if losses is None else upper_bound(losses, CONFIDENCE, precision=1e-4) * 100.0

    def _part(self, number: int, rows: Array) -> Columns:
        return {key: column[rows] for key, column in self.columns[number].items()}

    def _metric(self, number: int, rows: Array) -> float:
        return metric_value(self.budget.metric, self._part(number, rows))


def search_path(subject: TracedModel, settings: Settings, given: int, seed: int, most: int) -> SearchPath:
    """Run a search on half of `given` random samples, and evaluate its plans on `most` samples, these among them."""
    every = sorted(index for part in subject.data.parts for index in part.indices)
    pool = sorted(np.random.default_rng(1000 + seed).permutation(every)[:most].tolist())
    rows = np.random.default_rng(seed).permutation(len(pool))[: given // 2]
    chosen = [pool[row] for row in rows]
    calibration = dataclasses.replace(subject.data.calibration, indices=tuple(chosen[: given // 4]))
    validation = dataclasses.replace(subject.data.validation, indices=tuple(chosen[given // 4 :]))
    rewriter = planner.Rewriter(subject.graph, subject.sites, calibration, executor=subject.executor)
    measured, fitted = planner._split_calibration(calibration, settings)
    search = Search(
        rewriter,
        planner.output_divergence(subject, measured, Steps(None)),
        ValidationLoss(subject.graph, subject.model, validation, subject.metric, executor=subject.executor),
        multiply_add_cost_model(subject.graph, workload_calls(subject, settings)),
        settings.chosen_actions,
        settings.loss_limit,
        fitting=fitted,
        preview=planner.preview_of(subject, measured, Steps(None)),
        journal=Journal(),
    )
    search.run()
    plans = [search.plan("", "", number) for number in range(len(search.steps) + 1)]
    graphs = [rewriter.reduced(graph, plan.changes) for graph, plan in zip(search.graphs, plans, strict=True)]
    whole = dataclasses.replace(subject.data.test, indices=tuple(pool))
    return SearchPath(
        search.validation.bounded,
        _columns(subject, graphs, whole),
        np.array([0.0, *(step.loss for step in search.steps)]),
        np.array([search.whole, *(step.cost for step in search.steps)]),
        frozenset(map(int, rows)),
    )


def _columns(subject: TracedModel, graphs: Sequence[Any], split: Split) -> list[Columns]:
    """Return the columns of every graph on a split, compared with the first."""
    executor, programs = subject.executor, {str(number): Program(graph) for number, graph in enumerate(graphs)}
    measured = Measured(subject.head, subject.metric, "0")
    shared = executor.share((programs, subject.model.evaluated_output, measured))
    groups = executor.divide(split.batches(BATCH), math.ceil(len(split) / BATCH))
    parts = list(chain.from_iterable(executor.run(_parts, ((shared, batches) for batches in groups))))
    return [join([part.columns[name] for part in parts]) for name in programs]


@torch.inference_mode()
def _parts(models: tuple[dict[str, Program], EvaluatedOutput, Measured], batches: Iterable[Batch]) -> Iterator[Part]:
    """Run the programs on each batch."""
    programs, output, measured = models
    runners = {name: graph_runner(output, program.run) for name, program in programs.items()}
    for batch in batches:
        yield measured.part(runners, batch, 0)


def outcomes(path: SearchPath, given: int, budget: float, splits: int) -> Iterator[dict[str, Any]]:
    """Yield the plan that each rule takes for each draw of the decision's samples, judged on the samples not given."""
    within = [number for number, lost in enumerate(path.validation) if lost <= budget + ROUNDING]
    last, fresh = max(within), np.array(sorted(set(range(len(next(iter(path.columns[0].values()))))) - path.used))
    kept = efficient(list(path.costs), list(path.validation))
    numbers = [number for number in range(last, 0, -1) if path.costs[number] < min(path.costs[:number])]
    for draw in range(splits):
        order = np.random.default_rng(draw).permutation(fresh)
        decision, others = order[: given // 4], order[given // 4 :]
        rules = {"validation alone": last}
        fresh_losses = {n: path.loss(n, decision) for n in numbers}
        rules["fresh samples"] = next((n for n in numbers if fresh_losses[n] <= budget + ROUNDING), 0)
        rules["default"] = next((n for n in numbers if path.held(n, decision, fresh_losses[n]) <= budget), 0)
        certified = 0
        for number in [number for number in range(1, last + 1) if kept[number]]:
            if path.bound(number, decision) > budget:
                break
            certified = number
        rules["confidence 90 %"] = certified
        for rule, number in rules.items():
            yield {
                "rule": rule,
                "measured": path.measured(number, others),
                "expected": path.loss(number, others),
                "speedup": float(path.costs[0] / path.costs[number]),
            }


def summary(rows: list[dict[str, Any]], budget: float) -> dict[str, dict[str, float]]:
    """Return the share of exports that exceed the budget, mean losses and mean speed-up, by rule."""
    found = {}
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        found[rule] = {
            "exceeding": float(np.mean([row["measured"] > budget for row in own])),
            "measured": float(np.mean([row["measured"] for row in own])),
            "budgeted": float(np.mean([row["expected"] for row in own])),
            "speedup": float(np.exp(np.mean(np.log([row["speedup"] for row in own])))),
        }
    return found


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--case", "chosen", multiple=True, type=click.Choice(list(CASES)), help="Repeatable.  [default: all]")
@click.option("--given", "counts", multiple=True, type=int, help="Numbers of given samples.  [default: 100, 200, 400]")
@click.option("--searches", default=2, show_default=True, help="Searches for each number of given samples.")
@click.option("--most", default=1000, show_default=True, help="Samples of the data that are used at all.")
@click.option("--splits", default=40, show_default=True, help="Draws of the decision's samples.")
@click.option("--workers", type=int, help="Processes of Ray that run the models; the results are the same.")
@click.option("--ray", help="Cluster of Ray, as for export.")
def main(
    data_root: Path,
    chosen: tuple[str, ...],
    counts: tuple[int, ...],
    searches: int,
    most: int,
    splits: int,
    workers: int | None,
    ray: str | None,
) -> None:
    """Run the cases and write the results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    where = sources(data_root)
    with executor_for(workers, ray) as executor:
        for case in chosen or CASES:
            model, samples = (None if name is None else where[name] for name in CASES[case])
            settings = Settings(model=model, data=samples, cost="macs", max_loss=max(BUDGETS))
            subject = load(settings, Steps(None), executor=executor)
            for given in counts or GIVEN:
                click.echo(f"{case}, {given} samples", err=True)
                paths = [search_path(subject, settings, given, seed, most) for seed in range(searches)]
                for budget in BUDGETS:
                    rows = [row for path in paths for row in outcomes(path, given, budget, splits // searches)]
                    key = f"{given} samples, {budget:g} %"
                    found.setdefault(case, {})[key] = {
                        "given": given,
                        "budget": budget,
                        "samples": min(most, sum(len(part.indices) for part in subject.data.parts)),
                        "searches": searches,
                        "draws": len(rows) // len({row["rule"] for row in rows}),
                        "rules": summary(rows, budget),
                    }
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
