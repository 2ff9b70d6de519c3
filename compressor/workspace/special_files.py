"""FIFOs, sockets and devices, which must not be opened: opening a FIFO without a writer waits forever."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def special_kind(path: Path) -> str | None:
    """Return what a path is, such as ``a FIFO``, following links; None for files, folders and missing paths."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), None)


def first_special(paths: Iterable[Path]) -> str | None:
    """Return a clause on the first path that must not be opened; None if there is none.

    >>> first_special([Path("/dev/null"), Path("/")])
    '/dev/null is a device, not a file'
    """
    found = ((path, special_kind(path)) for path in paths)
    return next((f"{path} is {kind}, not a file" for path, kind in found if kind is not None), None)
