"""The output folder: written under a temporary name, renamed when complete, so that it is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from compressor.errors import CompressorError

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Less free than a page of a file system: nothing could be written.
SPARE = 4096
# Characters of the folder's name in the temporary one, whose length is limited too.
_SHOWN = 100


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
    place = path.resolve()  # a link is followed, and a later change of folder changes nothing
    _check_free(place, path, force=force)
    check_writable(path)
    with _readable_errors(path, unwritable=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name[:_SHOWN]}.", suffix=".partial", dir=place.parent))
        _check_name(place)
    try:
        with _readable_errors(path):
            partial.chmod(0o755)  # mkdtemp makes it private, the finished folder is not
            yield partial
            write_manifest(partial)
            _move_into_place(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for files that are not shipped, on the same disk as the output; gone afterwards."""
    place = beside.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix=f".{place.name[:_SHOWN]}.", suffix=".scratch", dir=place.parent)
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Find out before the work that `folder` can be made, or written to.

    Raises:
        FolderError: it is a file, or lies below one, or may not be written.
    """
    place = folder.resolve()
    with _readable_errors(folder, unwritable=True):
        nearest = next(parent for parent in (place, *place.parents) if parent.exists())
    if not nearest.is_dir():
        raise FolderError(f"{folder} cannot be written ({nearest} is no folder); choose another --output.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FolderError(f"{folder} cannot be written (no permission for {nearest}); choose another --output.")


def write_files(folder: Path, contents: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Write files into a folder, made if need be: all of them, or none.

    Raises:
        FolderError: the folder cannot be written, or the disk is full.
    """
    made = not folder.exists()
    with _readable_errors(folder, unwritable=True):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=folder))
        try:
            for name, content in contents.items():
                (partial / name).write_bytes(content)
            return tuple((partial / name).replace(folder / name) for name in contents)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """List files of a folder with size and SHA-256: those named, or every one."""
    every = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = sorted(set(every if names is None else names) - {MANIFEST})
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")


def listed(folder: Path) -> dict[str, str]:
    """The files of a folder that Compressor wrote, with their SHA-256.

    Raises:
        FolderError: there is no manifest, or it is one of another program.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        return {name: entry["sha256"] for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{folder} is no folder that Compressor wrote: it has no {MANIFEST} of one.") from error


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Hold files, and the external data that belongs to them, against the manifest: a bad copy is noticed.

    Raises:
        FolderError: there is no manifest, or a file is missing or has changed.
    """
    digests = listed(folder)
    wanted = list(names)
    for name in (*wanted, *digests.keys() & {f"{name}.data" for name in wanted}):
        if not (folder / name).is_file():
            raise FolderError(f"{folder} lacks {name}; copy the whole folder again.")
        if _sha256(folder / name) != digests.get(name):
            raise FolderError(f"{name} in {folder} is not the file that was exported; copy the whole folder again.")


def engine_bytes(path: Path) -> int:
    """Size of an engine's file, with the weights that an ONNX file, OpenVINO's or a config has beside it."""
    if path.name == "config.json":
        return sum(part.stat().st_size for part in path.parent.glob("*.safetensors"))
    beside = (path.with_name(path.name + ".data"), *([path.with_suffix(".bin")] if path.suffix == ".xml" else []))
    return sum(part.stat().st_size for part in (path, *beside) if part.exists())


def copy_onnx(source: Path, destination: Path) -> Path:
    """Copy an ONNX file under its final name, with its external data, whose name is written inside it."""
    external = source.with_name(source.name + ".data")
    if not external.exists():
        shutil.copyfile(source, destination)
        return destination
    import onnx

    model = onnx.load(str(source))
    onnx.save_model(model, str(destination), save_as_external_data=True, location=destination.name + ".data")
    # onnx makes the weights readable by their owner alone; whoever may read the model must be able to read them too.
    shutil.copymode(destination, destination.with_name(destination.name + ".data"))
    return destination


def _check_free(place: Path, path: Path, *, force: bool) -> None:
    """Refuse what may not be replaced; `path` is how the user wrote `place`."""
    with _readable_errors(path, unwritable=True):
        if not place.exists():
            return
        if not place.is_dir():
            raise FolderError(f"{path} exists and is no folder; choose another --output.")
        empty = not any(place.iterdir())
    if place.is_mount():
        raise FolderError(f"{path} is a mount point, which cannot be replaced in one move; choose a folder inside it.")
    if not force and not empty:
        raise FolderError(f"the output folder {path} exists; choose another --output, or replace it with --force.")
    strange = [] if empty else _strangers(place)
    if strange:
        raise FolderError(
            f"{path} holds files that Compressor did not write ({strange[0]}), so --force does not replace it; move "
            "them, or choose another --output."
        )


def _strangers(folder: Path) -> list[str]:
    """Files that the manifest of a folder does not list: someone's own, which must not be deleted."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    try:
        ours = listed(folder)
    except FolderError:
        return found or [str(folder)]
    return [name for name in found if name not in ours and name != MANIFEST]


def _check_name(place: Path) -> None:
    """Find out now, not after a long search, that the disk does not take the name."""
    with contextlib.suppress(FileNotFoundError):
        place.stat()


def _move_into_place(partial: Path, place: Path) -> None:
    """Swap the finished folder in; an old one is removed only after the new one has its place."""
    old = None
    if place.exists():
        old = partial.with_suffix(".old")  # as unique as the partial folder's own name
        place.rename(old)
    try:
        partial.rename(place)
    except BaseException:  # an interrupt too
        if old is not None:
            old.rename(place)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _readable_errors(path: Path, *, unwritable: bool = False) -> Iterator[None]:
    """Say in a sentence what the disk refused; with `unwritable`, whatever it refused."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise FolderError(_full(path)) from error
        if unwritable or error.errno == errno.EROFS:
            raise FolderError(f"{path} cannot be written ({error.strerror}); choose another --output.") from error
        raise
    except Exception as error:  # native writers (ONNX, an engine builder) have error types of their own for a full disk
        if _free_bytes(path) < SPARE:
            raise FolderError(_full(path)) from error
        raise


def _full(path: Path) -> str:
    return f"the disk that holds {path} is full; free some space or choose another --output."


def _free_bytes(path: Path) -> float:
    """Bytes free where a folder is to be made; infinite where the system does not say."""
    try:
        return shutil.disk_usage(path.resolve().parent).free
    except OSError:
        return float("inf")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(chunk)
    return digest.hexdigest()
