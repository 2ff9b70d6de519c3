"""How much a ranking of sites depends on the samples it was made with: halves, smaller sizes, bootstrap.

A ranking orders sites by a mean over all tokens of the samples drawn, as `passes.score` does. Two rankings are compared
by Spearman's and Kendall's (tau-b) rank correlation. Everything is drawn from sums of single samples.
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


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of two rankings: the mean over draws, and the 5th and 95th percentile of Spearman's."""

    samples: int
    spearman: float
    low: float
    high: float
    kendall: float


@dataclass(frozen=True)
class Stability:
    """How stable a ranking is.

    `halves` compares disjoint halves; `sizes` smaller draws (without replacement) with all samples, of which they are
    part, so that the last of them flatter themselves. `ranks` holds for each site its rank (1: the most redundant) by
    all samples and the 5th and 95th percentile over bootstrap draws (Efron 1979); `kept` is the share of these draws
    whose `top` most redundant sites are the same set.
    """

    halves: Agreement
    sizes: tuple[Agreement, ...]
    ranks: tuple[tuple[int, int, int], ...]
    top: int
    kept: float


def stability(
    tokens: Array, sums: Array, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Stability | None:
    """Compare the rankings of many draws; None for fewer than three sites or four samples, where nothing can be told.

    Args:
        tokens: [sites, samples], how many tokens each sample has.
        sums: [sites, samples], what is added up over them.
        seed: of the draws.
        progress: called with draws done and all draws.
    """
    sites, samples = sums.shape
    if sites < 3 or samples < 4:
        return None
    rng = np.random.default_rng(seed)
    sizes = sizes_below(samples)
    every = means_of(tokens, sums, np.arange(samples)[None])
    halves = _agreement(*_halves(tokens, sums, rng), samples // 2)
    found = []
    for done, size in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        drawn = np.stack([rng.permutation(samples)[:size] for _ in range(DRAWS)])
        found.append(_agreement(means_of(tokens, sums, drawn), np.repeat(every, DRAWS, 0), size))
    again = means_of(tokens, sums, rng.integers(0, samples, (DRAWS, samples)))
    if progress is not None:
        progress(len(sizes), len(sizes))
    top = max(1, sites // 4)
    return Stability(halves, tuple(found), _ranks(every, again), top, _kept(every, again, top))


def sizes_below(samples: int) -> tuple[int, ...]:
    """8, 16, 32, ... as far as they are smaller than all samples.

    >>> sizes_below(100), sizes_below(8)
    ((8, 16, 32, 64), (4,))
    """
    found, size = [], SMALLEST
    while size < samples:
        found.append(size)
        size *= 2
    return tuple(found) or (samples // 2,)


def _halves(tokens: Array, sums: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    samples = sums.shape[1]
    drawn = np.stack([rng.permutation(samples) for _ in range(DRAWS)])
    middle = samples // 2
    return means_of(tokens, sums, drawn[:, :middle]), means_of(tokens, sums, drawn[:, middle : 2 * middle])


def means_of(tokens: Array, sums: Array, drawn: npt.NDArray[Any]) -> Array:
    """The mean over all tokens of each draw, [draws, sites]."""
    found: Array = np.stack([sums[:, rows].sum(1) / np.maximum(tokens[:, rows].sum(1), 1.0) for rows in drawn])
    return found


def _agreement(left: Array, right: Array, samples: int) -> Agreement:
    spearman = rank_correlation(left, right)
    kendall = [float(stats.kendalltau(*pair).statistic) for pair in zip(left, right, strict=True)]
    low, high = np.percentile(spearman, [5, 95])
    return Agreement(samples, float(spearman.mean()), float(low), float(high), float(np.nan_to_num(kendall).mean()))


def rank_correlation(left: Array, right: Array) -> Array:
    """Spearman's correlation of each row of `left` with that of `right`; 0 where all of a row is equal."""
    first, second = (stats.rankdata(each, axis=-1) for each in (left, right))
    first, second = (each - each.mean(-1, keepdims=True) for each in (first, second))
    spread = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    found: Array = (first * second).sum(-1) / np.where(spread > 0, spread, 1.0)
    return found


def _ranks(every: Array, drawn: Array) -> tuple[tuple[int, int, int], ...]:
    """Rank of each site, 1 for the largest mean, with the range of ranks over the draws."""
    full = stats.rankdata(-every[0], method="ordinal")
    each = stats.rankdata(-drawn, method="ordinal", axis=-1)
    low, high = np.percentile(each, [5, 95], axis=0, method="nearest")
    return tuple((int(a), int(b), int(c)) for a, b, c in zip(full, low, high, strict=True))


def _kept(every: Array, drawn: Array, top: int) -> float:
    wanted = set(np.argsort(-every[0], kind="stable")[:top].tolist())
    return float(np.mean([set(np.argsort(-row, kind="stable")[:top].tolist()) == wanted for row in drawn]))
