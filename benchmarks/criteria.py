"""Compare published pruning criteria with the search of Compressor, at equal multiply-adds and measured latency.

    python benchmarks/criteria.py --data-root ../shared/data [--model NAME ...] [--method NAME ...]

For each model and method, plans grow until they save 10, 20, 35 and 50 % of the multiply-adds. The first plan that
reaches a budget is evaluated on test data, which no method has seen. Exact rewrites (dead tokens, folding) are applied
to every plan. The engines of all plans are timed in one interleaved run; the speed-ups predicted by the cost model are
recorded too. With `--method`, only these methods are measured again, against the original model in the same run, and
the other rows are kept. `python benchmarks/tables.py` writes the tables and the figure.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from main_job import sources

from compressor.lower.fold_graph import fold_graph
from compressor.lower.traced_model import TracedModel, load
from compressor.lower.write_onnx import lower
from compressor.measure.graph_evaluator import GraphEvaluator, graph_evaluator
from compressor.quality.evaluate import Evaluation, evaluate, graph_runner
from compressor.search.cost_model import CostModel, multiply_add_cost_model
from compressor.search.planner import output_divergence, prepare_search, score
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.workspace.environment import environment
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.base import PassError
from passes.execute.interpreter import run
from passes.graph.graph import Graph
from passes.plan.plan import with_action
from passes.plan.selection import SCORED, choose, parse

Grown = tuple[Mapping[str, str], float]  # changes, and an upper bound of the share that they save

RESULTS = Path(__file__).parent / "results" / "criteria.json"
SAMPLES = {"MiniLM": 600}  # half of them for the test; the other models use all samples
AS_IS = "as it is"
ROUNDS = 6  # timed bursts of each engine
BUDGETS = (0.1, 0.2, 0.35, 0.5)


@dataclass(frozen=True)
class Method:
    """A published method: the unit that it ranks, the metric, and the action that replaces a branch."""

    name: str
    unit: str
    metric: str
    action: str = "drop"
    seed: int = 0


METHODS = (
    Method("random, seed 0", "site", "random", seed=0),
    Method("random, seed 1", "site", "random", seed=1),
    Method("random, seed 2", "site", "random", seed=2),
    Method("reverse order, block", "block", "reverse"),
    Method("cosine, attention (LLM-Drop)", "attention", "cosine"),
    Method("cosine, MLP (LLM-Drop)", "mlp", "cosine"),
    Method("cosine, block (LLM-Drop)", "block", "cosine"),
    Method("cosine, joint (LLM-Drop)", "site", "cosine"),
    Method("Block Influence (ShortGPT)", "block", "influence"),
    Method("angular, blocks in a row (Gromov)", "block", "angular"),
    Method("angular + TBA", "block", "angular", "tba"),
    Method("angular + ReplaceMe LS", "block", "angular", "replaceme"),
    Method("angular + ReplaceMe cosine", "block", "angular", "replaceme-cosine"),
    Method("output effect, one by one", "site", "output"),
)
# Searches of Compressor by their actions. Deletion alone is the greedy deletion of SLEB and FinerCut, with our effect.
MAPS = "drop,constant,scale,low-rank,linear,fuse"
SEARCHES = {
    "greedy deletion": "drop",
    "ours, without tokens": MAPS,
    "ours": f"{MAPS},merge",
    "ours, by time": f"{MAPS},merge",
}
BY_TIME = "ours, by time"  # its budgets are shares of the predicted latency, as in an export
MODELS = {
    "digits": (None, None),
    "DeiT-Tiny": ("deit", "images"),
    "MiniLM": ("minilm", "stsb"),
    "Llama 260k": ("llama", "tokens"),
}


@dataclass(frozen=True)
class Bench:
    """One model: the traced model, the cost models, and the plans evaluated so far."""

    subject: TracedModel
    settings: Settings
    rewriter: Rewriter
    counts: CostModel
    times: CostModel
    scratch: Path
    judged: dict[tuple[tuple[str, str], ...], dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def saved(self, graph: Graph, prices: CostModel | None = None) -> float:
        """Return the share of the cost that a graph saves, by `prices` or else by multiply-adds."""
        prices = self.counts if prices is None else prices
        return 1.0 - prices.cost(graph) / prices.cost(self.subject.graph)


def plans(bench: Bench, method: Method) -> Iterator[Grown]:
    """Yield the growing plans of a published method, with the savings of deletion, an upper bound for its action."""
    subject, steps = bench.subject, Steps()
    needs_scores = method.metric in SCORED
    scores = score(subject, steps) if needs_scores else None
    effect = None
    if method.metric == "output":
        samples = subject.data.calibration.head(bench.settings.search_samples)
        measured = output_divergence(subject, samples, steps).of_units([[site] for site in subject.sites])
        effect = lambda _: measured  # noqa: E731
    for count in range(1, len(subject.sites) + 1):
        selection = parse(str(count) if method.unit == "site" else f"{method.unit}:{count}")
        ranking = partial(
            choose, selection, subject.sites, method.metric, scores=scores, effect=effect, seed=method.seed
        )
        try:
            plan = ranking(model=subject.model.name)
        except PassError:
            return  # all units of this kind are used
        yield with_action(plan, method.action).changes, bench.saved(bench.rewriter.rewritten(plan.changes))


def points(
    bench: Bench, candidates: Iterator[Grown], prices: CostModel
) -> Iterator[tuple[float, Mapping[str, str], Graph]]:
    """Yield for each budget the first plan that reaches it and its graph; stop at a plan that cannot be applied."""
    budgets = list(BUDGETS)
    for changes, saved in candidates:
        if not budgets:
            return
        if saved < budgets[0]:  # cannot reach the budget: skip the expensive fit
            continue
        try:
            graph = bench.rewriter.rewritten(changes)
        except PassError as error:
            click.echo(f"    refused: {error}")
            return
        while budgets and bench.saved(graph, prices) >= budgets[0]:
            yield budgets.pop(0), changes, graph


def searched(bench: Bench, name: str, evaluator: GraphEvaluator, timed: Journal) -> Iterator[Grown]:
    """Yield the growing plans of one search, with the share that they save; `timed` is the journal of latencies."""
    cost = "latency" if name == BY_TIME else "macs"
    settings = Settings(**{**bench.settings.to_dict(), "actions": SEARCHES[name], "cost": cost})
    journal = timed if name == BY_TIME else Journal()
    search = prepare_search(bench.subject, settings, bench.rewriter, evaluator, Steps(), journal)
    search.limit = math.inf  # perplexity can more than double
    search.run(1.0 / (1.0 - BUDGETS[-1]) + 0.02)
    click.echo(f"    {len(search.steps)} steps, {search.effects.sweeps:.0f} sweeps")
    for count, step in enumerate(search.steps, start=1):
        saved = 1.0 - step.cost / search.cost_model.cost(bench.subject.graph)
        yield {step.unit: step.action for step in search.steps[:count]}, saved


def judged(bench: Bench, graphs: Mapping[tuple[tuple[str, str], ...], Graph]) -> Evaluation:
    """Evaluate graphs, by their changes, and the original on test data; write their ONNX files."""
    subject = bench.subject
    folded = {f"plan {len(bench.files) + number}": fold_graph(graph) for number, graph in enumerate(graphs.values())}
    runners = {name: graph_runner(subject.model, partial(run, graph)) for name, graph in folded.items()}
    runners[AS_IS] = graph_runner(subject.model, partial(run, subject.graph))
    evaluation = evaluate(subject.data.test, runners, head=subject.head, metric=subject.metric, reference=AS_IS)
    for (name, graph), changes in zip(folded.items(), graphs, strict=True):
        bench.files[name] = lower(graph, subject.model, bench.scratch / f"{name}.onnx")
        bench.judged[changes] = {
            "plan": name,
            "figure": asdict(evaluation.figure(name)),
            "loss": asdict(evaluation.loss(AS_IS, name)),
            **{key: asdict(value) for key, value in evaluation.label_free(name).items()},
        }
    return evaluation


def measure(model: str, where: Mapping[str, str], only: Collection[str] = ()) -> dict[str, Any]:
    """Measure all methods on one model, or those in `only`."""
    spec, data = (None if name is None else where.get(name, name) for name in MODELS[model])
    settings = Settings(model=spec, data=data, drop="auto", samples=SAMPLES.get(model))
    steps = Steps()
    target, options = check_target(settings)
    with tempfile.TemporaryDirectory() as scratch:
        subject = load(settings, steps)
        evaluator = graph_evaluator(subject, target, options, replace(settings, rounds=ROUNDS), Path(scratch))
        rewriter = Rewriter(subject.graph, subject.sites, subject.data.calibration)
        timed = Journal()
        times = prepare_search(subject, settings, rewriter, evaluator, steps, timed).cost_model
        counts = multiply_add_cost_model(subject.graph, evaluator.timer.calls)
        bench = Bench(subject, settings, rewriter, counts, times, Path(scratch))
        original = judged(bench, {(): subject.graph}).figure(AS_IS)
        candidates = {method.name: partial(plans, bench, method) for method in METHODS}
        candidates |= {name: partial(searched, bench, name, evaluator, timed) for name in SEARCHES}
        rows = [row for name in only or candidates for row in _rows(bench, name, candidates[name]())]
        engines = {AS_IS: lower(subject.graph, subject.model, Path(scratch) / "original.onnx")} | bench.files
        latency = evaluator.timer.latency(evaluator.builder, engines, steps)
    for row in rows:
        row["speedup"] = latency[row.pop("plan")].speedup_over(latency[AS_IS])._asdict()
    exact = bench.judged[()]
    return {
        "model": subject.model.name,
        "metric": subject.metric,
        "original": asdict(original),
        "latency_ms": latency[AS_IS].median,
        "exact": {
            "saved": bench.saved(fold_graph(subject.graph)),
            "speedup": latency[exact["plan"]].speedup_over(latency[AS_IS])._asdict(),
        },
        "prices": {"timings": dict(times.timings), "largest_error": times.error},
        "rows": rows,
        "samples": len(subject.data.test),
    }


def _rows(bench: Bench, method: str, candidates: Iterator[Grown]) -> list[dict[str, Any]]:
    start = time.perf_counter()
    plans_by_budget = list(points(bench, candidates, bench.times if method == BY_TIME else bench.counts))
    by_changes = {tuple(changes.items()): graph for _, changes, graph in plans_by_budget}
    unseen = {changes: graph for changes, graph in by_changes.items() if changes not in bench.judged}
    if unseen:  # several methods can yield the same plan
        judged(bench, unseen)
    rows = []
    for budget, changes, graph in plans_by_budget:
        predicted = bench.times.cost(bench.subject.graph) / bench.times.cost(graph)
        rows.append({"method": method, "budget": budget, "saved": bench.saved(graph), "predicted_speedup": predicted,
                     "changes": dict(changes)} | bench.judged[tuple(changes.items())])  # fmt: skip
    figures = ", ".join(f"{row['budget']:.0%}: {row['loss']['value']:+.2f}" for row in rows)
    click.echo(f"  {method}: {figures} ({time.perf_counter() - start:.0f} s)")
    return rows


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--model",
    "chosen",
    multiple=True,
    type=click.Choice(list(MODELS)),
    help="Model to measure; repeatable.  [default: all]",
)
@click.option(
    "--method", "only", multiple=True, help="Method to measure; repeatable, other rows are kept.  [default: all]"
)
def main(data_root: Path, chosen: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Evaluate every criterion on every model and write results/criteria.json."""
    for model in chosen or tuple(MODELS):
        click.echo(model)
        start = time.perf_counter()
        result = measure(model, sources(data_root), only)
        result |= {"seconds": time.perf_counter() - start, "environment": environment()}
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
        if only and model in results["models"]:
            rows = [row for row in results["models"][model]["rows"] if row["method"] not in only]
            result = results["models"][model] | {"rows": rows + result["rows"]}
        results["models"][model] = result
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
