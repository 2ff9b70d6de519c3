"""Refit what still writes to the trunk, and the head, in closed form: pulled to what the original had there.

Each kept branch's last linear map gets the ridge solution for what the original's state behind it and the present one
differ by, the ridge on the *difference* to the weights there are: an infinite strength changes nothing. An exact fit of
hidden states is known to do harm (see DESIGN.md 5), so the strength is the one with the least divergence of the output
on samples that were not fitted, and a map that no strength improves stays as it is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compressor.data.splits import Split
from compressor.heal.distill import Draft
from compressor.models import Model
from compressor.quality.evaluate import tensor_batches
from compressor.quality.output_divergence import Effects
from passes.analysis.redundancy import MASK, rows_of
from passes.execute.interpreter import Until
from passes.graph.edit import own
from passes.graph.graph import Graph, Site, attribute, output_values
from passes.graph.sites import aten

STRENGTHS = (1e-4, 1e-2, 1e-1, 1.0, 10.0)  # times the mean square of the map's inputs
LEAST_GAIN = 1e-3  # share of the divergence by which a refit must lower it
DRAFTS = 4  # how often the graph is handed out to be judged


@dataclass(frozen=True)
class Spot:
    """A linear map that may be refitted: its node, and where its effect is compared with the original, by name."""

    map: str
    behind: str
    channel_dim: int


def refitted(
    graph: Graph,
    original: Graph,
    model: Model,
    calibration: Split,
    *,
    sites: Sequence[Site],
    seconds: float,
) -> Iterator[Draft]:
    """Refit one map after the other, in order, each given those before it; hand the graph out now and then.

    Half of the calibration samples are fitted, on the other half strengths are chosen. No gradients, no labels; of the
    activations only sums are kept. Stops when the time is over.

    Args:
        graph: the rewritten fork; it stays as it is.
        original: what its states are compared with; it stays as it is.
        model: what both were traced from.
        calibration: samples; their labels are not read.
        sites: sites of the original that the graph still has.
        seconds: wall time.
    """
    start, spots = time.perf_counter(), find_spots(graph, original, model, sites)
    if not spots or len(calibration) < 2:
        return
    fitting, choosing = (dataclasses.replace(calibration, indices=calibration.indices[part::2]) for part in (0, 1))
    effects = Effects(original, model, choosing)
    best, _ = effects.measure(graph, {})
    due = {len(spots) * number // DRAFTS for number in range(1, DRAFTS + 1)}
    for number, spot in enumerate(spots, start=1):
        forks = dict(enumerate(_variants(graph, original, fitting, spot)))
        if forks:
            _, found = effects.measure(graph, forks)
            least = min(found, key=found.__getitem__)
            if found[least] < best * (1 - LEAST_GAIN):
                graph, best = forks[least], found[least]
        late = time.perf_counter() - start > seconds * number / (number + 1)
        if number in due or late:
            yield Draft(graph, number, len(spots))
        if late:
            return


def find_spots(graph: Graph, original: Graph, model: Model, sites: Sequence[Site]) -> list[Spot]:
    """The last linear map of each of these branches, in order, and that of the answer; only where it ends in one."""
    nodes, goals = {node.name: node for node in graph.nodes()}, {node.name for node in original.nodes()}
    spots = [
        Spot(site.branch, site.root, site.channel_dim)
        for site in sites
        if _is_map(graph, nodes.get(site.branch)) and site.root in nodes and site.root in goals
    ]
    answer = output_values(graph)[model.outputs.index(model.answer)]
    if _is_map(graph, answer) and answer.name in goals:
        spots.append(Spot(answer.name, answer.name, answer.meta["val"].ndim - 1))
    return spots


def _is_map(graph: Graph, node: fx.Node | None) -> bool:
    """Whether a node is a linear map whose weights nobody else reads."""
    if node is None or node.target != aten.linear.default:
        return False
    read = [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
    held = [attribute(graph, argument) for argument in read if argument.op == "get_attr"]
    everything = [attribute(graph, other) for other in graph.nodes() if other.op == "get_attr"]
    alone = all(sum(value is other for other in everything) == 1 for value in held)
    return alone and len(held) == len(read) and all(len(argument.users) == 1 for argument in read)


@dataclass(frozen=True)
class Moments:
    """Sums over rows of a map's inputs x (with a 1 at the end for its bias) and of what is amiss behind it, e."""

    xx: torch.Tensor
    ex: torch.Tensor

    def change(self, strength: float) -> torch.Tensor:
        """The D [out, in + 1] that minimises |e - D x|^2 + strength * mean square of x * |D|^2 over these rows."""
        ridge = strength * self.xx.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(self.xx), dtype=torch.float64)
        solution: torch.Tensor = torch.linalg.solve(self.xx + ridge * eye, self.ex.T)
        return solution.T


@torch.inference_mode()
def moments(graph: Graph, original: Graph, split: Split, spot: Spot) -> Moments:
    """One sweep of both graphs, each only as far as needed; float64."""
    node = next(node for node in graph.nodes() if node.name == spot.map)
    source, biased = node.all_input_nodes[0].name, len(node.args) > 2
    now, before = Until(graph, {source, spot.behind}), Until(original, {spot.behind})
    xx: Any = 0
    ex: Any = 0
    for feeds in tensor_batches(split):
        present, goal = now.run(feeds), before.run(feeds)
        amiss = goal[spot.behind] - present[spot.behind]
        mask = feeds.get(MASK) if amiss.ndim > 2 else None
        x, e = (rows_of(value, spot.channel_dim, mask).double() for value in (present[source], amiss))
        x = torch.cat([x, torch.full((len(x), 1), float(biased), dtype=x.dtype)], dim=1)
        xx, ex = xx + x.T @ x, ex + e.T @ x
    return Moments(xx, ex)


def _variants(graph: Graph, original: Graph, split: Split, spot: Spot) -> Iterator[Graph]:
    """Forks with the map refitted at each strength; none where nothing is amiss behind it."""
    found = moments(graph, original, split, spot)
    if not bool(torch.isfinite(found.ex).all()) or not bool(found.ex.any()):
        return
    node = next(node for node in graph.nodes() if node.name == spot.map)
    weight, *bias = (argument for argument in node.args[1:] if isinstance(argument, fx.Node))
    for strength in STRENGTHS:
        change, fork = found.change(strength), graph.fork()
        _add(fork, weight, change[:, :-1])
        for offset in bias:
            _add(fork, offset, change[:, -1])
        yield fork


def _add(fork: Graph, node: fx.Node, change: torch.Tensor) -> None:
    old = attribute(fork, node).detach()
    own(fork, str(node.target), (old.double() + change).to(old.dtype))
