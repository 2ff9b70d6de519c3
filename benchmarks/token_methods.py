"""Part `methods` of benchmarks/tokens.py: the methods of token reduction at equal schedules, by quality alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import click
import numpy as np

from compressor.lower.traced_model import TracedModel, load
from compressor.quality.evaluate import Evaluation, evaluate, graph_runner
from compressor.quality.intervals import bootstrap
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.progress import Steps
from passes.analysis.symbolic_cost import Counter
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.graph import Graph
from passes.merge_tokens.token_merging import ReduceTokens

AS_IS = "as it is"
BASE = "tome"  # the method that the others are compared with
METHODS = ("tome", "atm", "unary", "evit", "attention", "norm", "merge")
# Shares of the tokens that go after the attention of a block, by block.
SCHEDULES = {
    "25% at block 5, 37% at 8": {5: 0.25, 8: 0.37},
    "25% at 7, 45% at 9": {7: 0.25, 9: 0.45},
    "25% at 3, 37% at 6 and 8": {3: 0.25, 6: 0.37, 8: 0.37},
    "25% at 3, 37% at 5, 7 and 8": {3: 0.25, 5: 0.37, 7: 0.37, 8: 0.37},
}
USED = 400  # images on which the rule of `merge` was chosen; they are left out


def methods(
    settings: Settings,
    steps: Steps,
    schedules: Mapping[str, Mapping[int, float]] = SCHEDULES,
    used: int = USED,
) -> dict[str, Any]:
    """Measure every method with every schedule on the samples that no choice was made on."""
    subject = load(settings, steps)
    test = unseen(subject, used)
    rows = []
    for schedule, shares in schedules.items():
        with steps.step(schedule):
            graphs = {method: reduced(subject.graph, shares, method) for method in METHODS}
            runners = {name: graph_runner(subject.model, partial(run, graph)) for name, graph in graphs.items()}
            runners[AS_IS] = graph_runner(subject.model, partial(run, subject.graph))
            found = evaluate(test, runners, head=subject.head, metric=subject.metric, reference=AS_IS)
        rows += [_row(schedule, method, subject, graphs[method], found) for method in METHODS]
        for row in rows[-len(METHODS) :]:
            click.echo(f"  {row['method']}: {row['divergence']['value']:.4f}, {row['loss']['value']:+.2f}", err=True)
    return {
        "model": subject.model.name,
        "metric": subject.metric,
        "samples": len(test),
        "rows": rows,
        "environment": environment(),
    }


def unseen(subject: TracedModel, used: int) -> Any:
    """Return the test split with all samples but those on which the rule was chosen."""
    count = len(subject.data.test.samples.ids)
    order = np.random.default_rng(0).permutation(count)
    return replace(subject.data.test, indices=tuple(sorted(order[used:].tolist())))


def reduced(graph: Graph, shares: Mapping[int, float], method: Any) -> Graph:
    """Return a fork with the tokens reduced after the attention of some blocks."""
    fork = graph.fork()
    apply(ReduceTokens({f"blocks.{block}": share for block, share in shares.items()}, method=method), fork)
    return fork


def _row(schedule: str, method: str, subject: TracedModel, graph: Graph, found: Evaluation) -> dict[str, Any]:
    feeds = next(iter(subject.data.test.batches(1))).feeds
    counter = Counter(subject.graph, {name: tuple(value.shape) for name, value in feeds.items()})
    pair = {"mine": found.columns[method]["divergence"], "base": found.columns[BASE]["divergence"]}
    against = bootstrap(lambda part: (part["mine"] - part["base"]).mean(-1), pair)
    return {
        "schedule": schedule,
        "method": method,
        "saved": 1.0 - counter.count(graph).multiply_adds / counter.count(subject.graph).multiply_adds,
        "divergence": asdict(found.label_free(method)["divergence"]),
        "divergence_against_base": asdict(against),
        "loss": asdict(found.loss(AS_IS, method)),
        "loss_against_base": asdict(found.loss(BASE, method)),
    }
