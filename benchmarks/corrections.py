"""Corrections of dropped branches, plans by an integer program, and joined blocks: published ways against ours.

    python benchmarks/corrections.py --data-root ../shared/data [--part NAME ...] [--case NAME ...]

- `knapsack`: plans of an integer program over single effects, beside those of the search, with tokens merged and
  without (knapsack.py).
- `corrections`: the same branches dropped, and replaced in several ways (this file).
- `joined`: two adjacent blocks computed side by side, and their MLPs made one (joined_blocks.py).

Each is fitted and chosen on calibration samples and judged on test data, in pairs at equal multiply-adds. The results
are in benchmarks/results/corrections.json; `python benchmarks/tables.py` writes the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from joined_blocks import joined
from knapsack import ACTIONS, knapsack
from main_job import sources
from paired import Bench, Variant

from compressor.lower.traced_model import load
from compressor.quality.evaluate import tensor_batches
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.progress import Steps
from passes.analysis.least_squares import STRENGTHS, Fit, Map, Regression, Replacement, Sweep
from passes.base import apply
from passes.graph.graph import Graph, Site
from passes.rewrite.drop import Drop
from passes.rewrite.replace import Replace

RESULTS = Path(__file__).parent / "results" / "corrections.json"
MODELS = {"DeiT-Tiny": ("deit", "images"), "MiniLM": ("minilm", "stsb"), "Llama 260k": ("llama", "tokens")}
SAMPLES = {"MiniLM": 600}
PARTS = {
    "knapsack": ("DeiT-Tiny",),
    "knapsack without tokens": ("MiniLM",),
    "corrections": ("DeiT-Tiny", "Llama 260k"),
    "joined": ("DeiT-Tiny",),
}
ANY, MLP = ("attention", "mlp"), ("mlp",)
DESIGNS = {  # kinds and number of branches
    "DeiT-Tiny": ((MLP, 3), (ANY, 3), (ANY, 5)),
    "Llama 260k": ((ANY, 1), (ANY, 3), (MLP, 2)),
}
FREE = ("drop", "constant", "scale")  # actions without multiply-adds
OURS = "the best of these by effect"
AGAIN = "branches chosen by low-rank"
ROUNDS = 3  # times that maps with a shared basis are fitted


@dataclass(frozen=True)
class Magnitudes:
    """Statistics of the states x before and y after a branch: y of the original, x of the graph that replaces it.

    `norms` is the mean over tokens of |y| / |x|, `scalar` the least-squares a of y ~ a x, and `channels` [width] the
    ratio of the mean absolute values of each feature.
    """

    norms: float
    scalar: float
    channels: torch.Tensor


# Ways to replace a branch by y = a x: arXiv 2507.18212 (Prune&Comp), and 2505.24680 (LinearPatch) without its rotation.
PUBLISHED: dict[str, Callable[[Magnitudes], float | torch.Tensor]] = {
    "one scalar, by norms": lambda found: found.norms,
    "one scalar, least squares": lambda found: found.scalar,
    "scale by magnitudes of channels": lambda found: found.channels,
}


@torch.inference_mode()
def magnitudes(bench: Bench, graph: Graph, site: Site) -> Magnitudes:
    """Measure the magnitudes on the calibration samples on which no effect is measured."""
    sweep = Sweep(Fit(bench.subject.graph, (site,), sources=("state",)), graph)
    ratios, xy, xx = 0.0, 0.0, 0.0
    sums, rows = torch.zeros(2, site.width, dtype=torch.float64), 0
    for feeds in tensor_batches(bench.fitting):
        for _, _, regressor, target in sweep.rows(feeds):
            x = regressor.double()
            y = x + target.double()
            ratios += float((y.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)).sum())
            xy, xx, rows = xy + float((x * y).sum()), xx + float((x * x).sum()), rows + len(x)
            sums += torch.stack([x.abs().sum(0), y.abs().sum(0)])
    return Magnitudes(ratios / rows, xy / xx, sums[1] / sums[0].clamp(min=1e-12))


def with_map(graph: Graph, site: Site, stand_in: Replacement) -> Graph:
    """Return a fork in which a map replaces the branch of a site."""
    fork = graph.fork()
    apply(Replace(site, stand_in), fork)
    return fork


def replaced(bench: Bench, graph: Graph, site: Site, ways: Sequence[str]) -> dict[str, Graph]:
    """Return a fork for each way to replace the branch of a site: an action, or one of `PUBLISHED`."""
    actions = [way for way in ways if way not in PUBLISHED]
    fits = bench.rewriter.fits(graph, [site.name], bench.fitting) if set(actions) - {"drop"} else {}
    forks = {action: bench.rewriter.changed(graph, site.name, action, fits.get(site.name)) for action in actions}
    if len(actions) < len(ways):
        found = magnitudes(bench, graph, site)
        for way in [way for way in ways if way in PUBLISHED]:
            factor = torch.ones(site.width, dtype=torch.float64) * PUBLISHED[way](found) - 1.0
            forks[way] = with_map(graph, site, Replacement("state", Map((factor,), None), 1.0))
    return forks


def without(graph: Graph, sites: Sequence[Site]) -> Graph:
    """Return a fork with the branches of some sites dropped."""
    fork = graph.fork()
    if sites:
        apply(Drop(tuple(sites)), fork)
    return fork


def one_by_one(bench: Bench, sites: Sequence[Site], ways: Sequence[str]) -> tuple[Graph, list[str]]:
    """Replace branches from the first to the last, each in the way of the least divergence with the later ones dropped.

    Each map is fitted on the graph with the earlier ones in place.
    """
    graph, taken = bench.subject.graph, list[str]()
    for number, site in enumerate(sites):
        forks = replaced(bench, graph, site, ways)
        ends = {way: without(fork, sites[number + 1 :]) for way, fork in forks.items()}
        taken.append(bench.least(ends) if len(ends) > 1 else ways[0])
        graph = forks[taken[-1]]
    return graph, taken


def chosen(bench: Bench, kinds: Sequence[str], count: int, action: str) -> list[Site]:
    """Return the branches whose replacement costs the least divergence, taken one after the other, in their order."""
    graph, found = bench.subject.graph, list[Site]()
    for _ in range(count):
        left = {site.name: site for site in bench.subject.sites if site.kind in kinds and site not in found}
        fits = {} if action == "drop" else bench.rewriter.fits(graph, list(left), bench.fitting)
        forks = {name: bench.rewriter.changed(graph, name, action, fits.get(name)) for name in left}
        best = bench.least(forks)
        graph = forks[best]
        found.append(left[best])
    return sorted(found, key=lambda site: site.order)


def shared_basis(fits: Sequence[Regression], rank: int, strength: float) -> list[Map]:
    """Return maps t_i ~ U_i V r_i + b_i of several branches, with one V [rank, width] for all of them (SubFit).

    With the mean covariance C of the r_i and the ridge solutions A_i, V is the projection that keeps most of the sum of
    |A_i r|^2: the leading directions of the sum of C^(1/2) A_i^T A_i C^(1/2). Each U_i is the ridge solution for V r_i.
    """
    values, vectors = torch.linalg.eigh(torch.stack([_centred(fit)[0] for fit in fits]).mean(0))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    predicted = torch.cat([_ridge(*_centred(fit), strength) @ root for fit in fits])
    _, directions = torch.linalg.eigh(predicted.T @ predicted)
    basis = directions[:, -rank:].T @ torch.linalg.pinv(root, rtol=1e-6, hermitian=True)
    maps = []
    for fit in fits:
        rr, tr = _centred(fit)
        out = _ridge(basis @ rr @ basis.T, tr @ basis.T, strength)
        maps.append(Map((basis, out), fit.t / fit.rows - out @ (basis @ (fit.r / fit.rows))))
    return maps


def validated_basis(halves: Sequence[tuple[Regression, Regression]], rank: int) -> list[Map]:
    """Return the maps with a shared basis whose ridge strength leaves the least, by two-fold cross-validation."""

    def left(strength: float) -> float:
        """Return the sum of the shares of |t|^2 that the maps leave unexplained on the half they were not fitted on."""
        folds = [list(half) for half in zip(*halves, strict=True)]
        pairs = ((train, test) for train, test in zip(folds, folds[::-1], strict=True))
        return sum(
            rows.error(fitted) / max(rows.power(), 1e-300)
            for train, test in pairs
            for fitted, rows in zip(shared_basis(train, rank, strength), test, strict=True)
        )

    return shared_basis([even + odd for even, odd in halves], rank, min(STRENGTHS, key=left))


def _centred(fit: Regression) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the covariances of r with r and of t with r, over the rows."""
    r, t = fit.r / fit.rows, fit.t / fit.rows
    return fit.rr / fit.rows - torch.outer(r, r), fit.tr / fit.rows - torch.outer(t, r)


def _ridge(rr: torch.Tensor, tr: torch.Tensor, strength: float) -> torch.Tensor:
    ridge = strength * rr.diagonal().mean() * torch.eye(len(rr), dtype=torch.float64)
    solution: torch.Tensor = torch.linalg.solve(rr + ridge, tr.T).T
    return solution


def subfit(bench: Bench, sites: Sequence[Site], rank: int, rounds: int) -> Graph:
    """Return the graph with all branches replaced by maps with a shared basis, fitted together `rounds` times.

    In the first round, branches are fitted with the earlier ones dropped; then, with the maps of the round before.
    """
    maps: list[Map] = []
    for _ in range(rounds):
        halves, graph = list[tuple[Regression, Regression]](), bench.subject.graph
        for number, site in enumerate(sites):
            halves.append(bench.rewriter.fits(graph, [site.name], bench.fitting)[site.name].halves["normalised"])
            stand_in = Replacement("normalised", maps[number], 1.0) if maps else None
            graph = without(graph, [site]) if stand_in is None else with_map(graph, site, stand_in)
        maps = validated_basis(halves, rank)
    graph = bench.subject.graph
    for site, fitted in zip(sites, maps, strict=True):
        graph = with_map(graph, site, Replacement("normalised", fitted, 1.0))
    return graph


def variants(bench: Bench, kinds: Sequence[str], count: int) -> Iterator[tuple[str, Variant]]:
    """Yield the variants of one design by name."""
    sites = chosen(bench, kinds, count, "drop")
    yield "drop", Variant(without(bench.subject.graph, sites), told={"sites": [site.name for site in sites]})
    for name in ("constant", "scale"):
        yield name, Variant(one_by_one(bench, sites, [name])[0], ("drop",))
    graph, taken = one_by_one(bench, sites, FREE)
    yield OURS, Variant(graph, ("drop",), {"taken": taken})
    for name in PUBLISHED:
        yield name, Variant(one_by_one(bench, sites, [name])[0], ("drop", OURS))
    graph, taken = one_by_one(bench, sites, (*FREE, *PUBLISHED))
    yield f"{OURS}, and published", Variant(graph, ("drop", OURS), {"taken": taken})
    for name in ("low-rank", "linear"):
        yield name, Variant(one_by_one(bench, sites, [name])[0])
    if kinds == MLP:
        yield from with_shared_basis(bench, sites)


def with_shared_basis(bench: Bench, sites: Sequence[Site]) -> Iterator[tuple[str, Variant]]:
    """Yield maps with a shared basis, at the same branches and at those whose low-rank maps cost least."""
    base, rank = "low-rank", sites[0].width // 4
    for rounds in (1, ROUNDS):
        yield f"shared basis, fitted {rounds}x", Variant(subfit(bench, sites, rank, rounds), (base,))
    again = chosen(bench, MLP, len(sites), base)
    told = {"sites": [site.name for site in again]}
    yield f"{base}, {AGAIN}", Variant(one_by_one(bench, again, [base])[0], (base,), told)
    graph = subfit(bench, again, rank, ROUNDS)
    yield f"shared basis, fitted {ROUNDS}x, {AGAIN}", Variant(graph, (base, f"{base}, {AGAIN}"), told)


def corrections(bench: Bench, designs: Sequence[tuple[Sequence[str], int]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure all ways to replace the dropped branches of each design."""
    for kinds, count in designs:
        name = f"{count} {'MLP' if kinds == MLP else 'branch'}{'' if count == 1 else 's' if kinds == MLP else 'es'}"
        yield name, bench.judged(dict(variants(bench, kinds, count)))


def measure(part: str, case: str, bench: Bench) -> Iterator[tuple[str, Any]]:
    """Run one part on one model; yield its results by name."""
    if part in ACTIONS:
        yield from knapsack(bench, ACTIONS[part]).items()
    else:
        yield from joined(bench) if part == "joined" else corrections(bench, DESIGNS[case])


@click.command()
@click.option("--data-root", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Repeatable.  [default: all]")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(MODELS)), help="Repeatable.  [default: all]")
def main(data_root: Path, parts: tuple[str, ...], cases: tuple[str, ...]) -> None:
    """Run the parts and write the results."""
    where = sources(data_root)
    for case, (model, data) in MODELS.items():
        wanted = [part for part in parts or PARTS if case in PARTS[part] and (not cases or case in cases)]
        if not wanted:
            continue
        settings = Settings(model=where[model], data=where[data], drop="auto", cost="macs", samples=SAMPLES.get(case))
        bench = Bench(load(settings, Steps(None)), settings)
        for part in wanted:
            click.echo(f"{part}, {case}", err=True)
            result = {"samples": len(bench.subject.data.test), "metric": bench.subject.metric, "found": {}}
            result["environment"] = environment()
            for name, rows in measure(part, case, bench):
                result["found"][name] = rows
                found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                found.setdefault(part, {})[case] = result
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
