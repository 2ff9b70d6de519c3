"""Adding files to a finished output folder: they become visible at once, together with the manifest, or not at all.

A copy of the folder is made beside it from hard links, which takes no space. The new files are added to the copy, and
then the two folders exchange their names in one step of the file system. A process that is killed leaves the folder as
it was or complete.

Some folders cannot be exchanged: a mount point, the current folder, a folder whose parent is read-only, and folders on
a file system without hard links or without an exchange (FAT, some network file systems, Windows). Their files are
replaced one by one: the manifest of all files first, the report last. A process that is killed then leaves a folder
that `compressor build` and `export --force` accept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from compressor.workspace.folder_errors import readable_errors
from compressor.workspace.output_lock import INSIDE, PARTIAL, SCRATCH, temporary_folder

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_CURRENT = -100  # AT_FDCWD of Linux: paths are relative to the current folder


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder on the disk of a finished output folder, for files that will be added to it.

    Raises:
        FolderError: the disk is full, or cannot be written.
    """
    resolved = folder.resolve()
    beside = resolved if _can_exchange(resolved) else resolved / INSIDE
    with readable_errors(folder), temporary_folder(beside, SCRATCH) as staging:
        yield staging


def add_files(folder: Path, new: Path, *, first: str, last: str) -> None:
    """Add all files of the folder `new` to `folder`, which replaces files of the same names.

    Args:
        folder: a finished output folder, whose lock the caller holds.
        new: a folder on the same disk, such as one in a `staging_folder`; without folders in it.
        first: the file to replace first if the folder cannot be exchanged: the manifest.
        last: the file to replace last in that case: the report.
    """
    resolved = folder.resolve()
    if _can_exchange(resolved) and _exchanged_with_copy(resolved, new):
        return
    names = {path.name for path in new.iterdir()}
    for name in (first, *sorted(names - {first, last}), last):
        (new / name).replace(resolved / name)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step; return False if the system or the file system cannot do that.

    Python has no function for it. Linux has renameat2(2), macOS renamex_np(2).
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux":
        rename, arguments = getattr(libc, "renameat2", None), (_CURRENT, paths[0], _CURRENT, paths[1], _EXCHANGE)
    else:
        rename, arguments = getattr(libc, "renamex_np", None), (*paths, _EXCHANGE)
    return rename is not None and rename(*arguments) == 0


def _can_exchange(resolved: Path) -> bool:
    """Return whether the parent is writable, the folder is no mount point and not the current folder of the process.

    The shell of a user who is in the folder would otherwise stay in the old one, which is deleted.
    """
    current = Path.cwd()
    writable = os.access(resolved.parent, os.W_OK | os.X_OK)
    return writable and not resolved.is_mount() and resolved not in (current, *current.parents)


def _exchanged_with_copy(resolved: Path, new: Path) -> bool:
    """Exchange a folder with a copy that has the new files; return False if the file system does not support that."""
    try:
        with temporary_folder(resolved, PARTIAL) as copy:
            shutil.copytree(resolved, copy, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
            _copy_owners(resolved, copy)
            for path in new.iterdir():
                (copy / path.name).unlink(missing_ok=True)  # a link to the file of the folder, which must not change
                os.link(path, copy / path.name)
            return exchange(copy, resolved)
    except OSError:  # shutil.Error too: no hard links, or a file on another disk
        return False


def _copy_owners(folder: Path, copy: Path) -> None:
    """Give the folders of a copy their owners, so that a run as root does not take a folder from its user."""
    if not hasattr(os, "chown"):
        return
    for source in (folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        owner, target = source.stat(), copy / source.relative_to(folder)
        if (owner.st_uid, owner.st_gid) != (target.stat().st_uid, target.stat().st_gid):
            with contextlib.suppress(PermissionError):
                os.chown(target, owner.st_uid, owner.st_gid)
