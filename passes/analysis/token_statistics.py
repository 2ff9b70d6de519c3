"""Where along depth, positions and kinds of tokens a model is redundant: one streaming sweep over calibration data.

With x the trunk before a branch and y = x + f(x), for each token: cosine <x, y> / (|x| |y|) (as LLM-Drop, He et al.
2024, eq. 1), relative update |f(x)| / |x|, and |f(x)|. They are added up in float64 by site, position and kind of
token; of each sample only one cosine a site is kept, so that rankings can be drawn anew. Of each trunk state: |x| by
kind, and for each sample the largest |activation| and the median, whose ratio tells massive activations (Sun et al.
2024, "Massive Activations in Large Language Models", section 2: above 100 and a thousand times the median).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from passes.analysis.redundancy import MASK
from passes.analysis.token_axis import from_data, leading_constants
from passes.base import PassError, swept
from passes.execute.interpreter import Program
from passes.graph.sites import find_sites

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph, Site


@dataclass(frozen=True)
class Kinds:
    """How tokens are called.

    `leading` names those that stand in front of all others, one by one (class, registers). In texts the first token
    that is no padding is called `first`, the last one `last`, where these are given. All others are `rest`.
    """

    leading: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    rest: str = "token"

    @property
    def names(self) -> tuple[str, ...]:
        """Every kind once, those in front first."""
        return tuple(dict.fromkeys([*self.leading, *filter(None, (self.first, self.last)), self.rest]))

    def of(self, shape: tuple[int, int], mask: torch.Tensor | None, leading: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Kind (an index of `names`, -1 for padding) and position of each token, int64 [rows, tokens].

        Args:
            shape: rows and tokens.
            mask: [rows, tokens], 0 at padding; None where there is none. Positions begin at the first token.
            leading: how many of the leading tokens this state has.
        """
        present = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        place = (present.long().cumsum(1) - 1).clamp(min=0)
        kind = torch.full(shape, self.names.index(self.rest))
        for position, name in enumerate(self.leading[:leading]):
            kind[:, position] = self.names.index(name)
        if self.last is not None:
            kind[place == present.sum(1, keepdim=True) - 1] = self.names.index(self.last)
        if self.first is not None:
            kind[place == 0] = self.names.index(self.first)
        return torch.where(present, kind, -1), place


@dataclass(frozen=True)
class Changes:
    """What branches or blocks do to tokens: float64 sums.

    `positions` [3, positions] are tokens, cosines and relative updates; `kinds` [4, kinds] the same and |f(x)|;
    `samples` [2, samples] tokens and cosines of each sample.
    """

    positions: torch.Tensor
    kinds: torch.Tensor
    samples: torch.Tensor

    def __add__(self, other: Changes) -> Changes:
        """Sums over the samples of both."""
        longest = max(self.positions.shape[1], other.positions.shape[1])
        padded = [
            torch.nn.functional.pad(each.positions, (0, longest - each.positions.shape[1])) for each in (self, other)
        ]
        return Changes(padded[0] + padded[1], self.kinds + other.kinds, torch.cat([self.samples, other.samples], 1))


@dataclass(frozen=True)
class States:
    """What a trunk state holds: `kinds` [2, kinds] are tokens and sums of |x|.

    `samples` [4, samples] are the largest |activation| of each sample, the median, and the channel and kind of token
    that the largest one belongs to.
    """

    kinds: torch.Tensor
    samples: torch.Tensor

    def __add__(self, other: States) -> States:
        """Sums over the samples of both."""
        return States(self.kinds + other.kinds, torch.cat([self.samples, other.samples], 1))


@dataclass(frozen=True)
class Statistics:
    """Everything by name: sites, blocks, and trunk states (by the node that holds them). Parts of the data add up."""

    kinds: tuple[str, ...]
    sites: Mapping[str, Changes]
    blocks: Mapping[str, Changes]
    states: Mapping[str, States] = field(repr=False)

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both parts of the data together."""
        return Statistics(
            self.kinds,
            {name: each + other.sites[name] for name, each in self.sites.items()},
            {name: each + other.blocks[name] for name, each in self.blocks.items()},
            {name: each + other.states[name] for name, each in self.states.items()},
        )


@dataclass(frozen=True)
class Study:
    """Measure `Statistics` of all sites in one sweep over the data. Changes nothing.

    Args:
        kinds: how tokens are called.
        rows_per_sample: 2 where a sample is a pair of texts.
    """

    kinds: Kinds = Kinds()
    rows_per_sample: int = 1

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Statistics:
        """Run the graph once over `data` and add up the statistics of each batch.

        Raises:
            PassError: no data, no sites, or values that are not finite (with the first site that has them).
        """
        sites = find_sites(graph)
        if not sites:
            raise PassError("the graph has no residual site, so there is nothing to study.")
        return swept(_Sweep(graph, sites, self).batch, data, "Study")


class _Sweep:
    def __init__(self, graph: Graph, sites: tuple[Site, ...], study: Study) -> None:
        self.study, self.names = study, study.kinds.names
        self.blocks = {name: list(members) for name, members in groupby(sites, key=lambda site: site.block)}
        self.dims = {site.trunk: site.channel_dim for site in sites} | {site.root: site.channel_dim for site in sites}
        self.states = tuple(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
        self.nodes = {node.name: node for node in graph.nodes()}
        self.leading = _leading(graph, self.states, self.dims, self.nodes, len(study.kinds.leading))
        self.at_root: dict[str, list[Site]] = {}
        for site in sites:
            self.at_root.setdefault(site.root, []).append(site)
        self.at_end = {members[-1].root: members for members in self.blocks.values()}
        branches = {site.branch for site in sites if site.add != site.root}
        self.program = Program(graph, keep={members[0].trunk for members in self.blocks.values()} | branches)

    @torch.inference_mode()
    def batch(self, feeds: Mapping[str, torch.Tensor]) -> Statistics:
        values, mask = self.program.start(feeds), feeds.get(MASK)
        sites: dict[str, Changes] = {}
        blocks: dict[str, Changes] = {}
        states: dict[str, States] = {}
        for name in set(self.states) & {node.name for node in values}:  # a trunk that is an input itself
            states[name] = self._state(name, values, mask)
        for node in self.program.walk(values):
            if node.name in self.states and node.name not in states:
                states[node.name] = self._state(node.name, values, mask)
            for site in self.at_root.get(node.name, ()):
                x, change = self._tokens(site.trunk, values), self._tokens(site.branch, values, like=site)
                sites[site.name] = self._changes(x, x + change, change, site, mask)
            if node.name in self.at_end:
                first, last = self.at_end[node.name][0], self.at_end[node.name][-1]
                x, y = self._tokens(first.trunk, values), self._tokens(last.root, values)
                if x.shape == y.shape:
                    blocks[first.block] = self._changes(x, y, y - x, first, mask)
        order = {name: states[name] for name in self.states}
        return Statistics(self.names, sites, blocks, order)

    def _tokens(self, name: str, values: Mapping[fx.Node, Any], like: Site | None = None) -> torch.Tensor:
        """A state as float32 [rows, tokens, width]; a grid's tokens are in reading order."""
        dim = self.dims[name] if like is None else like.channel_dim
        value: torch.Tensor = values[self.nodes[name]].float().movedim(dim, -1)
        return value.reshape(len(value), -1, value.shape[-1])

    def _named(self, trunk: str, shape: torch.Size, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Kind and position of each token of a state."""
        size = int(shape[0]), int(shape[1])
        fits = mask is not None and tuple(mask.shape) == size
        kinds = self.study.kinds if fits or mask is None else Kinds(rest=self.study.kinds.rest)
        kind, place = kinds.of(size, mask if fits else None, self.leading[trunk])
        if kinds is not self.study.kinds:
            kind += self.names.index(kinds.rest)
        return kind, place

    def _changes(
        self, x: torch.Tensor, y: torch.Tensor, change: torch.Tensor, site: Site, mask: torch.Tensor | None
    ) -> Changes:
        kind, place = self._named(site.trunk, x.shape, mask)
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).double()
        size = change.norm(dim=-1)
        update = (size / x.norm(dim=-1).clamp(min=1e-12)).double()
        there = kind >= 0
        if not (torch.isfinite(cosine[there]).all() and torch.isfinite(update[there]).all()):
            raise PassError(f"site {site.name} computes values that are NaN or infinite on the calibration data.")
        ones = torch.ones_like(cosine)
        by_place = _summed([ones, cosine, update], place[there], there, int(place.max()) + 1)
        by_kind = _summed([ones, cosine, update, size.double()], kind[there], there, len(self.names))
        rows = torch.stack([(each * there).sum(1) for each in (ones, cosine)])
        return Changes(by_place, by_kind, rows.reshape(2, -1, self.study.rows_per_sample).sum(2))

    def _state(self, name: str, values: Mapping[fx.Node, Any], mask: torch.Tensor | None) -> States:
        x = self._tokens(name, values)
        kind, _ = self._named(name, x.shape, mask)
        there = kind >= 0
        by_kind = _summed(
            [torch.ones_like(x[..., 0]).double(), x.norm(dim=-1).double()], kind[there], there, len(self.names)
        )
        per = self.study.rows_per_sample
        rows = [_largest(x[at : at + per], kind[at : at + per]) for at in range(0, len(x), per)]
        return States(by_kind, torch.tensor(rows, dtype=torch.float64).T)


def _summed(values: list[torch.Tensor], index: torch.Tensor, there: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of each value over the tokens of each index, float64 [values, count]."""
    total = torch.zeros(len(values), count, dtype=torch.float64)
    return total.index_add_(1, index, torch.stack([value[there] for value in values]))


def _largest(x: torch.Tensor, kind: torch.Tensor) -> tuple[float, float, float, float]:
    """Of one sample: the largest |activation|, the median, and channel and kind of the token of the largest."""
    there = kind >= 0
    sizes = x[there].abs()
    if not len(sizes):
        return math.nan, math.nan, -1.0, -1.0
    place = int(sizes.argmax())
    token, channel = divmod(place, sizes.shape[1])
    return float(sizes.flatten()[place]), float(sizes.median()), float(channel), float(kind[there][token])


def _leading(
    graph: Graph, states: Iterable[str], dims: Mapping[str, int], nodes: Mapping[str, fx.Node], most: int
) -> dict[str, int]:
    """How many leading tokens each state has: as many as at the trunk's beginning, as long as its length is the same.

    Class tokens that join late (CaiT) change the length, so what is in front is read again there.
    """
    data, found = from_data(graph.nodes()), {}
    length: object = None
    count = 0
    for name in states:
        shape = nodes[name].meta["val"].shape
        if len(shape) != 3 or dims[name] % 3 != 2:
            found[name] = 0
            continue
        if shape[1] is not length and str(shape[1]) != str(length):
            length, count = shape[1], leading_constants(nodes[name], 1, data)
        found[name] = min(count, most)
    return found
