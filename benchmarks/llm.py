"""Compare published plans with the search on a small trained language model, by perplexity and generation latency.

    python benchmarks/llm.py --data-root ../shared/data [--rounds 10] [--context 64]

The published plans drop attention layers, MLPs, blocks, or any branches (LLM-Drop's "joint"), ranked by cosine. The
plans of Compressor are the steps of one search (`--drop auto`, all actions but merging). Quality is measured on
sequences that neither ranking nor search has seen. Generation is measured as by `compressor bench`, all engines in one
interleaved run (ONNX Runtime, float, batch 1). Each published plan is paired with the step of the search whose measured
time per token is nearest, and their perplexities are compared. `python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from main_job import sources

from compressor.benchmark.contenders import EngineEntry
from compressor.benchmark.decode_timing import Generation, measure
from compressor.benchmark.runner import BenchRunner, Condition
from compressor.lower.fold_graph import fold_graph
from compressor.lower.traced_model import TracedModel, load
from compressor.measure.engine_builder import EngineBuilder, with_input_sizes
from compressor.measure.engine_parity import engine_parity
from compressor.measure.graph_evaluator import GraphEvaluator, graph_evaluator
from compressor.measure.workload import workload_calls
from compressor.quality.evaluate import Evaluation
from compressor.report.report import latency_to_dict
from compressor.search.planner import prepare_search, score
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.workspace.environment import environment
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph
from passes.plan.selection import choose, parse
from runtimes.base.timing import Latency

RESULTS = Path(__file__).parent / "results" / "llm.json"
AS_IS, OURS = "as it is", "auto"
PUBLISHED = {"attention": (1, 2, 3, 4), "mlp": (1, 2, 3, 4), "block": (1, 2), "joint": (1, 2, 3, 4)}
ACTIONS = "drop,constant,scale,low-rank,linear,fuse"
CONTEXT = 64


@dataclass(frozen=True)
class Plan:
    """A plan to measure: its family, the number of units changed, and the changes."""

    family: str
    count: int
    changes: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the engine and of the table row."""
        return f"{self.family} {self.count}" if self.count else AS_IS


def published(subject: TracedModel) -> Iterator[Plan]:
    """Yield the published plans, ranked by cosine on the calibration data; "joint" ranks all branches together."""
    scores = score(subject, Steps())
    for family, counts in PUBLISHED.items():
        for count in counts:
            selection = parse(str(count) if family == "joint" else f"{family}:{count}")
            plan = choose(selection, subject.sites, "cosine", model=subject.model.name, scores=scores)
            yield Plan(family, count, plan.changes)


def searched(subject: TracedModel, settings: Settings, rewriter: Rewriter, evaluator: GraphEvaluator) -> Iterator[Plan]:
    """Yield every step of one search, which runs until nothing more is saved; its cost is generation latency."""
    search = prepare_search(subject, settings, rewriter, evaluator, Steps(), Journal())
    search.limit = math.inf  # perplexity can more than double
    search.run()
    for count in range(1, len(search.steps) + 1):
        yield Plan(OURS, count, search.plan(subject.model.name, OURS, count).changes)


def measured(
    subject: TracedModel, settings: Settings, graphs: Mapping[str, Graph], scratch: Path, rounds: int, context: int
) -> tuple[Evaluation | None, dict[str, Generation]]:
    """Measure quality on test data, and generation in one interleaved run, of all graphs by name."""
    target, options = check_target(settings)
    builder = EngineBuilder(subject, target, with_input_sizes(options, subject, settings), scratch)
    entries = []
    for name, graph in graphs.items():
        path = builder.lower(graph, name.replace(" ", "-"))
        engine_parity(builder, path, graph)
        entries.append(EngineEntry(name, settings.target, path))
    feeds = {1: next(iter(workload_calls(subject, settings).values())).inputs}
    stand = BenchRunner(subject, settings, tuple(entries), AS_IS, (Condition(1, None),), feeds, (context,))
    engines, steps = stand.built(scratch, Steps()), Steps()
    evaluation = stand.quality(engines, steps)
    return evaluation, {each.name: each for each in measure(stand, engines, rounds, scratch, steps)}


def rows_of(plans: Sequence[Plan], quality: Evaluation | None, timed: Mapping[str, Generation]) -> list[dict[str, Any]]:
    """Return the table row of every plan."""
    original, rows = timed[AS_IS], []
    for plan in plans:
        mine = timed[plan.name]
        row: dict[str, Any] = {"name": plan.name, "family": plan.family, "changes": dict(plan.changes)}
        row["cache_bytes_per_token"] = mine.cache // mine.context
        for part in ("first", "token"):
            latency: Latency = getattr(mine, part)
            row[part] = {key: value for key, value in latency_to_dict(latency).items() if key != "samples_ms"}
            row[f"{part}_speedup"] = latency.speedup_over(getattr(original, part))._asdict()
        if quality is not None:
            row |= {"figure": asdict(quality.figure(plan.name)), "loss": asdict(quality.loss(AS_IS, plan.name))}
            row |= {key: asdict(value) for key, value in quality.label_free(plan.name).items()}
        rows.append(row)
    return rows


def nearest(
    plans: Sequence[Plan], quality: Evaluation | None, timed: Mapping[str, Generation]
) -> dict[str, dict[str, Any]]:
    """Pair each published plan with the search step whose measured time per token is nearest.

    Returns:
        By name of the published plan: the name of the step (`point`), its speed-up per token over the published plan
        (`speedup`), and the paired relative difference of its perplexity in % (`loss`; negative if it is better).
    """
    ours = [plan.name for plan in plans if plan.family == OURS]
    pairs = {}
    for plan in plans:
        if plan.family in PUBLISHED and ours:
            theirs = timed[plan.name].token
            point = min(ours, key=lambda name: abs(math.log(timed[name].token.median / theirs.median)))
            pairs[plan.name] = {
                "point": point,
                "speedup": timed[point].token.speedup_over(theirs)._asdict(),
                "loss": None if quality is None else asdict(quality.loss(plan.name, point)),
            }
    return pairs


def compare(settings: Settings, rounds: int, context: int) -> dict[str, Any]:
    """Measure all plans of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        subject = load(settings, Steps())
        target, options = check_target(settings)
        evaluator = graph_evaluator(subject, target, options, settings, Path(scratch))
        rewriter = Rewriter(subject.graph, subject.sites, subject.data.calibration)
        plans = [Plan("", 0, {}), *published(subject), *searched(subject, settings, rewriter, evaluator)]
        click.echo(f"{len(plans)} plans", err=True)
        graphs = {plan.name: fold_graph(rewriter.rewritten(plan.changes)) for plan in plans}
        folder = Path(scratch) / "engines"
        folder.mkdir()
        quality, timed = measured(subject, settings, graphs, folder, rounds, context)
    return {
        "model": subject.model.name,
        "metric": subject.metric,
        "context": context,
        "samples": len(subject.data.test),
        "rows": rows_of(plans, quality, timed),
        "nearest": nearest(plans, quality, timed),
        "environment": environment(),
    }


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Timed bursts per engine.")
@click.option(
    "--context", type=click.IntRange(min=1), default=CONTEXT, show_default=True, help="Tokens in the KV cache."
)
@click.option("--samples", type=click.IntRange(min=3), help="Largest number of sequences.  [default: all]")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="Results file.")
def main(data_root: Path, rounds: int, context: int, samples: int | None, output: Path) -> None:
    """Measure all plans and write results/llm.json."""
    where = sources(data_root)
    settings = Settings(model=where["llama"], data=where["tokens"], drop="auto", actions=ACTIONS, tokens="none",
                        generate=f"{context}:{context}", samples=samples)  # fmt: skip
    output.write_text(json.dumps(compare(settings, rounds, context), indent=1) + "\n")


if __name__ == "__main__":
    main()
