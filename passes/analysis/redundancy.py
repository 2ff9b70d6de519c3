"""How redundant each branch is: one streaming sweep over calibration data, memory independent of its length.

Formulas, with x the trunk before the norm and y = x + f(x), means over all unpadded tokens of all samples:

- cosine similarity, LLM-Drop (He et al., "What Matters in Transformers?", eq. 1): mean <x, y> / (|x| |y|);
- Block Influence, ShortGPT (Men et al. 2024, eq. 1): 1 - mean cosine between block input and block output;
- angular distance, Gromov et al. 2024 (eq. 7): arccos(<x, y> / (|x| |y|)) / pi, over n blocks, at the last unpadded
  token of each text, over all tokens otherwise;
- relative update norm: mean |f(x)| / |x|.

A text is what comes with an ``attention_mask``. A block ends with the complete sum of its last site, so where norms
follow the sums (BERT) its output is taken before the last of them. States are compared in float32, as LLM-Drop does,
and summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from passes.base import PassError, swept
from passes.execute.interpreter import Program
from passes.execute.sections import Room, cut, run_in_sections, section_ends
from passes.graph.sites import find_sites

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph, Site

MASK = "attention_mask"
MATRIX = 2  # axes


@dataclass(frozen=True)
class Moments:
    """Sums in float64: cosine similarity and relative update norm over `tokens`, angular distance over `ends`.

    `ends` are the last tokens of texts, and all tokens otherwise.
    """

    tokens: int = 0
    ends: int = 0
    cosine: float = 0.0
    angular: float = 0.0
    update: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        """Moments of the tokens of both."""
        return Moments(
            self.tokens + other.tokens,
            self.ends + other.ends,
            self.cosine + other.cosine,
            self.angular + other.angular,
            self.update + other.update,
        )

    def mean(self, name: str) -> float:
        """Mean of one of the sums; NaN before any token was seen."""
        count = self.ends if name == "angular" else self.tokens
        return float(getattr(self, name)) / count if count else math.nan


@dataclass(frozen=True)
class Scores:
    """Statistics of every site and block, and of every pair of trunk states.

    Scores of two parts of the data add up (``+``) to the scores of the whole. `states` are the trunk values in order
    (the input of each site, then the last output); `similarity` and `angular` are [states, states] float64 sums over
    `tokens` [states, states] and `ends`; pairs of different shape stay at zero tokens.
    """

    samples: int
    sites: Mapping[str, Moments]
    blocks: Mapping[str, Moments]
    states: tuple[str, ...]
    similarity: torch.Tensor = field(repr=False)
    tokens: torch.Tensor = field(repr=False)
    angular: torch.Tensor = field(repr=False)
    ends: torch.Tensor = field(repr=False)

    def __add__(self, other: Scores) -> Scores:
        """Scores of both parts of the data together.

        Raises:
            PassError: the two are of different graphs.
        """
        if self.states != other.states:
            raise PassError("scores of two different graphs cannot be added: their sites differ.")
        return Scores(
            self.samples + other.samples,
            {name: moments + other.sites[name] for name, moments in self.sites.items()},
            {name: moments + other.blocks[name] for name, moments in self.blocks.items()},
            self.states,
            self.similarity + other.similarity,
            self.tokens + other.tokens,
            self.angular + other.angular,
            self.ends + other.ends,
        )

    def cosine(self, name: str) -> float:
        """Mean cosine similarity of a site's or block's input and output; 1 means it changes no direction."""
        return (self.sites.get(name) or self.blocks[name]).mean("cosine")

    def influence(self, name: str) -> float:
        """Block Influence, 1 - cosine; low means redundant."""
        return 1.0 - self.cosine(name)

    def update(self, name: str) -> float:
        """Mean |f(x)| / |x|."""
        return (self.sites.get(name) or self.blocks[name]).mean("update")

    def similarity_matrix(self) -> torch.Tensor:
        """Mean cosine similarity of every pair of states, [states, states]; NaN where shapes differ."""
        return self.similarity / torch.where(self.tokens > 0, self.tokens, math.nan)

    def angular_matrix(self) -> torch.Tensor:
        """Mean angular distance in [0, 1] of every pair of states, [states, states]; NaN where shapes differ."""
        return self.angular / torch.where(self.ends > 0, self.ends, math.nan)


@dataclass
class _Seen:
    """What is known of one batch so far."""

    samples: int
    mask: torch.Tensor | None
    sites: dict[str, Moments] = field(default_factory=dict)
    blocks: dict[str, Moments] = field(default_factory=dict)
    scores: Scores | None = None


@dataclass(frozen=True)
class Score:
    """Measure `Scores` of all sites in one sweep over the data. Changes nothing.

    With `room` the graph is run in sections of whole blocks, for weights that stay on disk. Pairs of states are then
    compared where angular distance is taken alone, similarity too: all their tokens would not fit into memory.
    """

    room: Room | None = None

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Scores:
        """Run the graph once over `data` and add up the statistics of each batch.

        Raises:
            PassError: no data, no sites, or values that are not finite (with the first site that has them).
        """
        sites = find_sites(graph)
        if not sites:
            raise PassError("the graph has no residual site, so there is nothing to score.")
        sweep = _Sweep(graph, sites)
        if self.room is None:
            return swept(sweep.batch, data, "Score")
        parts = sweep.in_sections(data or (), self.room)
        if (first := next(parts, None)) is None:
            raise PassError("Score got no batches of data.")
        return sum(parts, start=first)


class _Sweep:
    def __init__(self, graph: Graph, sites: tuple[Site, ...]) -> None:
        self.sites = sites
        self.blocks = {name: list(members) for name, members in groupby(sites, key=lambda site: site.block)}
        self.states = tuple(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
        self.dims = {site.trunk: site.channel_dim for site in sites} | {site.root: site.channel_dim for site in sites}
        self.ends = {members[-1].root: name for name, members in self.blocks.items()}
        self.nodes = {node.name: node for node in graph.nodes()}
        branches = {site.branch for site in sites if site.add != site.root}
        self.program = Program(graph, keep={*self.states, *self.ends, *branches}, outputs=())
        self.place = {node.name: place for place, node in enumerate(self.program.order)}
        self.last_read = {
            source.name: place for place, node in enumerate(self.program.order) for source in node.all_input_nodes
        }
        self.at_root: dict[str, list[Site]] = {}
        for site in sites:
            self.at_root.setdefault(site.root, []).append(site)

    @torch.inference_mode()
    def batch(self, feeds: Mapping[str, torch.Tensor]) -> Scores:
        values = self.program.start(feeds)
        seen = _Seen(len(next(iter(feeds.values()))), feeds.get(MASK))
        for node in self.program.walk(values):
            self._see(node, values, seen)
        return self._scores(values, seen)

    @torch.inference_mode()
    def in_sections(self, data: Iterable[Mapping[str, torch.Tensor]], room: Room) -> Iterator[Scores]:
        """The scores of each batch, all of which go through one section before the next."""
        seen: list[_Seen] = []

        def noted() -> Iterator[Mapping[str, torch.Tensor]]:
            for feeds in data:
                seen.append(_Seen(len(next(iter(feeds.values()))), feeds.get(MASK)))
                yield feeds

        def see(number: int, node: fx.Node, values: dict[fx.Node, Any]) -> None:
            self._see(node, values, seen[number])
            if node.name in self.ends:
                self._let_go(node, values, seen[number])
            if node.name == self.sites[-1].root:
                seen[number].scores = self._scores(values, seen[number])

        sections = cut(self.program, section_ends(self.program.graph), room.weights)
        for number, _ in enumerate(run_in_sections(self.program, sections, noted(), room.folder, see)):
            scores = seen[number].scores
            assert scores is not None
            yield scores

    def _see(self, node: fx.Node, values: dict[fx.Node, Any], seen: _Seen) -> None:
        for site in self.at_root.get(node.name, ()):
            seen.sites[site.name] = self._site(site, values, seen.mask)
        if node.name in self.ends:
            name = self.ends[node.name]
            seen.blocks[name] = self._block(self.blocks[name], values, seen.mask)

    def _scores(self, values: dict[fx.Node, Any], seen: _Seen) -> Scores:
        return Scores(seen.samples, seen.sites, seen.blocks, self.states, *self._pairs(values, seen.mask))

    def _let_go(self, end: fx.Node, values: dict[fx.Node, Any], seen: _Seen) -> None:
        """Behind a block, keep of its states only what pairs are told by; the last one is still computed with."""
        for site in self.blocks[self.ends[end.name]]:
            values.pop(self.nodes[site.branch], None)
        for state in (name for name in self.states if self.last_read.get(name, -1) <= self.place[end.name]):
            value = values.get(self.nodes[state])
            if value is not None and value.ndim > MATRIX:
                values[self.nodes[state]] = _ends(value, self.dims[state], seen.mask)

    def _site(self, site: Site, values: dict[fx.Node, Any], mask: torch.Tensor | None) -> Moments:
        before, change = values[self.nodes[site.trunk]].float(), values[self.nodes[site.branch]].float()
        return _moments(before, before + change, site.channel_dim, mask, site.name)

    def _block(self, members: list[Site], values: dict[fx.Node, Any], mask: torch.Tensor | None) -> Moments:
        first, last = values[self.nodes[members[0].trunk]], values[self.nodes[members[-1].root]]
        if first.shape != last.shape:
            return Moments()
        return _moments(first.float(), last.float(), members[0].channel_dim, mask, members[0].block)

    def _pairs(self, values: dict[fx.Node, Any], mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Sums over tokens for each pair of states of one shape: cosines, their tokens, angles, their tokens."""
        count = len(self.states)
        sums, tokens, angles, ends = torch.zeros(4, count, count, dtype=torch.float64)
        for members in self._same_shape(values):
            where = torch.tensor(members)
            pair = where[:, None], where
            states = [self._state(values, index) for index in members]
            rows = [rows_of(value, dim, mask) for value, dim in states]
            sums[pair], angles[pair] = _pair_sums(rows)
            tokens[pair] = ends[pair] = float(len(rows[0]))
            if mask is not None:
                last = [_ends(value, dim, mask) for value, dim in states]
                angles[pair], ends[pair] = _pair_sums(last)[1], float(len(last[0]))
        return sums, tokens, angles, ends

    def _same_shape(self, values: dict[fx.Node, Any]) -> list[list[int]]:
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index in range(len(self.states)):
            value, dim = self._state(values, index)
            groups.setdefault((tuple(value.shape), dim), []).append(index)
        return list(groups.values())

    def _state(self, values: dict[fx.Node, Any], index: int) -> tuple[torch.Tensor, int]:
        """A state and the axis of its features: the last of rows, as which states in sections are kept."""
        value = values[self.nodes[self.states[index]]]
        return value, min(self.dims[self.states[index]], value.ndim - 1)


def rows_of(value: torch.Tensor, channel_dim: int, mask: torch.Tensor | None) -> torch.Tensor:
    """A state as float32 rows [tokens, width], padded tokens left out."""
    rows = value.movedim(channel_dim, -1).float()
    if mask is not None and rows.ndim == 3 and rows.shape[:2] == mask.shape:
        return rows[mask.bool()]
    return rows.reshape(-1, rows.shape[-1])


def _ends(value: torch.Tensor, channel_dim: int, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows at which angular distance is taken: the last unpadded token of each text, or all tokens."""
    rows = value.movedim(channel_dim, -1)
    if mask is None or rows.ndim != 3 or rows.shape[:2] != mask.shape:
        return rows_of(value, channel_dim, None)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.bool() * positions).argmax(1)  # on whichever side the padding is
    return rows[torch.arange(len(rows), device=mask.device), last].float()


def _moments(
    before: torch.Tensor, after: torch.Tensor, channel_dim: int, mask: torch.Tensor | None, name: str
) -> Moments:
    x, y = rows_of(before, channel_dim, mask), rows_of(after, channel_dim, mask)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).double()
    update = ((y - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)).double()
    if not torch.isfinite(cosine).all() or not torch.isfinite(update).all():
        raise PassError(
            f"site {name} computes values that are NaN or infinite on the calibration data; "
            "check the weights and the preprocessing."
        )
    at_ends = cosine
    if mask is not None:
        x, y = _ends(before, channel_dim, mask), _ends(after, channel_dim, mask)
        at_ends = torch.nn.functional.cosine_similarity(x, y, dim=-1).double()
    angular = torch.arccos(at_ends.clamp(-1.0, 1.0)) / math.pi
    return Moments(len(cosine), len(at_ends), float(cosine.sum()), float(angular.sum()), float(update.sum()))


def _pair_sums(states: list[torch.Tensor], chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over rows of the cosine and of arccos / pi for each pair of states, each given as rows [tokens, width]."""
    count = len(states)
    cosines, angles = torch.zeros(2, count, count, dtype=torch.float64, device=states[0].device)
    for start in range(0, len(states[0]), chunk):  # all states of all tokens side by side would double the memory
        rows = torch.stack([state[start : start + chunk] for state in states], dim=1)
        unit = torch.nn.functional.normalize(rows, dim=-1)
        products = unit @ unit.transpose(1, 2)
        cosines += products.sum(0, dtype=torch.float64)
        angles += torch.arccos(products.clamp_(-1.0, 1.0)).sum(0, dtype=torch.float64)
    return cosines, (angles / math.pi).fill_diagonal_(0.0)  # rounding would put a state 1e-4 away from itself
