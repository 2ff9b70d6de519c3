"""The manifest of an exported folder, and the check of a folder against it before any of its files is opened.

A folder can come from anywhere, so nothing in it is trusted: names in it must be plain names, files must be those that
the manifest lists, and every JSON file must fit its schema. The manifest is not signed. It detects an incomplete copy
and an edited file, and not an author who writes both; the other checks hold for such a folder too.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from compressor.errors import FolderError
from compressor.workspace.folder_errors import resolved_output
from compressor.workspace.json_files import JsonFileError, read_json

MANIFEST = "manifest.json"
EDITABLE = ("README.md",)  # the model card: users edit it, and no command reads it
EXPORTED = "report.json"  # a folder of a sweep has none
COPY_AGAIN = "copy the whole folder again"
# Files that a library can load by their name alone, although the manifest does not list them.
LOADED = (".json", ".jinja", ".safetensors", ".bin", ".gguf", ".model", ".py", ".pt", ".pth", ".onnx", ".data")
LONGEST = 255  # bytes of a file name, as file systems limit them


def plain_name(name: str) -> str:
    """Return the name of a file in a folder if it is a plain relative path with slashes; raise ValueError otherwise.

    >>> plain_name("deferred/baseline.onnx")
    'deferred/baseline.onnx'
    >>> plain_name("../baseline.onnx")
    Traceback (most recent call last):
        ...
    ValueError: '../baseline.onnx' is not the plain name of a file in the folder
    """
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and ":" not in name
    if not plain or any(part in ("", ".", "..") or len(part.encode()) > LONGEST for part in parts):
        raise ValueError(f"{name[:LONGEST]!r} is not the plain name of a file in the folder")
    return name


PlainName = Annotated[str, AfterValidator(plain_name)]


@with_config(ConfigDict(extra="forbid"))
class Entry(TypedDict):
    """The size of a file in bytes and its SHA-256."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@with_config(ConfigDict(extra="forbid"))
class _Manifest(TypedDict):
    files: dict[PlainName, Entry]


_SCHEMA = TypeAdapter(_Manifest)


def read_manifest(folder: Path) -> dict[str, str]:
    """Read the manifest of a folder that Compressor wrote: SHA-256 by file name.

    Raises:
        FolderError: there is no manifest, or another program wrote it.
    """
    return {name: entry["sha256"] for name, entry in read_entries(folder).items()}


def check_folder(folder: Path) -> dict[str, str]:
    """Compare every file that the manifest lists with it, and return the SHA-256 by file name.

    The model card may be edited or missing. Files that the manifest does not list are ignored, unless a library could
    load them (`LOADED`).

    Raises:
        FolderError: there is no manifest, a file is missing, is no regular file in the folder or has changed, or there
            is a file to be loaded that the manifest does not list.
    """
    entries = read_entries(folder)
    if (folder / MANIFEST).is_symlink():
        raise FolderError(f"{MANIFEST} in {folder} is a link; copy the folder with the files that its links lead to.")
    for name, entry in entries.items():
        if name not in EDITABLE:
            _check_file(folder, name, entry)
    unlisted = next(_unlisted(folder, entries), None)
    if unlisted is not None:
        raise FolderError(
            f"{folder} holds {unlisted!r}, which its {MANIFEST} does not list and which could be loaded in place of an "
            f"exported file; move it out of the folder."
        )
    return {name: entry["sha256"] for name, entry in entries.items()}


def check_outside(folder: Path) -> None:
    """Check that new files in a folder do not come to lie in an exported folder, where `check_folder` refuses them.

    Raises:
        FolderError: it is an exported folder, or lies in one.
    """
    resolved = resolved_output(folder)
    for parent in (resolved, *resolved.parents):
        with contextlib.suppress(FolderError):
            if (parent / MANIFEST).is_file() and EXPORTED in read_entries(parent):
                break
    else:
        return
    raise FolderError(
        f"{folder} is or lies in the exported folder {parent.name}, which `bench` and `build` refuse with files that "
        f"its {MANIFEST} does not list; choose an --output outside it."
    )


def check_outside_data(output: Path, *sources: object) -> None:
    """Check that an output does not come to lie in a folder of samples, where the next run would read it as samples.

    Args:
        output: the file or folder that the run writes.
        sources: values of --data; those that name no folder, such as None, files and data sets of the hub, are ignored.

    Raises:
        FolderError: it is one of the folders, or lies in one.
    """
    resolved = resolved_output(output)
    for source in sources:
        if (
            isinstance(source, (str, Path))
            and resolved.is_relative_to(Path(source).resolve())
            and Path(source).is_dir()
        ):
            raise FolderError(
                f"{output} is or lies in the data {source}, whose files and folders are read as samples and classes; "
                "choose an --output outside it."
            )


def check_no_input(output: Path, *inputs: object) -> None:
    """Check that an output does not replace what the command reads, such as the checkpoint that it compresses.

    Args:
        output: the file or folder that the run writes.
        inputs: values of MODEL, --data and the like; those that name no file or folder are ignored.

    Raises:
        FolderError: it is one of them, or holds one.
    """
    resolved = resolved_output(output)
    read = next((each for each in inputs if isinstance(each, (str, Path)) and _lies_in(each, resolved)), None)
    if read is not None:
        raise FolderError(f"{output} is or holds {read}, which this command reads; choose another --output.")


def _lies_in(path: str | Path, folder: Path) -> bool:
    """Return whether a file or folder exists and is a resolved path or lies in it; False for what is no path."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # such as a URL, or a name that is too long
        return Path(path).exists() and Path(path).resolve().is_relative_to(folder)
    return False


def listed_file(folder: Path, name: str, digests: Mapping[str, str]) -> Path:
    """Return the path of a file in a checked folder.

    Raises:
        FolderError: the manifest does not list the file.
    """
    if name not in digests:
        raise FolderError(f"{folder} lacks {name}; {COPY_AGAIN}.")
    return folder / name


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_entries(folder: Path) -> dict[str, Entry]:
    """Read the entries of a manifest: size in bytes and SHA-256 by file name.

    Raises:
        FolderError: there is no manifest, or another program wrote it.
    """
    try:
        return read_json(folder / MANIFEST, _SCHEMA, remedy=COPY_AGAIN)["files"]
    except (FileNotFoundError, JsonFileError) as error:
        if not folder.exists():
            raise FolderError(f"there is no folder {folder}; check the path.") from error
        reason = "" if isinstance(error, FileNotFoundError) else f": {str(error).rstrip('.')}"
        raise FolderError(
            f"{folder} is not a folder that Compressor wrote: it has no valid {MANIFEST}{reason}; give the folder of "
            "an export."
        ) from error


def _check_file(folder: Path, name: str, entry: Entry) -> None:
    """Check that a file is a regular file in the folder and has the size and the SHA-256 of the manifest."""
    try:
        resolved = (folder / name).resolve(strict=True)
        facts = resolved.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that form a loop
        raise FolderError(f"{folder} lacks {name}; {COPY_AGAIN}.") from error
    if not resolved.is_relative_to(folder.resolve()) or not stat.S_ISREG(facts.st_mode):
        raise FolderError(
            f"{name} in {folder} is not a regular file in the folder; copy the folder with the files that its links "
            "lead to."
        )
    if facts.st_size != entry["bytes"] or digest_of(resolved) != entry["sha256"]:
        raise FolderError(f"{name} in {folder} is not the file that was exported; {COPY_AGAIN}.")


def _unlisted(folder: Path, listed: Mapping[str, Entry]) -> Iterator[str]:
    """Yield the names of files that a library could load and that are not listed; hidden files are not loaded."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.suffix.lower() in LOADED and not hidden and name not in (*listed, MANIFEST) and not path.is_dir():
            yield name
