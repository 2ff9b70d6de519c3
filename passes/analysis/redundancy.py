"""Redundancy scores of residual branches, measured in one streaming sweep over the calibration data.

Memory does not grow with the amount of data. With x the trunk before the norm and y = x + f(x), the scores are means
over all unpadded tokens of all samples:

- cosine similarity, LLM-Drop (He et al., "What Matters in Transformers?", eq. 1): mean <x, y> / (|x| |y|);
- Block Influence, ShortGPT (Men et al. 2024, eq. 1): 1 - mean cosine between block input and block output;
- angular distance, Gromov et al. 2024 (eq. 7): arccos(<x, y> / (|x| |y|)) / pi, over n blocks, at the last unpadded
  token of each text, or over all tokens of other inputs;
- relative update norm: mean |f(x)| / |x|.

A sample with an ``attention_mask`` counts as text. A block ends with the complete sum of its last site, so the output
of a post-norm block (BERT) is taken before its last norm. States are compared in float32, as LLM-Drop does, and summed
in float64. A token whose x or y is zero has no direction, so no cosine, angle or relative update; it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from passes.base import PassError, over_groups, sum_over_batches
from passes.execute.interpreter import Program
from passes.execute.sections import SectionBudget, partition, run_in_sections
from passes.graph.graph import dependents_of
from passes.graph.sites import find_sites

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph, Site

MASK = "attention_mask"
TARGETS = ("decoder_input_ids",)  # inputs of a decoder beside an encoder, whose tokens `MASK` does not describe
IMAGES, TOKENS = ("pixel_values",), ("input_ids",)
MATRIX = 2  # number of axes of a matrix


@dataclass(frozen=True)
class Moments:
    """Float64 sums: cosine similarity and relative update norm over `tokens`, angular distance over `ends`.

    `tokens` and `ends` are counts. `ends` counts the last tokens of texts, or all tokens of other inputs. `zeros`
    counts the tokens that are left out, because a state is zero there.
    """

    tokens: int = 0
    ends: int = 0
    cosine: float = 0.0
    angular: float = 0.0
    update: float = 0.0
    zeros: int = 0

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the tokens of both."""
        return Moments(
            self.tokens + other.tokens,
            self.ends + other.ends,
            self.cosine + other.cosine,
            self.angular + other.angular,
            self.update + other.update,
            self.zeros + other.zeros,
        )

    def mean(self, name: str) -> float:
        """Return the mean of one of the sums; NaN if there is no token."""
        count = self.ends if name == "angular" else self.tokens
        return float(getattr(self, name)) / count if count else math.nan


@dataclass(frozen=True)
class Scores:
    """Redundancy statistics of every site, every block and every pair of trunk states.

    Scores of two parts of the data are added with ``+``. `states` names the trunk values in order: the input of each
    site, then the last output. `similarity` and `angular` are float64 sums [states, states] over the counts `tokens`
    and `ends` [states, states]. Pairs of states of different shape keep a count of zero.
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
        """Return the scores of both parts of the data.

        Raises:
            PassError: the scores are of graphs with different trunk states.
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
        """Return the mean cosine similarity of input and output of a site or block; 1 means unchanged direction."""
        return (self.sites.get(name) or self.blocks[name]).mean("cosine")

    def influence(self, name: str) -> float:
        """Return the Block Influence, 1 - cosine; a low value means redundant."""
        return 1.0 - self.cosine(name)

    def update(self, name: str) -> float:
        """Return the relative update norm, mean |f(x)| / |x|."""
        return (self.sites.get(name) or self.blocks[name]).mean("update")

    def similarity_matrix(self) -> torch.Tensor:
        """Return the mean cosine similarity of every pair of states, [states, states]; NaN where shapes differ."""
        return self.similarity / torch.where(self.tokens > 0, self.tokens, math.nan)

    def similarity_of_all_tokens(self) -> torch.Tensor:
        """Return `similarity_matrix`.

        Raises:
            PassError: the states were compared at the last tokens alone, as `Score` does with `room`.
        """
        compared, all_tokens = float(self.tokens.max()), max(moments.tokens for moments in self.sites.values())
        if compared < all_tokens:
            raise PassError(
                f"the states of all blocks were compared at {compared:.0f} of {all_tokens} tokens, because they do not "
                "fit into memory at once; choose the metric angular, which reads these tokens, or leave --max-memory "
                "out."
            )
        return self.similarity_matrix()

    def angular_matrix(self) -> torch.Tensor:
        """Return the mean angular distance in [0, 1] of every pair of states; NaN where shapes differ."""
        return self.angular / torch.where(self.ends > 0, self.ends, math.nan)


@dataclass
class _BatchRecord:
    """Statistics of one batch while it is executed."""

    samples: int
    mask: torch.Tensor | None
    sites: dict[str, Moments] = field(default_factory=dict)
    blocks: dict[str, Moments] = field(default_factory=dict)
    scores: Scores | None = None


@dataclass(frozen=True)
class Score:
    """Analysis pass that measures the `Scores` of all sites in one sweep. It does not change the graph.

    With `room` the graph is executed in sections of whole blocks, for weights that stay on disk. Pairs of states are
    then compared only at the tokens of the angular distance, because all tokens of all states do not fit into memory.
    """

    room: SectionBudget | None = None

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Scores:
        """Run the graph once over `data` and add up the statistics of each batch.

        Raises:
            PassError: there is no data or no site, or values are not finite, or a state is zero at all tokens; the
                message names the first such site.
        """
        sites = find_sites(graph)
        if not sites:
            raise PassError("the graph has no residual site, so there is nothing to score.")
        sweep = _Sweep(graph, sites)
        if self.room is None:
            return _compared(sum_over_batches(sweep.batch, data, "Score"))
        parts = iter(over_groups(partial(sweep.in_sections, room=self.room), data))
        if (first := next(parts, None)) is None:
            raise PassError("Score got no batches of data.")
        return _compared(sum(parts, start=first))


def _compared(scores: Scores) -> Scores:
    """Return the scores; raise if a site has none, because its trunk is zero."""
    absent = next((name for name, moments in scores.sites.items() if moments.zeros and not moments.tokens), None)
    if absent is not None:
        raise PassError(
            f"the trunk before or after {absent} is zero at every token of the calibration data, so it has no cosine; "
            "check the weights and the data, or name branches with --drop."
        )
    return scores


class _Sweep:
    def __init__(self, graph: Graph, sites: tuple[Site, ...]) -> None:
        self.sites = sites
        self.blocks = {name: list(members) for name, members in groupby(sites, key=lambda site: site.block)}
        self.states = tuple(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
        self.dims = {site.trunk: site.channel_dim for site in sites} | {site.root: site.channel_dim for site in sites}
        self.ends = {members[-1].root: name for name, members in self.blocks.items()}
        self.unmasked = without_mask(graph)
        branches = {site.branch for site in sites if site.add != site.root}
        self.program = Program(graph, keep={*self.states, *self.ends, *branches}, outputs=())
        self.position = {node.name: position for position, node in enumerate(self.program.order)}
        self.last_read = {
            source.name: position for position, node in enumerate(self.program.order) for source in node.all_input_nodes
        }
        self.at_root: dict[str, list[Site]] = {}
        for site in sites:
            self.at_root.setdefault(site.root, []).append(site)

    @property
    def nodes(self) -> Mapping[str, fx.Node]:
        """Return the nodes of the program by name."""
        return self.program.named

    @torch.inference_mode()
    def batch(self, feeds: Mapping[str, torch.Tensor]) -> Scores:
        values = self.program.start(feeds)
        record = _BatchRecord(len(next(iter(feeds.values()))), feeds.get(MASK))
        for node in self.program.walk(values):
            self._observe(node, values, record)
        return self._scores(values, record)

    @torch.inference_mode()
    def in_sections(self, data: Iterable[Mapping[str, torch.Tensor]], room: SectionBudget) -> Iterator[Scores]:
        """Yield the scores of each batch; all batches pass through a section before the next section runs."""
        records: list[_BatchRecord] = []

        def recorded_feeds() -> Iterator[Mapping[str, torch.Tensor]]:
            for feeds in data:
                records.append(_BatchRecord(len(next(iter(feeds.values()))), feeds.get(MASK)))
                yield feeds

        def observe(number: int, node: fx.Node, values: dict[fx.Node, Any]) -> None:
            self._observe(node, values, records[number])
            if node.name in self.ends:
                self._release(node, values, records[number])
            if node.name == self.sites[-1].root:
                records[number].scores = self._scores(values, records[number])

        sections = partition(self.program, {self.states[0], *self.ends}, room.weights)
        with room.own_folder() as folder:
            for number, _ in enumerate(run_in_sections(self.program, sections, recorded_feeds(), folder, observe)):
                scores = records[number].scores
                assert scores is not None
                yield scores

    def _observe(self, node: fx.Node, values: dict[fx.Node, Any], record: _BatchRecord) -> None:
        for site in self.at_root.get(node.name, ()):
            record.sites[site.name] = self._site(site, values, self._mask(site.root, record))
        if node.name in self.ends:
            name = self.ends[node.name]
            record.blocks[name] = self._block(self.blocks[name], values, self._mask(node.name, record))

    def _scores(self, values: dict[fx.Node, Any], record: _BatchRecord) -> Scores:
        return Scores(record.samples, record.sites, record.blocks, self.states, *self._pairs(values, record))

    def _mask(self, name: str, record: _BatchRecord) -> torch.Tensor | None:
        """Return the padding mask of a state; None for tokens that it does not describe."""
        return None if name in self.unmasked else record.mask

    def _release(self, end: fx.Node, values: dict[fx.Node, Any], record: _BatchRecord) -> None:
        """Reduce the states of a finished block to the rows of the angular distance, unless they are still read."""
        for site in self.blocks[self.ends[end.name]]:
            values.pop(self.nodes[site.branch], None)
        for state in (name for name in self.states if self.last_read.get(name, -1) <= self.position[end.name]):
            value = values.get(self.nodes[state])
            if value is not None and value.ndim > MATRIX:
                values[self.nodes[state]] = _end_rows(value, self.dims[state], self._mask(state, record))

    def _site(self, site: Site, values: dict[fx.Node, Any], mask: torch.Tensor | None) -> Moments:
        before, change = values[self.nodes[site.trunk]].float(), values[self.nodes[site.branch]].float()
        return _moments(before, before + change, site.channel_dim, mask, site.name)

    def _block(self, members: list[Site], values: dict[fx.Node, Any], mask: torch.Tensor | None) -> Moments:
        first, last = values[self.nodes[members[0].trunk]], values[self.nodes[members[-1].root]]
        if first.shape != last.shape:
            return Moments()
        return _moments(first.float(), last.float(), members[0].channel_dim, mask, members[0].block)

    def _pairs(self, values: dict[fx.Node, Any], record: _BatchRecord) -> tuple[torch.Tensor, ...]:
        """Return sums for each pair of states of one shape: cosines, their token count, angles, their token count."""
        count = len(self.states)
        sums, tokens, angles, ends = torch.zeros(4, count, count, dtype=torch.float64)
        for members in self._same_shape(values):
            indices = torch.tensor(members)
            pair = indices[:, None], indices
            states = [self._state(values, index) for index in members]
            mask = self._mask(self.states[members[0]], record)
            rows = [rows_of(value, dim, mask) for value, dim in states]
            sums[pair], angles[pair], tokens[pair] = _pair_sums(rows)
            ends[pair] = tokens[pair]
            if mask is not None:
                last = [_end_rows(value, dim, mask) for value, dim in states]
                _, angles[pair], ends[pair] = _pair_sums(last)
        return sums, tokens, angles, ends

    def _same_shape(self, values: dict[fx.Node, Any]) -> list[list[int]]:
        groups: dict[tuple[tuple[int, ...], int, bool], list[int]] = {}
        for index in range(len(self.states)):
            value, dim = self._state(values, index)
            unmasked = self.states[index] in self.unmasked
            groups.setdefault((tuple(value.shape), dim, unmasked), []).append(index)
        return list(groups.values())

    def _state(self, values: dict[fx.Node, Any], index: int) -> tuple[torch.Tensor, int]:
        """Return a state and its feature axis, which is the last one for states that were reduced to rows."""
        value = values[self.nodes[self.states[index]]]
        return value, min(self.dims[self.states[index]], value.ndim - 1)


def without_mask(graph: Graph) -> frozenset[str]:
    """Return the names of the nodes whose tokens `MASK` does not describe.

    They are the tokens of a decoder beside an encoder, and the patches of images beside a tower of texts.
    """
    of_images = dependents_of(graph, IMAGES) - dependents_of(graph, TOKENS)
    return dependents_of(graph, TARGETS) | of_images


def output_mask(feeds: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the padding mask of the tokens of the output: that of the input tokens, if these are the same tokens.

    The outputs of a decoder beside an encoder belong to other tokens, whose padding is not known.
    """
    return None if any(name in feeds for name in TARGETS) else feeds.get(MASK)


def rows_of(value: torch.Tensor, channel_dim: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Return a state as float32 rows [tokens, width] without padding tokens."""
    rows = value.movedim(channel_dim, -1).float()
    if mask is not None and rows.ndim == 3 and rows.shape[:2] == mask.shape:
        return rows[mask.bool()]
    return rows.reshape(-1, rows.shape[-1])


def _end_rows(value: torch.Tensor, channel_dim: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows of the angular distance: the last unpadded token of each text, or all tokens."""
    rows = value.movedim(channel_dim, -1)
    if mask is None or rows.ndim != 3 or rows.shape[:2] != mask.shape:
        return rows_of(value, channel_dim, None)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.bool() * positions).argmax(1)  # for left and right padding
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
    known = have_directions(x, y)
    at_ends = cosine = cosine[known]
    if mask is not None:
        x, y = _end_rows(before, channel_dim, mask), _end_rows(after, channel_dim, mask)
        at_ends = torch.nn.functional.cosine_similarity(x, y, dim=-1).double()[have_directions(x, y)]
    angular = torch.arccos(at_ends.clamp(-1.0, 1.0)) / math.pi
    sums = float(cosine.sum()), float(angular.sum()), float(update[known].sum())
    return Moments(len(cosine), len(at_ends), *sums, zeros=len(known) - len(cosine))


def have_directions(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return at which tokens neither of two states [..., width] is zero, bool [...]."""
    known: torch.Tensor = (x.norm(dim=-1) > 0) & (y.norm(dim=-1) > 0)
    return known


def _pair_sums(states: list[torch.Tensor], chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sums over rows of the cosine and of arccos / pi for each pair of states [tokens, width], and their counts.

    Rows at which one of the two states is zero do not count.
    """
    count = len(states)
    cosines, angles, counts = torch.zeros(3, count, count, dtype=torch.float64, device=states[0].device)
    for start in range(0, len(states[0]), chunk):  # stacking all tokens of all states at once would double the memory
        rows = torch.stack([state[start : start + chunk] for state in states], dim=1)
        known = (rows.norm(dim=-1) > 0).double()
        unit = torch.nn.functional.normalize(rows, dim=-1)
        products = unit @ unit.transpose(1, 2)
        cosines += products.sum(0, dtype=torch.float64)
        counts += known.T @ known
        arcs = torch.arccos(products.clamp_(-1.0, 1.0))
        if not known.all():
            arcs = torch.where(known[:, :, None] * known[:, None, :] > 0, arcs, 0.0)
        angles += arcs.sum(0, dtype=torch.float64)
    # Rounding errors would give a state a distance of 1e-4 to itself.
    return cosines, (angles / math.pi).fill_diagonal_(0.0), counts
