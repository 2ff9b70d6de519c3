"""Timing is brief in every test: no test asserts a time, and a burst of default length would be half of an export."""

from functools import partial

import pytest

from compressor.deferred import build
from compressor.measure import latency
from runtimes.base.timing import interleave


@pytest.fixture(scope="session", autouse=True)
def brief_timing():
    """Shorten the bursts of exports, builds and searches; a test of timing itself calls `interleave`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (latency, build):
            patch.setattr(module, "interleave", partial(interleave, burst_seconds=0.02, warmup_seconds=0.01))
        patch.setattr(latency, "QUICK_SECONDS", 0.02)
        patch.setattr(latency, "QUICK_ROUNDS", 4)
        yield
