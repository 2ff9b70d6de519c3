"""Least-squares fits against solutions on stacked rows, and against branches of exactly the fitted form."""

import functools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.least_squares import STRENGTHS, Fit, Fits, Map, Regression
from passes.analysis.site_location import locate_site
from passes.base import PassError, apply
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from passes.rewrite.replace import Replace
from tests import samples
from tests.architectures import TIMM, TRANSFORMERS
from tests.samples import traced

BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}
# Normal equations square the condition number, about 1e2 here: 1e4 times the float64 epsilon 2e-16, with a margin.
NORMAL = 1e-9


def fitted(graph, *batches, original=None, sites=None, **options):
    sites = tuple(find_sites(graph)) if sites is None else tuple(sites)
    return apply(Fit(original or graph, sites, **options), graph, batches)


def rows_and_targets(rows=200, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(rows, width, generator=generator, dtype=torch.float64) + 3.0
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    t = r @ mixing + torch.randn(rows, width, generator=generator, dtype=torch.float64) - 1.0
    return r, t


def lstsq(r, t, *, bias):
    """Return A [width, width] and b [width] from an orthogonal decomposition of the stacked rows."""
    stacked = torch.cat([r, torch.ones(len(r), 1, dtype=r.dtype)], 1) if bias else r
    solution = torch.linalg.lstsq(stacked, t).solution
    return (solution[:-1].T, solution[-1]) if bias else (solution.T, None)


def close(left, right, tolerance=NORMAL):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- regressions


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_least_squares(bias):
    r, t = rows_and_targets()
    solution = Regression.of(r, t).solve("linear", biased=bias)
    matrix, offset = lstsq(r, t, bias=bias)
    close(solution.matrix(7), matrix)
    assert (solution.bias is None) == (not bias)
    if bias:
        close(solution.bias, offset)


@pytest.mark.parametrize("strength", [1e-4, 0.1, 10.0])
def test_ridge_is_the_closed_formula(strength):
    """Both sides are centred, so the intercept is not shrunk. The strength is relative to the mean variance."""
    r, t = rows_and_targets()
    rc, tc = r - r.mean(0), t - t.mean(0)
    gram = rc.T @ rc
    expected = torch.linalg.solve(gram + strength * gram.diagonal().mean() * torch.eye(7, dtype=r.dtype), rc.T @ tc).T
    solution = Regression.of(r, t).solve("linear", strength)
    close(solution.matrix(7), expected)
    close(solution.bias, t.mean(0) - expected @ r.mean(0))


def test_scale_is_a_regression_for_each_channel():
    r, t = rows_and_targets()
    solution = Regression.of(r, t).solve("scale")
    for channel in range(7):
        slope, offset = lstsq(r[:, [channel]], t[:, [channel]], bias=True)
        assert float(solution.factors[0][channel]) == pytest.approx(float(slope), rel=NORMAL)
        assert float(solution.bias[channel]) == pytest.approx(float(offset), rel=NORMAL)


def test_constant_is_the_mean():
    r, t = rows_and_targets()
    solution = Regression.of(r, t).solve("constant")
    assert solution.factors == ()
    close(solution.bias, t.mean(0))
    assert Regression.of(r, t).error(solution) == pytest.approx(
        float((t - t.mean(0)).square().sum(1).mean()), rel=NORMAL
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_is_optimal_for_its_rank(rank):
    """No other map of that rank has a lower error: not a truncated SVD of the linear map, and no perturbed map."""
    r, t = rows_and_targets()
    regression = Regression.of(r, t)
    solution = regression.solve("low-rank", rank=rank)
    best, full = regression.error(solution), regression.solve("linear")
    assert torch.linalg.matrix_rank(solution.matrix(7)) == rank
    assert [tuple(factor.shape) for factor in solution.factors] == [(rank, 7), (7, rank)]
    u, s, v = torch.linalg.svd(full.matrix(7))
    truncated = u[:, :rank] * s[:rank] @ v[:rank]
    generator = torch.Generator().manual_seed(1)
    others = [truncated]
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            steps = [size * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in solution.factors]
            down, up = (factor + step for factor, step in zip(solution.factors, steps, strict=True))
            others.append(up @ down)
    for other in others:
        bias = t.mean(0) - other @ r.mean(0)
        assert regression.error(Map((other,), bias)) >= best * (1 - NORMAL)
    assert best >= regression.error(full) * (1 - NORMAL)


def test_full_rank_equals_linear_and_error_grows_with_lower_rank():
    r, t = rows_and_targets()
    regression = Regression.of(r, t)
    close(regression.solve("low-rank", rank=7).matrix(7), regression.solve("linear").matrix(7))
    errors = [regression.error(regression.solve("low-rank", rank=rank)) for rank in range(1, 8)]
    assert errors == sorted(errors, reverse=True)
    assert regression.solve("low-rank", rank=99).factors[0].shape == (7, 7)
    assert Regression.of(*rows_and_targets(width=12)).solve("low-rank").factors[0].shape == (3, 12)  # a quarter


@pytest.mark.parametrize("form", ["constant", "scale", "linear", "low-rank"])
@pytest.mark.parametrize("biased", [True, False])
def test_error_from_sums_equals_error_of_rows(form, biased):
    if form == "constant" and not biased:
        return
    (r, t), (other_r, other_t) = rows_and_targets(), rows_and_targets(seed=5)
    solution = Regression.of(r, t).solve(form, 1e-3, rank=2, biased=biased)
    offset = 0.0 if solution.bias is None else solution.bias
    for x, y in ((r, t), (other_r, other_t)):
        expected = float((x @ solution.matrix(7).T + offset - y).square().sum(1).mean())
        assert Regression.of(x, y).error(solution) == pytest.approx(expected, rel=NORMAL)
    assert Regression.of(r, t).power() == pytest.approx(float(t.square().sum(1).mean()), rel=NORMAL)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 6))
def test_sums_of_parts_equal_sums_of_all_rows(parts, width):
    """Only the order of float64 additions differs: 1e-12."""
    r, t = rows_and_targets(sum(parts), width)
    whole = Regression.of(r, t)
    total = functools.reduce(
        lambda left, right: left + right,
        (Regression.of(a, b) for a, b in zip(r.split(parts), t.split(parts), strict=True)),
    )
    assert total.rows == whole.rows == sum(parts)
    for name in ("r", "t", "rr", "tr", "tt"):
        assert getattr(total, name).dtype == torch.float64
        close(getattr(total, name), getattr(whole, name), 1e-12)


def test_channels_without_variance_get_no_slope():
    """A constant channel far from zero: rounding errors in its variance must not produce a slope."""
    r, t = rows_and_targets()
    r[:, 2] = 1234.567
    regression = Regression.of(r, t)
    for form in ("scale", "linear"):
        solution = regression.solve(form)
        assert float(solution.matrix(7).abs().max()) < 100
        kept = [channel for channel in range(7) if channel != 2]
        without = Regression.of(r[:, kept], t[:, kept]).solve(form)
        close(solution.matrix(7)[kept][:, kept], without.matrix(6), 1e-6)  # centring 1e3 costs six digits of a variance


@pytest.mark.parametrize(("form", "rank"), [("quadratic", None), ("low-rank", 0)])
def test_unknown_form_or_rank_raises(form, rank):
    with pytest.raises(PassError, match="expected one of constant, scale, linear, low-rank and a rank of at least 1"):
        Regression.of(*rows_and_targets()).solve(form, rank=rank)


# ------------------------------------------------------------------------------------------------------------ graphs


class Branches(nn.Module):
    """A stem with a linear map, then residual branches."""

    def __init__(self, width, *branches):
        super().__init__()
        self.stem, self.branches = nn.Linear(width, width), nn.ModuleList(branches)

    def forward(self, x):
        x = torch.sin(self.stem(x))
        for branch in self.branches:
            x = x + branch(x)
        return x


def small(width, *branches, tokens=5):
    torch.manual_seed(1)
    model = models.load(Branches(width, *branches).eval(), example_inputs=torch.rand(2, tokens, width))
    return trace(model)


def batches_of(count, width, *, rows=8, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(rows, tokens, width, generator=generator)} for _ in range(count)]


def dropped_and_replaced(graph, sites, fits, form, *, drop=(), rank=None):
    """Return the graph with the sites in `drop` dropped and the last of `sites` replaced."""
    edited = graph.fork()
    apply(Drop(tuple(site.name for site in drop)), edited)
    site = sites[-1]
    apply(Replace(site, fits[site.name].stand_in(form, rank=rank)), edited)
    return edited


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# A float32 graph computes its states to 1e-7, and the smallest ridge, 1e-8, shrinks directions of little variance.
REPRODUCED = 1e-5

shapes = st.tuples(st.integers(2, 12), st.integers(1, 6), st.integers(2, 5))  # width, tokens, batches


@settings(max_examples=15, deadline=None)
@given(shapes, st.booleans(), st.sampled_from([[0], [1], [0, 1]]))
def test_affine_branch_is_reproduced(shape, normalised, span):
    """Fit an affine branch of the state or its norm, or a span of two: the first is dropped, the second fitted."""
    width, tokens, count = shape
    normalised = normalised and span == [0] and width > 3  # two channels have one normalised direction only

    def branch():
        linear = nn.Linear(width, width)
        return nn.Sequential(nn.LayerNorm(width), linear) if normalised else linear

    graph = small(width, branch(), branch() if not normalised else nn.Sequential(nn.Linear(width, width), nn.Tanh()))
    sites = find_sites(graph)
    data = batches_of(count, width, tokens=tokens, rows=60)
    chosen = [sites[position] for position in span]
    edited = graph.fork()
    apply(Drop(tuple(site.name for site in chosen[:-1])), edited)
    fits = fitted(edited, *data, original=graph, sites=chosen[-1:])
    stand_in = fits[chosen[-1].name].stand_in("linear")
    apply(Replace(chosen[-1], stand_in), edited)
    assert stand_in.unexplained < REPRODUCED**2
    feeds = batches_of(1, width, tokens=tokens, rows=3, seed=9)[0]
    assert relative(run(edited, feeds)[0], run(graph, feeds)[0]) < REPRODUCED


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.scale + self.shift


@pytest.mark.parametrize(("form", "rank"), [("scale", None), ("low-rank", 2), ("low-rank", 3)])
def test_branch_of_a_simpler_form_is_reproduced(form, rank):
    torch.manual_seed(0)
    branch = Scaled(8) if form == "scale" else nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    graph = small(8, branch, nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    sites = find_sites(graph)[:1]
    fits = fitted(graph, *batches_of(4, 8, rows=40), sites=sites)
    edited = dropped_and_replaced(graph, sites, fits, form, rank=rank)
    feeds = batches_of(1, 8, seed=7)[0]
    assert relative(run(edited, feeds)[0], run(graph, feeds)[0]) < REPRODUCED
    assert fits[sites[0].name].stand_in("constant").unexplained > 1e-3
    if form == "low-rank":
        assert fits[sites[0].name].stand_in(form, rank=1).unexplained > 1e-3


def states(graph, feeds, *names):
    """Return the values of named nodes as float64 rows [tokens, width]."""
    return [value.double().flatten(0, -2) for value in samples.states(graph, feeds, *names)]


def test_tba_maps_the_whole_state():
    """TBA: T = argmin |X T - Y| over the state before and behind the site, no bias; here I + A^T."""
    _, graph, sites = traced("vit")
    feeds = {"x": torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
    site = sites[2]
    stand_in = fitted(graph, feeds, sites=[site], all_tokens=True)[site.name].stand_in("tba")
    x, y = states(graph, feeds, site.trunk, site.root)
    expected = torch.linalg.lstsq(x, y).solution
    assert stand_in.map.bias is None
    assert stand_in.strength == 0.0
    # The states are float32; subtracting them rounds the target to 1e-7, which a condition of 1e2 makes 1e-5.
    close(torch.eye(16) + stand_in.map.matrix(16).T, expected, 1e-4)
    error = float((x @ expected - y).square().sum() / (y - x).square().sum())
    assert stand_in.unexplained == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("dropped", [False, True])
def test_replaceme_maps_the_previous_branch(dropped):
    """ReplaceMe: T = argmin |M T + Y - L|, with M the branch last added, Y the trunk it was added to."""
    _, graph, sites = traced("vit")
    feeds = {"x": torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
    site, now = sites[3], graph.fork()
    apply(Drop((sites[2].name,) if dropped else ()), now)
    stand_in = fitted(now, feeds, original=graph, sites=[site], all_tokens=True)[site.name].stand_in("replaceme")
    m, x = states(now, feeds, *((sites[1].branch, sites[1].add) if dropped else (sites[2].branch, sites[2].add)))
    (after,) = states(graph, feeds, site.root)
    expected = torch.linalg.lstsq(m, after - (x - m)).solution
    assert (stand_in.source, stand_in.map.bias) == ("previous", None)
    close(stand_in.map.matrix(16).T, expected, 1e-3)  # m is of size 1e-2 beside states of 1, rounded to 1e-7
    error = (m @ expected + x - m - after).square().sum() / (after - x).square().sum()
    assert stand_in.unexplained == pytest.approx(float(error), rel=1e-3)


def test_fit_compensates_for_a_dropped_site():
    """The target is the state of the original graph, so the constant of the second site includes the first mean."""
    model, graph, sites = traced("vit")
    now = graph.fork()
    apply(Drop((sites[1].name,)), now)
    fits = fitted(now, model.example, original=graph, sites=[sites[2]], all_tokens=True)[sites[2].name]
    (after,) = states(graph, model.example, sites[2].root)
    (before,) = states(now, model.example, sites[0].root)
    bias = fits.stand_in("constant").map.bias
    close(bias, (after - before).mean(0), 1e-6)  # float32 states
    alone = fitted(graph, model.example, sites=[sites[2]], all_tokens=True)[sites[2].name].stand_in("constant")
    assert float((bias - alone.map.bias).abs().max()) > 1e-3


def test_unexplained_is_relative_to_the_same_target_for_all_sources():
    """Fuse and linear are measured against the same |t|^2, so a plan can compare them."""
    _, graph, sites = traced("vit")
    site, batches = sites[1], [{"x": torch.rand(9, 3, 32, 32)} for _ in range(4)]
    fits = fitted(graph, *batches, sites=[site])[site.name]
    even, odd = fits.halves["previous"]
    assert (even + odd).power() == pytest.approx(sum(half.tt.sum().item() for half in fits.halves["state"]) / (36 * 5))
    x, m, y = states(graph, batches[0], site.trunk, sites[0].branch, site.root)
    fuse = fits.stand_in("fuse")
    mapped = x - m + m @ fuse.map.matrix(16).T + fuse.map.bias
    assert float((mapped - y).square().sum() / (y - x).square().sum()) == pytest.approx(fuse.unexplained, rel=0.3)
    assert float((mapped - y).norm()) < float((x - y).norm())


def test_fuse_of_an_unrelated_target_is_the_identity():
    """A map folded into the previous branch shrinks to the identity; zero would drop that branch too."""
    halves = tuple(Regression.of(rows_and_targets(seed=seed)[0], torch.ones(200, 7)) for seed in range(2))
    stand_in = Fits({"previous": halves}, {}).stand_in("fuse")
    close(stand_in.map.matrix(7), torch.eye(7, dtype=torch.float64))
    close(stand_in.map.bias, torch.ones(7, dtype=torch.float64))


def test_source_with_lower_error_is_selected():
    torch.manual_seed(0)
    graph = small(8, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    fits = fitted(graph, *batches_of(4, 8, rows=40))
    first, second = (fits[site.name].stand_in("linear") for site in find_sites(graph))
    assert (first.source, second.source) == ("normalised", "state")
    only = fitted(graph, *batches_of(4, 8, rows=40), sources=("state",))
    assert only[find_sites(graph)[0].name].stand_in("linear").source == "state"
    assert first.unexplained < only[find_sites(graph)[0].name].stand_in("linear").unexplained


def test_strength_minimises_held_out_error():
    """Few rows per feature need a stronger ridge than many rows."""
    torch.manual_seed(0)
    noisy = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh())
    graph = small(24, noisy)
    (site,) = find_sites(graph)
    few, many = (fitted(graph, *batches_of(2, 24, rows=rows))[site.name] for rows in (6, 800))
    assert few.stand_in("linear").strength > many.stand_in("linear").strength
    for fits in (few, many):
        even, odd = fits.halves["state"]

        def held_out(strength, even=even, odd=odd):
            pairs = (even, odd), (odd, even)
            return sum(test.error(train.solve("linear", strength)) * test.rows for train, test in pairs)

        best = fits.stand_in("linear")
        assert best.strength == min(STRENGTHS, key=held_out)
        assert best.unexplained == pytest.approx(held_out(best.strength) / float((even + odd).tt.sum()))


def test_even_and_odd_batches_are_the_halves():
    graph = small(6, nn.Linear(6, 6))
    (site,) = find_sites(graph)
    even, odd = fitted(graph, *batches_of(3, 6, rows=4))[site.name].halves["state"]
    assert (even.rows, odd.rows) == (40, 20)


@pytest.mark.parametrize("form", ["constant", "scale", "linear", "low-rank", "tba", "replaceme", "fuse"])
def test_one_batch_is_enough(form):
    _, graph, sites = traced("vit")
    feeds = {"x": torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
    stand_in = fitted(graph, feeds, sites=[sites[1]])[sites[1].name].stand_in(form)
    assert all(bool(torch.isfinite(factor).all()) for factor in stand_in.map.factors)
    assert 0.0 < stand_in.unexplained < 1.0  # no held-out rows: the error of the fit itself


@pytest.mark.parametrize("name", ["hf_bert", "hf_llama"])
def test_padding_changes_nothing(name):
    """Masked positions add exact zeros in another order, so the states differ by float32 rounding."""
    model, graph, sites = traced(name)
    short = {key: value[:, :5] for key, value in model.example.items()}
    short["attention_mask"] = torch.ones_like(short["attention_mask"])
    padded = {key: torch.nn.functional.pad(value, (0, 6), value=3) for key, value in short.items()}
    padded["attention_mask"] = torch.nn.functional.pad(short["attention_mask"], (0, 6))
    if "token_type_ids" in padded:
        padded["token_type_ids"] = torch.nn.functional.pad(short["token_type_ids"], (0, 6))
    unpadded_fits, padded_fits = (fitted(graph, feeds) for feeds in (short, padded))
    for site in sites:
        assert unpadded_fits[site.name].halves.keys() == padded_fits[site.name].halves.keys()
        for source, halves in unpadded_fits[site.name].halves.items():
            other = padded_fits[site.name].halves[source][0]
            assert halves[0].rows == other.rows == 10
            close(halves[0].rr, other.rr, 1e-5)
            close(halves[0].tr, other.tr, 1e-5)


def test_parallel_branches_are_fitted_independently():
    """x + a(x) + m(x): the target of a excludes m, also after the trunk changed because block 0 was dropped."""
    model, graph, sites = traced("vit_parallel_scaling")
    for now, trunk in ((graph, sites[2].trunk), (graph.fork(), sites[0].trunk)):
        if now is not graph:
            apply(Drop((sites[0].name, sites[1].name)), now)
        fits = fitted(now, model.example, original=graph, sites=sites[2:], all_tokens=True)
        (after,) = states(graph, model.example, sites[2].root)
        before, attention, mlp = states(now, model.example, trunk, sites[2].branch, sites[3].branch)
        for site, parallel in ((sites[2], mlp), (sites[3], attention)):
            assert locate_site(now, site).trunk == trunk
            bias = fits[site.name].stand_in("constant").map.bias
            close(bias, (after - before - parallel).mean(0), 1e-6)  # float32 states


@pytest.mark.parametrize("name", ["hf_phi", "hf_gpt_neox", "vit_parallel_scaling"])
@pytest.mark.parametrize("dropped", [0, 1])
def test_the_remaining_parallel_branch_is_still_a_site(name, dropped):
    """GPT-NeoX adds its branches to each other first; after one is dropped, another node adds the other."""
    model, graph, sites = traced(name)
    now = graph.fork()
    apply(Drop((sites[dropped].name,)), now)
    remaining = sites[1 - dropped]
    location = locate_site(now, remaining)
    assert (location.branch, location.trunk) == (remaining.branch, sites[0].trunk)
    stand_in = fitted(now, model.example, original=graph, sites=[remaining])[remaining.name].stand_in("linear")
    apply(Replace(remaining, stand_in), now)
    assert not torch.equal(run(now, model.example)[0], run(graph, model.example)[0])


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        return torch.tanh(x + self.a(x).sin() + self.b(x).cos() + self.c(x).tanh())


def test_root_of_three_parallel_branches_without_the_last():
    torch.manual_seed(0)
    graph = trace(models.load(Three().eval(), example_inputs=torch.rand(2, 6)))
    a, b, c = find_sites(graph)
    now, feeds = graph.fork(), {"x": torch.randn(50, 6)}
    apply(Drop((c.name,)), now)
    assert locate_site(now, a).root == b.add
    bias = fitted(now, feeds, original=graph, sites=[a])[a.name].stand_in("constant").map.bias
    one, three = states(graph, feeds, a.branch, c.branch)
    close(bias, (one + three).mean(0), 1e-6)  # float32 states


# ----------------------------------------------------------------------------------------------- contracts and refusals


def test_fit_does_not_change_the_graph():
    model, graph, sites = traced("vit")
    before = run(graph, model.example)[0]
    code, names = graph.module.code, [name for name, _ in graph.module.named_parameters()]
    fits = fitted(graph, model.example)
    assert set(fits) == {site.name for site in sites}
    assert graph.module.code == code
    assert [name for name, _ in graph.module.named_parameters()] == names
    assert torch.equal(run(graph, model.example)[0], before)


def test_data_is_read_lazily_and_freed():
    """At most one batch is alive when the next is created, and the kept sums have no token axis."""
    graph = small(6, nn.Linear(6, 6), nn.Linear(6, 6))
    handed, alive = [], []

    def batches():
        for _ in range(8):
            alive.append(sum(reference() is not None for reference in handed))
            rows = torch.randn(16, 5, 6)
            handed.append(weakref.ref(rows))
            feeds = {"x": rows}
            del rows
            yield feeds
            del feeds

    fits = apply(Fit(graph, find_sites(graph)), graph, batches())
    assert max(alive) <= 1
    for halves in (halves for fit in fits.values() for halves in fit.halves.values()):
        for half in halves:
            assert half.rows == 4 * 80
            sizes = {size for name in ("r", "t", "rr", "tr", "tt") for size in getattr(half, name).shape}
            assert sizes == {6}


def test_errors_state_the_reason():
    model, graph, sites = traced("vit")
    with pytest.raises(PassError, match="needs calibration data"):
        apply(Fit(graph, sites), graph)
    with pytest.raises(PassError, match="no batches"):
        fitted(graph)
    first = fitted(graph, model.example, sites=sites[:1])[sites[0].name]
    for form in ("fuse", "replaceme"):
        with pytest.raises(PassError, match="that branch does not end in a linear map"):
            first.stand_in(form)
    with pytest.raises(PassError, match="expected one of constant"):
        first.stand_in("cubic")
    only = fitted(graph, model.example, sites=sites[1:2], sources=("state",))[sites[1].name]
    with pytest.raises(PassError, match="the source 'previous' was not fitted"):
        only.stand_in("fuse")
    other = fitted(graph, model.example, sites=sites[1:2], sources=("previous",))[sites[1].name]
    with pytest.raises(PassError, match="the source 'state' was not fitted"):
        other.stand_in("linear")
    dropped = graph.fork()
    apply(Drop((sites[2].name,)), dropped)
    with pytest.raises(PassError, match=r"the branch of blocks\.1\.attn is no longer in the graph"):
        fitted(dropped, model.example, original=graph, sites=sites)


def test_error_names_the_site_with_non_finite_values():
    model = BY_NAME["vit"].load()
    with torch.no_grad():
        model.module.blocks[1].mlp.fc2.weight.fill_(math.nan)
    with pytest.raises(PassError, match=r"site blocks\.1\.mlp computes values that are NaN or infinite"):
        fitted(trace(model), model.example)


def test_dead_tokens_are_excluded_from_the_fit():
    """After the last block only the class token is read, so only its rows enter the fit."""
    _, graph, sites = traced("vit")
    feeds = {"x": torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
    last, earlier = sites[3], sites[1]
    x, y = (value.reshape(40, -1, 16)[:, 0] for value in states(graph, feeds, last.trunk, last.root))
    fits = fitted(graph, feeds, sites=[last, earlier])
    assert fits[last.name].halves["state"][0].rows == 40
    assert fits[earlier.name].halves["state"][0].rows > 40
    close(fits[last.name].stand_in("constant").map.bias, (y - x).mean(0), 1e-6)  # float32 states, subtracted
    everything = fitted(graph, feeds, sites=[last], all_tokens=True)[last.name]
    assert everything.halves["state"][0].rows == fits[earlier.name].halves["state"][0].rows
