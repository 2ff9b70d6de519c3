"""ExecuTorch's private functions that the target executorch uses: the thread pool of the Python runtime.

Both functions exist in ExecuTorch 1.5.1. Without them, an engine runs on as many threads as ExecuTorch chooses. Like
the whole package, this module imports ExecuTorch only inside its functions.
"""

from __future__ import annotations


def thread_count() -> int:
    """Return the number of threads of the pool, with `portable_lib._threadpool_get_thread_count`."""
    from executorch.extension.pybindings import portable_lib

    return int(portable_lib._threadpool_get_thread_count())


def reset_threads(count: int) -> None:
    """Replace the pool by one with `count` threads, with `portable_lib._unsafe_reset_threadpool`.

    Loaded methods keep the address of the old pool, so no engine may be open.
    """
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(count)
