"""Stability of a ranking of sites: comparison of rankings by halves, by fewer samples and by bootstrap draws.

A ranking orders sites by a mean over all tokens of the drawn samples, as `passes.analysis.redundancy` does. Rankings
are compared by Spearman's and Kendall's (tau-b) rank correlation. All means are computed from sums of single samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

DRAWS = 200
SMALLEST = 8
EQUAL = 1e-7  # difference of cosines that rounding explains; nothing ranks sites by it


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of two rankings of `samples` samples.

    `spearman` and `kendall` are means over draws; `low` and `high` are the 5th and 95th percentile of Spearman's.
    """

    samples: int
    spearman: float
    low: float
    high: float
    kendall: float


@dataclass(frozen=True)
class Stability:
    """The stability of a ranking.

    Attributes:
        halves: agreement of disjoint halves of the samples.
        sizes: agreement of smaller draws, without replacement, with all samples. The draws are parts of all samples, so
            the agreement of the larger ones is too optimistic.
        ranks: for each site its rank by all samples (1 is the most redundant), and the 5th and 95th percentile of its
            rank over bootstrap draws (Efron 1979).
        top: number of most redundant sites that `kept` compares.
        kept: share of the bootstrap draws with the same set of `top` most redundant sites as all samples.
    """

    halves: Agreement
    sizes: tuple[Agreement, ...]
    ranks: tuple[tuple[int, int, int], ...]
    top: int
    kept: float


def stability(
    tokens: Array, sums: Array, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Stability | None:
    """Compare the rankings of many draws; return None for fewer than three sites or four samples, and for equal scores.

    Args:
        tokens: number of tokens of each sample, [sites, samples].
        sums: sum of the score over these tokens, [sites, samples].
        seed: seed of the draws.
        progress: called with the number of finished sizes and the number of all sizes.
    """
    sites, samples = sums.shape
    if sites < 3 or samples < 4:
        return None
    rng = np.random.default_rng(seed)
    sizes = sizes_below(samples)
    every = means_of(tokens, sums, np.arange(samples)[None])
    if float(np.ptp(every)) <= EQUAL:
        return None
    halves = _agreement(*_halves(tokens, sums, rng), samples // 2)
    agreements = []
    for done, size in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        drawn = np.stack([rng.permutation(samples)[:size] for _ in range(DRAWS)])
        agreements.append(_agreement(means_of(tokens, sums, drawn), np.repeat(every, DRAWS, 0), size))
    redrawn = means_of(tokens, sums, rng.integers(0, samples, (DRAWS, samples)))
    if progress is not None:
        progress(len(sizes), len(sizes))
    top = max(1, sites // 4)
    return Stability(halves, tuple(agreements), _ranks(every, redrawn), top, _kept(every, redrawn, top))


def sizes_below(samples: int) -> tuple[int, ...]:
    """Return the sizes 8, 16, 32, ... below the number of samples, or its half if there is none.

    >>> sizes_below(100), sizes_below(8)
    ((8, 16, 32, 64), (4,))
    """
    sizes, size = [], SMALLEST
    while size < samples:
        sizes.append(size)
        size *= 2
    return tuple(sizes) or (samples // 2,)


def _halves(tokens: Array, sums: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    samples = sums.shape[1]
    drawn = np.stack([rng.permutation(samples) for _ in range(DRAWS)])
    middle = samples // 2
    return means_of(tokens, sums, drawn[:, :middle]), means_of(tokens, sums, drawn[:, middle : 2 * middle])


def means_of(tokens: Array, sums: Array, drawn: npt.NDArray[Any]) -> Array:
    """Return the mean over all tokens of each draw, [draws, sites].

    Args:
        tokens: number of tokens, [sites, samples].
        sums: sum of the score over these tokens, [sites, samples].
        drawn: indices of the samples of each draw, [draws, size].
    """
    means: Array = np.stack([sums[:, rows].sum(1) / np.maximum(tokens[:, rows].sum(1), 1.0) for rows in drawn])
    return means


def _agreement(left: Array, right: Array, samples: int) -> Agreement:
    spearman = rank_correlation(left, right)
    kendall = [float(stats.kendalltau(*pair).statistic) for pair in zip(left, right, strict=True)]
    low, high = np.percentile(spearman, [5, 95])
    return Agreement(samples, float(spearman.mean()), float(low), float(high), float(np.nan_to_num(kendall).mean()))


def rank_correlation(left: Array, right: Array) -> Array:
    """Return Spearman's correlation of each row of `left` with that of `right`; 0 if all values of a row are equal."""
    first, second = (stats.rankdata(values, axis=-1) for values in (left, right))
    first, second = (ranks - ranks.mean(-1, keepdims=True) for ranks in (first, second))
    spread = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    correlation: Array = (first * second).sum(-1) / np.where(spread > 0, spread, 1.0)
    return correlation


def _ranks(every: Array, drawn: Array) -> tuple[tuple[int, int, int], ...]:
    """Return the rank of each site, 1 for the largest mean, with the 5th and 95th percentile over the draws."""
    full = stats.rankdata(-every[0], method="ordinal")
    ranks = stats.rankdata(-drawn, method="ordinal", axis=-1)
    low, high = np.percentile(ranks, [5, 95], axis=0, method="nearest")
    return tuple((int(a), int(b), int(c)) for a, b, c in zip(full, low, high, strict=True))


def _kept(every: Array, drawn: Array, top: int) -> float:
    most = set(np.argsort(-every[0], kind="stable")[:top].tolist())
    return float(np.mean([set(np.argsort(-row, kind="stable")[:top].tolist()) == most for row in drawn]))
