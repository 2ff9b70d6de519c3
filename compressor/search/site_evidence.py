"""What a choice was based on, for the report: scores and effects of every site, similar states, tokens left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressor.data.splits import Split
from compressor.quality.evaluate import tensor_batches
from passes.analysis.redundancy import Score, Scores
from passes.base import PassError, apply
from passes.execute.interpreter import Program
from passes.graph.graph import Graph, Site
from passes.graph.sites import find_sites

SAMPLES = 32  # scored where nothing else asked for scores
AT_ONCE = 4  # of them: the trunk's states of all depths are held side by side


def evidence(sites: Sequence[Site], scores: Scores | None, effects: Mapping[str, float]) -> dict[str, Any]:
    """What is known of the sites, as plain JSON values; empty where nothing was measured.

    Args:
        sites: all sites, in order.
        scores: similarities, where they were measured.
        effects: output divergence when a site alone is dropped, by its name.
    """
    found: dict[str, Any] = {}
    if scores is not None:
        found["samples"] = scores.samples
        found["states"] = list(state_names(sites, scores))
        found["similarity"] = nested(scores.similarity_matrix().tolist())
    if scores is not None or effects:
        found["sites"] = {site.name: _row(site, scores, effects.get(site.name)) for site in sites}
    return found


def few_scores(graph: Graph, split: Split) -> Scores | None:
    """Scores on a few samples, for the report only: None where a state is not finite, which stops no export."""
    try:
        return apply(Score(), graph, tensor_batches(split.head(SAMPLES), AT_ONCE))
    except PassError:
        return None


def tokens_left(graph: Graph, sites: Sequence[Site], split: Split) -> dict[str, int]:
    """Tokens that enter each site of a rewritten graph, for one sample of `split`.

    Args:
        graph: the original's with branches dropped and tokens merged.
        sites: those of the original, in order. One that is gone passes on what the next one gets.
        split: samples.
    """
    left = {site.add: site for site in find_sites(graph)}
    if not left:
        return {}
    last = list(left.values())[-1]
    (root,) = [node for node in graph.nodes() if node.name == last.root]
    readers = {node.name for node in root.users}  # among them the merging behind it, if there is any
    program = Program(graph, keep={site.trunk for site in left.values()} | readers | {last.root})
    values = program.start(next(tensor_batches(split, split.samples.rows_per_sample)))
    with torch.inference_mode():
        for _ in program.walk(values):
            pass
    states = {node.name: value for node, value in values.items() if isinstance(value, torch.Tensor)}
    shape = states[last.root].shape
    after = [_tokens(states[name], last) for name in readers & set(states) if _alike(states[name].shape, shape, last)]
    behind = min([_tokens(states[last.root], last), *after])
    found: dict[str, int] = {}
    for site in reversed(sites):
        here = left.get(site.add)
        behind = behind if here is None else _tokens(states[here.trunk], here)
        found[site.name] = behind
    return {site.name: found[site.name] for site in sites}


def _alike(found: torch.Size, state: torch.Size, site: Site) -> bool:
    """Whether a value has the shape of a state but for the number of its tokens."""
    return len(found) == len(state) and found[0] == state[0] and found[site.channel_dim] == state[site.channel_dim]


def state_names(sites: Sequence[Site], scores: Scores) -> tuple[str, ...]:
    """A readable name per trunk state: the site it enters, then the output of the last."""
    entered: dict[str, str] = {}
    for site in sites:
        entered.setdefault(site.trunk, site.name)
    return tuple(entered.get(state, "output") for state in scores.states)


def nested(rows: list[list[float]]) -> list[list[float | None]]:
    """A matrix as JSON takes it: NaN (states of different shape) as None."""
    return [[_number(value) for value in row] for row in rows]


def _row(site: Site, scores: Scores | None, effect: float | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {"effect": None if effect is None else _number(effect)}
    if scores is not None:
        row |= {"cosine": _number(scores.cosine(site.name)), "update": _number(scores.update(site.name))}
    return row


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tokens(value: torch.Tensor, site: Site) -> int:
    """Positions of one sample's state."""
    return value[0].numel() // value.shape[site.channel_dim]
