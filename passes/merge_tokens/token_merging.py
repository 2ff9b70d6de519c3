"""Let fewer tokens flow on: merge similar ones or drop unattended ones behind chosen attentions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from passes.analysis.token_axis import from_data, leading_constants
from passes.base import PassError, Rewritten
from passes.graph.edit import remove_dead
from passes.graph.sites import find_sites
from passes.merge_tokens.propagate import Walk
from passes.merge_tokens.stages import Reduction

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from passes.graph.graph import Graph, Site

Amount = int | float


@dataclass(frozen=True)
class ReduceTokens:
    """Merge or drop tokens behind the attention of chosen blocks, in the trunk of any isotropic transformer.

    Before::

        %y = add(%x, %attention); %n = layer_norm(%y); ...; %a = scaled_dot_product_attention(%q, %k, %v)

    After::

        %y = add(%x, %attention); %m = matmul(%mean, %y); %n = layer_norm(%m); ...
        %a = scaled_dot_product_attention(%q, %k, %v, log(%sizes))

    Everything behind is followed operator by operator: lengths in reshapes, position tables, rotary tables, relative
    biases and padding masks take part in the same reduction; outputs with a value for each token are spread again.

    Args:
        schedule: block or attention site, and what it takes away: a number of tokens, or (a float below 0.5) a share
            of those that are not protected. Texts of any length take shares only.
        method: ``merge`` averages pairs of similar keys (Token Merging, Bolya et al., ICLR 2023) and weights the later
            attention by size; ``attention`` keeps the tokens that are looked at most (by the class token where there
            is one, else on average), ``norm`` those of the largest keys.
        protected: number of leading tokens that always stay. None: those made of parameters (class, registers) and
            those that are read by position later on.
        unmerge: whether outputs with a value for each token get their old length back; None: where tokens are merged.
            A dropped token has no value to give back.
        trusted: `protected` was found by `protects` on this model, and the graph is a fork that an error may spoil:
            nothing is tried out beforehand.

    A graph is left as it is where nothing is to be taken, and where an error is raised before the first edit.
    """

    schedule: tuple[tuple[str, Amount], ...]
    method: Literal["merge", "attention", "norm"] = "merge"
    protected: int | None = None
    unmerge: bool | None = None
    trusted: bool = False

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Take a mapping for a schedule too, and check the amounts."""
        if isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", tuple(self.schedule.items()))
        if self.method not in ("merge", "attention", "norm"):
            raise PassError(f"found the method {self.method!r}, expected merge, attention or norm.")
        for name, amount in self.schedule:
            if amount < 0 or (isinstance(amount, float) and amount >= 0.5):
                raise PassError(f"{name} is to lose {amount} tokens; expected a number from 0 or a share below 0.5.")

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; returns the names of the sites behind which tokens are taken away.

        Raises:
            PassError: a name is no attention of the graph, the amount is more than there is, or an operator cannot be
                followed (window partitions, causal masks); the message names it.
        """
        sites = find_sites(graph)
        chosen = [(_attention(sites, name), amount) for name, amount in self.schedule if amount]
        if not chosen:
            return Rewritten()
        chosen.sort(key=lambda pair: pair[0].order)
        amounts = {site.root: amount for site, amount in chosen}
        ends = chosen[0][0], chosen[-1][0]
        if self.trusted and self.protected is not None:
            reduction = Reduction(self.method, self.protected, self.unmerge)
        else:
            reduction = Reduction(self.method, self._protected(graph, *ends), self.unmerge)
            Walk(graph.fork(), *ends, amounts, reduction).run()  # errors leave the graph as it was
        Walk(graph, *ends, amounts, reduction).run()
        remove_dead(graph)
        return Rewritten(changed=tuple(site.name for site, _ in chosen))

    def _protected(self, graph: Graph, first: Site, last: Site) -> int:
        trial = Walk(graph.fork(), first, last, {}, Reduction(self.method, 0, self.unmerge))
        trial.run()
        if self.protected is None:
            (trunk,) = [node for node in graph.nodes() if node.name == first.trunk]
            return max(leading_constants(trunk, 1, from_data(graph.nodes())), trial.read_by_position)
        if self.protected < trial.read_by_position:
            raise PassError(
                f"{self.protected} tokens are to be protected, but the model reads the first {trial.read_by_position} "
                "by their position: protect as many, or leave the number out."
            )
        return self.protected

    def protects(self, graph: Graph) -> int:
        """How many leading tokens stay when this is run on `graph`; the graph is left as it is.

        Raises:
            PassError: as `run`.
        """
        sites = find_sites(graph)
        chosen = sorted((_attention(sites, name) for name, _ in self.schedule), key=lambda site: site.order)
        return self._protected(graph, chosen[0], chosen[-1])


def _attention(sites: tuple[Site, ...], name: str) -> Site:
    """The attention site of that name, or the one of the block of that name."""
    attentions = [site for site in sites if site.kind == "attention"]
    for site in attentions:
        if name in (site.name, site.block):
            return site
    known = ", ".join(site.name for site in attentions[:12]) or "none"
    raise PassError(f"tokens are taken away behind an attention, and {name!r} is none; the graph has {known}.")
