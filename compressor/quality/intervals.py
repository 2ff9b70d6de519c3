"""Bootstrap intervals; this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = dict[str, Array]

RESAMPLES = 999
DRAWS = 2_000_000  # samples drawn at a time in a bootstrap, 16 MB per column


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % bootstrap interval over `n` samples."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(statistic: Callable[[Columns], Array], columns: Columns, seed: int = 0) -> Figure:
    """Compute `statistic` with a 95 % percentile bootstrap interval (Efron 1979) from `RESAMPLES` resamples.

    Args:
        statistic: reduces the last axis of columns; leading axes hold resamples, many per call.
        columns: name to one number per sample.
        seed: seed of the draws.
    """
    count = len(next(iter(columns.values())))
    value = float(statistic(columns))
    if count < 2:
        return Figure(value, value, value, count)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS // count)
    drawn = []
    for start in range(0, RESAMPLES, at_once):
        rows = rng.integers(0, count, (min(at_once, RESAMPLES - start), count))
        drawn.append(statistic({name: column[rows] for name, column in columns.items()}))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return Figure(value, float(low), float(high), count)


def by_text(columns: Columns, owners: Sequence[str]) -> Columns:
    """Aggregate the columns of windows into columns of texts, in order of first appearance.

    Windows of one text are not independent, so the bootstrap must resample texts.

    Args:
        columns: name to one number per window; "nll" and "tokens" are summed, the others averaged over tokens.
        owners: the text of each window.
    """
    indices = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    rows = np.array([indices[owner] for owner in owners])
    tokens = np.bincount(rows, columns["tokens"], len(indices))
    means = {key: np.bincount(rows, columns[key] * columns["tokens"], len(indices)) for key in columns}
    return {"nll": np.bincount(rows, columns["nll"], len(indices)), "tokens": tokens} | {
        key: value / np.maximum(tokens, 1.0) for key, value in means.items() if key not in ("nll", "tokens")
    }


def format_count(count: int, gap: str = "") -> str:
    """Format a count with about three digits and an SI prefix, with `gap` before the prefix.

    >>> format_count(950), format_count(49_792), format_count(5_717_416), format_count(1_258_000_000)
    ('950', '49.8k', '5.72M', '1.26G')
    >>> format_count(950, " "), format_count(49_792, " "), format_count(1_258_000_000, " ")
    ('950 ', '49.8 k', '1.26 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{gap}{unit}"
    return f"{count}{gap}"
