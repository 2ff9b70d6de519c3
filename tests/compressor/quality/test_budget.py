"""Tests of the loss that a budget bounds, and of its upper confidence bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from compressor.quality.budget import Budget, BudgetError, samples_needed, upper_bound
from compressor.quality.heads.features import Features
from compressor.quality.heads.label_sets import LabelSets
from compressor.quality.heads.single_class import SingleClass
from compressor.quality.heads.tokens import MaskedTokens, NextTokens


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, size: (rng.random(size) < 0.01).astype(float),
        lambda rng, size: np.where(rng.random(size) < 0.05, rng.random(size), 0.0),
        lambda rng, size: rng.random(size),
    ],
    ids=["rare", "sparse", "uniform"],
)
def test_bound_holds_with_its_confidence(draw, confidence):
    rng = np.random.default_rng(0)
    mean = draw(rng, 2_000_000).mean()
    trials = 300
    failures = sum(upper_bound(draw(rng, 150), confidence, precision=1e-4) < mean for _ in range(trials))
    allowed = trials * (1 - confidence)
    assert failures <= allowed + 3 * np.sqrt(allowed)


@pytest.mark.parametrize("count", [50, 400])
def test_bound_is_close_to_the_exact_one_of_a_binomial(count):
    for hits in (0, count // 50, count // 10):
        losses = np.random.default_rng(1).permutation(np.arange(count) < hits).astype(float)
        exact = beta.ppf(0.9, hits + 1, count - hits)  # Clopper and Pearson 1934
        assert exact * 0.95 < upper_bound(losses, 0.9) < exact * 1.6 + 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.5, 0.99))
def test_bound_grows_with_the_confidence_and_lies_above_no_less_than_the_best_case(losses, confidence):
    values = np.array(losses)
    low, high = upper_bound(values, confidence), upper_bound(values, (1 + confidence) / 2)
    assert 0 < low <= high + 1e-6 <= 1 + 2e-6
    assert low >= upper_bound(np.zeros(len(values)), confidence) - 1e-6


def test_samples_needed_are_about_enough():
    rng = np.random.default_rng(2)
    losses = np.where(rng.random(400) < 0.02, 0.3, 0.0)
    needed = samples_needed(losses, 0.01, 0.9)
    assert needed is not None
    many = np.where(rng.random(needed) < (losses > 0).mean(), 0.3, 0.0)
    assert upper_bound(many, 0.9) < 0.0115
    assert samples_needed(losses, float(losses.mean()), 0.9) is None


def test_each_kind_of_budget_is_judged_by_its_own_columns():
    columns = {
        "accuracy": np.array([1.0, 0.0, 1.0, 1.0]),
        "agreement": np.array([1.0, 0.0, 0.0, 1.0]),
        "regret": np.array([0.0, 0.1, 0.5, 0.0]),
        "divergence": np.array([0.01, 0.02, 0.03, 0.0]),
    }
    head, original = SingleClass(), {"accuracy": columns["accuracy"], "agreement": np.ones(4)}
    assert Budget(head, "accuracy").loss(original, columns) == pytest.approx(15.0)
    assert Budget(head, "agreement").loss(original, columns) == pytest.approx(15.0)
    for metric in ("accuracy", "agreement"):
        assert Budget(head, metric, "agreement").loss(original, columns) == pytest.approx(50.0)
        assert Budget(head, metric, "divergence").loss(original, columns) == pytest.approx(1.5)
        assert list(Budget(head, metric).sample_losses(columns)) == [0.0, 0.1, 0.5, 0.0]
        assert list(Budget(head, metric, "agreement").sample_losses(columns)) == [0.0, 1.0, 1.0, 0.0]
        assert Budget(head, metric, "divergence").sample_losses(columns) is None


@pytest.mark.parametrize(("samples", "lost"), [(40, 4), (400, 40), (40_000, 4000), (400, 20), (400, 8), (400, 0)])
def test_labels_raise_the_expected_loss_by_their_precision(samples, lost):
    """5 points are expected; a binomial share has the variance p (1 - p) / n, and the expectation half of the loss."""
    original = {"accuracy": np.ones(samples), "regret": np.zeros(samples)}
    changed = {"accuracy": (np.arange(samples) >= lost).astype(float), "regret": np.full(samples, 0.05)}
    share = lost / samples
    variance, doubt = share * (1 - share) / samples, (share / 2) ** 2
    labels = max(share, 0.05)
    wanted = (0.05 * variance + labels * doubt) / (variance + doubt) if lost else 0.05
    loss = Budget(SingleClass(), "accuracy").loss(original, changed)
    assert loss == pytest.approx(100 * wanted, rel=0.03)
    assert 5.0 <= loss <= 100 * labels + 1e-9


def test_losses_that_are_no_mean_of_shares_have_no_bound():
    assert Budget(NextTokens(), "perplexity").sample_losses({"nll": np.ones(3), "tokens": np.ones(3)}) is None
    assert Budget(LabelSets(), "f1").sample_losses({"hits": np.ones(3)}) is None
    assert list(Budget(Features(), "fidelity").sample_losses({"fidelity": np.array([1.0, 0.9])})) == pytest.approx(
        [0.0, 0.1]
    )


def test_agreement_of_an_output_without_predictions_is_refused():
    with pytest.raises(BudgetError, match="give --budget accuracy or divergence"):
        Budget(NextTokens(), "perplexity", "agreement")


@pytest.mark.parametrize("metric", ["perplexity", "divergence"])
def test_standard_error_is_the_spread_of_the_loss_over_data_sets(metric):
    rng, found, errors = np.random.default_rng(0), [], []
    budget = Budget(NextTokens(), "perplexity", "divergence" if metric == "divergence" else "accuracy")
    for _ in range(200):
        before = {"nll": rng.gamma(4.0, 25.0, 60), "tokens": np.full(60, 40.0)}
        lost = rng.gamma(2.0, 2.0, 60)
        after = {"nll": before["nll"] + lost, "tokens": before["tokens"], "divergence": lost / 40.0}
        found.append(budget.loss(before, after))
        errors.append(budget.standard_error(before, after))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)  # 5 % for 200 draws, and 60 samples are few


def test_standard_error_of_an_agreement_of_tokens_is_its_spread_over_data_sets():
    rng, found, errors = np.random.default_rng(0), [], []
    budget = Budget(MaskedTokens(), "masked_perplexity", "agreement")
    for _ in range(200):
        after = {"tokens": np.full(60, 40.0), "agreement": rng.beta(8.0, 2.0, 60)}
        found.append(budget.loss(after, after))
        errors.append(budget.standard_error(after, after))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)  # 5 % for 200 draws, and 60 samples are few


def test_a_mean_of_shares_is_bounded_otherwise_and_has_no_standard_error():
    columns = {"agreement": np.array([1.0, 0.0]), "regret": np.array([0.0, 0.5])}
    assert Budget(SingleClass(), "agreement").standard_error(columns, columns) == 0.0
