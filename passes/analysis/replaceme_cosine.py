"""ReplaceMe with the cosine objective: a map of the previous branch output, learned by gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity

from passes.analysis.least_squares import Fit, Map, Regression, Replacement, Sweep
from passes.base import PassError
from passes.graph.graph import Graph, Site

Rows = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FitCosine:
    """Analysis pass that learns the replacement of a span by the cosine objective of ReplaceMe.

    Shopkhoev et al., NeurIPS 2025. Let Y be the trunk of the current graph, M the branch output that was last added to
    it, and L the state after the site in the original graph. Adam minimises the sum of 1 - cos(M T, L - Y) over all
    unpadded tokens, starting at T = identity. This is the memory-saving form of the paper, without a bias. The
    objective does not determine the scale of M T.

    Rows are taken in the order of the data, without shuffling. A step uses at most `rows` tokens and never mixes two
    batches. Both graphs are executed `epochs` times; activations are freed after each batch. The map is learned in
    float64. The pass does not change the graph.
    """

    original: Graph = field(repr=False)
    site: Site
    epochs: int = 10
    rate: float = 1e-4
    rows: int = 1024

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Replacement:
        """Return the map m -> T^T m of the source ``previous``, and the share of |t|^2 it leaves on the same rows.

        Args:
            graph: the current graph.
            data: batches of named inputs, as a list or another iterable that supports repeated iteration.

        Raises:
            PassError: there is no data, the data supports one iteration only, the site is no longer in the graph, no
                previous branch can take the map, or values are not finite.
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
                for m_rows, goal in zip(torch.split(m, self.rows), torch.split(t + m, self.rows), strict=True):
                    descent.step(m_rows, goal)
        assert sums is not None
        matrix = descent.transform.detach().T.contiguous()
        residual = Map((matrix - torch.eye(len(matrix), dtype=matrix.dtype),), None)
        return Replacement("previous", Map((matrix,), None), sums.error(residual) / max(sums.power(), 1e-300))

    def _checked(self, data: Iterable[Mapping[str, torch.Tensor]] | None) -> Iterable[Mapping[str, torch.Tensor]]:
        if self.epochs < 1 or self.rows < 1 or self.rate <= 0.0:
            raise PassError(
                f"found epochs={self.epochs}, rows={self.rows} and rate={self.rate}; "
                "expected at least 1 epoch, at least 1 row and a rate above 0."
            )
        if isinstance(data, Iterator):
            raise PassError(
                f"FitCosine iterates {self.epochs} times over the data and found an iterator, "
                "which supports one pass only; pass a list of batches."
            )
        return () if data is None else data


def _rows(sweep: Sweep, data: Iterable[Mapping[str, torch.Tensor]], when: str) -> Iterator[Rows]:
    """Yield regressor and target of each batch as float64 rows [tokens, width]."""
    feeds = None
    for feeds in data:
        for _, _, regressor, target in sweep.rows(feeds):
            yield regressor.to("cpu", torch.float64), target.to("cpu", torch.float64)
    if feeds is None:
        raise PassError(f"FitCosine got no batches of data in {when}.")


class _Descent:
    """Optimizer of T [width, width], starting at the identity."""

    def __init__(self, width: int, rate: float) -> None:
        with torch.inference_mode(False):
            self.transform = torch.eye(width, dtype=torch.float64).requires_grad_()
        self.adam = torch.optim.Adam([self.transform], lr=rate)

    def step(self, m: torch.Tensor, goal: torch.Tensor) -> None:
        """Take one Adam step on the sum over rows of 1 - cos(m T, goal)."""
        # The caller may be in inference mode. Autograd refuses inference tensors, but accepts their clones.
        with torch.inference_mode(False), torch.enable_grad():
            loss = (1.0 - cosine_similarity(m.clone() @ self.transform, goal.clone(), dim=-1)).sum()
            (self.transform.grad,) = torch.autograd.grad(loss, self.transform)
            self.adam.step()
