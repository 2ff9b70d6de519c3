"""Apply the changes of a plan to a graph: drop branches or blocks, replace branches by fitted maps, merge tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.data.splits import Split
from compressor.executor.base import Batches, Executor, InProcess
from compressor.quality.evaluate import tensor_batches
from passes.analysis.least_squares import Fit, Fits, Replacement
from passes.analysis.replaceme_cosine import FitCosine
from passes.analysis.site_location import locate_site
from passes.base import PassError, apply
from passes.graph.graph import Graph, Site
from passes.merge_tokens.token_merging import ReduceTokens
from passes.plan.plan import PUBLISHED, form_and_rank, merged_tokens
from passes.rewrite.drop import Drop
from passes.rewrite.remove_blocks import RemoveBlocks, weights_read
from passes.rewrite.replace import Replace


@dataclass
class Rewriter:
    """Rewriter of forks of one traced model; the original is not changed.

    Maps are fitted on `split` to the states of the original and of the current graph, so a plan applied in its order
    gives the same weights each time.

    Attributes:
        original: graph of the traced model.
        sites: all sites, in order.
        split: calibration samples for the fits.
        executor: runs the model over them.
        sweeps: forward passes over `split`: two for each fit (of the original and of the current graph), and two per
            epoch for ``replaceme-cosine``, which is trained.
        whole: change whole blocks, which are removed including their norms, in place of single sites.
        nested: change whole blocks, or the attention of a block alone, which is a unit of its own within the block. The
            first block that is left keeps its attention (see `compressor.lower.gguf.rules`).
        fixed: units that must not be changed, with the reason.
        units: sites by name of the unit that is changed together: a site or, with `whole`, a block.
    """

    original: Graph
    sites: Sequence[Site]
    split: Split
    sweeps: float = 0.0
    whole: bool = False
    nested: bool = False
    fixed: Mapping[str, str] = field(default_factory=dict)
    executor: Executor = field(default_factory=InProcess)
    units: dict[str, tuple[Site, ...]] = field(init=False)
    _by_name: dict[str, Site] = field(default_factory=dict)
    _protected: dict[tuple[str, ...], int] = field(default_factory=dict)
    _batches: dict[tuple[int, ...], Batches] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_name = {site.name: site for site in self.sites}
        self.units = {}
        for site in self.sites:
            name = site.block if self.whole or self.nested else site.name
            self.units[name] = (*self.units.get(name, ()), site)
        if self.nested:
            later = [site for site in self.sites if site.block != self.sites[0].block]
            self.units |= {site.name: (site,) for site in later if site.kind == "attention"}

    def fits(
        self, current: Graph, names: Iterable[str], split: Split | None = None, *, all_tokens: bool = False
    ) -> dict[str, Fits]:
        """Fit the regressions of some sites in one sweep over `split` (None: all calibration samples).

        The result lacks sites whose branch was removed or is followed by a fitted map.
        """
        samples = self.split if split is None else split
        sites = tuple(self._by_name[name] for name in names if _replaceable(current, self._by_name[name]))
        if not sites:
            return {}
        self.sweeps += 2 * len(samples) / len(self.split)
        step = Fit(self.original, sites, all_tokens=all_tokens)
        return apply(step, current.fork(), self._batches_of(samples))

    def _batches_of(self, samples: Split) -> Batches:
        """Return the feeds of a split, which every fit on it shares."""
        return self._batches.setdefault(tuple(samples.indices), Batches(self.executor, lambda: tensor_batches(samples)))

    def changed(self, current: Graph, name: str, action: str, fits: Fits | None = None) -> Graph:
        """Return a fork of `current` with one more unit changed; without `fits`, fit the map of the action first.

        Raises:
            PassError: the action cannot be applied to this unit; the message gives the reason.
        """
        if name in self.fixed:
            raise PassError(f"{self.fixed[name]}.")
        fork, unit = current.fork(), self.units[name]
        form, rank = form_and_rank(action)
        if form == "drop":
            left = tuple(site for site in unit if _replaceable(current, site)) if self.nested else unit
            apply(Drop(left), fork)
            if self.whole:
                self._remove_block(fork, name)
            if self.nested:
                self._check_first_block(fork)
            return fork
        if self.whole or self.nested:
            raise PassError(f"a block can only be dropped; found {action} at {name}.")
        (site,) = unit
        locate_site(current, site)  # raises with the reason if no map can be fitted here any more
        if form == "replaceme-cosine":
            stand_in = self._learned(current, name)
        else:
            if fits is None:
                fits = self.fits(current, [name], all_tokens=form in PUBLISHED)[name]
            stand_in = fits.stand_in(form, rank=rank)
        apply(Replace(site, stand_in), fork)
        return fork

    def _remove_block(self, graph: Graph, block: str) -> None:
        apply(RemoveBlocks((block,)), graph)
        read = weights_read(graph)
        if not any(weight.startswith(f"{other}.") for weight in read for other in self.units):
            raise PassError(f"no block would be left of the {len(self.units)} that can be dropped; drop fewer.")

    def _check_first_block(self, graph: Graph) -> None:
        left = [site for site in self.sites if _replaceable(graph, site)]
        if not left:
            raise PassError("no block would be left that can be dropped; drop fewer.")
        if left[0].kind != "attention":
            raise PassError("the first block that is left would have no attention.")

    def _learned(self, current: Graph, name: str) -> Replacement:
        step = FitCosine(self.original, self._by_name[name])
        stand_in = apply(step, current.fork(), self._batches_of(self.split))
        self.sweeps += 2 * step.epochs
        return stand_in

    def reduced(self, graph: Graph, changes: Mapping[str, str]) -> Graph:
        """Return a fork with tokens merged as in `changes`, or the graph itself if they merge none.

        Tokens are merged last: maps are fitted to the states of the original, which have all tokens.

        Raises:
            PassError: tokens cannot be merged at one of these sites; the message gives the reason.
        """
        amounts = {name: merged_tokens(action) for name, action in changes.items()}
        schedule = tuple((name, amount) for name, amount in amounts.items() if amount)
        if not schedule:
            return graph
        merging = tuple(sorted(name for name, _ in schedule))
        if merging not in self._protected:
            self._protected[merging] = ReduceTokens(schedule).protects(self.original)
        fork = graph.fork()
        apply(ReduceTokens(schedule, protected=self._protected[merging], trusted=True), fork)
        return fork

    def apply_changes(self, changes: Mapping[str, str], progress: Callable[[int, int], None] | None = None) -> Graph:
        """Return the original with all changes applied in their order, except merging of tokens (see `reduced`).

        Raises:
            PassError: an action cannot be applied to its site; the message gives the reason.
        """
        graph = self.original.fork()
        for done, (name, action) in enumerate(self._by_unit(changes).items()):
            if progress is not None:
                progress(done, len(changes))
            if merged_tokens(action) is None:
                graph = self.changed(graph, name, action)
        return graph

    def of_sites(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Return the action of each site for the changes of units."""
        return {site.name: action for name, action in changes.items() for site in self.units[name]}

    def _by_unit(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Return the changes by unit.

        Raises:
            PassError: the changes name only some sites of a unit.
        """
        units = {site.name: unit for unit, members in self.units.items() for site in members}
        if self.nested:  # a block is changed as a whole where all of its sites are
            whole = [unit for unit, members in self.units.items() if all(site.name in changes for site in members)]
            units |= {site.name: unit for unit in reversed(whole) for site in self.units[unit]}
        by_unit = {units[name]: action for name, action in changes.items()}
        if self.of_sites(by_unit).keys() != changes.keys():
            raise PassError(f"only whole units can be changed: {', '.join(by_unit)}; name all sites of each.")
        return by_unit

    def rewritten(self, changes: Mapping[str, str]) -> Graph:
        """Return the original with all changes applied and tokens merged.

        Raises:
            PassError: an action cannot be applied to its site; the message gives the reason.
        """
        return self.reduced(self.apply_changes(changes), changes)


def _replaceable(graph: Graph, site: Site) -> bool:
    """Return whether a map can be fitted in place of the branch of a site."""
    try:
        locate_site(graph, site)
    except PassError:
        return False
    return True
