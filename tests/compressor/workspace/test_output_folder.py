"""Tests of the output folder: it is complete or absent, and files of the user are never deleted."""

import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from compressor.workspace.folder_errors import readable_errors
from compressor.workspace.manifest import check_folder
from compressor.workspace.output_folder import (
    FolderError,
    check_no_input,
    check_outside,
    check_outside_data,
    check_writable,
    output_folder,
    scratch_folder,
    write_file,
    write_files,
)
from compressor.workspace.output_lock import output_lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, *, force: bool = False, content: str = "new") -> None:
    with output_folder(path, force=force) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(content)


def test_manifest_holds_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    make(tmp_path / "out")
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert files == {"sub/a.txt": {"bytes": 3, "sha256": hashlib.sha256(b"new").hexdigest()}}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "out", force=False) as folder, scratch_folder(tmp_path / "out") as scratch:
            (folder / "half").write_text("x")
            (scratch / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == []


def test_existing_folder_is_replaced_only_with_force(tmp_path: Path) -> None:
    make(tmp_path / "out", content="old")
    with pytest.raises(FolderError, match="exists; choose another --output, or replace it with --force"):
        make(tmp_path / "out")
    make(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_existing_folder_survives_failed_replacement(tmp_path: Path) -> None:
    make(tmp_path / "out", content="old")

    def fail() -> None:
        with output_folder(tmp_path / "out", force=True):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - raised above, without a message
        fail()
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("manifest", [None, "{}", "nonsense", '{"files": {"other": 1}}'])
def test_force_does_not_replace_a_foreign_folder(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "out" / "manifest.json").write_text(manifest)
    with pytest.raises(FolderError, match="did not write"):
        make(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_force_does_not_replace_a_folder_with_an_added_file(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"did not write \(notes.txt\)"):
        make(tmp_path / "out", force=True)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()


def test_file_at_the_output_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="exists and is not a folder"):
        make(tmp_path / "file", force=True)
    with pytest.raises(FolderError, match="cannot be written"):
        make(tmp_path / "file" / "out")
    with pytest.raises(FolderError, match="is not a folder"):
        check_writable(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_too_long_name_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="cannot be written"):
        make(tmp_path / ("x" * 300))
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", [b"caf\xe9", b"caf\xe9/out"])
def test_a_name_that_is_no_utf8_is_refused_before_the_work(tmp_path: Path, name: bytes) -> None:
    """ONNX Runtime and safetensors take no such path, which they say after the search."""
    with pytest.raises(FolderError, match=r"is no name in UTF-8.*choose another --output"):
        make(tmp_path / os.fsdecode(name))
    assert names(tmp_path) == []


def test_nothing_is_written_into_an_exported_folder(tmp_path: Path) -> None:
    """Its manifest would not list the file, so that `bench` and `build` would refuse the folder from then on."""
    with output_folder(tmp_path / "out", force=False) as folder:
        (folder / "report.json").write_text("{}")
    (tmp_path / "link").symlink_to("out")
    with output_folder(tmp_path / "front", force=False) as folder:
        (folder / "sweep.json").write_text("{}")
    for folder in (tmp_path / "out", tmp_path / "out" / "new", tmp_path / "link"):
        with pytest.raises(FolderError, match=r"the exported folder out, .*choose an --output outside it"):
            check_outside(folder)
        with pytest.raises(FolderError, match="the exported folder out"):
            write_files(folder, {"inspect.json": b"{}"})
    with pytest.raises(FolderError, match="the exported folder out"):
        make(tmp_path / "out" / "second")
    check_folder(tmp_path / "out")
    make(tmp_path / "out", force=True)
    make(tmp_path / "front" / "second")


def test_nothing_is_written_into_a_folder_of_samples(tmp_path: Path) -> None:
    """A picture of scores would be read as a sample by the next run, and the folder of a sweep as a class."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "texts.txt").write_text("a")
    for output in ("photos", "photos/front", "link/a/b", "photos/bench.json"):
        with pytest.raises(FolderError, match=r"photos, whose files .* choose an --output outside it"):
            check_outside_data(tmp_path / output, None, tmp_path / "photos")
    with pytest.raises(FolderError, match="is or lies in the data"):
        check_outside_data(tmp_path / "photos" / "x", str(tmp_path / "link"))
    check_outside_data(tmp_path / "out", tmp_path / "photos", tmp_path / "texts.txt", "owner/name", "random")
    check_outside_data(tmp_path / "photos-out", tmp_path / "photos")


def test_what_a_command_reads_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --force, an exported checkpoint was replaced by its own export, and `bench` wrote over its data."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "checkpoint")
    (tmp_path / "rows.npz").write_text("a")
    (tmp_path / "link").symlink_to("checkpoint")
    for output, inputs in (
        ("checkpoint", ("checkpoint", None)),
        ("link", (Path("checkpoint"), None)),
        ("rows.npz", ("owner/name", tmp_path / "rows.npz")),
        ("checkpoint", ("checkpoint/a.txt",)),
    ):
        (tmp_path / "checkpoint" / "a.txt").touch()
        with pytest.raises(FolderError, match=r"is or holds .*, which this command reads; choose another --output\."):
            check_no_input(Path(output), *inputs)
    check_no_input(Path("checkpoint/inner"), "checkpoint", "rows.npz", None, object(), "a" * 5000, "https://x/y")
    check_no_input(Path("checkpoint2"), "checkpoint")


def test_a_nul_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"cannot be written \(embedded null byte\)"):
        make(tmp_path / "a\0b")


def test_links_that_form_a_loop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "loop", tmp_path / "loop" / "out"):
        with pytest.raises(FolderError, match="cannot be written"):
            make(output)
        with pytest.raises(FolderError, match="cannot be written"):
            check_writable(output)
    assert names(tmp_path) == ["loop"]


def test_the_root_of_the_file_system_is_refused() -> None:
    for check in (make, check_writable):
        with pytest.raises(FolderError, match=r"^/ is the root of the file system; choose an --output inside it\.$"):
            check(Path("/"))


def test_a_file_replaces_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FolderError, match="pipe is a FIFO, but a file is written there; choose another --output"):
        write_files(tmp_path, {"a": b"new", "pipe": b"new"})
    with output_lock(tmp_path / "pipe"), pytest.raises(FolderError, match="pipe is a FIFO"):
        write_file(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_full_disk_is_reported_for_every_writer_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        with output_folder(tmp_path / "out", force=False):
            raise error

    with pytest.raises(FolderError, match="is full"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RuntimeError, match="native"):
        fail(RuntimeError("native writer failed"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(FolderError, match="is full"):
        fail(RuntimeError("native writer failed"))
    assert names(tmp_path) == []


def test_a_disk_that_was_full_while_an_engine_was_built_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native writers name no cause, and the files that filled the disk are deleted before the error arrives."""
    out, free = tmp_path / "out", 0

    def usage(_: object) -> object:
        full = any(name.endswith(".scratch") for name in names(tmp_path))
        return shutil._ntuple_diskusage(10**6, 10**6, free if full else 10**6)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(FolderError, match=r"the disk that holds .*out is full"), scratch_folder(out):
        raise RuntimeError("iostream error")
    free = 30_000
    with pytest.raises(RuntimeError, match="iostream error"), scratch_folder(out):
        raise RuntimeError("iostream error")
    words = r"has 30,000 bytes free, and about 50,000 are written; .*choose another --output \(iostream error\)"
    with pytest.raises(FolderError, match=words), scratch_folder(out), readable_errors(out, needed=50_000):
        raise RuntimeError("iostream error")


def test_write_files_writes_all_or_none(tmp_path: Path) -> None:
    assert write_files(tmp_path / "a" / "b", {"x": b"1", "y": b"2"}) == (tmp_path / "a/b/x", tmp_path / "a/b/y")
    assert names(tmp_path / "a" / "b") == ["x", "y"]
    with pytest.raises(FolderError, match="cannot be written"):
        write_files(tmp_path / "c", {"x": b"1", "no/such/folder": b"2"})
    assert not (tmp_path / "c").exists()
