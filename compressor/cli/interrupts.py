"""The end of a command by a signal: an interrupt (SIGINT), or SIGTERM, as of a container that is stopped."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from compressor.errors import Terminated

PAUSE = 0.05  # seconds, by which an ignored interrupt is raised again; the destructor that ignored it has ended then


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM into `Terminated`, status 143, and raise an interrupt again that Python has ignored.

    Python only prints an exception that is raised in a destructor or in the callback of a weak reference, of which
    torch's tracing has many. A command that was interrupted there went on to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, ignored = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = lambda raised: _raise_again(raised) or ignored(raised)
    try:
        yield
    finally:
        sys.unraisablehook = ignored
        signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> NoReturn:
    raise Terminated(128 + signal.SIGTERM)


def _raise_again(raised: Any) -> bool:
    """Have the main thread raise an ignored interrupt again; return whether it was one."""
    numbers = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}
    number = numbers.get(raised.exc_type)
    if number is None:
        return False
    timer = threading.Timer(PAUSE, _thread.interrupt_main, (number,))
    timer.daemon = True
    timer.start()
    return True
