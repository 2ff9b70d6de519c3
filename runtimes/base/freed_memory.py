"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give the pages of freed memory back to the system, where the C library keeps them (glibc's ``malloc_trim``).

    The weights of a closed session of ONNX Runtime stay in the process otherwise: 0.8 GiB of a model of 1.5 GB.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
