"""Agreement between data sets on the ranking of a model's sites: rank correlation and shared top sites.

The intervals are bootstrap intervals: both sets of samples are drawn with replacement (Efron 1979). A permutation test
(Fisher 1935) decides whether two sets rank differently: all samples are split at random into two mixtures of the sizes
of the sets, and sets that agree less than 95 % of such pairs of mixtures rank differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats

from compressor.study.ranking_stability import DRAWS, Array, means_of, rank_correlation

if TYPE_CHECKING:
    from compressor.data.splits import Split
    from compressor.models import Model

ENDS = (1, 2, 4, 8, 16, 32)  # numbers of most redundant sites that are compared


@dataclass(frozen=True)
class CosineSums:
    """The numbers of tokens and the sums of cosines of one data set, by site and sample, float64 [sites, samples]."""

    name: str
    tokens: Array
    sums: Array

    def means(self, drawn: np.typing.NDArray[np.int64] | None = None) -> Array:
        """Return the mean cosine of each site over the samples of each draw, [draws, sites].

        Args:
            drawn: indices of the samples of each draw, [draws, size]; None for one draw of all samples.
        """
        rows = np.arange(self.sums.shape[1])[None] if drawn is None else drawn
        return means_of(self.tokens, self.sums, rows)

    def redrawn(self, rng: np.random.Generator) -> Array:
        """Return the means over `DRAWS` bootstrap draws, [draws, sites]."""
        count = self.sums.shape[1]
        return self.means(rng.integers(0, count, (DRAWS, count)))


@dataclass(frozen=True)
class DatasetAgreement:
    """The agreement of two data sets on the ranking of a model's sites.

    Attributes:
        first: source of one data set.
        second: source of the other.
        samples: their numbers of samples.
        spearman: Spearman's rank correlation.
        low: its 5th percentile over bootstrap draws of both sets.
        high: its 95th percentile over the same draws.
        kendall: Kendall's rank correlation (tau-b).
        mixed: mean of Spearman's correlation between two random mixtures of the samples.
        floor: its 5th percentile.
        kinds: Spearman's correlation among the sites of each kind.
        shared: by the number of most redundant sites, how many of them both sets have in common.
    """

    first: str
    second: str
    samples: tuple[int, int]
    spearman: float
    low: float
    high: float
    kendall: float
    mixed: float
    floor: float
    kinds: dict[str, float]
    shared: dict[int, int]

    @property
    def alike(self) -> bool:
        """Return whether the sets agree at least as well as 5 % of random mixtures do."""
        return self.spearman >= self.floor


def between(first: CosineSums, second: CosineSums, kinds: Sequence[str], *, seed: int = 0) -> DatasetAgreement | None:
    """Compare the rankings by two data sets; return None for fewer than three sites.

    Args:
        first: the sums of one set.
        second: the sums of the other set, for the same sites.
        kinds: the kind of each site.
        seed: seed of the draws.
    """
    if len(kinds) < 3:
        return None
    rng = np.random.default_rng(seed)
    one, other = first.means(), second.means()
    drawn = rank_correlation(first.redrawn(rng), second.redrawn(rng))
    mixed = _mixed(first, second, rng)
    low, high = np.percentile(drawn, [5, 95])
    return DatasetAgreement(
        first=first.name,
        second=second.name,
        samples=(first.sums.shape[1], second.sums.shape[1]),
        spearman=float(rank_correlation(one, other)[0]),
        low=float(low),
        high=float(high),
        kendall=float(np.nan_to_num(stats.kendalltau(one[0], other[0]).statistic)),
        mixed=float(mixed.mean()),
        floor=float(np.percentile(mixed, 5)),
        kinds=_by_kind(one, other, kinds),
        shared=shared_ends(one[0], other[0]),
    )


def _mixed(first: CosineSums, second: CosineSums, rng: np.random.Generator) -> Array:
    """Return Spearman's correlation between random mixtures of the samples, of the sizes of the sets, [draws]."""
    both = CosineSums("both", np.hstack([first.tokens, second.tokens]), np.hstack([first.sums, second.sums]))
    size = first.sums.shape[1]
    permutations = np.stack([rng.permutation(both.sums.shape[1]) for _ in range(DRAWS)])
    return rank_correlation(both.means(permutations[:, :size]), both.means(permutations[:, size:]))


def _by_kind(one: Array, other: Array, kinds: Sequence[str]) -> dict[str, float]:
    sites = {kind: [index for index, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)}
    return {
        kind: float(rank_correlation(one[:, rows], other[:, rows])[0]) for kind, rows in sites.items() if len(rows) >= 3
    }


def shared_ends(one: Array, other: Array) -> dict[int, int]:
    """Count the common entries among the 1, 2, 4, ... largest, for numbers up to half of all entries.

    >>> shared_ends(np.array([4.0, 3.0, 2.0, 1.0]), np.array([3.0, 4.0, 1.0, 2.0]))
    {1: 0, 2: 2}
    """
    orders = [np.argsort(-means, kind="stable") for means in (one, other)]
    return {
        count: len(set(orders[0][:count].tolist()) & set(orders[1][:count].tolist()))
        for count in ENDS
        if count <= len(one) // 2
    }


def short(source: str) -> str:
    """Return the short name of a data set: the last part of its path.

    >>> short("../data/stories.txt"), short("random")
    ('stories.txt', 'random')
    """
    return Path(source).name or source


def random_tokens(model: Model, split: Split, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of a split with random token ids; lengths and padding are kept.

    Args:
        model: the model, whose config states the size of the vocabulary.
        split: the split with the texts.
        seed: seed of the token ids.
    """
    from compressor.quality.evaluate import tensor_batches

    generator = torch.Generator().manual_seed(seed)
    config = getattr(model.module, "config", None)
    size = int(model.example["input_ids"].max()) + 1 if config is None else config.get_text_config().vocab_size
    for feeds in tensor_batches(split):
        token_ids = torch.randint(0, size, feeds["input_ids"].shape, generator=generator)
        yield {**feeds, "input_ids": token_ids.to(feeds["input_ids"].dtype)}
