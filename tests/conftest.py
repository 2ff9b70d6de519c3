"""Timing is brief in every test: no test asserts a time, and a burst of default length would be half of an export.

Tests that the installed release of a library cannot pass are skipped with the reason.
"""

from functools import partial

import pytest

from compressor.deferred import build
from compressor.measure import latency
from runtimes.base.timing import interleave
from tests.older_releases import reason_to_skip


@pytest.fixture(scope="session", autouse=True)
def brief_timing():
    """Shorten the bursts of exports, builds and searches; a test of timing itself calls `interleave`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (latency, build):
            patch.setattr(module, "interleave", partial(interleave, burst_seconds=0.02, warmup_seconds=0.01))
        patch.setattr(latency, "QUICK_SECONDS", 0.02)
        patch.setattr(latency, "QUICK_ROUNDS", 4)
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        if (reason := reason_to_skip(item.nodeid)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
