"""Time engines against each other, interleaved, on the calls of a workload."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.workload import RUN, Call, EngineWithFeeds, LastEngine, total_latency
from compressor.workspace.progress import Steps
from runtimes.base.protocols import Feeds
from runtimes.base.timing import MIN_RUNS, WARMUP_RUNS, Latency, Timeable, interleave

QUICK_ROUNDS = 8  # rounds of the quick timing in a search; they are short, so that some run on a quiet machine
QUICK_SECONDS = 0.1  # length of a burst
QUICK_WARMUP = 0.05  # length of its warm-up
STEADY = 0.1  # relative difference of two timings of one engine above which the machine is under load
REPEATS = 3  # quick timings at most, if the machine is under load
AGAIN = "again"  # the first engine, timed a second time


@dataclass(frozen=True)
class EngineTimer:
    """Times engines on one workload.

    Attributes:
        calls: the calls whose time is the latency, by name; see `compressor.measure.workload`.
        rounds: timed bursts of each engine.
        unsteady: relative differences of two timings of one engine that stayed above `STEADY` after all repetitions.
    """

    calls: Mapping[str, Call]
    rounds: int
    unsteady: list[float] = field(default_factory=list, compare=False)

    @property
    def inputs(self) -> Feeds:
        """The inputs of the first call."""
        return next(iter(self.calls.values())).inputs

    def latencies(
        self, builder: EngineBuilder, engines: Mapping[str, Path], steps: Steps
    ) -> dict[str, dict[str, Latency]]:
        """Time every call of every engine.

        Returns:
            Latencies by engine and call.
        """
        return self._interleaved(builder, engines, partial(time_engines, rounds=self.rounds, steps=steps))

    def latency(self, builder: EngineBuilder, engines: Mapping[str, Path], steps: Steps) -> dict[str, Latency]:
        """Time engines on the whole workload; return the latency by engine."""
        return self.totals(self.latencies(builder, engines, steps))

    def totals(self, latencies: Mapping[str, Mapping[str, Latency]]) -> dict[str, Latency]:
        """Add up the latencies of the calls of each engine, each as often as it is made."""
        return {name: total_latency(self.calls, parts) for name, parts in latencies.items()}

    def quick(
        self,
        builder: EngineBuilder,
        engines: Mapping[str, Path],
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Time every call of every engine in short bursts.

        The first engine is timed twice. If its two times differ by more than `STEADY`, the machine is under load, and
        all engines are timed again, at most `REPEATS` times.

        Returns:
            Milliseconds of the quietest burst of all repetitions, by engine and call.
        """
        briefly = partial(
            interleave,
            rounds=QUICK_ROUNDS,
            burst_seconds=QUICK_SECONDS,
            warmup_seconds=QUICK_WARMUP,
            progress=progress,
        )
        first = next(iter(engines))
        twice = {**engines, AGAIN: engines[first]}
        times = {name: dict.fromkeys(self.calls, math.inf) for name in twice}
        for _ in range(REPEATS):
            for name, parts in self._interleaved(builder, twice, briefly).items():
                times[name] = {call: min(times[name][call], part.quietest) for call, part in parts.items()}
            one, other = (self.total(times[name]) for name in (first, AGAIN))
            difference = max(one, other) / min(one, other) - 1.0
            if difference <= STEADY:
                break
        else:
            self.unsteady.append(difference)
        return {name: times[name] for name in engines}

    def total(self, milliseconds: Mapping[str, float]) -> float:
        """Add up the milliseconds of the calls, each as often as it is made."""
        return sum(self.calls[call].times * time for call, time in milliseconds.items())

    def _interleaved(
        self, builder: EngineBuilder, engines: Mapping[str, Path], interleaved: Callable[..., dict[str, Latency]]
    ) -> dict[str, dict[str, Latency]]:
        """Time all calls of all engines in one interleaved run, in which the calls of an engine follow each other."""
        openers = builder.openers(engines)
        if list(self.calls) == [RUN]:
            return {name: {RUN: latency} for name, latency in interleaved(openers, self.calls[RUN].inputs).items()}
        pairs = [(name, call) for name in engines for call in self.calls]
        with tempfile.TemporaryDirectory(dir=builder.scratch) as caches, contextlib.closing(LastEngine()) as last:
            engines_with_feeds = {
                f"{name}, {call}": partial(
                    EngineWithFeeds,
                    openers[name],
                    self.calls[call].feeds(openers[name], Path(caches, f"{number}")),
                    last,
                )
                for number, (name, call) in enumerate(pairs)
            }
            latencies = interleaved(engines_with_feeds, {})
        return {name: {call: latencies[f"{name}, {call}"] for call in self.calls} for name in engines}


def time_engines(
    openers: Mapping[str, Callable[[], Timeable]],
    feeds: Feeds,
    rounds: int,
    steps: Steps,
    *,
    name: str = "measure the latency",
    min_runs: int = MIN_RUNS,
    warmup_runs: int = WARMUP_RUNS,
) -> dict[str, Latency]:
    """Time engines against each other in one interleaved run, with progress."""
    with steps.step(name) as tick:
        return interleave(
            openers,
            feeds,
            rounds=rounds,
            min_runs=min_runs,
            warmup_runs=warmup_runs,
            progress=lambda name, done, total: tick(done, total, name),
        )
