"""The published cosine form of a stand-in: a map of the branch added before, learned by gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from passes.analysis.least_squares import Fit, Map, Regression, StandIn, Sweep
from passes.base import PassError
from passes.graph.graph import Graph, Site

Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FitCosine:
    """Learn what ReplaceMe puts in the place of a span (Shopkhoev et al., NeurIPS 2025), by its cosine objective.

    With Y the trunk of the graph as it is now, M the branch output last added to it and L the original's state behind
    the site, minimise the sum over all unpadded tokens of 1 - cos(M T, L - Y): the cheap form of the paper, without a
    bias, from T = identity, by Adam. Rows are taken in the order of the data, not shuffled, and a step never mixes two
    batches of it: a batch of fewer than `rows` tokens makes a smaller step. The objective leaves the scale of M T open.

    `epochs` sweeps of both graphs; no activation outlives its batch. The map is learned in float64. Changes nothing.
    """

    original: Graph = field(repr=False)
    site: Site
    epochs: int = 10
    rate: float = 1e-4
    rows: int = 1024

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> StandIn:
        """The map m -> T^T m of the source ``previous``, and the share of |t|^2 it leaves on the same rows.

        Args:
            graph: the graph as it is now.
            data: batches of named inputs, gone through once for each epoch: a list, or what can be iterated repeatedly.

        Raises:
            PassError: no data, data that can be gone through only once, a site that is no longer in the graph or has
                no branch before it that a map could be folded into, or values that are not finite.
        """
        batches = self._checked(data)
        sweep = Sweep(Fit(self.original, (self.site,), ("previous",), all_tokens=True), graph)
        refused = sweep.places[self.site.name].refused
        if "previous" in refused:
            raise PassError(f"{refused['previous']}.")
        descent = _Descent(self.site.width, self.rate)
        sums: Regression | None = None
        for epoch in range(1, self.epochs + 1):
            for m, t in _rows(sweep, batches, f"epoch {epoch} of {self.epochs}"):
                if epoch == 1:
                    sums = Regression.of(m, t) if sums is None else sums + Regression.of(m, t)
                for part, goal in zip(torch.split(m, self.rows), torch.split(t + m, self.rows), strict=True):
                    descent.step(part, goal)
        assert sums is not None
        matrix = descent.transform.detach().T.contiguous()
        beside = Map((matrix - torch.eye(len(matrix), dtype=matrix.dtype),), None)
        return StandIn("previous", Map((matrix,), None), sums.error(beside) / max(sums.power(), 1e-300))

    def _checked(self, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Iterable[Mapping[str, torch.Tensor]]:
        if self.epochs < 1 or self.rows < 1 or self.rate <= 0.0:
            raise PassError(
                f"found {self.epochs} epochs of steps of {self.rows} rows at rate {self.rate}; expected at least 1 "
                "epoch, 1 row and a rate above 0."
            )
        if isinstance(data, Iterator):
            raise PassError(
                f"FitCosine goes through its data {self.epochs} times and found an iterator, which is exhausted after "
                "one; pass a list of batches, or an object that can be iterated repeatedly."
            )
        return () if data is None else data


def _rows(sweep: Sweep, data: Iterable[Mapping[str, torch.Tensor]], when: str) -> Iterator[Rows]:
    """Regressor and target of each batch, float64 rows [tokens, width]."""
    feeds = None
    for feeds in data:
        for _, _, regressor, target in sweep.rows(feeds):
            yield regressor.to("cpu", torch.float64), target.to("cpu", torch.float64)
    if feeds is None:
        raise PassError(f"FitCosine got no batches of data in {when}.")


class _Descent:
    """T [width, width], on its way down from the identity."""

    def __init__(self, width: int, rate: float) -> None:
        with torch.inference_mode(False):
            self.transform = torch.eye(width, dtype=torch.float64).requires_grad_()
        self.adam = torch.optim.Adam([self.transform], lr=rate)

    def step(self, m: torch.Tensor, goal: torch.Tensor) -> None:
        """One step of Adam down the sum over rows of 1 - cos(m T, goal)."""
        # The caller may be in inference mode; what was computed there takes no part in a gradient, its copies do.
        with torch.inference_mode(False), torch.enable_grad():
            loss = (1.0 - cosine_similarity(m.clone() @ self.transform, goal.clone(), dim=-1)).sum()
            (self.transform.grad,) = torch.autograd.grad(loss, self.transform)
            self.adam.step()
