"""The output folder: written under a temporary name and renamed when complete, its manifest, and file checks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from compressor.errors import FolderError
from compressor.workspace.manifest import MANIFEST, digest_of, read_manifest

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# With less than one page of a file system free, no file can be written.
SPARE = 4096
# Characters of the folder's name that the temporary name repeats: file systems limit the length of both.
_PREFIX_LENGTH = 100


@contextlib.contextmanager
def output_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty temporary folder; add a manifest and move it to `path` if the block raises nothing.

    Args:
        path: the folder to create.
        force: replace an existing folder, if it is empty or its manifest lists every file in it.

    Raises:
        FolderError: the folder exists and may not be replaced, it cannot be written, or the disk is full.
    """
    destination = path.resolve()  # follow links, and be independent of a later chdir
    _check_replaceable(destination, path, force=force)
    check_writable(path)
    with _readable_errors(path, unwritable=True):
        destination.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{destination.name[:_PREFIX_LENGTH]}."
        partial = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=destination.parent))
        _check_name(destination)
    try:
        with _readable_errors(path):
            partial.chmod(0o755)  # mkdtemp creates it with mode 0o700
            yield partial
            write_manifest(partial)
            _move_into_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield a temporary folder on the same disk as the output folder `beside`, and delete it afterwards."""
    output = beside.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix=f".{output.name[:_PREFIX_LENGTH]}.", suffix=".scratch", dir=output.parent)
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Check, before expensive work, that `folder` can be created or written to.

    Raises:
        FolderError: it is a file, is inside a file, or may not be written.
    """
    resolved = folder.resolve()
    with _readable_errors(folder, unwritable=True):
        nearest = next(parent for parent in (resolved, *resolved.parents) if parent.exists())
    if not nearest.is_dir():
        raise FolderError(f"{folder} cannot be written ({nearest} is not a folder); choose another --output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FolderError(f"{folder} cannot be written (no permission for {nearest}); choose another --output.")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write files into a folder, which is created if it is missing: all of them, or none.

    Raises:
        FolderError: the folder cannot be written, or the disk is full.
    """
    is_new = not folder.exists()
    with _readable_errors(folder, unwritable=True):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=folder))
        try:
            for name, content in contents.items():
                (partial / name).write_bytes(content)
            return tuple((partial / name).replace(folder / name) for name in contents)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write manifest.json with the size and SHA-256 of the files `names`, or of every file in the folder."""
    all_files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = sorted(set(all_files if names is None else names) - {MANIFEST})
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")


def engine_bytes(path: Path) -> int:
    """Return the size of an engine's file in bytes.

    Weights in separate files count: the external data of ONNX, the .bin of OpenVINO, the safetensors of a checkpoint.
    """
    if path.name == "config.json":
        return sum(part.stat().st_size for part in path.parent.glob("*.safetensors"))
    weights = (path.with_name(path.name + ".data"), *([path.with_suffix(".bin")] if path.suffix == ".xml" else []))
    return sum(part.stat().st_size for part in (path, *weights) if part.exists())


def copy_onnx(source: Path, destination: Path) -> Path:
    """Copy an ONNX file; rename its external data after `destination`, also inside the file."""
    external = source.with_name(source.name + ".data")
    if not external.exists():
        shutil.copyfile(source, destination)
        return destination
    import onnx

    model = onnx.load(str(source))
    onnx.save_model(model, str(destination), save_as_external_data=True, location=destination.name + ".data")
    # onnx creates the external data with mode 0o600; give it the mode of the model file.
    shutil.copymode(destination, destination.with_name(destination.name + ".data"))
    return destination


def _check_replaceable(destination: Path, path: Path, *, force: bool) -> None:
    """Raise if `destination` exists and may not be replaced; messages show `path`, as the user wrote it."""
    with _readable_errors(path, unwritable=True):
        if not destination.exists():
            return
        if not destination.is_dir():
            raise FolderError(f"{path} exists and is not a folder; choose another --output.")
        empty = not any(destination.iterdir())
    if destination.is_mount():
        raise FolderError(f"{path} is a mount point, which cannot be replaced; choose a folder inside it.")
    if not force and not empty:
        raise FolderError(f"the output folder {path} exists; choose another --output, or replace it with --force.")
    foreign = [] if empty else _foreign_files(destination)
    if foreign:
        raise FolderError(
            f"{path} holds files that Compressor did not write ({foreign[0]}), so --force does not replace it; move "
            "them, or choose another --output."
        )


def _foreign_files(folder: Path) -> list[str]:
    """Return the files that the folder's manifest does not list; they are the user's and must not be deleted."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    try:
        manifest = read_manifest(folder)
    except FolderError:
        return files or [str(folder)]
    return [name for name in files if name not in manifest and name != MANIFEST]


def _check_name(path: Path) -> None:
    """Raise OSError now, not after a long search, if the file system does not accept the name."""
    with contextlib.suppress(FileNotFoundError):
        path.stat()


def _move_into_place(partial: Path, destination: Path) -> None:
    """Rename the finished folder to `destination`; delete an old folder only after that succeeded."""
    old = None
    if destination.exists():
        old = partial.with_suffix(".old")  # unique, as the name of the partial folder is
        destination.rename(old)
    try:
        partial.rename(destination)
    except BaseException:  # KeyboardInterrupt too
        if old is not None:
            old.rename(destination)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _readable_errors(path: Path, *, unwritable: bool = False) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a FolderError; with `unwritable`, every OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise FolderError(_full(path)) from error
        if unwritable or error.errno == errno.EROFS:
            raise FolderError(f"{path} cannot be written ({error.strerror}); choose another --output.") from error
        raise
    except Exception as error:  # native writers (ONNX, engine builders) raise their own errors if the disk is full
        if _free_bytes(path) < SPARE:
            raise FolderError(_full(path)) from error
        raise


def _full(path: Path) -> str:
    return f"the disk that holds {path} is full; free some space or choose another --output."


def _free_bytes(path: Path) -> float:
    """Return the free bytes on the disk of a folder's parent; infinity if the system does not report them."""
    try:
        return shutil.disk_usage(path.resolve().parent).free
    except OSError:
        return float("inf")
