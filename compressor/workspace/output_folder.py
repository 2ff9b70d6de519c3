"""The output folder: written under a temporary name and renamed when complete, its manifest, and file checks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from compressor.errors import FolderError
from compressor.workspace.add_files import exchange
from compressor.workspace.folder_errors import readable_errors, resolved_output
from compressor.workspace.manifest import (
    MANIFEST,
    check_no_input,
    check_outside,
    check_outside_data,
    digest_of,
    read_entries,
    read_manifest,
)
from compressor.workspace.output_lock import (
    INSIDE,
    JOURNAL,
    OLD,
    PARTIAL,
    SCRATCH,
    Say,
    hidden_path,
    output_lock,
    silent,
    temporary_folder,
)
from compressor.workspace.special_files import special_kind
from runtimes.base.part_files import part_files

__all__ = [
    "MANIFEST",
    "FolderError",
    "check_file",
    "check_no_input",
    "check_outside",
    "check_outside_data",
    "check_writable",
    "copy_onnx",
    "engine_bytes",
    "engine_files",
    "output_folder",
    "read_manifest",
    "scratch_folder",
    "write_file",
    "write_files",
    "write_manifest",
    "write_merged_manifest",
]


@contextlib.contextmanager
def output_folder(path: Path, *, force: bool, say: Say = silent) -> Iterator[Path]:
    """Yield an empty temporary folder; add a manifest and move it to `path` if the block raises nothing.

    The lock of `path` is held meanwhile, see `compressor.workspace.output_lock`. The journal of a search for `path` is
    deleted at the end.

    Args:
        path: the folder to create.
        force: replace an existing folder, if it is empty or its manifest lists every file in it.
        say: shows a sentence about what a killed run left and was removed.

    Raises:
        FolderError: the folder exists and may not be replaced, another run writes it, it cannot be written, or the
            disk is full.
    """
    destination = resolved_output(path)  # follow links, and be independent of a later chdir
    _check_encoding(destination, path)
    with output_lock(path, say):
        _check_replaceable(destination, path, force=force)
        check_writable(path)
        check_outside(destination.parent)
        with contextlib.ExitStack() as stack:
            with readable_errors(path, unwritable=True):
                partial = stack.enter_context(temporary_folder(destination, PARTIAL))
                _check_name(destination)
            with readable_errors(path):
                partial.chmod(0o755)  # mkdtemp creates it with mode 0o700
                yield partial
                write_manifest(partial)
                _move_into_place(partial, destination)
                hidden_path(destination, JOURNAL).unlink(missing_ok=True)  # its search will not be resumed


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield a temporary folder on the same disk as the output `beside`, whose lock is held; delete it afterwards.

    Raises:
        FolderError: the disk is full.
    """
    with readable_errors(beside), temporary_folder(beside, SCRATCH) as folder, readable_errors(beside):
        yield folder  # the inner one looks at the disk while the folder is still there


def check_writable(folder: Path) -> None:
    """Check, before expensive work, that `folder` can be created or written to.

    Raises:
        FolderError: it is a file, is inside a file, or may not be written.
    """
    resolved = resolved_output(folder)
    with readable_errors(folder, unwritable=True):
        nearest = next(parent for parent in (resolved, *resolved.parents) if parent.exists())
    if not nearest.is_dir():
        raise FolderError(f"{folder} cannot be written ({nearest} is not a folder); choose another --output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FolderError(f"{folder} cannot be written (no permission for {nearest}); choose another --output.")


def check_file(path: Path) -> None:
    """Check that a file can be written in place of what lies at `path`.

    Raises:
        FolderError: a folder, a FIFO, a socket or a device lies there.
    """
    kind = "a folder" if path.is_dir() else special_kind(path)
    if kind is not None:
        raise FolderError(f"{path} is {kind}, but a file is written there; choose another --output.")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write files into a folder, which is created if it is missing: each of them whole, and all of them or none.

    The lock of `folder` is held meanwhile. A process that is killed while the files get their names, after all were
    written, may leave some of them.

    Raises:
        FolderError: another run writes the folder, it cannot be written, or the disk is full.
    """
    check_outside(folder)
    with output_lock(folder), readable_errors(folder, unwritable=True):
        is_new = not folder.exists()
        try:
            with temporary_folder(folder / INSIDE, PARTIAL) as partial:
                return _written(folder, contents, partial)
        finally:
            if is_new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whose lock is held: the whole file, or nothing.

    Raises:
        FolderError: it cannot be written, or the disk is full.
    """
    with readable_errors(path, unwritable=True), temporary_folder(path, PARTIAL) as partial:
        resolved = resolved_output(path)
        _written(resolved.parent, {resolved.name: content}, partial)


def _written(folder: Path, contents: Mapping[str, bytes], partial: Path) -> tuple[Path, ...]:
    """Write files into a temporary folder, then move them to `folder`."""
    for name, content in contents.items():
        (partial / name).write_bytes(content)
        check_file(folder / name)
    return tuple((partial / name).replace(folder / name) for name in contents)


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write manifest.json with the size and SHA-256 of the files `names`, or of every file in the folder."""
    all_files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    (folder / MANIFEST).write_text(_manifest(_entries(folder, all_files if names is None else names)))


def write_merged_manifest(folder: Path, kept: Iterable[str], new: Path) -> None:
    """Write manifest.json of a folder to which the files of `new` will be added into `new`.

    Args:
        folder: a finished output folder. The entries of its files are taken from its manifest.
        kept: files in this manifest that stay as they are. Files in `new` replace those of the same names.
        new: a folder with the new files.
    """
    earlier = read_entries(folder)
    entries: dict[str, Mapping[str, object]] = {name: earlier[name] for name in kept}
    entries |= _entries(new, (path.name for path in new.iterdir()))
    (new / MANIFEST).write_text(_manifest(entries))


def _entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int | str]]:
    """Return the entries of files in a manifest: size in bytes and SHA-256."""
    files = sorted(set(names) - {MANIFEST})
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in files}


def _manifest(entries: Mapping[str, Mapping[str, object]]) -> str:
    return json.dumps({"files": dict(sorted(entries.items()))}, indent=2) + "\n"


def engine_bytes(path: Path) -> int:
    """Return the size of an engine's file in bytes.

    Weights in separate files count: the external data of ONNX, the .bin of OpenVINO, the safetensors of a checkpoint.
    So do the other files of a model of several, given the first.
    """
    return sum(map(_file_bytes, part_files(path)))


def _file_bytes(path: Path) -> int:
    if path.name == "config.json":
        return sum(part.stat().st_size for part in path.parent.rglob("*.safetensors"))
    return sum(part.stat().st_size for part in _with_weights(path))


def engine_files(path: Path) -> tuple[Path, ...]:
    """Return the files that an engine is opened from: those of `engine_bytes`, and all files of a checkpoint."""
    if path.name == "config.json":
        return tuple(sorted(part for part in path.parent.iterdir() if part.is_file()))
    return tuple(file for part in part_files(path) for file in _with_weights(part))


def _with_weights(path: Path) -> list[Path]:
    """Return a file with the weights beside it."""
    weights = (path.with_name(path.name + ".data"), *([path.with_suffix(".bin")] if path.suffix == ".xml" else []))
    return [part for part in (path, *weights) if part.exists()]


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
    with readable_errors(path, unwritable=True):
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


def _check_encoding(destination: Path, path: Path) -> None:
    """Raise if the name of a folder is no UTF-8, because no runtime opens files in such a folder."""
    try:
        str(destination).encode()
    except UnicodeEncodeError as error:
        raise FolderError(
            f"{path} is no name in UTF-8, or lies in a folder without one, and no runtime opens files there; choose "
            "another --output."
        ) from error


def _check_name(path: Path) -> None:
    """Raise OSError now, not after a long search, if the file system does not accept the name."""
    with contextlib.suppress(FileNotFoundError):
        path.stat()


def _move_into_place(partial: Path, destination: Path) -> None:
    """Rename the finished folder to `destination`; an old folder there gets the name `partial`, and is deleted later.

    On a file system that cannot exchange two names, the old folder is moved away first. If the process is killed then,
    the next run with this output restores it, see `compressor.workspace.output_lock`.
    """
    if not destination.exists():
        partial.rename(destination)
        return
    if exchange(partial, destination):
        return
    old = partial.with_suffix(f".{OLD}")  # unique, as the name of the partial folder is
    destination.rename(old)
    try:
        partial.rename(destination)
    except BaseException:  # KeyboardInterrupt too
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
