"""What the target executorch reads of ExecuTorch's private parts: the pool of threads of its Python runtime.

Both were seen in ExecuTorch 1.5.1. Without them, an engine runs on as many threads as ExecuTorch chooses.
It imports ExecuTorch when it is called, as the whole package does.
"""

from __future__ import annotations


def thread_count() -> int:
    """Return how many threads the pool has, by `portable_lib._threadpool_get_thread_count`."""
    from executorch.extension.pybindings import portable_lib

    return int(portable_lib._threadpool_get_thread_count())


def reset_threads(count: int) -> None:
    """Replace the pool by one of so many threads, by `portable_lib._unsafe_reset_threadpool`.

    Loaded methods keep the address of the pool before: no engine may be open.
    """
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(count)
