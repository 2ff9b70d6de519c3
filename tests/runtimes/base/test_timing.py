"""Latency statistics against closed forms, and the order of events while timing; no test asserts a duration."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.base.protocols import RuntimesError
from runtimes.base.timing import Latency, interleave

times = st.floats(0.01, 1000.0)
bursts = st.lists(st.lists(times, min_size=1, max_size=5).map(tuple), min_size=1, max_size=4).map(tuple)


class Recorder:
    """An engine that logs its calls."""

    def __init__(self, name, log):
        self.name, self.log = name, log
        log.append(("open", name))

    def bind(self, feeds):
        self.log.append(("bind", self.name, feeds))
        return lambda: self.log.append(("run", self.name))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append(("close", self.name))


def recorded(names, **options):
    log = []
    openers = {name: (lambda name=name: Recorder(name, log)) for name in names}
    quick = {"burst_seconds": 0.0, "warmup_seconds": 0.0} | options
    return interleave(openers, {"x": 1}, **quick), log


@given(bursts)
def test_statistics_pool_the_bursts(samples):
    latency, pooled = Latency(samples), np.concatenate(samples)
    assert latency.n == pooled.size
    # Exactly equal: the same NumPy function on the same numbers.
    assert (latency.median, latency.p90, latency.p99) == tuple(np.percentile(pooled, [50, 90, 99]))


@given(bursts)
def test_speedup_over_itself_is_one(samples):
    ratio, low, high = Latency(samples).speedup_over(Latency(samples), resamples=50)
    assert ratio == 1.0
    assert 0.0 < low <= high


def test_constant_samples_give_an_exact_interval():
    fast, slow = Latency(((2.0,) * 4,) * 3), Latency(((5.0,) * 6,) * 2)
    assert fast.speedup_over(slow) == (2.5, 2.5, 2.5)
    assert slow.speedup_over(fast) == (0.4, 0.4, 0.4)


def test_speedup_depends_on_the_seed_alone():
    rng = np.random.default_rng(3)
    a, b = (Latency(tuple(map(tuple, rng.lognormal(size=(4, 9))))) for _ in range(2))
    assert a.speedup_over(b, resamples=100) == a.speedup_over(b, resamples=100)
    assert a.speedup_over(b, resamples=100) != a.speedup_over(b, resamples=100, seed=1)


def test_drift_between_bursts_widens_the_interval():
    # The same 40 samples, shuffled or sorted into bursts: only a hierarchical bootstrap differs.
    values = np.random.default_rng(0).lognormal(sigma=0.3, size=40)
    reference = Latency(((1.0,),))
    mixed = Latency(tuple(map(tuple, values.reshape(4, 10)))).speedup_over(reference)
    drifted = Latency(tuple(map(tuple, np.sort(values).reshape(4, 10)))).speedup_over(reference)
    assert mixed.ratio == drifted.ratio
    assert drifted.high - drifted.low > 1.5 * (mixed.high - mixed.low)


def test_slowdown_of_a_whole_round_does_not_count_as_a_difference():
    # Some rounds are up to eight times slower, but the ratio is always 2. Paired bursts keep it exact.
    slowness = np.array([[1.0], [3.0], [8.0], [2.0]]) * np.ones((4, 5))
    fast, slow = Latency(tuple(map(tuple, slowness))), Latency(tuple(map(tuple, 2 * slowness)))
    assert fast.speedup_over(slow) == (2.0, 2.0, 2.0)
    unpaired = fast.speedup_over(Latency(slow.samples_ms[:3]))
    assert unpaired.high > unpaired.low


def test_interval_covers_the_true_ratio():
    # 100 experiments with a random offset per burst; the true ratio is 1.25. The bound is 0.85 instead of 0.95, because
    # a percentile bootstrap of six bursts is slightly too narrow, and 100 experiments have a standard error of 2 to 3
    # percentage points.
    rng, covered = np.random.default_rng(0), 0
    for seed in range(100):
        fast, slow = (
            median * np.exp(0.05 * rng.normal(size=(6, 1)) + 0.05 * rng.normal(size=(6, 8))) for median in (4, 5)
        )
        _, low, high = Latency(tuple(map(tuple, fast))).speedup_over(
            Latency(tuple(map(tuple, slow))), seed=seed, resamples=100
        )
        covered += low <= 1.25 <= high
    assert covered / 100 >= 0.85


@pytest.mark.parametrize("samples", [(), ((),), ((1.0,), ()), ((0.0,),), ((float("nan"),),), ((float("inf"),),)])
def test_latency_refuses_invalid_samples(samples):
    with pytest.raises(RuntimesError, match="Found a latency"):
        Latency(samples)


@pytest.mark.parametrize(
    ("names", "rounds", "order"), [("AB", 4, "ABBAABBA"), ("ABC", 3, "ABCCBAABC"), ("A", 2, "AA"), ("AB", 1, "AB")]
)
def test_bursts_alternate(names, rounds, order):
    latencies, log = recorded(names, rounds=rounds, min_runs=4)
    assert "".join(event[1] for event in log if event[0] == "open") == order
    assert {name: [len(burst) for burst in latencies[name].samples_ms] for name in names} == {
        name: [4] * rounds for name in names
    }


def test_one_engine_is_open_at_a_time_and_warmed_up():
    _, log = recorded("AB", rounds=1, min_runs=2)
    feeds = {"x": 1}
    assert log == [
        event
        for name in "AB"
        # One warm-up run and two timed runs.
        for event in [("open", name), ("bind", name, feeds), *[("run", name)] * 3, ("close", name)]
    ]


def test_progress_counts_every_burst():
    seen = []
    recorded("AB", rounds=2, progress=lambda *event: seen.append(event))
    assert seen == [("A", 0, 4), ("B", 1, 4), ("B", 2, 4), ("A", 3, 4)]


@pytest.mark.parametrize(("names", "options"), [("", {}), ("A", {"rounds": 0}), ("A", {"min_runs": 0})])
def test_nothing_to_time_is_an_error(names, options):
    with pytest.raises(RuntimesError, match="expected at least 1 of each"):
        recorded(names, **options)
