"""Evidence for the choice of a plan, for the report: scores and effects of sites, similarity of states, tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compressor.data.splits import Split
from compressor.limitations import Limitation
from compressor.quality.evaluate import tensor_batches
from passes.analysis.redundancy import Score, Scores
from passes.base import PassError, apply
from passes.execute.interpreter import Program
from passes.graph.graph import Graph, Site
from passes.graph.sites import find_sites

SAMPLES = 32  # samples scored for the report alone
AT_ONCE = 4  # batch size of the scoring, which keeps the trunk's states of all depths in memory


def evidence(sites: Sequence[Site], scores: Scores | None, effects: Mapping[str, float]) -> dict[str, Any]:
    """Return the measurements of the sites as plain JSON values; empty if nothing was measured.

    Args:
        sites: all sites, in order.
        scores: similarities; None if they were not measured.
        effects: output divergence of dropping one site alone, by its name.
    """
    content: dict[str, Any] = {}
    if scores is not None:
        content["samples"] = scores.samples
        content["states"] = list(state_names(sites, scores))
        content["similarity"] = nested(scores.similarity_matrix().tolist())
        if zeros := zeros_of(scores):
            content["zeros"] = zeros
    if scores is not None or effects:
        content["sites"] = {site.name: _row(site, scores, effects.get(site.name)) for site in sites}
    return content


def zeros_of(scores: Scores) -> dict[str, int]:
    """Return the number of tokens that the scores of each site leave out, for the sites that leave some out."""
    return {name: moments.zeros for name, moments in scores.sites.items() if moments.zeros}


def of_zeros(zeros: Mapping[str, int]) -> Iterator[Limitation]:
    """Yield a limitation if scores leave out tokens at which the trunk is zero; see `zeros_of`."""
    if zeros:
        name, most = max(zeros.items(), key=lambda pair: pair[1])
        others = f" and up to as many at {len(zeros) - 1} others" if len(zeros) > 1 else ""
        yield Limitation(
            "similarity of branches",
            f"{most:,} tokens at {name}{others} are left out of cosines, angles and updates, because the trunk is zero "
            "there and has no direction",
        )


def scores_for_report(graph: Graph, split: Split) -> Scores | None:
    """Return scores on `SAMPLES` samples, or None if a state is not finite; only the report uses them."""
    try:
        return apply(Score(), graph, tensor_batches(split.head(SAMPLES), AT_ONCE))
    except PassError:
        return None


def tokens_left(graph: Graph, sites: Sequence[Site], split: Split) -> dict[str, int]:
    """Return the number of tokens that enter each site of a rewritten graph, for one sample of `split`.

    Args:
        graph: the graph with branches dropped and tokens merged.
        sites: sites of the original, in order. A dropped site has the tokens of the next remaining one.
        split: samples.
    """
    remaining = {site.add: site for site in find_sites(graph)}
    if not remaining:
        return {}
    last = list(remaining.values())[-1]
    (root,) = [node for node in graph.nodes() if node.name == last.root]
    readers = {node.name for node in root.users}  # with tokens merged after the last site, these include the merging
    program = Program(graph, keep={site.trunk for site in remaining.values()} | readers | {last.root})
    values = program.start(next(tensor_batches(split.middle(1))))
    with torch.inference_mode():
        for _ in program.walk(values):
            pass
    states = {node.name: value for node, value in values.items() if isinstance(value, torch.Tensor)}
    shape = states[last.root].shape
    after = [_tokens(states[name], last) for name in readers & set(states) if _alike(states[name].shape, shape, last)]
    tokens = min([_tokens(states[last.root], last), *after])
    entering: dict[str, int] = {}
    for site in reversed(sites):
        kept = remaining.get(site.add)
        tokens = tokens if kept is None else _tokens(states[kept.trunk], kept)
        entering[site.name] = tokens
    return {site.name: entering[site.name] for site in sites}


def _alike(shape: torch.Size, state: torch.Size, site: Site) -> bool:
    """Return whether two shapes differ in the number of tokens at most."""
    return len(shape) == len(state) and shape[0] == state[0] and shape[site.channel_dim] == state[site.channel_dim]


def state_names(sites: Sequence[Site], scores: Scores) -> tuple[str, ...]:
    """Return a name for each trunk state: the site it enters, and ``output`` for the output of the last site."""
    entered: dict[str, str] = {}
    for site in sites:
        entered.setdefault(site.trunk, site.name)
    return tuple(entered.get(state, "output") for state in scores.states)


def nested(rows: list[list[float]]) -> list[list[float | None]]:
    """Return a matrix as JSON values; NaN, the similarity of states of different shapes, becomes None."""
    return [[_number(value) for value in row] for row in rows]


def _row(site: Site, scores: Scores | None, effect: float | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {"effect": None if effect is None else _number(effect)}
    if scores is not None:
        row |= {"cosine": _number(scores.cosine(site.name)), "update": _number(scores.update(site.name))}
    return row


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tokens(value: torch.Tensor, site: Site) -> int:
    """Return the number of tokens in the state of one sample."""
    return value[0].numel() // value.shape[site.channel_dim]
