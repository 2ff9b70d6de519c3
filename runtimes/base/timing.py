"""Latency measurement for comparing engines: alternating bursts on one clock, with all raw samples kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from time import perf_counter_ns
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import Feeds, RuntimesError

# They count for engines that take longer than a burst and its warm-up last, such as a second for each inference.
WARMUP_RUNS = 1
MIN_RUNS = 2
RESAMPLES = 2000
DRAWN_AT_ONCE = 2**20  # samples of a bootstrap in memory at a time


class Timeable(Protocol):
    """The part of the Engine protocol that timing uses."""

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device and return a function that runs one complete inference on them."""

    def __enter__(self) -> Timeable:
        """Return the engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""


class Speedup(NamedTuple):
    """Ratio of two median latencies, with a 95 % confidence interval."""

    ratio: float
    low: float
    high: float

    @staticmethod
    def of(ratio: float, resampled: npt.NDArray[np.float64]) -> Speedup:
        """Return a speedup whose interval spans the 2.5th to 97.5th percentile of the resampled ratios."""
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Speedup(ratio, float(low), float(high))


@dataclass(frozen=True)
class Latency:
    """The latency of every single inference of one engine, in milliseconds, grouped by burst.

    Samples of one burst share the state of the machine and are therefore not independent, so bursts are kept apart.

    Raises:
        RuntimesError: A burst is empty or contains a time that is not positive and finite.

    >>> Latency(((1.0, 3.0), (2.0, 2.0))).median
    2.0
    """

    samples_ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(self.samples_ms):
            raise RuntimesError("Found a latency without samples; expected at least one sample in every burst.")
        if not all(0.0 < sample < float("inf") for sample in chain.from_iterable(self.samples_ms)):
            raise RuntimesError("Found a latency that is not positive and finite; expected a time in milliseconds.")

    @property
    def n(self) -> int:
        """The number of timed inferences."""
        return sum(map(len, self.samples_ms))

    @property
    def median(self) -> float:
        """The median over all bursts, in milliseconds."""
        return self._percentile(50.0)

    @property
    def quietest(self) -> float:
        """The smallest median of any burst, in milliseconds: an estimate that ignores bursts slowed by other processes.

        Use it for predictions only. Do not report it: the best of many bursts is better than what users will see.

        >>> Latency(((9.0, 9.0), (2.0, 3.0, 2.0), (8.0,))).quietest
        2.0
        """
        return min(float(np.median(burst)) for burst in self.samples_ms)

    @property
    def p90(self) -> float:
        """The 90th percentile over all bursts, in milliseconds."""
        return self._percentile(90.0)

    @property
    def p99(self) -> float:
        """The 99th percentile over all bursts, in milliseconds."""
        return self._percentile(99.0)

    def speedup_over(self, other: Latency, *, seed: int = 0, resamples: int = RESAMPLES) -> Speedup:
        """Return median(other) / median(self) with a percentile bootstrap 95 % interval; above 1 means self is faster.

        `resampled_medians` describes the bootstrap.
        """
        return _speedup(self, other, seed, resamples)

    def _percentile(self, q: float) -> float:
        return float(np.percentile(np.concatenate(self.samples_ms), q))


@lru_cache(maxsize=32)
def _speedup(latency: Latency, other: Latency, seed: int, resamples: int) -> Speedup:
    """Return how much faster a latency is than another; cached, because every copy of a report needs it."""
    mine, theirs = resampled_medians((latency, other), seed=seed, resamples=resamples)
    return Speedup.of(other.median / latency.median, theirs / mine)


def resampled_medians(
    latencies: Sequence[Latency], *, seed: int = 0, resamples: int = RESAMPLES
) -> npt.NDArray[np.float64]:
    """Return bootstrap medians of shape [latencies, resamples], for intervals of any function of several medians.

    The bootstrap is hierarchical (Davison and Hinkley, Bootstrap Methods and their Application, 1997, on hierarchical
    data): it draws bursts with replacement, then samples within each drawn burst, so that drift between bursts widens
    the interval. Every latency with as many bursts as the first uses the same burst numbers: bursts of one round of
    interleave() are adjacent in time, so a slowdown common to all of them must not count as a difference.
    """
    rng = np.random.default_rng(seed)
    together = len(latencies[0].samples_ms)
    drawn = rng.integers(together, size=(resamples, together))
    medians = np.empty((len(latencies), resamples))
    for row, bursts in enumerate(latency.samples_ms for latency in latencies):
        own = drawn if len(bursts) == together else rng.integers(len(bursts), size=(resamples, len(bursts)))
        medians[row] = _medians(bursts, own, rng)
    return medians


def speedups_over(name: str, latencies: Mapping[str, Latency]) -> dict[str, Speedup]:
    """Return the speedup of every latency over `latencies[name]`, with the same rounds drawn for all.

    `resampled_medians` describes the bootstrap.
    """
    medians = dict(zip(latencies, resampled_medians(list(latencies.values())), strict=True))
    return {
        other: Speedup.of(latencies[name].median / latency.median, medians[name] / medians[other])
        for other, latency in latencies.items()
    }


def interleave(
    openers: Mapping[str, Callable[[], Timeable]],
    feeds: Feeds,
    *,
    rounds: int = 10,
    burst_seconds: float = 0.6,
    min_runs: int = MIN_RUNS,
    max_runs: int = 1000,
    warmup_runs: int = WARMUP_RUNS,
    warmup_seconds: float = 0.2,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Latency]:
    """Time engines on the same feeds, in bursts ordered A B B A A B, and return the latency of each engine.

    Only one engine is open at a time: ONNX Runtime's threads keep spinning after a run and would slow down other
    engines, by up to two times on two cores. The order is reversed every round, so that gradual slowdown of the
    machine favours no engine.

    Args:
        openers: For each name, a function that opens a new engine.
        feeds: The inputs, copied to the device before the clock starts.
        rounds: Number of bursts of each engine. Even numbers keep the order fair.
        burst_seconds: Minimum duration of one burst in seconds, without warm-up.
        min_runs: Minimum number of timed inferences in one burst, however long they take.
        max_runs: Maximum number of timed inferences in one burst; it keeps the report small for very fast models.
        warmup_runs: Minimum number of untimed inferences at the start of a burst.
        warmup_seconds: Minimum duration of the warm-up in seconds.
        progress: Called before each burst with the engine's name, the number of finished bursts and the total.

    Raises:
        RuntimesError: There is nothing to time, or an engine refuses the feeds.
    """
    if not openers or rounds < 1 or min_runs < 1:
        raise RuntimesError(
            f"Found {len(openers)} engines, {rounds} rounds and {min_runs} runs; expected at least 1 of each."
        )
    bursts: dict[str, list[tuple[float, ...]]] = {name: [] for name in openers}
    for done, name in enumerate(_order(tuple(openers), rounds)):
        if progress is not None:
            progress(name, done, rounds * len(openers))
        with openers[name]() as engine:
            warmup = partial(_repeat, seconds=warmup_seconds, fewest=warmup_runs)
            timed = partial(_repeat, seconds=burst_seconds, fewest=min_runs, most=max_runs)
            bursts[name].append(_burst(engine, feeds, warmup, timed))
    return {name: Latency(tuple(samples)) for name, samples in bursts.items()}


def _burst(
    engine: Timeable, feeds: Feeds, warmup: Callable[..., object], timed: Callable[..., tuple[float, ...]]
) -> tuple[float, ...]:
    """Warm up and time one burst; on return the bound inputs, which can be large, are freed for the next engine."""
    step = engine.bind(feeds)
    warmup(step)
    return timed(step)


def _order(names: tuple[str, ...], rounds: int) -> list[str]:
    """Return the burst order.

    >>> "".join(_order(("A", "B", "C"), 3))
    'ABCCBAABC'
    """
    return [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]


def _repeat(step: Callable[[], None], *, seconds: float, fewest: int, most: float = math.inf) -> tuple[float, ...]:
    """Call `step` for `seconds`, at least `fewest` and at most `most` times, and return each duration in milliseconds.

    `fewest` takes precedence over `most`.
    """
    samples: list[float] = []
    end = perf_counter_ns() + int(seconds * 1e9)
    while len(samples) < fewest or (perf_counter_ns() < end and len(samples) < most):
        start = perf_counter_ns()
        step()
        samples.append((perf_counter_ns() - start) / 1e6)
    return tuple(samples)


def _medians(
    bursts: Sequence[Sequence[float]], drawn: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Return the median of the drawn bursts ``[resamples, bursts]`` after resampling within each of them."""
    counts = np.array([len(burst) for burst in bursts])
    table = np.full((len(bursts), counts.max()), np.inf)
    for row, burst in zip(table, bursts, strict=True):
        row[: len(burst)] = burst
    parts = np.array_split(drawn, math.ceil(len(drawn) * table.size / DRAWN_AT_ONCE))
    return np.concatenate([_medians_at_once(table, counts, part, rng) for part in parts])


def _medians_at_once(
    table: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int64],
    drawn: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Return `_medians` of bursts ``[bursts, samples]``, filled with infinity behind the samples of each, `counts`."""
    sizes = counts[drawn][..., np.newaxis]
    places = rng.integers(0, sizes, size=(*drawn.shape, table.shape[1]))
    values = np.where(np.arange(table.shape[1]) < sizes, table[drawn[..., np.newaxis], places], np.inf)
    ordered = np.sort(values.reshape(len(drawn), -1))
    total, rows = sizes.sum((1, 2)), np.arange(len(drawn))
    return (ordered[rows, (total - 1) // 2] + ordered[rows, total // 2]) / 2.0  # type: ignore[no-any-return]
