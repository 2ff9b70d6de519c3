"""The end of a command by a signal: an interrupt (SIGINT), SIGTERM, as of a container that is stopped, or SIGHUP.

SIGHUP comes when the terminal is closed or the connection to a server ends. Like SIGTERM, it would end the process at
once, and temporary folders would stay.
"""

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
# Windows has no SIGHUP.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Terminated`, and raise an interrupt again that Python has ignored.

    The status is 143, or 129 for SIGHUP. A signal that is ignored stays so, as SIGHUP under ``nohup``.

    Python only prints an exception that is raised in a destructor or in the callback of a weak reference, of which
    torch's tracing has many. A command that was interrupted there went on to its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in ENDING if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # None: of C code
    previous, ignored = {number: signal.signal(number, _terminate) for number in caught}, sys.unraisablehook
    sys.unraisablehook = lambda raised: _raise_again(raised) or ignored(raised)
    try:
        yield
    finally:
        sys.unraisablehook = ignored
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminate(number: int, _: object) -> NoReturn:
    raise Terminated(128 + number)


def _raise_again(raised: Any) -> bool:
    """Have the main thread raise an ignored interrupt again; return whether it was one."""
    if raised.exc_type not in (KeyboardInterrupt, Terminated):
        return False
    number = signal.SIGINT if raised.exc_type is KeyboardInterrupt else raised.exc_value.code - 128
    timer = threading.Timer(PAUSE, _thread.interrupt_main, (number,))
    timer.daemon = True
    timer.start()
    return True
