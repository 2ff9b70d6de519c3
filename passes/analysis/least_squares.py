"""Closed-form replacements of residual branches, fitted by least squares.

Let x be the state before a site in the current graph and y the state after the site in the *original* graph. The
target is t = y - x, so a fitted map also corrects the shift that earlier edits caused. A map that is fitted after the
preceding sites were dropped replaces the whole span. The least-squares map is t ~ A r + b. The regressor r is

- ``state``: x itself (TOAST/TBA, Cannistraci et al., arXiv 2410.04941, made affine and residual);
- ``normalised``: the input of the branch's first linear map, mostly the normalised x;
- ``previous``: the branch output m that was last added to x (ReplaceMe, Shopkhoev et al., NeurIPS 2025, made affine).
  The replacement maps m to m + A m + b and can be folded into the output projection of that branch.

Sums are accumulated in float64 over all unpadded tokens; activations are freed after each batch. The ridge strength is
chosen by two-fold cross-validation over even and odd batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from passes.analysis.redundancy import MASK, rows_of, without_mask
from passes.analysis.site_location import locate_site
from passes.analysis.token_liveness import live_parts
from passes.base import PassError, over_batches
from passes.execute.interpreter import PartialRun
from passes.graph.graph import Graph, Site

if TYPE_CHECKING:
    from passes.analysis.slicing_rules import AxisRange

SOURCES = ("state", "normalised", "previous")
FORMS = ("constant", "scale", "linear", "low-rank")
STRENGTHS = (1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean variance of a regressor's features


@dataclass(frozen=True)
class Map:
    """Fitted map r -> A r + b, in float64.

    `factors` is empty for a constant. It holds one vector [width] for a per-channel scale, one matrix [width, width]
    for a linear map, and two matrices, [rank, width] then [width, rank], for a low-rank map.
    """

    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    def matrix(self, width: int) -> torch.Tensor:
        """Return A as a full matrix [width, width]."""
        if not self.factors:
            return torch.zeros(width, width, dtype=torch.float64)
        if len(self.factors) == 2:
            return self.factors[1] @ self.factors[0]
        (factor,) = self.factors
        return torch.diag(factor) if factor.ndim == 1 else factor


@dataclass(frozen=True)
class Regression:
    """Sufficient statistics of a regression of t [rows, width] on r [rows, width], in float64.

    `rr` is the sum of r r^T, `tr` of t r^T (both [width, width]), `tt` of t squared [width]. Statistics of several
    batches are added with ``+``.
    """

    rows: int
    r: torch.Tensor
    t: torch.Tensor
    rr: torch.Tensor
    tr: torch.Tensor
    tt: torch.Tensor

    @staticmethod
    def of(regressor: torch.Tensor, target: torch.Tensor) -> Regression:
        """Compute the sums of one batch of rows in float64."""
        r, t = regressor.double(), target.double()
        return Regression(len(r), r.sum(0), t.sum(0), r.T @ r, t.T @ r, (t * t).sum(0))

    def __add__(self, other: Regression) -> Regression:
        """Return the sums over the rows of both."""
        mine = (self.r, self.t, self.rr, self.tr, self.tt)
        theirs = (other.r, other.t, other.rr, other.tr, other.tt)
        return Regression(self.rows + other.rows, *(a + b for a, b in zip(mine, theirs, strict=True)))

    def error(self, fitted: Map) -> float:
        """Return the mean of |A r + b - t|^2 over the rows, computed from the sums."""
        a = fitted.matrix(len(self.r))
        b = torch.zeros_like(self.t) if fitted.bias is None else fitted.bias
        squares = (a @ self.rr * a).sum() + self.rows * (b * b).sum() + self.tt.sum()
        mixed = 2 * ((a @ self.r) * b).sum() - 2 * (a * self.tr).sum() - 2 * (b * self.t).sum()
        return max(float(squares + mixed), 0.0) / max(self.rows, 1)

    def power(self) -> float:
        """Return the mean of |t|^2, which is the error of dropping the branch."""
        return float(self.tt.sum()) / max(self.rows, 1)

    def solve(self, form: str, strength: float = 0.0, *, rank: int | None = None, biased: bool = True) -> Map:
        """Return the ridge solution of a form.

        Args:
            form: one of `FORMS`.
            strength: ridge strength relative to the mean variance of the regressor's features.
            rank: rank of a ``low-rank`` map, solved by reduced-rank regression (Izenman 1975), which is optimal for
                these rows; None is a quarter of the width.
            biased: False fits a map without bias on uncentred rows, as in TBA and ReplaceMe.

        Raises:
            PassError: the form does not exist, or the rank is below 1.
        """
        if form not in FORMS or (rank is not None and rank < 1):
            raise PassError(
                f"found form {form!r} and rank {rank}; expected one of {', '.join(FORMS)} and a rank of at least 1."
            )
        mean_r, mean_t, rr, tr = self._centred if biased else (self.r * 0, self.t * 0, self.rr, self.tr)
        ridge = max(strength * float(rr.diagonal().mean()), torch.finfo(torch.float64).tiny)
        # Centring leaves rounding errors of this size in directions without variance, which carry no information.
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
        """Eigendecomposition of the centred sums, shared by all ridge strengths."""
        _, _, rr, tr = self._centred
        return _spectrum(rr, tr)


def _spectrum(rr: torch.Tensor, tr: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values, vectors = torch.linalg.eigh(rr)
    return values, vectors, tr @ vectors


def matrix_times(factors: tuple[torch.Tensor, ...], vector: torch.Tensor) -> torch.Tensor:
    """Return A r for one vector r [width], with A given by its factors."""
    for factor in factors:
        vector = factor * vector if factor.ndim == 1 else factor @ vector
    return vector


def _reduced(matrix: torch.Tensor, rr: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Project a full solution on the `rank` directions of largest variance of its predictions; None is a quarter."""
    _, directions = torch.linalg.eigh(matrix @ rr @ matrix.T)
    kept = directions[:, -min(max(len(matrix) // 4, 1) if rank is None else rank, len(matrix)) :]
    return kept.T @ matrix, kept


@dataclass(frozen=True)
class Replacement:
    """Replacement of a branch: a map of a source, and the share of |t|^2 that the map leaves unexplained.

    `unexplained` is measured on held-out batches, or on the fitted batch if there is only one. Dropping the branch
    leaves 1 for every source. `strength` is the ridge strength.
    """

    source: str
    map: Map = field(repr=False)
    unexplained: float
    strength: float = 0.0


@dataclass(frozen=True)
class Fits:
    """Regressions of one site by source, as sums of even and of odd batches; refused sources map to the reason."""

    halves: Mapping[str, tuple[Regression, Regression]]
    refused: Mapping[str, str]

    def stand_in(self, form: str, *, rank: int | None = None) -> Replacement:
        """Return the replacement of a form with the least held-out error over its sources.

        Args:
            form: ``constant``, ``scale``, ``linear``, ``low-rank``, ``fuse`` (linear in the previous branch's output),
                ``tba`` or ``replaceme`` (the published forms: plain least squares, no bias).
            rank: rank of a ``low-rank`` map.

        Raises:
            PassError: the site has no source for this form; the message states the reason.
        """
        if form in ("fuse", "replaceme"):
            return self._fitted("previous", "linear", rank, published=form == "replaceme")
        if form == "tba":
            return self._fitted("state", "linear", rank, published=True)
        available = [source for source in ("state", "normalised") if source in self.halves] or ["state"]
        candidates = available if form != "constant" else available[:1]
        return min((self._fitted(source, form, rank) for source in candidates), key=lambda fit: fit.unexplained)

    def _fitted(self, source: str, form: str, rank: int | None, *, published: bool = False) -> Replacement:
        if source not in self.halves:
            raise PassError(
                f"{self.refused.get(source, f'the source {source!r} was not fitted; add it to `sources`')}."
            )
        even, odd = self.halves[source]
        whole, pairs = even + odd, ((even, odd), (odd, even))
        power, single_batch = max(whole.power(), 1e-300), not (even.rows and odd.rows)

        # Without a bias the published objective x T ~ y equals t ~ x (T - I).
        def solved(rows: Regression, form: str, strength: float) -> Map:
            return rows.solve(form, strength, rank=rank, biased=not published)

        def held_out_error(form: str, strength: float) -> float:
            return sum(test.error(solved(train, form, strength)) * test.rows for train, test in pairs) / whole.rows

        # A low-rank map is projected from the linear one and takes over its strength.
        validated_form, strength = "linear" if form == "low-rank" else form, 0.0 if published else STRENGTHS[2]
        if not (published or single_batch or form == "constant"):
            strength = min(STRENGTHS, key=lambda strength: held_out_error(validated_form, strength))
        fitted = solved(whole, form, strength)
        error = whole.error(fitted) if single_batch else held_out_error(form, strength)
        return Replacement(source, _plus_identity(fitted) if source == "previous" else fitted, error / power, strength)


def _plus_identity(fitted: Map) -> Map:
    """Return the map r -> r + A r + b."""
    (matrix,) = fitted.factors
    return Map((matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device),), fitted.bias)


@dataclass(frozen=True)
class Fit:
    """Analysis pass that collects the regressions of sites in one sweep of the original and the current graph.

    `sites` are sites of the original graph that the current graph still has. If later operators read only some tokens
    of the state after a site (the class token, in the last block), only those tokens count. `all_tokens` counts every
    token, as the published forms do. The pass does not change the graph.
    """

    original: Graph = field(repr=False)
    sites: tuple[Site, ...]
    sources: tuple[str, ...] = SOURCES
    all_tokens: bool = False

    rewrites: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None) -> dict[str, Fits]:
        """Return the fits by site name.

        Raises:
            PassError: there is no data, a site is no longer in the graph, or values are not finite.
        """
        sweep = Sweep(self, graph)
        for number, regressions in enumerate(over_batches(sweep.batch, data)):
            for (site, source), regression in regressions:
                sums = sweep.sums[site, source]
                half = number % 2
                sums[half] = regression if sums[half] is None else sums[half] + regression
        return {site.name: sweep.fits(site.name) for site in self.sites}


class Sweep:
    """Joint execution of the original and the current graph of a fit, up to the last value that the fit needs."""

    def __init__(self, fit: Fit, graph: Graph) -> None:
        self.places = {site.name: locate_site(graph, site) for site in fit.sites}
        self.sources = fit.sources
        roots = {site.root for site in fit.sites}
        self.before = PartialRun(fit.original, roots)
        self.now = PartialRun(graph, {name for place in self.places.values() for name in place.names()})
        self.read = {} if fit.all_tokens else live_parts(graph)
        self.dims = {site.name: site.channel_dim for site in fit.sites}
        self.roots = {site.name: site.root for site in fit.sites}
        self.unmasked = without_mask(graph)
        self.sums: dict[tuple[str, str], list[Any]] = {}
        for name, place in self.places.items():
            for source in self.sources:
                if source not in place.refused:
                    self.sums[name, source] = [None, None]

    @torch.inference_mode()
    def batch(self, feeds: Mapping[str, torch.Tensor]) -> Iterator[tuple[tuple[str, str], Regression]]:
        """Yield the sums of one batch with their site and source."""
        for name, source, regressor, target in self.rows(feeds):
            yield (name, source), Regression.of(regressor, target)

    @torch.inference_mode()
    def rows(self, feeds: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
        """Yield site, source, and the rows [tokens, width] of regressor and target in one batch.

        Raises:
            PassError: values are not finite.
        """
        original, current = self.before.run(feeds), self.now.run(feeds)
        for name, place in self.places.items():
            mask = None if place.root in self.unmasked else feeds.get(MASK)
            without_branch = current[place.root] - current[place.branch]  # the trunk plus any parallel branches
            state_after = original[self.roots[name]]
            for source in self.sources:
                if (name, source) not in self.sums:
                    continue
                regressor, target = current[place.source(source)], state_after - without_branch
                part = self.read.get(place.root)
                regressor, target = (
                    rows_of(_read_part(value, part), self.dims[name], None if mask is None else _read_part(mask, part))
                    for value in (regressor, target)
                )
                if not all(bool(torch.isfinite(rows).all()) for rows in (regressor, target)):
                    raise PassError(f"site {name} computes values that are NaN or infinite on the calibration data.")
                yield name, source, regressor, target

    def fits(self, name: str) -> Fits:
        """Return the sums of one site over all batches. Raises PassError if there was no batch."""
        by_source = {source: halves for (site, source), halves in self.sums.items() if site == name}
        if not all(any(halves) for halves in by_source.values()):
            raise PassError("Fit got no batches of data.")
        complete = {source: _fill_missing(halves) for source, halves in by_source.items()}
        return Fits(complete, dict(self.places[name].refused))


def _read_part(value: torch.Tensor, part: AxisRange | None) -> torch.Tensor:
    """Return the part of a value that later operators read."""
    if part is None:
        return value
    start = part.start % value.shape[part.axis]
    return value.narrow(part.axis, start, part.width)


def _fill_missing(halves: list[Regression | None]) -> tuple[Regression, Regression]:
    """Return both halves; after a single batch the missing half is empty."""
    one = next(half for half in halves if half is not None)
    empty = Regression(0, *(torch.zeros_like(value) for value in (one.r, one.t, one.rr, one.tr, one.tt)))
    even, odd = (empty if half is None else half for half in halves)
    return even, odd
