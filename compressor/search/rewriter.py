"""Carry out decisions on a graph: drop branches, fit stand-ins on what is left, fold what folds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from compressor.data.splits import Split
from compressor.quality.evaluate import tensor_batches
from passes.analysis.least_squares import Fit, Fits, StandIn
from passes.analysis.replaceme_cosine import FitCosine
from passes.analysis.site_location import place_of
from passes.base import PassError, apply
from passes.graph.graph import Graph, Site
from passes.merge_tokens.token_merging import ReduceTokens
from passes.plan.plan import PUBLISHED, form_and_rank, merged_tokens
from passes.rewrite.drop import Drop
from passes.rewrite.remove_blocks import RemoveBlocks, weights_read
from passes.rewrite.replace import Replace


@dataclass
class Rewriter:
    """Rewrites forks of one traced model; the model itself stays as it is.

    Stand-ins are fitted on `split`, given the original's states and those of the graph as it is at that moment, so a
    plan carried out in its order gives the same weights each time. `units` are what is changed at a time, by name:
    single sites, or with `whole` blocks, of which nothing stays behind, no norm either. `sweeps` counts forward passes
    over `split` (two for each fit: of the original and of the current graph; two an epoch for ``replaceme-cosine``,
    which is learned).
    """

    original: Graph
    sites: Sequence[Site]
    split: Split
    sweeps: float = 0.0
    whole: bool = False
    units: dict[str, tuple[Site, ...]] = field(init=False)
    _by_name: dict[str, Site] = field(default_factory=dict)
    _protected: dict[tuple[str, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name = {site.name: site for site in self.sites}
        self.units = {}
        for site in self.sites:
            name = site.block if self.whole else site.name
            self.units[name] = (*self.units.get(name, ()), site)

    def fits(
        self, current: Graph, names: Iterable[str], split: Split | None = None, *, all_tokens: bool = False
    ) -> dict[str, Fits]:
        """The regressions of some sites, all in one sweep over `split` (the calibration samples, where not given).

        Sites whose branch is gone, or has a map behind it by now, are left out.
        """
        samples = self.split if split is None else split
        sites = tuple(self._by_name[name] for name in names if _has_place(current, self._by_name[name]))
        if not sites:
            return {}
        self.sweeps += 2 * len(samples) / len(self.split)
        return apply(Fit(self.original, sites, all_tokens=all_tokens), current.fork(), tensor_batches(samples))

    def changed(self, current: Graph, name: str, action: str, fits: Fits | None = None) -> Graph:
        """A fork of `current` with one more unit changed; a stand-in is fitted first where `fits` are not given.

        Raises:
            PassError: the action cannot be carried out there, with the reason.
        """
        fork, unit = current.fork(), self.units[name]
        form, rank = form_and_rank(action)
        if form == "drop":
            apply(Drop(unit), fork)
            if self.whole:
                self._remove_block(fork, name)
            return fork
        if self.whole:
            raise PassError(f"a block can only be dropped, found {action} at {name}.")
        (site,) = unit
        place_of(current, site)  # says why, where nothing can be fitted there any more
        if form == "replaceme-cosine":
            stand_in = self._learned(current, name)
        else:
            found = self.fits(current, [name], all_tokens=form in PUBLISHED)[name] if fits is None else fits
            stand_in = found.stand_in(form, rank=rank)
        apply(Replace(site, stand_in), fork)
        return fork

    def _remove_block(self, graph: Graph, block: str) -> None:
        apply(RemoveBlocks((block,)), graph)
        read = weights_read(graph)
        if not any(weight.startswith(f"{other}.") for weight in read for other in self.units):
            raise PassError("no block would be left.")

    def _learned(self, current: Graph, name: str) -> StandIn:
        step = FitCosine(self.original, self._by_name[name])
        stand_in = apply(step, current.fork(), _Batches(self.split))
        self.sweeps += 2 * step.epochs
        return stand_in

    def reduced(self, graph: Graph, changes: Mapping[str, str]) -> Graph:
        """The graph with the tokens merged that `changes` merge; the graph itself where they merge none.

        Tokens are merged last: until then every state has the tokens of the original's, which stand-ins are fitted to.

        Raises:
            PassError: the tokens of this model cannot be merged there, with the reason.
        """
        amounts = {name: merged_tokens(action) for name, action in changes.items()}
        schedule = tuple((name, amount) for name, amount in amounts.items() if amount)
        if not schedule:
            return graph
        places = tuple(sorted(name for name, _ in schedule))
        if places not in self._protected:
            self._protected[places] = ReduceTokens(schedule).protects(self.original)
        fork = graph.fork()
        apply(ReduceTokens(schedule, protected=self._protected[places], trusted=True), fork)
        return fork

    def carried_out(self, changes: Mapping[str, str], progress: Callable[[int, int], None] | None = None) -> Graph:
        """The original with all changes made, in their order, but the merging of tokens (see `reduced`).

        Raises:
            PassError: an action cannot be carried out at its site, with the reason.
        """
        graph = self.original.fork()
        for done, (name, action) in enumerate(self._by_unit(changes).items()):
            if progress is not None:
                progress(done, len(changes))
            if merged_tokens(action) is None:
                graph = self.changed(graph, name, action)
        return graph

    def of_sites(self, changes: Mapping[str, str]) -> dict[str, str]:
        """What changes of units do to each site."""
        return {site.name: action for name, action in changes.items() for site in self.units[name]}

    def _by_unit(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Changes of sites, unit by unit: all sites of a unit change together."""
        units = {site.name: unit for unit, members in self.units.items() for site in members}
        found = {units[name]: action for name, action in changes.items()}
        if self.of_sites(found).keys() != changes.keys():
            raise PassError(f"only whole units can be changed: {', '.join(found)}; name all sites of each.")
        return found

    def rewritten(self, changes: Mapping[str, str]) -> Graph:
        """The original with all changes made and tokens merged.

        Raises:
            PassError: an action cannot be carried out at its site, with the reason.
        """
        return self.reduced(self.carried_out(changes), changes)


@dataclass(frozen=True)
class _Batches:
    """The feeds of a split as tensors, as often as they are asked for."""

    split: Split

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return tensor_batches(self.split)


def _has_place(graph: Graph, site: Site) -> bool:
    try:
        place_of(graph, site)
    except PassError:
        return False
    return True
