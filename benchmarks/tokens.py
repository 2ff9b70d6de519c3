"""Measure the latency gain and the quality loss of token merging.

    python benchmarks/tokens.py --data-root ../shared/data [--part deit] [--part large] [--part methods] [--rounds 10]

Part `deit`: DeiT-Tiny on real images, with fixed schedules and with plans of the search (all actions), in float and
int8, at batch sizes 1 and 8. Part `large`: ViT-B/16 and ViT-L/16 at 384 pixels with random weights, speed only, with
the time of each operator type. Part `methods`: methods of token reduction at equal schedules, quality only. All
designs of one precision and batch size are timed in one interleaved run. The script writes
benchmarks/results/tokens.json; `python benchmarks/tables.py` writes the tables.
"""

from __future__ import annotations

import bisect
import json
import tempfile
import time
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from main_job import brief, sources
from rich.console import Console
from token_methods import CASES, methods

from compressor.lower.fold_graph import fold_graph
from compressor.lower.traced_model import TracedModel, load
from compressor.lower.write_onnx import lower
from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.engine_quality import evaluate_engines
from compressor.measure.graph_evaluator import GraphEvaluator, graph_evaluator
from compressor.measure.latency import EngineTimer
from compressor.measure.variant import Variant, convert_variants, lower_variant
from compressor.measure.workload import workload_calls
from compressor.quality.evaluate import Evaluation
from compressor.quality.parity import check_parity
from compressor.quality.torch_reference import reference_of, with_rounding
from compressor.report import report
from compressor.search.planner import facts_of, merge_schedule, prepare_search, run_search
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.workspace.environment import environment
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.analysis.symbolic_cost import Counter
from passes.graph.graph import Graph
from runtimes.base.protocols import Feeds
from runtimes.base.timing import Latency, interleave

RESULTS = Path(__file__).parent / "results" / "tokens.json"
BATCHES = (1, 8)
PRECISIONS = (None, "static")
PROFILED = 5  # runs with ONNX Runtime's profiler, after one warm-up run
AS_IS = "as it is"


@dataclass(frozen=True)
class Design:
    """A schedule in the form of ``--tokens``, or, with a `limit`, the plan of a search within that loss in %."""

    name: str
    tokens: str = "none"
    limit: float | None = None


DESIGNS = (
    Design(AS_IS),
    Design("4 behind each attention", "4"),
    Design("8 behind each attention", "8"),
    Design("13 behind each attention", "13"),
    Design("16 behind each attention", "16"),
    Design("50% half-way", "50%"),
    Design("64 at block 3 and 50 at block 7", "0,0,0,64,0,0,0,50,0,0,0,0"),
    Design("auto, at most 1 % loss", limit=1.0),
    Design("auto, at most 2 % loss", limit=2.0),
)
LARGE_DESIGNS = (Design(AS_IS), Design("8 behind each attention", "8"), Design("50% half-way", "50%"))


@dataclass(frozen=True)
class Large:
    """A model for timing only: its timm name, the largest number of rounds, and the fewest runs in each."""

    model: str
    rounds: int
    min_runs: int


LARGE = (Large("vit_base_patch16_224", 10, 5), Large("vit_large_patch16_384", 3, 2))


# ---------------------------------------------------------------------------------------------- quality and speed


def measure(settings: Settings, designs: Sequence[Design], rounds: int, steps: Steps) -> dict[str, Any]:
    """Measure designs in every precision and batch size; the first design is the original model."""
    target, options = check_target(settings)
    subject = load(settings, steps)
    with tempfile.TemporaryDirectory() as scratch:
        evaluator = graph_evaluator(subject, target, options, settings, Path(scratch))
        rewriter = Rewriter(subject.graph, subject.sites, subject.data.calibration)
        changes, facts = decided(designs, subject, settings, evaluator, rewriter, steps)
        graphs = {name: rewriter.rewritten(made) for name, made in changes.items()}
        variants = lowered(graphs, evaluator.builder, steps)
        rows: list[dict[str, Any]] = []
        for precision in PRECISIONS:
            row_settings = replace(settings, int8=precision, rounds=rounds)
            rows += _rows(variants, changes, work(graphs, subject), evaluator, row_settings, steps)
    return {
        "model": subject.model.name,
        "metric": subject.metric,
        "samples": {"search": len(subject.data.validation), "test": len(subject.data.test)},
        "searches": facts,
        "rows": rows,
        "environment": environment(),
    }


def decided(
    designs: Sequence[Design],
    subject: TracedModel,
    settings: Settings,
    evaluator: GraphEvaluator,
    rewriter: Rewriter,
    steps: Steps,
) -> tuple[dict[str, Mapping[str, str]], dict[str, Any]]:
    """Return the changes of every design, and facts about the searches."""
    changes: dict[str, Mapping[str, str]] = {}
    facts: dict[str, Any] = {}
    journal = Journal()
    # Largest limit first: losses measured for it, in full or cut short above it, are valid for smaller limits.
    for design in sorted(designs, key=lambda design: -1.0 if design.limit is None else -design.limit):
        if design.limit is None:
            changes[design.name] = merge_schedule(design.tokens, subject.sites)
            continue
        limited = replace(settings, max_loss=design.limit)
        search = prepare_search(subject, limited, rewriter, evaluator, steps, journal)
        run_search(search, steps)
        changes[design.name], facts[design.name] = search.changes, facts_of(search)
    return {design.name: changes[design.name] for design in designs}, facts


def lowered(graphs: Mapping[str, Graph], builder: EngineBuilder, steps: Steps) -> list[Variant]:
    """Lower every design and compare it with torch on real samples; the first one is named ``baseline``."""
    variants: list[Variant] = []
    for number, (name, graph) in enumerate(graphs.items()):
        with steps.step(f"build {name}"):
            variant = lower_variant(f"design{number}", graph, builder.fold(graph), builder)
        variants.append(replace(variant, name=name if variants else "baseline"))
    return variants


def work(graphs: Mapping[str, Graph], subject: TracedModel) -> dict[str, int]:
    """Return the multiply-adds of each graph for one sample."""
    feeds = next(iter(subject.data.test.batches(1))).feeds
    counter = Counter(subject.graph, {name: tuple(value.shape) for name, value in feeds.items()})
    return {name: counter.count(graph).multiply_adds for name, graph in graphs.items()}


def _rows(
    variants: Sequence[Variant],
    changes: Mapping[str, Mapping[str, str]],
    multiply_adds: Mapping[str, int],
    evaluator: GraphEvaluator,
    settings: Settings,
    steps: Steps,
) -> list[dict[str, Any]]:
    """Measure every design in one precision, beside the float original."""
    builder = evaluator.builder
    first, *others = changes
    converted = convert_variants(variants, settings.precision, evaluator.converter, steps)
    engines = {each.name: builder.build(each.source) for each in converted}
    reference = "original" if "original" in engines else "baseline"
    with steps.step("measure the quality"):
        test = builder.subject.data.test
        quality = evaluate_engines(builder, engines, test, reference, lambda *_: None)
    latency = {}
    for batch in BATCHES:
        timer = EngineTimer(workload_calls(builder.subject, replace(settings, batch=batch)), settings.rounds)
        latency[batch] = timer.latency(builder, engines, steps)
    rows = []
    for name in (first, *others):
        engine = "baseline" if name == first else name
        precision = "float" if settings.precision == "fp32" else "int8"
        row: dict[str, Any] = {"design": name, "precision": precision, "changes": changes[name]}
        row["multiply_adds"] = multiply_adds[name]
        rows.append(row | _quality(quality, engine, reference) | _speed(latency, engine, reference))
    return rows


def _quality(quality: Evaluation, engine: str, reference: str) -> dict[str, Any]:
    lost = {"float": quality.loss(reference, engine), "same": quality.loss("baseline", engine)}
    row = {"figure": asdict(quality.figure(engine)), "loss": {name: asdict(value) for name, value in lost.items()}}
    return row | {name: asdict(value) for name, value in quality.label_free(engine).items()}


def _speed(latency: Mapping[int, Mapping[str, Latency]], engine: str, reference: str) -> dict[str, Any]:
    """Return latencies by batch size, and speed-ups over the float original and over the original in this precision."""
    row: dict[str, Any] = {"latency": {}, "speedup": {}}
    for batch, by_engine in latency.items():
        mine = by_engine[engine]
        bases = {"float": by_engine[reference], "same": by_engine["baseline"]}
        row["latency"][str(batch)] = brief(report.latency_to_dict(mine))
        row["speedup"][str(batch)] = {name: mine.speedup_over(base)._asdict() for name, base in bases.items()}
    return row


# ------------------------------------------------------------------------------------------------------ speed only


def timed(large: Large, rounds: int, steps: Steps) -> dict[str, Any]:
    """Measure multiply-adds, latency and operator times of a model with random weights."""
    settings = Settings(model=large.model, data="random", drop="none", random_weights=True)
    target, options = check_target(settings)
    subject = load(settings, steps)
    feeds = next(iter(subject.data.test.batches(1))).feeds
    rewriter = Rewriter(subject.graph, subject.sites, subject.data.calibration)
    graphs = {design.name: rewriter.rewritten(merge_schedule(design.tokens, subject.sites)) for design in LARGE_DESIGNS}
    multiply_adds = work(graphs, subject)
    with tempfile.TemporaryDirectory() as scratch:
        files, differences = {}, {}
        for number, (name, graph) in enumerate(graphs.items()):
            with steps.step(f"build {name}"):
                files[name] = lower(fold_graph(graph), subject.model, Path(scratch) / f"design{number}.onnx")
                with target.load(files[name], options) as engine:
                    differences[name] = difference(graph, engine.run(feeds), feeds)
        with steps.step("measure the latency"):
            latency = interleave(
                {name: partial(target.load, path, options) for name, path in files.items()},
                feeds,
                rounds=min(rounds, large.rounds),
                min_runs=large.min_runs,
            )
        with steps.step("profile"):
            profiles = {name: operators(path, feeds) for name, path in files.items()}
    rows = [
        {
            "design": name,
            "multiply_adds": multiply_adds[name],
            "difference_from_torch": differences[name],
            "latency": brief(report.latency_to_dict(latency[name])),
            "speedup": latency[name].speedup_over(latency[AS_IS])._asdict(),
            "operators_ms": profiles[name],
        }
        for name in graphs
    ]
    return {"model": large.model, "rows": rows, "environment": environment()}


def difference(graph: Graph, outputs: Mapping[str, Any], feeds: Feeds) -> float:
    """Return the largest relative difference from torch on one sample; raise if it exceeds an export's tolerance."""
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    reference = reference_of(graph, tensors)
    refine = partial(with_rounding, reference, graph, [tensors])
    return check_parity(reference, lambda: outputs, name="design", refine=refine).difference


def operators(onnx: Path, feeds: Feeds, runs: int = PROFILED, threads: int | None = None) -> dict[str, float]:
    """Profile with ONNX Runtime; return the median milliseconds per run of each operator type, longest first."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling, options.log_severity_level, options.inter_op_num_threads = True, 3, 1
    options.profile_file_prefix = str(onnx.with_suffix(""))
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    for _ in range(runs + 1):
        session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text())
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    by_run = [Tally[str]() for _ in starts]
    for event in events:
        if event["name"].endswith("_kernel_time"):
            by_run[bisect.bisect_right(starts, event["ts"]) - 1][event["args"]["op_name"]] += event["dur"]
    kinds = {kind for tally in by_run for kind in tally}
    times = {kind: median(tally[kind] for tally in by_run[1:]) / 1000.0 for kind in kinds}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


# --------------------------------------------------------------------------------------------------------- command


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option(
    "--part",
    "chosen",
    multiple=True,
    type=click.Choice(("deit", "large", "methods")),
    help="Part to measure; repeatable.  [default: all]",
)
@click.option("--case", "cases", type=click.Choice(tuple(CASES)), multiple=True, help="Cases of part methods.  [all]")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Timed bursts per engine.")
def main(data_root: Path, chosen: tuple[str, ...], cases: tuple[str, ...], rounds: int) -> None:
    """Measure token merging and write results/tokens.json; results of other parts are kept."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    steps = Steps(Console(stderr=True))
    where = sources(data_root)
    if "deit" in chosen or not chosen:
        start = time.perf_counter()
        settings = Settings(model=where["deit"], data=where["images"], drop="auto", cost="latency")
        results["deit"] = measure(settings, DESIGNS, rounds, steps) | {"seconds": time.perf_counter() - start}
        _write(results)
    for large in LARGE if "large" in chosen or not chosen else ():
        click.echo(large.model, err=True)
        results.setdefault("large", {})[large.model] = timed(large, rounds, steps)
        _write(results)
    for name in (cases or CASES) if "methods" in chosen or not chosen else ():
        click.echo(name, err=True)
        results.setdefault("methods", {})[name] = methods(CASES[name], where, steps)
        _write(results)


def _write(results: Mapping[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
