"""Freed memory goes back to the system."""

import sys
from pathlib import Path

import numpy as np
import pytest

from runtimes.base.freed_memory import return_freed_memory
from runtimes.base.protocols import Closing

SIZE, COUNT = 96_000, 2_000  # bytes below those that the C library maps one by one


def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc_trim")
@pytest.mark.parametrize("free", [return_freed_memory, lambda: Closing([]).close()])
def test_the_pages_between_values_that_are_kept_are_returned(free):
    free()
    values = [np.ones(SIZE // 8) for _ in range(COUNT)]
    kept = values[::50]
    full = resident()
    del values
    free()
    assert full - resident() > 0.8 * SIZE * COUNT
    assert kept[-1].sum() == SIZE // 8


def test_closing_twice_is_allowed():
    engine = Closing([])
    engine.close()
    engine.close()
