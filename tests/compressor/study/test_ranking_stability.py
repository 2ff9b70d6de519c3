"""Tests of the stability of a stable and of an arbitrary synthetic ranking, and of rank correlations against SciPy."""

import numpy as np
import pytest
from scipy import stats

from compressor.study.ranking_stability import DRAWS, rank_correlation, sizes_below, stability

SITES, SAMPLES = 12, 60


def sums(spread, noise, seed=0):
    """Return cosine sums of 10 tokens per sample: site means `spread` apart, with `noise` over samples."""
    rng = np.random.default_rng(seed)
    means = 0.5 + spread * np.arange(SITES)[:, None]
    return np.full((SITES, SAMPLES), 10.0), 10.0 * (means + noise * rng.standard_normal((SITES, SAMPLES)))


def test_a_stable_ranking_has_correlations_of_one():
    result = stability(*sums(spread=0.01, noise=1e-6))
    assert result.halves.spearman == pytest.approx(1.0)
    assert result.halves.kendall == pytest.approx(1.0)
    assert result.halves.samples == SAMPLES // 2
    assert [part.samples for part in result.sizes] == [8, 16, 32]
    assert all(part.low == pytest.approx(1.0) for part in result.sizes)
    assert result.ranks == tuple((SITES - index, SITES - index, SITES - index) for index in range(SITES))
    assert (result.top, result.kept) == (SITES // 4, 1.0)


def test_equal_scores_rank_nothing():
    """Branches of zeros have a cosine of 1 each; a correlation of 0 was stated for them, with an interval."""
    tokens, equal = np.full((SITES, SAMPLES), 10.0), np.full((SITES, SAMPLES), 10.0)
    assert stability(tokens, equal) is None
    assert stability(tokens, equal + 1e-9 * np.arange(SITES)[:, None]) is None
    assert stability(tokens, equal - 1e-4 * np.arange(SITES)[:, None]) is not None


def test_an_arbitrary_ranking_has_low_correlations():
    result = stability(*sums(spread=0.0, noise=0.1))
    # Disjoint halves of one sample of noise are anticorrelated.
    assert result.halves.spearman < 0.1
    assert result.halves.kendall < 0.1
    correlations = [part.spearman for part in result.sizes]
    assert correlations == sorted(correlations)  # larger subsets share more samples with the whole
    assert result.kept < 0.5
    assert all(low <= rank <= high for rank, low, high in result.ranks)
    assert np.mean([high - low for _, low, high in result.ranks]) > 3


def test_more_samples_rank_more_reliably():
    result = stability(*sums(spread=0.01, noise=0.05))
    assert result.sizes[0].spearman < result.sizes[-1].spearman < 1.0
    assert 0.5 < result.halves.spearman < 1.0
    assert result == stability(*sums(spread=0.01, noise=0.05))


def test_samples_are_weighted_by_their_tokens():
    tokens, cosines = sums(spread=0.01, noise=0.0)
    tokens[:, 0], cosines[:, 0] = 1e6, 1e6 * np.linspace(0.9, 0.1, SITES)  # one long sample with the opposite order
    assert [rank for rank, _, _ in stability(tokens, cosines).ranks] == list(range(1, SITES + 1))


def test_the_correlation_equals_scipys():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 5, (2, 6, 9)).astype(float)
    wanted = [stats.spearmanr(*pair).statistic for pair in zip(left, right, strict=True)]
    np.testing.assert_allclose(rank_correlation(left, right), wanted, rtol=1e-12)
    assert rank_correlation(np.ones((1, 4)), np.arange(4.0)[None]).tolist() == [0.0]


def test_too_few_samples_give_none_and_progress_is_reported():
    assert stability(np.ones((2, 50)), np.ones((2, 50))) is None
    assert stability(np.ones((5, 3)), np.ones((5, 3))) is None
    calls = []
    stability(*sums(0.01, 0.1), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(sizes_below(SAMPLES)),) * 2
    assert DRAWS >= 100
