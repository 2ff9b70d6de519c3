"""Token reduction pass: merge similar tokens or drop unimportant ones after chosen attentions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from passes.analysis.token_axis import data_dependent_nodes, leading_constants
from passes.base import PassError, Rewritten
from passes.graph.edit import remove_dead
from passes.graph.sites import find_sites
from passes.merge_tokens.propagate import ReductionPropagator
from passes.merge_tokens.stages import DROPPING, MERGING, Reduction

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from passes.graph.graph import Graph, Site

Amount = int | float


@dataclass(frozen=True)
class ReduceTokens:
    """Rewrite pass that merges or drops tokens after the attention of chosen blocks of an isotropic transformer.

    Before::

        %y = add(%x, %attention); %n = layer_norm(%y); ...; %a = scaled_dot_product_attention(%q, %k, %v)

    After::

        %y = add(%x, %attention); %m = matmul(%mean, %y); %n = layer_norm(%m); ...
        %a = scaled_dot_product_attention(%q, %k, %v, log(%sizes))

    All later operators are adapted to the shorter token axis. Reshape sizes, position tables, rotary tables, relative
    biases and padding masks are reduced in the same way. Outputs with a value for each token are unmerged.

    Where the length is dynamic, the methods that merge pairs remove a share of the tokens of each row that are no
    padding, so that a row with padding behind it gives what it gives alone. In rows of a fixed length padding merges
    first; the methods that drop tokens drop padding first.

    Args:
        schedule: pairs of a block or attention site and the number of tokens to remove, or the share (a float below
            0.5) of the unprotected tokens. A dynamic token axis takes shares only.
        method: ``merge`` averages similar tokens by the matching of Token Merging (Bolya et al., ICLR 2023) and weights
            later attention by token size. Similar are tokens whose states point the same way. Those that receive
            little attention merge first: from the class token if there is one, otherwise on average. The other
            methods are published ones, for comparison. ``tome`` is Token Merging itself, whose similarity is that of
            the keys. ``atm`` weights it by token sizes (Lee and Choi, arXiv 2505.15160). ``unary`` merges the tokens
            that receive the least attention into the most similar of the others (Yang, arXiv 2604.16745). ``evit``
            averages them into one token (Liang et al., ICLR 2022). ``attention`` drops them, and ``norm`` drops those
            with the smallest key norms.
        protected: number of leading tokens that are never removed. None protects leading tokens made of parameters
            (class, registers) and tokens that later operators read by position.
        unmerge: True restores the original length of outputs with a value for each token. None does so for methods
            that merge only, because a dropped token has no value.
        trusted: True skips the trial run on a fork. It requires that `protected` was returned by `protects` for this
            model and that the graph is a fork, which an error may leave half edited.

    The graph is unchanged if no token is removed, or if the trial run raises an error.
    """

    schedule: tuple[tuple[str, Amount], ...]
    method: Literal["merge", "tome", "atm", "unary", "evit", "attention", "norm"] = "merge"
    protected: int | None = None
    unmerge: bool | None = None
    trusted: bool = False

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Convert a mapping to a schedule, and check method and amounts."""
        if isinstance(self.schedule, Mapping):
            object.__setattr__(self, "schedule", tuple(self.schedule.items()))
        if self.method not in (*MERGING, *DROPPING):
            methods = ", ".join((*MERGING, *DROPPING[:-1]))
            raise PassError(f"found the method {self.method!r}; expected {methods} or {DROPPING[-1]}.")
        for name, amount in self.schedule:
            if amount < 0 or (isinstance(amount, float) and amount >= 0.5):
                raise PassError(
                    f"found the amount {amount} for {name}; expected a number of tokens from 0 or a share below 0.5."
                )

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Insert the reductions. Return the names of the sites after which tokens are removed.

        Raises:
            PassError: a name is not an attention of the graph, an amount does not fit, or the tokens cannot be tracked
                through an operator (window partitions, causal masks); the message names it.
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
            ReductionPropagator(
                graph.fork(), *ends, amounts, reduction
            ).run()  # trial run: an error leaves the graph unchanged
        ReductionPropagator(graph, *ends, amounts, reduction).run()
        remove_dead(graph)
        return Rewritten(changed=tuple(site.name for site, _ in chosen))

    def _protected(self, graph: Graph, first: Site, last: Site) -> int:
        trial = ReductionPropagator(graph.fork(), first, last, {}, Reduction(self.method, 0, self.unmerge))
        trial.run()
        if self.protected is None:
            (trunk,) = [node for node in graph.nodes() if node.name == first.trunk]
            return max(
                leading_constants(trunk, trial.axis, data_dependent_nodes(graph.nodes())), trial.read_by_position
            )
        if self.protected < trial.read_by_position:
            raise PassError(
                f"found protected={self.protected}, but the model reads the first {trial.read_by_position} tokens by "
                "position; protect at least that many, or leave `protected` unset."
            )
        return self.protected

    def protects(self, graph: Graph) -> int:
        """Return the number of protected leading tokens of this pass on `graph`. The graph is not changed.

        Raises:
            PassError: see `run`.
        """
        sites = find_sites(graph)
        chosen = sorted((_attention(sites, name) for name, _ in self.schedule), key=lambda site: site.order)
        return self._protected(graph, chosen[0], chosen[-1])


def _attention(sites: tuple[Site, ...], name: str) -> Site:
    """Return the attention site with this name, or the first one of the block with this name."""
    attentions = [site for site in sites if site.kind == "attention"]
    for site in attentions:
        if name in (site.name, site.block):
            return site
    names = ", ".join(site.name for site in attentions[:12]) or "none"
    raise PassError(f"found {name!r}, expected the name of an attention site or of its block; the graph has {names}.")
