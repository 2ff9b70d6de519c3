"""Closed-form refit of the linear maps that write to the trunk, and of the head, to the hidden states of the original.

The last linear map of each kept branch is changed by the ridge solution for the difference between the original's
hidden state after the branch and the present one. The ridge penalises the *change* of the weights, so an infinite
strength changes nothing. Behind merged tokens, hidden states have other rows than the original's; there the fit is made
on the graph before merging, with the weights as they are by then. Strengths are chosen on the merged graph alone. An
exact fit of hidden states does harm (see DESIGN.md 5), so the strength with the least
output divergence on held-out samples is used, and a map that no strength improves stays unchanged.
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
from compressor.heal.distill import NO_WEIGHT, Draft, NotStartedError
from compressor.models import Model
from compressor.quality.evaluate import tensor_batches
from compressor.quality.output_divergence import OutputDivergence
from passes.analysis.redundancy import MASK, rows_of, without_mask
from passes.execute.interpreter import PartialRun
from passes.graph.edit import replace_parameter, with_weights
from passes.graph.graph import Graph, Site, attribute, output_values
from passes.graph.sites import aten

STRENGTHS = (1e-4, 1e-2, 1e-1, 1.0, 10.0)  # ridge strengths, relative to the mean square of the map's inputs
LEAST_GAIN = 1e-3  # smallest relative decrease of the divergence for which a refit is accepted
DRAFTS = 4  # number of drafts that are evaluated


@dataclass(frozen=True)
class RefitTarget:
    """A linear map to refit: the names of its node and of the node whose value is compared with the original."""

    map: str
    behind: str
    channel_dim: int


def refit_closed_form(
    graph: Graph,
    original: Graph,
    model: Model,
    calibration: Split,
    *,
    sites: Sequence[Site],
    seconds: float,
    unmerged: Graph | None = None,
) -> Iterator[Draft]:
    """Refit the maps in order, each on top of the earlier ones, and yield up to `DRAFTS` drafts.

    Half of the calibration samples are used for the fit, the other half to choose strengths. Neither gradients nor
    labels are needed, and only sums over activations are kept. The refit stops after `seconds`.

    Args:
        graph: rewritten fork with its tokens merged; it is not modified.
        original: graph whose hidden states are the goal; it is not modified.
        model: model that both graphs were traced from.
        calibration: samples; their labels are not used.
        sites: sites of the original; those that the graph lacks are left out.
        seconds: wall time in seconds.
        unmerged: the rewritten fork before tokens are merged; None if none are.

    Raises:
        NotStartedError: no map can be refitted, or there is only one sample.
    """
    start, spots = time.perf_counter(), find_spots(graph, original, model, sites)
    if not spots:
        raise NotStartedError(NO_WEIGHT)
    if len(calibration) < 2:
        raise NotStartedError("found 1 calibration sample, expected at least 2; give more samples")
    fitting, choosing = (dataclasses.replace(calibration, indices=calibration.indices[part::2]) for part in (0, 1))
    effects = OutputDivergence(original, model, choosing)
    best, _ = effects.measure(graph, {})
    due = {len(spots) * number // DRAFTS for number in range(1, DRAFTS + 1)}
    for number, spot in enumerate(spots, start=1):
        fitted = graph if unmerged is None or comparable(graph, original, spot) else with_weights(unmerged, graph)
        forks = dict(enumerate(_variants(graph, fitted, original, fitting, spot)))
        if forks:
            _, divergences = effects.measure(graph, forks)
            least = min(divergences, key=divergences.__getitem__)
            if divergences[least] < best * (1 - LEAST_GAIN):
                graph, best = forks[least], divergences[least]
        late = time.perf_counter() - start > seconds * number / (number + 1)
        if number in due or late:
            yield Draft(graph, number, len(spots))
        if late:
            return


def find_spots(graph: Graph, original: Graph, model: Model, sites: Sequence[Site]) -> list[RefitTarget]:
    """Return the linear maps to refit, in order: those that end a site's branch, and the one that ends the model."""
    nodes, original_names = {node.name: node for node in graph.nodes()}, {node.name for node in original.nodes()}
    spots = [
        RefitTarget(site.branch, site.root, site.channel_dim)
        for site in sites
        if _is_map(graph, nodes.get(site.branch)) and site.root in nodes and site.root in original_names
    ]
    answer = output_values(graph)[model.outputs.index(model.answer)]
    if _is_map(graph, answer) and answer.name in original_names:
        spots.append(RefitTarget(answer.name, answer.name, answer.meta["val"].ndim - 1))
    return spots


def comparable(graph: Graph, original: Graph, spot: RefitTarget) -> bool:
    """Return whether a value has as many rows as in the original: no tokens are merged before it."""
    shapes = [
        [str(size) for size in node.meta["val"].shape[1:]]
        for each in (graph, original)
        for node in each.nodes()
        if node.name == spot.behind
    ]
    return shapes[0] == shapes[1]


def _is_map(graph: Graph, node: fx.Node | None) -> bool:
    """Return whether a node is a linear map whose weights have no other consumer."""
    if node is None or node.target != aten.linear.default:
        return False
    parameters = [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
    tensors = [attribute(graph, argument) for argument in parameters if argument.op == "get_attr"]
    all_tensors = [attribute(graph, other) for other in graph.nodes() if other.op == "get_attr"]
    unshared = all(sum(value is other for other in all_tensors) == 1 for value in tensors)
    return unshared and len(tensors) == len(parameters) and all(len(argument.users) == 1 for argument in parameters)


@dataclass(frozen=True)
class Moments:
    """Sums over rows of x x^T and e x^T: x is the input of a map (with a 1 for its bias), e the error after it."""

    xx: torch.Tensor
    ex: torch.Tensor

    def change(self, strength: float) -> torch.Tensor:
        """Return the D [out, in + 1] that minimises |e - D x|^2 + strength * mean square of x * |D|^2 over the rows."""
        ridge = strength * self.xx.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(self.xx), dtype=torch.float64)
        solution: torch.Tensor = torch.linalg.solve(self.xx + ridge * eye, self.ex.T)
        return solution.T


@torch.inference_mode()
def moments(graph: Graph, original: Graph, split: Split, spot: RefitTarget) -> Moments:
    """Compute the moments in float64, in one pass over the split that runs both graphs only up to the nodes needed."""
    node = next(node for node in graph.nodes() if node.name == spot.map)
    source, biased = node.all_input_nodes[0].name, len(node.args) > 2
    now, before = PartialRun(graph, {source, spot.behind}), PartialRun(original, {spot.behind})
    unmasked = without_mask(graph)
    xx: Any = 0
    ex: Any = 0
    for feeds in tensor_batches(split):
        present, goal = now.run(feeds), before.run(feeds)
        error = goal[spot.behind] - present[spot.behind]
        mask = feeds.get(MASK) if error.ndim > 2 and spot.behind not in unmasked else None
        x, e = (rows_of(value, spot.channel_dim, mask).double() for value in (present[source], error))
        x = torch.cat([x, torch.full((len(x), 1), float(biased), dtype=x.dtype)], dim=1)
        xx, ex = xx + x.T @ x, ex + e.T @ x
    return Moments(xx, ex)


def _variants(graph: Graph, fitted: Graph, original: Graph, split: Split, spot: RefitTarget) -> Iterator[Graph]:
    """Yield a fork with the map refitted at each strength, to the moments of `fitted`; none if the error is zero."""
    sums = moments(fitted, original, split, spot)
    if not bool(torch.isfinite(sums.ex).all()) or not bool(sums.ex.any()):
        return
    node = next(node for node in graph.nodes() if node.name == spot.map)
    weight, *bias = (argument for argument in node.args[1:] if isinstance(argument, fx.Node))
    for strength in STRENGTHS:
        change, fork = sums.change(strength), graph.fork()
        _add(fork, weight, change[:, :-1])
        for argument in bias:
            _add(fork, argument, change[:, -1])
        yield fork


def _add(fork: Graph, node: fx.Node, change: torch.Tensor) -> None:
    old = attribute(fork, node).detach()
    replace_parameter(fork, str(node.target), (old.double() + change).to(old.dtype))
