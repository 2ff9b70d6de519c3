"""Whether different data rank the sites of a model alike: rank correlation and shared ends, against what chance gives.

The interval draws the samples of both sets anew, with replacement (Efron 1979). Whether they differ by more than their
size explains tells a permutation test (Fisher 1935): the samples of both are dealt into two heaps of the same sizes at
random, and sets that agree less than 95 % of such heaps rank differently.
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

ENDS = (1, 2, 4, 8, 16, 32)  # numbers of most redundant sites that are looked at


@dataclass(frozen=True)
class Sums:
    """What one data set says of the sites: tokens and cosines of each sample, float64 [sites, samples]."""

    name: str
    tokens: Array
    sums: Array

    def means(self, drawn: np.typing.NDArray[np.int64] | None = None) -> Array:
        """The mean cosine of each site over the samples of each draw, [draws, sites]; over all without draws."""
        rows = np.arange(self.sums.shape[1])[None] if drawn is None else drawn
        return means_of(self.tokens, self.sums, rows)

    def redrawn(self, rng: np.random.Generator) -> Array:
        """The means over many draws of as many samples, with replacement."""
        count = self.sums.shape[1]
        return self.means(rng.integers(0, count, (DRAWS, count)))


@dataclass(frozen=True)
class Between:
    """How two data sets agree on the order of a model's sites.

    `low` and `high` are the 5th and 95th percentile of Spearman's correlation over draws of both, `mixed` the mean and
    `floor` the 5th percentile of that of two heaps in which the samples of both are mixed. `kinds` is Spearman's among
    the sites of each kind alone, `shared` how many of the so many most redundant sites are the same.
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
        """Whether they differ by no more than heaps do in which they are mixed."""
        return self.spearman >= self.floor


def between(first: Sums, second: Sums, kinds: Sequence[str], *, seed: int = 0) -> Between | None:
    """Compare the rankings by two data sets; None for fewer than three sites, which have no order to speak of.

    Args:
        first: of one set.
        second: of the other, the same sites.
        kinds: of each site.
        seed: of the draws.
    """
    if len(kinds) < 3:
        return None
    rng = np.random.default_rng(seed)
    one, other = first.means(), second.means()
    drawn = rank_correlation(first.redrawn(rng), second.redrawn(rng))
    mixed = _mixed(first, second, rng)
    low, high = np.percentile(drawn, [5, 95])
    return Between(
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


def _mixed(first: Sums, second: Sums, rng: np.random.Generator) -> Array:
    """Spearman's correlation of two heaps of mixed samples, as large as the sets, [draws]."""
    both = Sums("both", np.hstack([first.tokens, second.tokens]), np.hstack([first.sums, second.sums]))
    size = first.sums.shape[1]
    dealt = np.stack([rng.permutation(both.sums.shape[1]) for _ in range(DRAWS)])
    return rank_correlation(both.means(dealt[:, :size]), both.means(dealt[:, size:]))


def _by_kind(one: Array, other: Array, kinds: Sequence[str]) -> dict[str, float]:
    places = {kind: [place for place, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)}
    return {
        kind: float(rank_correlation(one[:, own], other[:, own])[0]) for kind, own in places.items() if len(own) >= 3
    }


def shared_ends(one: Array, other: Array) -> dict[int, int]:
    """How many of the 1, 2, 4, ... largest are the same, as far as these are at most half of all.

    >>> shared_ends(np.array([4.0, 3.0, 2.0, 1.0]), np.array([3.0, 4.0, 1.0, 2.0]))
    {1: 0, 2: 2}
    """
    orders = [np.argsort(-each, kind="stable") for each in (one, other)]
    return {
        count: len(set(orders[0][:count].tolist()) & set(orders[1][:count].tolist()))
        for count in ENDS
        if count <= len(one) // 2
    }


def short(source: str) -> str:
    """What sentences call a data set: by the last part of its path.

    >>> short("../data/stories.txt"), short("random")
    ('stories.txt', 'random')
    """
    return Path(source).name or source


def random_tokens(model: Model, split: Split, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a split with every token replaced by any of the vocabulary; lengths and padding stay."""
    from compressor.quality.evaluate import tensor_batches

    numbers = torch.Generator().manual_seed(seed)
    config = getattr(model.module, "config", None)
    size = int(model.example["input_ids"].max()) + 1 if config is None else config.get_text_config().vocab_size
    for feeds in tensor_batches(split):
        drawn = torch.randint(0, size, feeds["input_ids"].shape, generator=numbers)
        yield {**feeds, "input_ids": drawn.to(feeds["input_ids"].dtype)}
