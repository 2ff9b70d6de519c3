"""Measure how a search scales with workers of Ray, on this machine and on a simulated cluster that loses a node.

    python benchmarks/scale.py timing    # under five minutes; nothing else may run
    python benchmarks/scale.py cluster

`timing` measures the effects of candidates of a ViT-Ti/16 with random weights in this process and on 1, 2 and 4
workers, and what a task, a candidate and a byte cost. `cluster` searches on the embedded sample, on four nodes of one
core each that `ray.cluster_utils` simulates on this machine; one is killed in the middle, and the result is compared
with that of one process. Both write their part of benchmarks/results/scale.json; `python benchmarks/tables.py` writes
the tables, and predicts from these costs how the search of a large model would scale.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from compressor.executor.base import Executor, InProcess
from compressor.executor.on_ray import executor_for
from compressor.executor.packed import packed
from compressor.lower.traced_model import TracedModel, load
from compressor.measure.workload import workload_calls
from compressor.quality.output_divergence import OutputDivergence
from compressor.quality.validation_loss import ValidationLoss
from compressor.search.cost_model import multiply_add_cost_model
from compressor.search.greedy import MEASURED_AT_ONCE, Search
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.progress import Steps
from passes.base import apply
from passes.execute.shared_prefix import SharedPrefixRun
from passes.graph.graph import Graph
from passes.rewrite.drop import Drop

RESULTS = Path(__file__).parent / "results" / "scale.json"
WORKERS = (1, 2, 4)
SAMPLES = 64
ROUNDS = 3  # of each measurement; the median is taken
TASKS = 400  # empty tasks
BYTES = 2**28  # put into the object store
NODES = 4
LEAST_SHARDS = 40  # after which the node is killed


def timing() -> dict[str, Any]:
    """Return the seconds of a measurement in this process and on workers, and what its parts cost."""
    settings = Settings(model="vit_tiny_patch16_224", data="random", random_weights=True, drop="1")
    subject = load(settings, Steps(None))
    variants = {site.name: _dropped(subject.graph, site.name) for site in subject.sites[::3]}
    forks = SharedPrefixRun(subject.graph, variants)
    divergences: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        name = f"this process, {threads} thread{'s' if threads > 1 else ''}"
        seconds[name], divergences[name] = _measured(subject, variants, InProcess())
    torch.set_num_threads(1)
    costs = _costs_here(subject, variants, forks, settings)
    for workers in WORKERS:
        start = time.perf_counter()
        with executor_for(workers, None) as executor:
            list(executor.run(time.sleep, [(0.2,)] * 2 * workers))
            started = time.perf_counter() - start
            name = f"{workers} worker{'s' if workers > 1 else ''}"
            seconds[name], divergences[name] = _measured(subject, variants, executor)
            seconds[name]["start"] = started
            if workers == 2:
                costs |= _costs_of_ray(executor)
    alone = "this process, 1 thread"
    work = forks.share * SAMPLES * subject.costs.total.multiply_adds
    return {
        "model": "vit_tiny_patch16_224",
        "candidates": len(variants),
        "samples": SAMPLES,
        "shards": _shards(subject),
        "sites": len(subject.sites),
        "nodes": len(subject.graph.nodes()),
        "seconds": seconds,
        "same": [name for name, found in divergences.items() if found == divergences[alone]],
        "costs": costs | {"multiply_adds_per_second": work / seconds[alone]["measure"]},
    }


def _dropped(graph: Graph, site: str) -> Graph:
    fork = graph.fork()
    apply(Drop((site,)), fork)
    return fork


def _shards(subject: TracedModel) -> int:
    return len(list(subject.data.calibration.head(SAMPLES).bounded_groups(32)))


def _measured(
    subject: TracedModel, variants: dict[str, Graph], executor: Executor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of running the original and of measuring all variants, and their divergences."""
    start = time.perf_counter()
    effects = OutputDivergence(subject.graph, subject.model, subject.data.calibration.head(SAMPLES), executor)
    first, rounds = time.perf_counter() - start, []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        _, divergences = effects.measure(subject.graph, variants)
        rounds.append(time.perf_counter() - start)
    return {"original": first, "measure": statistics.median(rounds)}, divergences


def _costs_here(
    subject: TracedModel, variants: dict[str, Graph], forks: SharedPrefixRun[str], settings: Settings
) -> dict[str, float]:
    """Return what this process does for each candidate, in seconds and bytes."""
    prices = multiply_add_cost_model(subject.graph, workload_calls(subject, settings))
    names = list(variants)

    def each(function: Any, count: int) -> float:
        rounds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            function()
            rounds.append(time.perf_counter() - start)
        return statistics.median(rounds) / count

    group = dict(list(variants.items())[:MEASURED_AT_ONCE])
    part = SharedPrefixRun(subject.graph, group)
    return {
        "rewrite": each(lambda: [_dropped(subject.graph, name) for name in names], len(names)),
        "price": each(lambda: [prices.cost(graph) for graph in variants.values()], len(names)),
        "compare": each(lambda: SharedPrefixRun(subject.graph, variants), len(names)),
        "pack": each(lambda: packed(part), len(group)),
        "packed_bytes": len(packed(part).pickled) / len(group),
        "share": forks.share,
    }


def _costs_of_ray(executor: Executor) -> dict[str, float]:
    """Return the seconds of a task without work, and of a byte in the object store, written and first read."""
    list(executor.run(abs, [(1,)] * 50))
    start = time.perf_counter()
    list(executor.run(abs, [(1,)] * TASKS))
    task = (time.perf_counter() - start) / TASKS
    start = time.perf_counter()
    handle = executor.share(torch.ones(BYTES // 4))
    written = time.perf_counter() - start
    start = time.perf_counter()
    list(executor.run(torch.numel, [(handle,)]))
    return {"task": task, "write_byte": written / BYTES, "read_byte": (time.perf_counter() - start) / BYTES}


def cluster() -> dict[str, Any]:
    """Search in this process and on a simulated cluster that loses a node; return what happened."""
    settings = Settings(cost="macs", actions="drop,linear", max_loss=5.0)
    subject = load(settings, Steps(None))
    torch.set_num_threads(1)
    expected, alone = _searched(subject, InProcess(), settings)
    with simulated() as (address, kill):
        done = 0

        def show(text: str) -> None:
            nonlocal done
            done += 1
            if done == LEAST_SHARDS:
                threading.Thread(target=kill).start()

        with executor_for(None, address, show) as executor:
            found, seconds = _searched(subject, executor, settings)
            left = _computing()
    return {
        "nodes": NODES,
        "shards": done,
        "killed_after": LEAST_SHARDS,
        "left": left,
        "changes": len(found.steps),
        "same": found.steps == expected.steps and found.front.added == expected.front.added,
        "seconds": {"this process, 1 thread": alone, f"{NODES} nodes, one killed": seconds},
    }


def _searched(subject: TracedModel, executor: Executor, settings: Settings) -> tuple[Search, float]:
    """Search within the budget on 64 calibration samples; return the search and its seconds."""
    start, split = time.perf_counter(), subject.data.calibration.head(SAMPLES)
    search = Search(
        Rewriter(subject.graph, subject.sites[::3], split, executor=executor),
        OutputDivergence(subject.graph, subject.model, split, executor),
        ValidationLoss(subject.graph, subject.model, subject.data.validation, subject.metric, executor=executor),
        multiply_add_cost_model(subject.graph, workload_calls(subject, settings)),
        settings.chosen_actions,
        settings.loss_limit,
        split,
        preview=OutputDivergence(subject.graph, subject.model, split.head(16), executor),
    )
    search.run()
    return search, time.perf_counter() - start


def _computing() -> int:
    """Return the number of nodes that are alive and have a core."""
    import ray

    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


@contextlib.contextmanager
def simulated() -> Iterator[tuple[str, Any]]:
    """Yield the address of a cluster of `NODES` nodes with a core each, and a function that kills one of them."""
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 300_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    try:
        members = [nodes.add_node(num_cpus=1, **store) for _ in range(NODES)]

        yield nodes.address, lambda: nodes.remove_node(members[1], allow_graceful=False)
    finally:
        nodes.shutdown()


PARTS = {"timing": timing, "cluster": cluster}


@click.command()
@click.argument("parts", nargs=-1, required=True, type=click.Choice(tuple(PARTS)))
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(parts: tuple[str, ...], output: Path) -> None:
    """Measure the parts and write them into results/scale.json."""
    results = json.loads(output.read_text()) if output.exists() else {}
    for part in parts:
        results[part] = PARTS[part]() | {"environment": environment()}
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
