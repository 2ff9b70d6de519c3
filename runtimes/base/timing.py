"""Latency measured so that two engines can be compared: one clock, alternating bursts, raw samples kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter_ns
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import Feeds, RuntimesError

WARMUP_RUNS = 3
MIN_RUNS = 5
RESAMPLES = 2000


class Timeable(Protocol):
    """What of an engine its timing needs."""

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Put the feeds where the engine runs; each call of the result is one complete inference on them."""

    def __enter__(self) -> Timeable:
        """Return the engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""


class Speedup(NamedTuple):
    """How many times faster, with a 95 % interval."""

    ratio: float
    low: float
    high: float

    @staticmethod
    def of(ratio: float, resampled: npt.NDArray[np.float64]) -> Speedup:
        """The ratio with the percentile interval of its resamples."""
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Speedup(ratio, float(low), float(high))


@dataclass(frozen=True)
class Latency:
    """The time of every single inference of one engine, in milliseconds, burst by burst.

    Bursts stay apart because samples of one burst share the state of the machine: they say less than as many
    independent ones.

    Raises:
        RuntimesError: A burst is empty or holds a time that is not positive and finite.

    >>> Latency(((1.0, 3.0), (2.0, 2.0))).median
    2.0
    """

    samples_ms: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.samples_ms or not all(self.samples_ms):
            raise RuntimesError("Found a latency without samples; expected at least one in every burst.")
        if not all(0.0 < sample < float("inf") for sample in chain.from_iterable(self.samples_ms)):
            raise RuntimesError("Found a latency that is not positive and finite; expected milliseconds.")

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
        """The least median of a burst, in milliseconds: what is left where other processes disturbed most bursts.

        For predictions. It is no figure to report: the best of many is better than what users will see.

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

        The bootstrap is that of `resampled_medians`.
        """
        mine, theirs = resampled_medians((self, other), seed=seed, resamples=resamples)
        return Speedup.of(other.median / self.median, theirs / mine)

    def _percentile(self, q: float) -> float:
        return float(np.percentile(np.concatenate(self.samples_ms), q))


def resampled_medians(
    latencies: Sequence[Latency], *, seed: int = 0, resamples: int = RESAMPLES
) -> npt.NDArray[np.float64]:
    """Return bootstrap medians, [latencies, resamples], so that any function of several medians gets an interval.

    The bootstrap is hierarchical (Davison and Hinkley, Bootstrap Methods and their Application, 1997, on hierarchical
    data): it draws bursts with replacement, then samples within each drawn burst, so that drift from burst to burst
    widens the interval. Latencies with as many bursts as the first get the same ones drawn: those of one round of
    interleave() are neighbours in time, and what slowed all of them down is no difference between them.
    """
    rng = np.random.default_rng(seed)
    bursts = [tuple(map(np.asarray, latency.samples_ms)) for latency in latencies]
    medians = np.empty((len(bursts), resamples))
    for i in range(resamples):
        drawn = _draw(len(bursts[0]), rng)
        for place, each in enumerate(bursts):
            paired = drawn if len(each) == len(drawn) else _draw(len(each), rng)
            medians[place, i] = _median(each, paired, rng)
    return medians


def speedups_over(name: str, latencies: Mapping[str, Latency]) -> dict[str, Speedup]:
    """Return how many times faster each latency is than the named one, the same rounds drawn for all.

    See `resampled_medians`.
    """
    medians = dict(zip(latencies, resampled_medians(list(latencies.values())), strict=True))
    return {
        other: Speedup.of(latencies[name].median / each.median, medians[name] / medians[other])
        for other, each in latencies.items()
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
    """Time engines against each other on the same feeds, in bursts ordered A B B A A B, and return the latency of each.

    One engine is open at a time: ONNX Runtime's threads go on spinning after a run and would slow the others down, by
    up to two times on two cores. The order is reversed every round, so that a machine that gets slower favours nobody.

    Args:
        openers: For each name a function that opens its engine anew.
        feeds: The inputs; they are put where the engine runs before its clock starts.
        rounds: Bursts of each engine. Even numbers keep the order fair.
        burst_seconds: Shortest time of one burst, after warming up.
        min_runs: Fewest timed inferences of one burst, however long they take.
        max_runs: Most timed inferences of one burst: more of a very quick model say nothing more and fill the report.
        warmup_runs: Fewest untimed inferences at the start of a burst.
        warmup_seconds: Shortest time of those.
        progress: Called before each burst with the engine's name, the number of bursts done, and of all bursts.

    Raises:
        RuntimesError: Nothing to time, or an engine refuses the feeds.
    """
    if not openers or rounds < 1 or min_runs < 1:
        raise RuntimesError(
            f"Found {len(openers)} engines, {rounds} rounds, {min_runs} runs; expected at least 1 of each."
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
    """Warm up and time; what was bound is given back before the next engine opens, as a cache can be large."""
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
    """Call step until the time has passed, at least `fewest` and at most `most` times; return the milliseconds of each.

    `fewest` wins over `most`.
    """
    samples: list[float] = []
    end = perf_counter_ns() + int(seconds * 1e9)
    while len(samples) < fewest or (perf_counter_ns() < end and len(samples) < most):
        start = perf_counter_ns()
        step()
        samples.append((perf_counter_ns() - start) / 1e6)
    return tuple(samples)


def _draw(bursts: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return as many burst numbers as there are bursts, with replacement."""
    return rng.integers(bursts, size=bursts)


def _median(
    bursts: tuple[npt.NDArray[np.float64], ...], drawn: npt.NDArray[np.int64], rng: np.random.Generator
) -> float:
    """Return the median of the drawn bursts, each with its samples drawn again."""
    resampled = [bursts[number][_draw(bursts[number].size, rng)] for number in drawn]
    return float(np.median(np.concatenate(resampled)))
