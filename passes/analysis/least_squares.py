"""Closed-form stand-ins for branches: which map of a cheap state predicts what a branch (or a span of them) does.

With x the state before a site in the graph as it is now, and y the state behind the site in the *original* graph, the
target is t = y - x: a stand-in also repairs what changes upstream have shifted, and one that is fitted after the sites
before it were dropped stands for the whole span. From a regressor r the least-squares map is t ~ A r + b; r is

- ``state``: x itself (TOAST/TBA, Cannistraci et al., arXiv 2410.04941, made affine and residual);
- ``normalised``: what the branch's first linear map reads, mostly the normalised x;
- ``previous``: the branch output m that was last added to x (ReplaceMe, Shopkhoev et al., NeurIPS 2025, made affine).
  The stand-in maps m itself, m + A m + b, and can be folded into that branch's own output projection.

Sums are streamed in float64 over all unpadded tokens; no activation outlives its batch. The ridge strength is the one
with the least error on held-out batches: even batches judge the fit of odd ones and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from passes.analysis.redundancy import MASK, rows_of
from passes.analysis.site_location import place_of
from passes.analysis.token_liveness import read_parts
from passes.base import PassError
from passes.execute.interpreter import Until
from passes.graph.graph import Graph, Site

if TYPE_CHECKING:
    from passes.analysis.slicing_rules import Part

SOURCES = ("state", "normalised", "previous")
FORMS = ("constant", "scale", "linear", "low-rank")
STRENGTHS = (1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean variance of a regressor's features


@dataclass(frozen=True)
class Map:
    """A fitted map r -> A r + b.

    `factors` is empty for a constant, one vector [width] for a per-channel scale, one matrix [width, width] for a
    linear map, and two, [rank, width] then [width, rank], for one of low rank. float64 until it enters a graph.
    """

    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    def matrix(self, width: int) -> torch.Tensor:
        """A as a full matrix [width, width]."""
        if not self.factors:
            return torch.zeros(width, width, dtype=torch.float64)
        if len(self.factors) == 2:
            return self.factors[1] @ self.factors[0]
        (factor,) = self.factors
        return torch.diag(factor) if factor.ndim == 1 else factor


@dataclass(frozen=True)
class Regression:
    """Sums over rows of a regressor r [rows, width] and a target t [rows, width], all float64; they add up.

    `rr` is the sum of r r^T, `tr` of t r^T (both [width, width]), `tt` of t squared [width].
    """

    rows: int
    r: torch.Tensor
    t: torch.Tensor
    rr: torch.Tensor
    tr: torch.Tensor
    tt: torch.Tensor

    @staticmethod
    def of(regressor: torch.Tensor, target: torch.Tensor) -> Regression:
        """Sums of one batch of rows, accumulated in float64."""
        r, t = regressor.double(), target.double()
        return Regression(len(r), r.sum(0), t.sum(0), r.T @ r, t.T @ r, (t * t).sum(0))

    def __add__(self, other: Regression) -> Regression:
        """Sums over the rows of both."""
        mine = (self.r, self.t, self.rr, self.tr, self.tt)
        theirs = (other.r, other.t, other.rr, other.tr, other.tt)
        return Regression(self.rows + other.rows, *(a + b for a, b in zip(mine, theirs, strict=True)))

    def error(self, fitted: Map) -> float:
        """Mean over these rows of |A r + b - t|^2, from the sums alone."""
        a = fitted.matrix(len(self.r))
        b = torch.zeros_like(self.t) if fitted.bias is None else fitted.bias
        squares = (a @ self.rr * a).sum() + self.rows * (b * b).sum() + self.tt.sum()
        mixed = 2 * ((a @ self.r) * b).sum() - 2 * (a * self.tr).sum() - 2 * (b * self.t).sum()
        return max(float(squares + mixed), 0.0) / max(self.rows, 1)

    def power(self) -> float:
        """Mean of |t|^2: the error of putting nothing in the branch's place."""
        return float(self.tt.sum()) / max(self.rows, 1)

    def solve(self, form: str, strength: float = 0.0, *, rank: int | None = None, biased: bool = True) -> Map:
        """The ridge solution of a form.

        Args:
            form: one of `FORMS`.
            strength: ridge strength relative to the mean variance of the regressor's features.
            rank: of ``low-rank``: reduced-rank regression (Izenman 1975), the best of that rank for these rows.
            biased: without, neither side is centred and the map has no bias, as TBA and ReplaceMe have it.

        Raises:
            PassError: there is no such form, or no such rank.
        """
        if form not in FORMS or (rank is not None and rank < 1):
            raise PassError(f"there is no {form} map of rank {rank}; forms are {', '.join(FORMS)}, ranks start at 1.")
        mean_r, mean_t, rr, tr = self._centred if biased else (self.r * 0, self.t * 0, self.rr, self.tr)
        ridge = max(strength * float(rr.diagonal().mean()), torch.finfo(torch.float64).tiny)
        # What holds no variance holds no information either, only what rounding left of the sums before centring.
        floor = float(self.rr.diagonal().max().clamp(min=0)) * len(self.r) * torch.finfo(torch.float64).eps
        if form == "constant":
            return Map((), mean_t)
        if form == "scale":
            scale = torch.where(rr.diagonal() > floor, tr.diagonal() / (rr.diagonal() + ridge), 0.0)
            return Map((scale,), mean_t - scale * mean_r if biased else None)
        values, vectors, projected = self._spectrum if biased else _spectrum(rr, tr)
        inverse = torch.where(values > floor, 1.0 / (values.clamp(min=0) + ridge), 0.0)
        matrix = (projected * inverse) @ vectors.T
        factors = (matrix,) if form == "linear" else _reduced(matrix, rr, rank)
        return Map(factors, mean_t - matrix_times(factors, mean_r) if biased else None)

    @cached_property
    def _centred(self) -> tuple[torch.Tensor, ...]:
        mean_r, mean_t = self.r / self.rows, self.t / self.rows
        rr, tr = self.rr - self.rows * torch.outer(mean_r, mean_r), self.tr - self.rows * torch.outer(mean_t, mean_r)
        return mean_r, mean_t, (rr + rr.T) / 2, tr

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, ...]:
        """Decomposed once for all ridge strengths."""
        _, _, rr, tr = self._centred
        return _spectrum(rr, tr)


def _spectrum(rr: torch.Tensor, tr: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values, vectors = torch.linalg.eigh(rr)
    return values, vectors, tr @ vectors


def matrix_times(factors: tuple[torch.Tensor, ...], vector: torch.Tensor) -> torch.Tensor:
    """A r for one vector r, through the factors."""
    for factor in factors:
        vector = factor * vector if factor.ndim == 1 else factor @ vector
    return vector


def _reduced(matrix: torch.Tensor, rr: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Project a full solution on the `rank` directions (a quarter of all) of its predictions that vary most."""
    _, directions = torch.linalg.eigh(matrix @ rr @ matrix.T)
    kept = directions[:, -min(max(len(matrix) // 4, 1) if rank is None else rank, len(matrix)) :]
    return kept.T @ matrix, kept


@dataclass(frozen=True)
class StandIn:
    """What to put in a branch's place: a map of a source, and the share of |t|^2 that it leaves unexplained.

    `unexplained` is measured on held-out batches (on the same where there is one only); leaving the branch out
    altogether has 1, whatever the source.
    """

    source: str
    map: Map = field(repr=False)
    unexplained: float
    strength: float = 0.0


@dataclass(frozen=True)
class Fits:
    """The regressions of one site by source, each as sums of the even and of the odd batches, and what was refused."""

    halves: Mapping[str, tuple[Regression, Regression]]
    refused: Mapping[str, str]

    def stand_in(self, form: str, *, rank: int | None = None) -> StandIn:
        """The best stand-in of a form; of two sources that fit, the one that predicts held-out batches better.

        Args:
            form: ``constant``, ``scale``, ``linear``, ``low-rank``, ``fuse`` (linear in the previous branch's output),
                ``tba`` or ``replaceme`` (the published forms: plain least squares, no bias).
            rank: of ``low-rank``.

        Raises:
            PassError: the site has no source for this form, with the reason.
        """
        if form in ("fuse", "replaceme"):
            return self._fitted("previous", "linear", rank, published=form == "replaceme")
        if form == "tba":
            return self._fitted("state", "linear", rank, published=True)
        own = [source for source in ("state", "normalised") if source in self.halves] or ["state"]
        tried = own if form != "constant" else own[:1]
        return min((self._fitted(source, form, rank) for source in tried), key=lambda fit: fit.unexplained)

    def _fitted(self, source: str, form: str, rank: int | None, *, published: bool = False) -> StandIn:
        if source not in self.halves:
            raise PassError(f"{self.refused.get(source, f'no fit was asked for from the source {source!r}')}.")
        even, odd = self.halves[source]
        whole, pairs = even + odd, ((even, odd), (odd, even))
        power, alone = max(whole.power(), 1e-300), not (even.rows and odd.rows)

        # The published objective leaves out a shift in the target: x T ~ y is t ~ x (T - I) without a bias.
        def solved(rows: Regression, form: str, strength: float) -> Map:
            return rows.solve(form, strength, rank=rank, biased=not published)

        def held_out_error(form: str, strength: float) -> float:
            return sum(other.error(solved(half, form, strength)) * other.rows for half, other in pairs) / whole.rows

        # The strength of the full map serves the one of low rank too, which is cut from it.
        judged, strength = "linear" if form == "low-rank" else form, 0.0 if published else STRENGTHS[2]
        if not (published or alone or form == "constant"):
            strength = min(STRENGTHS, key=lambda strength: held_out_error(judged, strength))
        fitted = solved(whole, form, strength)
        error = whole.error(fitted) if alone else held_out_error(form, strength)
        return StandIn(source, _beside_itself(fitted) if source == "previous" else fitted, error / power, strength)


def _beside_itself(fitted: Map) -> Map:
    """The map of r + A r + b."""
    (matrix,) = fitted.factors
    return Map((matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device),), fitted.bias)


@dataclass(frozen=True)
class Fit:
    """Collect the regressions of some sites in one sweep of the original graph and of the graph as it is now.

    `sites` are sites of the original that the current graph still has. Where only some tokens of the state behind a
    site are read later on (the class token, in the last block), the others do not count, unless `all_tokens` is set,
    as in the published forms. Changes nothing.
    """

    original: Graph = field(repr=False)
    sites: tuple[Site, ...]
    sources: tuple[str, ...] = SOURCES
    all_tokens: bool = False

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> dict[str, Fits]:
        """Fits by site name.

        Raises:
            PassError: no data, a site that is no longer in the graph, or values that are not finite.
        """
        sweep = Sweep(self, graph)
        for number, feeds in enumerate(data or ()):
            for (site, source), regression in sweep.batch(feeds):
                sums = sweep.sums[site, source]
                half = number % 2
                sums[half] = regression if sums[half] is None else sums[half] + regression
        return {site.name: sweep.fits(site.name) for site in self.sites}


class Sweep:
    """Both graphs of a fit, run side by side up to the last value that it needs."""

    def __init__(self, fit: Fit, graph: Graph) -> None:
        self.places = {site.name: place_of(graph, site) for site in fit.sites}
        self.sources = fit.sources
        roots = {site.root for site in fit.sites}
        self.before = Until(fit.original, roots)
        self.now = Until(graph, {name for place in self.places.values() for name in place.names()})
        self.read = {} if fit.all_tokens else read_parts(graph)
        self.dims = {site.name: site.channel_dim for site in fit.sites}
        self.roots = {site.name: site.root for site in fit.sites}
        self.sums: dict[tuple[str, str], list[Any]] = {}
        for name, place in self.places.items():
            for source in self.sources:
                if source not in place.refused:
                    self.sums[name, source] = [None, None]

    @torch.inference_mode()
    def batch(self, feeds: Mapping[str, torch.Tensor]) -> Iterator[tuple[tuple[str, str], Regression]]:
        """The sums of one batch, by site and source."""
        for name, source, regressor, target in self.rows(feeds):
            yield (name, source), Regression.of(regressor, target)

    @torch.inference_mode()
    def rows(self, feeds: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """Site, source, and the rows [tokens, width] of regressor and target in one batch.

        Raises:
            PassError: values that are not finite.
        """
        original, current = self.before.run(feeds), self.now.run(feeds)
        mask = feeds.get(MASK)
        for name, place in self.places.items():
            without = current[place.root] - current[place.branch]  # the trunk, and what branches beside this one add
            goal = original[self.roots[name]]
            for source in self.sources:
                if (name, source) not in self.sums:
                    continue
                regressor, target = current[place.source(source)], goal - without
                part = self.read.get(place.root)
                regressor, target = (
                    rows_of(_taken(value, part), self.dims[name], None if mask is None else _taken(mask, part))
                    for value in (regressor, target)
                )
                if not all(bool(torch.isfinite(rows).all()) for rows in (regressor, target)):
                    raise PassError(f"site {name} computes values that are NaN or infinite on the calibration data.")
                yield name, source, regressor, target

    def fits(self, name: str) -> Fits:
        """The sums of one site over all batches; raises PassError where there were none."""
        mine = {source: halves for (site, source), halves in self.sums.items() if site == name}
        if not all(any(halves) for halves in mine.values()):
            raise PassError("Fit got no batches of data.")
        complete = {source: _both(halves) for source, halves in mine.items()}
        return Fits(complete, dict(self.places[name].refused))


def _taken(value: torch.Tensor, part: Part | None) -> torch.Tensor:
    """The part of a value that is read."""
    if part is None:
        return value
    start = part.start % value.shape[part.axis]
    return value.narrow(part.axis, start, part.width)


def _both(halves: list[Regression | None]) -> tuple[Regression, Regression]:
    """Two halves; where there was one batch only, the other is empty."""
    one = next(half for half in halves if half is not None)
    empty = Regression(0, *(torch.zeros_like(value) for value in (one.r, one.t, one.rr, one.tr, one.tt)))
    even, odd = (empty if half is None else half for half in halves)
    return even, odd
