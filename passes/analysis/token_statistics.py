"""Redundancy statistics by depth, token position and kind of token, from one streaming sweep over calibration data.

Let x be the trunk before a branch and y = x + f(x). The statistics of a token are the cosine <x, y> / (|x| |y|)
(LLM-Drop, He et al. 2024, eq. 1), the relative update |f(x)| / |x|, and |f(x)|. They are summed in float64 by site,
position and kind of token. Each sample also keeps its sum of cosines per site, so that rankings can be resampled.

The statistics of a trunk state are |x| by kind of token, and for each sample the largest |activation| and the median.
Their ratio detects massive activations (Sun et al. 2024, "Massive Activations in Large Language Models", section 2:
above 100 and above a thousand times the median).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from passes.analysis.redundancy import MASK, have_directions
from passes.analysis.token_axis import data_dependent_nodes, leading_constants
from passes.base import PassError, sum_over_batches
from passes.execute.interpreter import Program
from passes.graph.sites import find_sites

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph, Site


@dataclass(frozen=True)
class Kinds:
    """Names of the kinds of tokens.

    `leading` names the leading tokens one by one (class, registers). In texts, `first` names the first token that is
    not padding and `last` the last one, unless they are None. `rest` names all other tokens.
    """

    leading: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    rest: str = "token"

    @property
    def names(self) -> tuple[str, ...]:
        """Unique names of all kinds, leading tokens first."""
        return tuple(dict.fromkeys([*self.leading, *filter(None, (self.first, self.last)), self.rest]))

    def of(self, shape: tuple[int, int], mask: torch.Tensor | None, leading: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kind and position of each token, int64 [rows, tokens].

        The kind is an index into `names`, or -1 for padding. Positions start at the first token that is not padding.

        Args:
            shape: numbers of rows and tokens.
            mask: attention mask [rows, tokens], 0 at padding, or None.
            leading: number of leading tokens that this state has.
        """
        present = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        positions = (present.long().cumsum(1) - 1).clamp(min=0)
        kind = torch.full(shape, self.names.index(self.rest))
        for position, name in enumerate(self.leading[:leading]):
            kind[:, position] = self.names.index(name)
        if self.last is not None:
            kind[positions == present.sum(1, keepdim=True) - 1] = self.names.index(self.last)
        if self.first is not None:
            kind[positions == 0] = self.names.index(self.first)
        return torch.where(present, kind, -1), positions


@dataclass(frozen=True)
class Changes:
    """Float64 sums of the changes that a branch or block applies to tokens.

    `positions` [3, positions] holds token counts, cosines and relative updates. `kinds` [4, kinds] holds the same and
    |f(x)|. `samples` [2, samples] holds token counts and cosines of each sample.
    """

    positions: torch.Tensor
    kinds: torch.Tensor
    samples: torch.Tensor

    def __add__(self, other: Changes) -> Changes:
        """Return the sums over the samples of both."""
        longest = max(self.positions.shape[1], other.positions.shape[1])
        padded = [
            torch.nn.functional.pad(part.positions, (0, longest - part.positions.shape[1])) for part in (self, other)
        ]
        return Changes(padded[0] + padded[1], self.kinds + other.kinds, torch.cat([self.samples, other.samples], 1))


@dataclass(frozen=True)
class States:
    """Activation statistics of a trunk state.

    `kinds` [2, kinds] holds token counts and sums of |x|. `samples` [4, samples] holds the largest |activation| of each
    sample, the median, and the channel and the kind of token of the largest one.
    """

    kinds: torch.Tensor
    samples: torch.Tensor

    def __add__(self, other: States) -> States:
        """Return the sums over the samples of both."""
        return States(self.kinds + other.kinds, torch.cat([self.samples, other.samples], 1))


@dataclass(frozen=True)
class Statistics:
    """Statistics by name of site, block and trunk state (node name). Parts of the data are added with ``+``."""

    kinds: tuple[str, ...]
    sites: Mapping[str, Changes]
    blocks: Mapping[str, Changes]
    states: Mapping[str, States] = field(repr=False)

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both parts of the data."""
        return Statistics(
            self.kinds,
            {name: changes + other.sites[name] for name, changes in self.sites.items()},
            {name: changes + other.blocks[name] for name, changes in self.blocks.items()},
            {name: state + other.states[name] for name, state in self.states.items()},
        )


@dataclass(frozen=True)
class MeasureTokenStatistics:
    """Analysis pass that measures the `Statistics` of all sites in one sweep. It does not change the graph.

    Args:
        kinds: names of the kinds of tokens.
        rows_per_sample: rows of the batch that form one sample, 2 for pairs of texts.
    """

    kinds: Kinds = Kinds()
    rows_per_sample: int = 1

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Statistics:
        """Run the graph once over `data` and add up the statistics of each batch.

        Raises:
            PassError: there is no data or no site, or values are not finite; the message names the first such site.
        """
        sites = find_sites(graph)
        if not sites:
            raise PassError("the graph has no residual site, so there is nothing to study.")
        return sum_over_batches(_Sweep(graph, sites, self).batch, data, "MeasureTokenStatistics")


class _Sweep:
    def __init__(self, graph: Graph, sites: tuple[Site, ...], study: MeasureTokenStatistics) -> None:
        self.study, self.names = study, study.kinds.names
        self.blocks = {name: list(members) for name, members in groupby(sites, key=lambda site: site.block)}
        self.dims = {site.trunk: site.channel_dim for site in sites} | {site.root: site.channel_dim for site in sites}
        self.states = tuple(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
        nodes = {node.name: node for node in graph.nodes()}
        self.leading = _leading(graph, self.states, self.dims, nodes, len(study.kinds.leading))
        self.at_root: dict[str, list[Site]] = {}
        for site in sites:
            self.at_root.setdefault(site.root, []).append(site)
        self.at_end = {members[-1].root: members for members in self.blocks.values()}
        branches = {site.branch for site in sites if site.add != site.root}
        self.program = Program(graph, keep={members[0].trunk for members in self.blocks.values()} | branches)

    @property
    def nodes(self) -> Mapping[str, fx.Node]:
        """Return the nodes of the program by name; in another process, those that it has there."""
        return self.program.named

    @torch.inference_mode()
    def batch(self, feeds: Mapping[str, torch.Tensor]) -> Statistics:
        values, mask = self.program.start(feeds), feeds.get(MASK)
        sites: dict[str, Changes] = {}
        blocks: dict[str, Changes] = {}
        states: dict[str, States] = {}
        for name in set(self.states) & {node.name for node in values}:  # a trunk that is a graph input
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
        """Return a state as float32 [rows, tokens, width]; the tokens of a grid are in row-major order."""
        dim = self.dims[name] if like is None else like.channel_dim
        value: torch.Tensor = values[self.nodes[name]].float().movedim(dim, -1)
        return value.reshape(len(value), -1, value.shape[-1])

    def _token_kinds(
        self, trunk: str, shape: torch.Size, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return kind and position of each token of a state."""
        size = int(shape[0]), int(shape[1])
        fits = mask is not None and tuple(mask.shape) == size
        kinds = self.study.kinds if fits or mask is None else Kinds(rest=self.study.kinds.rest)
        kind, positions = kinds.of(size, mask if fits else None, self.leading[trunk])
        if kinds is not self.study.kinds:
            kind += self.names.index(kinds.rest)
        return kind, positions

    def _changes(
        self, x: torch.Tensor, y: torch.Tensor, change: torch.Tensor, site: Site, mask: torch.Tensor | None
    ) -> Changes:
        kind, positions = self._token_kinds(site.trunk, x.shape, mask)
        cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).double()
        size = change.norm(dim=-1)
        update = (size / x.norm(dim=-1).clamp(min=1e-12)).double()
        present = kind >= 0
        if not (torch.isfinite(cosine[present]).all() and torch.isfinite(update[present]).all()):
            raise PassError(f"site {site.name} computes values that are NaN or infinite on the calibration data.")
        present = present & have_directions(x, y)
        ones = torch.ones_like(cosine)
        by_position = _summed([ones, cosine, update], positions[present], present, int(positions.max()) + 1)
        by_kind = _summed([ones, cosine, update, size.double()], kind[present], present, len(self.names))
        rows = torch.stack([(value * present).sum(1) for value in (ones, cosine)])
        return Changes(by_position, by_kind, rows.reshape(2, -1, self.study.rows_per_sample).sum(2))

    def _state(self, name: str, values: Mapping[fx.Node, Any], mask: torch.Tensor | None) -> States:
        x = self._tokens(name, values)
        kind, _ = self._token_kinds(name, x.shape, mask)
        present = kind >= 0
        by_kind = _summed(
            [torch.ones_like(x[..., 0]).double(), x.norm(dim=-1).double()], kind[present], present, len(self.names)
        )
        step = self.study.rows_per_sample
        rows = [_largest(x[start : start + step], kind[start : start + step]) for start in range(0, len(x), step)]
        return States(by_kind, torch.tensor(rows, dtype=torch.float64).T)


def _summed(values: list[torch.Tensor], index: torch.Tensor, present: torch.Tensor, count: int) -> torch.Tensor:
    """Sum each value over the present tokens of each index; return float64 [values, count]."""
    total = torch.zeros(len(values), count, dtype=torch.float64)
    return total.index_add_(1, index, torch.stack([value[present] for value in values]))


def _largest(x: torch.Tensor, kind: torch.Tensor) -> tuple[float, float, float, float]:
    """Return the largest |activation| and the median of one sample, and channel and kind of token of the largest."""
    present = kind >= 0
    sizes = x[present].abs()
    if not len(sizes):
        return math.nan, math.nan, -1.0, -1.0
    index = int(sizes.argmax())
    token, channel = divmod(index, sizes.shape[1])
    return float(sizes.flatten()[index]), float(sizes.median()), float(channel), float(kind[present][token])


def _leading(
    graph: Graph, states: Iterable[str], dims: Mapping[str, int], nodes: Mapping[str, fx.Node], limit: int
) -> dict[str, int]:
    """Return the number of leading tokens of each state, at most `limit`.

    Consecutive states of the same length share one count. A class token that is concatenated late (CaiT) changes the
    length, so the leading tokens are counted again there.
    """
    data, counts = data_dependent_nodes(graph.nodes()), {}
    length: object = None
    count = 0
    for name in states:
        shape = nodes[name].meta["val"].shape
        if len(shape) != 3 or dims[name] % 3 != 2:
            counts[name] = 0
            continue
        if shape[1] is not length and str(shape[1]) != str(length):
            length, count = shape[1], leading_constants(nodes[name], 1, data)
        counts[name] = min(count, limit)
    return counts
