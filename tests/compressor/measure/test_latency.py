"""Quick timings under load: planted times of the engines."""

from pathlib import Path

import pytest

from compressor.measure.latency import AGAIN, REPEATS, STEADY, EngineTimer
from compressor.measure.workload import RUN, Call, EngineWithFeeds, LastEngine
from compressor.report.collect_limitations import of_timings
from runtimes.base.timing import Latency


@pytest.fixture
def timer(monkeypatch):
    """Return a timer and a function that plants the times of the first engine, once and again, in each repetition."""
    planted, rounds = [], []

    def interleaved(self, builder, engines, timing):
        rounds.append(list(engines))
        first, again = planted[min(len(rounds), len(planted)) - 1]
        times = {"a": first, "b": 3.0 + len(rounds), AGAIN: again}
        return {name: {RUN: Latency(((times[name],),))} for name in engines}

    monkeypatch.setattr(EngineTimer, "_interleaved", interleaved)
    return EngineTimer({RUN: Call(1, {}, {})}, 2), planted, rounds


ENGINES = {"a": Path("a"), "b": Path("b")}


def test_steady_timings_are_taken_once(timer):
    timer, planted, rounds = timer
    planted.append((10.0, 10.0 * (1 + STEADY / 2)))
    assert timer.quick(None, ENGINES) == {"a": {RUN: 10.0}, "b": {RUN: 4.0}}
    assert rounds == [["a", "b", AGAIN]]
    assert not timer.unsteady
    assert not list(of_timings(timer.unsteady))


def test_timings_under_load_are_repeated_until_they_agree(timer):
    """The quietest of all repetitions counts, for every engine."""
    timer, planted, rounds = timer
    planted += [(10.0, 20.0), (30.0, 9.9)]
    assert timer.quick(None, ENGINES) == {"a": {RUN: 10.0}, "b": {RUN: 4.0}}
    assert len(rounds) == 2
    assert not timer.unsteady


def test_timings_that_stay_unsteady_are_a_limitation(timer):
    timer, planted, rounds = timer
    planted.append((10.0, 15.0))
    timer.quick(None, ENGINES)
    assert len(rounds) == REPEATS
    assert timer.unsteady == [0.5]
    assert "took 50% longer when it was timed again" in next(iter(of_timings(timer.unsteady))).reason


class Recorded:
    """An engine that records when it is opened, bound and closed."""

    def __init__(self, name, events):
        self.name, self.events = name, events
        events.append(f"open {name}")

    def bind(self, feeds):
        self.events.append(f"{self.name} {feeds}")
        return lambda: None

    def close(self):
        self.events.append(f"close {self.name}")


def test_the_calls_of_an_engine_share_one_opening_and_one_engine_is_open_at_a_time():
    events, last = [], LastEngine()
    openers = {name: lambda name=name: Recorded(name, events) for name in "AB"}
    for name, feeds in (("A", "1"), ("A", "2"), ("B", "1"), ("A", "1")):
        with EngineWithFeeds(openers[name], feeds, last) as engine:
            engine.bind({})
    last.close()
    last.close()
    wanted = ["open A", "A 1", "A 2", "close A", "open B", "B 1", "close B", "open A", "A 1", "close A"]
    assert events == wanted
    events.clear()
    with EngineWithFeeds(openers["A"], "1") as engine:
        engine.bind({})
    assert events == ["open A", "A 1", "close A"]
