"""Rankings of a made-up stable and a made-up arbitrary model, and rank correlations against SciPy's."""

import numpy as np
import pytest
from scipy import stats

from compressor.study.ranking_stability import DRAWS, rank_correlation, sizes_below, stability

SITES, SAMPLES = 12, 60


def sums(spread, noise, seed=0):
    """Cosine sums of 10 tokens a sample: site means `spread` apart, samples `noise` around them."""
    rng = np.random.default_rng(seed)
    means = 0.5 + spread * np.arange(SITES)[:, None]
    return np.full((SITES, SAMPLES), 10.0), 10.0 * (means + noise * rng.standard_normal((SITES, SAMPLES)))


def test_a_stable_ranking_is_found_stable():
    found = stability(*sums(spread=0.01, noise=1e-6))
    assert found.halves.spearman == pytest.approx(1.0)
    assert found.halves.kendall == pytest.approx(1.0)
    assert found.halves.samples == SAMPLES // 2
    assert [each.samples for each in found.sizes] == [8, 16, 32]
    assert all(each.low == pytest.approx(1.0) for each in found.sizes)
    assert found.ranks == tuple((SITES - place, SITES - place, SITES - place) for place in range(SITES))
    assert (found.top, found.kept) == (SITES // 4, 1.0)


def test_an_arbitrary_ranking_is_found_arbitrary():
    found = stability(*sums(spread=0.0, noise=0.1))
    # Two halves of one pool of noise are anticorrelated, never correlated.
    assert found.halves.spearman < 0.1
    assert found.halves.kendall < 0.1
    grows = [each.spearman for each in found.sizes]
    assert grows == sorted(grows)  # the larger a part, the more it is the whole
    assert found.kept < 0.5
    assert all(low <= rank <= high for rank, low, high in found.ranks)
    assert np.mean([high - low for _, low, high in found.ranks]) > 3


def test_more_samples_rank_better_in_between():
    found = stability(*sums(spread=0.01, noise=0.05))
    assert found.sizes[0].spearman < found.sizes[-1].spearman < 1.0
    assert 0.5 < found.halves.spearman < 1.0
    assert found == stability(*sums(spread=0.01, noise=0.05))


def test_long_samples_count_as_many_tokens_as_they_have():
    tokens, cosines = sums(spread=0.01, noise=0.0)
    tokens[:, 0], cosines[:, 0] = 1e6, 1e6 * np.linspace(0.9, 0.1, SITES)  # one sample that says the opposite
    assert [rank for rank, _, _ in stability(tokens, cosines).ranks] == list(range(1, SITES + 1))


def test_the_correlation_is_scipys():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 5, (2, 6, 9)).astype(float)
    wanted = [stats.spearmanr(*pair).statistic for pair in zip(left, right, strict=True)]
    np.testing.assert_allclose(rank_correlation(left, right), wanted, rtol=1e-12)
    assert rank_correlation(np.ones((1, 4)), np.arange(4.0)[None]).tolist() == [0.0]


def test_too_little_is_not_judged_and_progress_is_told():
    assert stability(np.ones((2, 50)), np.ones((2, 50))) is None
    assert stability(np.ones((5, 3)), np.ones((5, 3))) is None
    told = []
    stability(*sums(0.01, 0.1), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(sizes_below(SAMPLES)),) * 2
    assert DRAWS >= 100
