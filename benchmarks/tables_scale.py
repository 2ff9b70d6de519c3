"""The tables of benchmarks/scale.py, and a model on paper of a large search from the costs that it measured."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scale.json"
AT_ONCE, FINALISTS = 6, 2  # candidates measured at a time: compressor/search/greedy.py
GAIN = 1.1  # factor below which twice as many workers do not pay
MACHINE = 8  # workers a machine
NETWORK = 3.125e9  # bytes a second between machines: 25 Gbit/s
SHOWN = (8, 64, 512)


@dataclasses.dataclass(frozen=True)
class Large:
    """A language model to search, and its data. One multiply-add for each parameter and token.

    Attributes:
        parameters: number of parameters.
        sites: number of branches.
        bytes_each: bytes of a stored parameter.
        tokens: tokens of a shard.
        shards: shards on which effects are measured; a quarter of them for previews.
        validated: shards of the validation samples.
        changes: changes that the search makes.
    """

    parameters: float = 70e9
    sites: int = 160
    bytes_each: int = 2
    tokens: int = 4096
    shards: int = 32  # 64 texts of 2,048 tokens
    validated: int = 256  # 512 texts
    changes: int = 40


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of worker: its name, and the multiply-adds that it computes in a second."""

    name: str
    speed: float


def kinds(found: Mapping[str, Any]) -> tuple[Kind, Kind]:
    """Return a core as measured, and a GPU as assumed."""
    measured = found["timing"]["costs"]["multiply_adds_per_second"]
    return Kind(f"core, {measured / 1e9:.0f} G multiply-adds/s (measured)", measured), Kind(
        "GPU, 80 T multiply-adds/s (assumed: 40 % of 400 TFLOP/s)", 8e13
    )


def predicted(found: Mapping[str, Any], model: Large, speed: float, workers: int) -> dict[str, float]:
    """Return the seconds of a search by what takes them.

    A search measures every drop on the previews, and then, for each change, `AT_ONCE` candidates on the previews and
    `FINALISTS` on all shards, and validates the plan. The driver makes and packs the candidates of a group before the
    workers get any, and hands out one task after the other. A task runs one shard through the unchanged model, up to
    the last fork, and half of the model for each candidate. Weights go from machine to machine in a tree.
    """
    costs, timing = found["timing"]["costs"], found["timing"]
    nodes = model.sites * timing["nodes"] / timing["sites"]
    candidate = (costs["rewrite"] + costs["price"] + costs["compare"] + costs["pack"]) * nodes / timing["nodes"]
    forward = model.parameters * model.tokens / speed
    total = {"driver": 0.0, "tasks": 0.0, "workers": 0.0}

    def group(candidates: int, shards: int, times: int = 1) -> None:
        parts = max(1, min(workers // shards, candidates))
        waves = math.ceil(shards * parts / workers)
        total["driver"] += times * candidates * candidate
        total["tasks"] += times * shards * parts * costs["task"]
        total["workers"] += times * waves * forward * (1.0 + 0.5 * candidates / parts if candidates else 1.0)

    previews = max(model.shards // 4, 1)
    group(0, model.shards)
    group(model.sites, previews)
    group(AT_ONCE, previews, model.changes)
    group(FINALISTS, model.shards, model.changes)
    group(0, model.validated, model.changes + 1)
    machines = math.ceil(workers / MACHINE)
    total["weights"] = (
        model.parameters * model.bytes_each * (costs["write_byte"] + math.ceil(math.log2(machines)) / NETWORK)
    )
    return total


def stops(found: Mapping[str, Any], model: Large, speed: float) -> tuple[int, str]:
    """Return the number of workers from which twice as many gain less than `GAIN`, and what takes most time there."""
    workers = 1
    while _seconds(found, model, speed, workers) > GAIN * _seconds(found, model, speed, 2 * workers):
        workers *= 2
    return workers, max((parts := predicted(found, model, speed, workers)), key=parts.__getitem__)


def _seconds(found: Mapping[str, Any], model: Large, speed: float, workers: int) -> float:
    return sum(predicted(found, model, speed, workers).values())


def scale() -> str | None:
    """Return the tables, or None without results."""
    return scale_tables(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def scale_tables(found: Mapping[str, Any]) -> str:
    """Return the table of this machine, the sentence on the cluster, and the prediction for a large model."""
    parts = [_timing(found["timing"])]
    if "cluster" in found:
        parts.append(_cluster(found["cluster"]))
    return "\n\n".join([*parts, _paper(found, Large())])


def _timing(found: Mapping[str, Any]) -> str:
    alone, cores = found["seconds"]["this process, 1 thread"]["measure"], found["environment"]["cores"]
    lines = ["| where | start, s | measurement, s | share of time lost | same to the bit |", "|---|---|---|---|---|"]
    for name, row in found["seconds"].items():
        used = min(int(name.split()[0]) if "worker" in name else int(name.split()[2]), cores)
        lost = 1.0 - alone / (used * row["measure"])
        start = f"{row['start']:.1f}" if "start" in row else ""
        same = "yes" if name in found["same"] else "no"
        lines.append(f"| {name} | {start} | {row['measure']:.2f} | {lost:.0%} | {same} |")
    costs = found["costs"]
    driver = sum(costs[name] for name in ("rewrite", "price", "compare", "pack"))
    facts = (
        f"- {found['candidates']} candidates of {found['model']} on {found['samples']} samples in {found['shards']} "
        f"shards; {cores} cores. A task without work takes {costs['task'] * 1e3:.2f} ms. The driver spends "
        f"{driver * 1e3:.0f} ms on a candidate (a graph of {found['nodes']} nodes): {costs['rewrite'] * 1e3:.0f} to "
        f"make it, {costs['price'] * 1e3:.0f} to price it, {costs['compare'] * 1e3:.0f} to compare it with the graph, "
        f"{costs['pack'] * 1e3:.0f} to pack {costs['packed_bytes'] / 1e3:.0f} kB.\n"
        f"- Weights are written into the object store at {1e-9 / costs['write_byte']:.1f} GB/s, once a machine, and "
        f"read in place ({costs['read_byte'] * 2**28 * 1e3:.0f} ms for 268 MB, task included)."
    )
    return "\n".join([*lines, "", facts])


def _cluster(found: Mapping[str, Any]) -> str:
    alone, seconds = found["seconds"].values()
    same = "is the same to the bit" if found["same"] else "DIFFERS"
    return (
        f"- Cluster: {found['nodes']} simulated nodes of a core each, one killed after {found['killed_after']} of "
        f"{found['shards']} shards; {found['left']} were left. The search ({found['changes']} changes) "
        f"{same} as in one process, which took {alone:.0f} s; the nodes, on the same two cores, took {seconds:.0f} s."
    )


def _paper(found: Mapping[str, Any], model: Large) -> str:
    head = "| worker | workers | search, hours | speed-up over 1 | driver | tasks | weights | workers busy |"
    lines = [head, "|---" * 8 + "|"]
    notes = []
    for kind in kinds(found):
        alone = _seconds(found, model, kind.speed, 1)
        for workers in SHOWN:
            parts = predicted(found, model, kind.speed, workers)
            total = sum(parts.values())
            shares = " | ".join(f"{parts[name] / total:.0%}" for name in ("driver", "tasks", "weights"))
            busy = alone / (workers * total)
            lines.append(
                f"| {kind.name} | {workers} | {total / 3600:,.1f} | {alone / total:.0f}x | {shares} | {busy:.0%} |"
            )
        number, why = stops(found, model, kind.speed)
        notes.append(f"from {number} {kind.name.split(',')[0]}s on, where {_REASONS[why]}")
    facts = (
        f"- On paper, not run: {model.parameters / 1e9:.0f} billion parameters, {model.sites} branches, drops, "
        f"{model.shards} shards of {model.tokens} tokens, {model.changes} changes. Twice as many workers gain less "
        f"than {GAIN - 1:.0%} {'; '.join(notes)}."
    )
    return "\n".join([*lines, "", facts])


_REASONS = {
    "workers": f"a step measures {AT_ONCE} or {FINALISTS} candidates at a time, too few tasks for more workers",
    "driver": "the driver, which makes and packs one candidate after the other, takes most of the time",
    "tasks": "the driver, which hands out one task after the other, takes most of the time",
    "weights": "sending the weights to every machine takes most of the time",
}
