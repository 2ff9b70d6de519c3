"""The searched plans of benchmarks/smollm2.py: `--drop auto` at the predicted time of the published plans."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smollm2_subject import EFFECT_SAMPLES, ORIGINAL, Design, Row, Subject

from compressor.measure.graph_evaluator import GraphEvaluator, graph_evaluator
from compressor.quantize.precision import Source
from compressor.search import planner
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph
from runtimes.base.timing import Latency, speedups_over

EQUAL = (Design("attention", 25), Design("attention", 50))  # the searches stop at the predicted time of these
GENERATED = "128:64"  # tokens of the timed prompt, and further tokens


def searched(subject: Subject) -> dict[str, Callable[[], Row]]:
    """Return the searches by name; each has the plan, its speed next to the published plan, and all of its quality."""

    def find(design: Design) -> Row:
        search, timed = search_until(subject, design)
        speeds = {name: speedup._asdict() for name, speedup in speedups_over(ORIGINAL, timed).items()}
        whole = search.whole / search.cost_model.cost(subject.graph(design))
        facts = {"equal": design.name, "predicted": {design.name: whole, "auto": search.speedup}, "speedups": speeds}
        return facts | {"sweeps": search.sweeps} | subject.whole_row(search.graph, search.changes)

    return {f"auto, as fast as {design.name}": lambda design=design: find(design) for design in EQUAL}  # type: ignore[misc]


def search_until(subject: Subject, design: Design) -> tuple[planner.Search, dict[str, Latency]]:
    """Search until the predicted time of a design, then time original, design and result side by side.

    Effects are measured on the calibration texts that single effects are measured on. The searches share a journal, so
    what one of them has measured is not measured again.
    """
    wanted = subject.graph(design)
    with evaluator_of(subject) as (options, evaluator):
        journal = Journal(f"searches of {subject.traced.model.name}", subject.work / "searches.jsonl")
        rewriter = planner.make_rewriter(subject.traced, options)
        search = planner.prepare_search(subject.traced, options, rewriter, evaluator, Steps(), journal)
        enough = search.whole / search.cost_model.cost(wanted)
        planner.run_search(search, Steps(), enough)
        search.milder(enough)
        timed = latencies(evaluator, {ORIGINAL: subject.traced.graph, design.name: wanted, "auto": search.graph})
    return search, timed


@contextmanager
def evaluator_of(subject: Subject) -> Iterator[tuple[Settings, GraphEvaluator]]:
    """Yield the settings of a search for speed on one thread of ONNX Runtime, and what builds and times its engines.

    A wished speed-up lifts the limit on the loss; `search_until` sets the one that counts.
    """
    changed = {"drop": "auto", "speedup": 2.0, "search_samples": EFFECT_SAMPLES, "generate": GENERATED, "threads": 1}
    options = Settings(**{**subject.settings.to_dict(), **changed})
    target, build = check_target(options)
    with tempfile.TemporaryDirectory(dir=subject.work) as scratch:
        yield options, graph_evaluator(subject.traced, target, build, options, Path(scratch))


def latencies(evaluator: GraphEvaluator, graphs: dict[str, Graph]) -> dict[str, Latency]:
    """Build an engine of each graph, and time them against each other."""
    with evaluator.builder.temporary() as builder:
        files = {name: builder.lower(builder.fold(graph), name) for name, graph in graphs.items()}
        engines = {name: builder.build(Source(path)) for name, path in files.items()}
        return evaluator.timer.latency(builder, engines, Steps())
