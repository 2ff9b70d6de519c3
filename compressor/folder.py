"""The output folder: written under a temporary name, renamed when complete, so that it is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compressor.errors import CompressorError

MANIFEST = "manifest.json"


class FolderError(CompressorError):
    """The output folder exists, cannot be written, or does not fit on the disk."""


@contextlib.contextmanager
def output_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder to fill; it gets a manifest and its real name only if the block ends well.

    Args:
        path: the folder to make.
        force: replace it if it exists, but only if Compressor wrote it (it holds a manifest) or it is empty.

    Raises:
        FolderError: it exists and may not be replaced, it cannot be written, or the disk is full.
    """
    _check_free(path, force=force)
    with _readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private, the finished folder is not
        with _readable_errors(path):
            yield partial
            write_manifest(partial)
            _move_into_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for files that are not shipped, on the same disk as the output; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.scratch.", dir=beside.parent) as name:
        yield Path(name)


def write_manifest(folder: Path) -> None:
    """List every file of a folder with size and SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")


def onnx_bytes(path: Path) -> int:
    """Size of an ONNX file together with its external data."""
    return sum(part.stat().st_size for part in (path, path.with_name(path.name + ".data")) if part.exists())


def _check_free(path: Path, *, force: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise FolderError(f"{path} exists and is no folder; choose another --output.")
    empty = not any(path.iterdir())
    if not force and not empty:
        raise FolderError(f"the output folder {path} exists; choose another --output, or replace it with --force.")
    if force and not empty and not (path / MANIFEST).is_file():
        raise FolderError(
            f"{path} holds files that Compressor did not write, so --force does not replace it; move them."
        )


def _move_into_place(partial: Path, path: Path) -> None:
    """Swap the finished folder in; an old one is removed only after the new one has its place."""
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FolderError(
                f"the disk of {path.parent} is full; free some space or choose another --output."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise FolderError(f"{path} cannot be written ({error.strerror}); choose another --output.") from error
        raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(chunk)
    return digest.hexdigest()
