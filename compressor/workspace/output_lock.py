"""The lock of an output, its temporary folders, and the removal of those that a killed run left.

A run holds the lock of its output until it ends. The lock is `flock` on the file ``.NAME.lock`` beside the output, so
the system releases it when the process ends, even after SIGKILL or a crash. The temporary folders of an output
(``.NAME.xxxxxxxx.partial``, ``.scratch`` and ``.old`` beside it) belong to the holder of its lock. Whoever obtains the
lock therefore knows that no living process needs those that exist already.

Windows has no `flock`. There, two runs with the same output are not detected, and leftovers are not removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from compressor.errors import FolderError
from compressor.workspace.folder_errors import readable_errors, resolved_output

if sys.platform != "win32":
    import fcntl

Say = Callable[[str], None]

PARTIAL, SCRATCH, OLD = "partial", "scratch", "old"  # endings of temporary folders
LOCK, JOURNAL = "lock", "journal"  # endings of hidden files beside an output
INSIDE = "compressor"  # the temporary folders inside an output folder are named as if they were those of this output
_NAME_LENGTH = 100  # characters; file systems limit the length of a name, usually to 255 bytes


def silent(message: str) -> None:
    """Show no message."""


@contextlib.contextmanager
def output_lock(output: Path, say: Say = silent) -> Iterator[None]:
    """Hold the lock of an output until the block ends; first remove what killed runs left beside it.

    Args:
        output: the file or folder that the run writes. Its parent is created if it is missing.
        say: shows a sentence about each leftover that was removed.

    Raises:
        FolderError: another process holds the lock, or no file can be written beside the output.
    """
    resolved = resolved_output(output)
    with _parents(resolved, output), _locked(resolved, output) as locked:
        if locked:
            with readable_errors(output, unwritable=True):
                _remove_leftovers(resolved, say)
        else:
            say(f"{output} is on a system without file locks, so another run with the same output is not detected.")
        yield


@contextlib.contextmanager
def _parents(resolved: Path, output: Path) -> Iterator[None]:
    """Create the missing parents of an output; at the end, delete those that are still empty, as after a failure."""
    with readable_errors(output, unwritable=True):
        missing = [parent for parent in resolved.parents if not parent.exists()]
        resolved.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for parent in missing:
                parent.rmdir()


@contextlib.contextmanager
def _locked(resolved: Path, output: Path) -> Iterator[bool]:
    """Hold the lock; yield whether the system has locks."""
    with readable_errors(output, unwritable=True):
        descriptor, path = _acquire(resolved, output)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if path != resolved:
                path.unlink(missing_ok=True)  # while it is locked; see _is_current
            os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(output: Path, kind: str) -> Iterator[Path]:
    """Yield a new temporary folder beside an output, and delete it afterwards.

    Args:
        output: the output, whose lock the caller holds.
        kind: `PARTIAL` or `SCRATCH`.
    """
    resolved = resolved_output(output)
    resolved.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{_stem(resolved)}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=f".{kind}", dir=resolved.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hidden_path(output: Path, ending: str) -> Path:
    """Return the path of the hidden file of an output: the `LOCK` or the `JOURNAL` beside it."""
    resolved = resolved_output(output)
    return resolved.with_name(f".{_stem(resolved)}.{ending}")


def _acquire(resolved: Path, output: Path) -> tuple[int | None, Path]:
    """Lock an output; return the descriptor and the path of the locked file, or None on a system without locks.

    If no file can be written beside the output, such as a mount point, the output folder itself is locked.
    """
    if sys.platform == "win32":
        return None, resolved
    path = hidden_path(resolved, LOCK)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    if not os.access(resolved.parent, os.W_OK | os.X_OK) and resolved.is_dir():
        path, flags = resolved, os.O_RDONLY
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = b"" if path == resolved else os.read(descriptor, 20)
            os.close(descriptor)
            raise FolderError(_in_use(output, holder)) from error
        except OSError:  # a network file system without locks
            os.close(descriptor)
            return None, path
        if path == resolved or _is_current(descriptor, path):
            if path != resolved:
                _write_process(descriptor)
            return descriptor, path
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Return whether a locked file still has its name: its last owner deletes it before the lock is released."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_process(descriptor: int) -> None:
    """Write the number of this process into the lock file, for the message of a second run."""
    with contextlib.suppress(OSError):  # on a full disk, the message lacks the number
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())


def _in_use(output: Path, holder: bytes) -> str:
    process = f" (process {holder.decode()})" if holder.isdigit() else ""
    return f"another run{process} is writing {output}; wait until it ends, or choose another --output."


def _stem(resolved: Path) -> str:
    """Return the part of the temporary names that identifies an output: its name, shortened if it is too long."""
    name = resolved.name
    if len(name) <= _NAME_LENGTH:
        return name
    return f"{name[: _NAME_LENGTH // 2]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def _remove_leftovers(resolved: Path, say: Say) -> None:
    """Remove the temporary folders of an output whose process is gone, and undo a replacement that it interrupted."""
    for path in _leftovers(resolved):
        if path.suffix == f".{OLD}" and not resolved.exists():
            path.rename(resolved)
            say(f"{resolved.name} is restored: a run that was killed had moved it away ({path.name}).")
            continue
        shutil.rmtree(path, ignore_errors=True)
        outcome = "could not be removed; remove it" if path.exists() else "was removed"
        say(f"{path.name}, which a run that was killed left beside {resolved.name}, {outcome}.")
    inside = resolved / INSIDE
    if resolved.is_dir() and any(_leftovers(inside)):
        _remove_leftovers(inside, say)


def _leftovers(resolved: Path) -> list[Path]:
    """Return the temporary folders of an output, the latest first."""
    pattern = re.compile(rf"\.{re.escape(_stem(resolved))}\.[a-z0-9_]{{8}}\.({PARTIAL}|{SCRATCH}|{OLD})")
    with os.scandir(resolved.parent) as entries:
        found = [entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
        return [Path(entry.path) for entry in sorted(found, key=lambda entry: -entry.stat().st_mtime_ns)]
