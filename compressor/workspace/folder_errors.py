"""Paths: their names, and the errors of output folders on a full disk, a read-only disk, without permission."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from compressor.errors import FolderError

FULL = (errno.ENOSPC, errno.EDQUOT)
# With less than one page of a file system free, no file can be written.
SPARE = 4096


@contextlib.contextmanager
def readable_errors(path: Path, *, unwritable: bool = False, needed: int = SPARE) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a FolderError; with `unwritable`, every OSError.

    Args:
        path: the output that the message names.
        unwritable: whether every OSError of the block means that `path` cannot be written.
        needed: bytes that the block writes. Errors of native writers name no cause, so with less free space than that
            the disk is named as the likely one.
    """
    try:
        yield
    except OSError as error:
        reason = _disk_error(error, path)
        if reason is None and unwritable:
            reason = f"{path} cannot be written ({error.strerror}); choose another --output."
        if reason is None:
            raise
        raise FolderError(reason) from error
    except FolderError:
        raise
    except Exception as error:  # native writers (ONNX, engine builders) raise their own errors if the disk is full
        free = _free_bytes(path)
        if free < SPARE:
            raise FolderError(_full(path)) from error
        if free < needed:
            raise FolderError(
                f"the disk that holds {path} has {free:,.0f} bytes free, and about {needed:,} are written; free some "
                f"space or choose another --output ({str(error).rstrip('.')})."
            ) from error
        raise


def name_of(path: str | Path) -> str:
    """Return the last part of a path; that of the folder that is meant by ``.``, ``..`` or an empty path.

    >>> name_of("models/my_vit/"), name_of(".") == Path.cwd().name, name_of("models/..") == Path.cwd().name
    ('my_vit', True, True)
    """
    name = Path(path).name
    return name if name not in ("", "..") else Path(path).resolve().name


def resolved_output(path: Path) -> Path:
    """Return an output without links in its path.

    Raises:
        FolderError: the links form a loop, or the path is the root of the file system.
    """
    try:
        resolved = path.resolve()
    except RuntimeError as error:  # of Python before 3.13; later ones return the path, which then cannot be read
        raise FolderError(f"{path} cannot be written (its links form a loop); choose another --output.") from error
    except ValueError as error:
        raise FolderError(f"{str(path)!r} cannot be written ({error}); choose another --output.") from error
    if not resolved.name:
        raise FolderError(f"{path} is the root of the file system; choose an --output inside it.")
    return resolved


def _disk_error(error: OSError, path: Path) -> str | None:
    """Return the sentence for an error of the disk itself; None for any other error."""
    if error.errno in FULL:
        return _full(path)
    if error.errno == errno.EFBIG:
        return (
            f"a file of {path} is larger than its disk or this process may write; raise the limit (ulimit -f), or "
            "choose another --output on a file system for larger files."
        )
    if error.errno == errno.EROFS:
        return f"{path} cannot be written ({error.strerror}); choose another --output."
    return None


def _full(path: Path) -> str:
    return f"the disk that holds {path} is full; free some space or choose another --output."


def _free_bytes(path: Path) -> float:
    """Return the free bytes on the disk of a folder, or of its parent; infinity if the system does not report them."""
    try:
        resolved = path.resolve()
        return shutil.disk_usage(resolved if resolved.is_dir() else resolved.parent).free
    except (OSError, RuntimeError):  # RuntimeError: links that form a loop
        return float("inf")
