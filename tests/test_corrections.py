"""Tests of benchmarks/corrections.py and its parts, against enumeration, planted maps and the eager model."""

import itertools

import numpy as np
import pytest
import torch

from compressor.lower.traced_model import load
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.analysis.least_squares import Regression
from passes.execute.interpreter import run
from tests.samples import digits
from tests.test_benchmarks import script


@pytest.fixture(scope="module")
def bench():
    settings = Settings(drop="auto", cost="macs", samples=80, search_samples=8)
    return script("paired").Bench(load(settings, Steps(None)), settings)


def pairs_of(bench, first):
    return script("paired").attentions_and_mlps(bench.subject.sites)[first : first + 2]


def rows_of(model, count=8):
    return {name: torch.as_tensor(value)[:count] for name, value in model.example.items()}


@pytest.mark.parametrize("seed", range(20))
def test_the_program_finds_the_best_of_all_plans(seed):
    rng = np.random.default_rng(seed)
    sites = {f"s{number}": ("drop", "scale", "linear")[: rng.integers(1, 4)] for number in range(5)}
    effects = {
        (site, action): (rng.normal(0.3, 0.3), rng.random()) for site, actions in sites.items() for action in actions
    }
    saving = 0.6 * sum(max(effects[site, action][1] for action in actions) for site, actions in sites.items())
    names = sorted(effects)
    conflicts = [(names[0], names[-1]), (names[1], names[1])]
    choices = itertools.product(*((None, *actions) for actions in sites.values()))
    plans = [{site: action for site, action in zip(sites, choice, strict=True) if action} for choice in choices]

    def allowed(plan):
        taken = set(plan.items())
        saved = sum(effects[each][1] for each in taken)
        return saved >= saving and not any(set(conflict) <= taken for conflict in conflicts)

    best = min((sum(effects[each][0] for each in plan.items()) for plan in plans if allowed(plan)), default=None)
    module = script("knapsack")
    if best is None:
        with pytest.raises(module.NoPlanError, match="no plan saves"):
            module.solved(effects, saving, conflicts)
        return
    found = module.solved(effects, saving, conflicts)
    assert allowed(found)
    assert sum(effects[each][0] for each in found.items()) == pytest.approx(best, abs=1e-6)


def regressions(maps, rows=400, width=12, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    made = []
    for matrix, bias in maps:
        r = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ torch.randn(
            width, width, generator=generator, dtype=torch.float64
        )
        t = r @ matrix.T + bias + noise * torch.randn(rows, width, generator=generator, dtype=torch.float64)
        made.append(Regression.of(r + 1.0, t))
    return made


def test_maps_with_a_shared_basis_are_found_exactly():
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    maps = [
        (torch.randn(12, 3, generator=generator, dtype=torch.float64) @ basis, torch.arange(12.0).double())
        for _ in range(3)
    ]
    fits = regressions(maps)
    found = script("corrections").shared_basis(fits, 3, 1e-12)
    assert all(torch.equal(fitted.factors[0], found[0].factors[0]) for fitted in found)
    for fit, fitted, (matrix, _) in zip(fits, found, maps, strict=True):
        assert fit.error(fitted) < 1e-12 * fit.power()
        torch.testing.assert_close(fitted.matrix(12), matrix, rtol=1e-6, atol=1e-6)


def test_a_basis_of_one_branch_is_that_of_reduced_rank_regression():
    (fit,) = regressions(
        [
            (
                torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
                torch.zeros(12).double(),
            )
        ],
        noise=0.5,
    )
    (fitted,) = script("corrections").shared_basis([fit], 4, 1e-12)
    best = fit.solve("low-rank", 1e-12, rank=4)
    torch.testing.assert_close(fitted.matrix(12), best.matrix(12), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fitted.bias, best.bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mlps", [False, True])
def test_blocks_in_parallel_compute_what_the_eager_model_does(bench, mlps):
    model = digits()[0]
    one, two = model.module.blocks[3:5]
    graph = script("joined_blocks").in_parallel(bench.subject.graph, *pairs_of(bench, 3), mlps=mlps)

    def forward(x):
        x = x + one.attn(one.norm1(x)) + two.attn(two.norm1(x))
        after = x + one.mlp(one.norm2(x))
        return after + two.mlp(two.norm2(x if mlps else after))

    feeds = rows_of(model)
    blocks = model.module.blocks
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(one, "forward", forward)
        patch.setattr(two, "forward", lambda x: x)
        expected = model.module(*feeds.values())
    (found,) = run(graph, feeds)
    assert len(blocks) == 12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32 in another order of sums


def test_an_mlp_with_all_neurons_and_no_error_stays_as_it_is(bench):
    module, (_, (_, mlp)) = script("joined_blocks"), pairs_of(bench, 2)
    shrink = module.Shrink(bench, bench.subject.graph, (mlp,))
    width = module.hidden(bench.subject.graph, mlp).meta["val"].shape[-1]
    feeds = rows_of(bench.subject.model)
    (same,) = run(shrink.shrunk(torch.arange(width)), feeds)
    (expected,) = run(bench.subject.graph, feeds)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)


def test_two_mlps_shrunk_to_one_cost_as_much_as_one(bench):
    module, (first, second) = script("joined_blocks"), pairs_of(bench, 4)
    rows = dict(module.variants(bench, first, second))
    saved = {name: bench.saved(variant.graph) for name, variant in rows.items()}
    assert saved["attentions in parallel"] == saved["attentions and MLPs in parallel"] == 0.0
    dropped = saved.pop(module.DROPPED)
    assert dropped > 0.0
    assert {saved[module.REPLACED], saved[module.REFITTED], saved["joined, half of the neurons"]} == {dropped}


def test_magnitudes_are_those_of_the_states_of_the_eager_model(bench):
    site = next(site for site in bench.subject.sites if site.name == "blocks.4.mlp")
    block, states = digits()[0].module.blocks[4], []

    def note(_, arguments):
        x = arguments[0]
        middle = x + block.attn(block.norm1(x))
        states.append((middle, middle + block.mlp(block.norm2(middle))))

    handle = block.register_forward_pre_hook(note)
    with torch.inference_mode():
        for batch in bench.fitting.bounded_batches(32):
            digits()[0].module(*(torch.from_numpy(value) for value in batch.feeds.values()))
    handle.remove()
    x, y = (torch.cat(parts).flatten(0, 1).double() for parts in zip(*states, strict=True))
    found = script("corrections").magnitudes(bench, bench.subject.graph, site)
    assert found.norms == pytest.approx(float((y.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-4)
    assert found.scalar == pytest.approx(float((x * y).sum() / (x * x).sum()), rel=1e-4)
    torch.testing.assert_close(found.channels, y.abs().mean(0) / x.abs().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_all_ways_are_measured_on_the_sample(bench, monkeypatch):
    module = script("corrections")
    found = dict(module.corrections(bench, ((module.MLP, 2),)))["2 MLPs"]
    free = {found[name]["saved"] for name in ("drop", "constant", "scale", *module.PUBLISHED)}
    assert len(free) == 1
    assert found["low-rank"]["saved"] == found["shared basis, fitted 3x"]["saved"] < found["drop"]["saved"]
    assert "| digits, 2 MLPs | low-rank |" in script("tables_corrections").corrections_table(
        {"digits": {"found": {"2 MLPs": found}}}
    )
    plans = script("knapsack")
    monkeypatch.setattr(plans, "BUDGETS", (0.1, 0.2))
    rows = plans.knapsack(bench, "drop,scale,low-rank")["rows"]
    for name, row in rows.items():
        for other in row["against"]:
            assert row["saved"] >= rows[other]["saved"] - 1e-9, name
