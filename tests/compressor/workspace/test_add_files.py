"""Tests of adding files to a finished folder: after a kill at any moment it is as it was, or complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.workspace import add_files as module
from compressor.workspace.add_files import add_files, exchange, staging_folder
from compressor.workspace.manifest import MANIFEST, check_folder
from compressor.workspace.output_folder import output_folder, write_merged_manifest
from compressor.workspace.output_lock import output_lock

# A child process for each operation on the file system (an audit event) is killed at that operation.
KILLER = """
import os, signal, sys
from pathlib import Path
from compressor.workspace import add_files as module
from tests.compressor.workspace.test_add_files import OPERATIONS, add, is_consistent, make

if sys.argv[2] == "in place":
    module._can_exchange = lambda path: False
if sys.argv[2] == "without exchange":
    module.exchange = lambda first, second: False

def child(folder, moment):
    state = {"count": 0, "on": False}
    def hook(event, arguments):
        if state["on"] and event in OPERATIONS:
            state["count"] += 1
            if state["count"] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    state["on"] = True
    add(folder)

outcomes = []
for moment in range(1, 1000, 1 if sys.argv[2] == "exchange" else 3):
    parent = Path(sys.argv[1]) / str(moment)
    parent.mkdir()
    make(parent / "out")
    pid = os.fork()
    if not pid:
        try:
            child(parent / "out", moment)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    outcomes.append(is_consistent(parent / "out"))
    if not os.WIFSIGNALED(status):
        break
print(*outcomes)
"""
OPERATIONS = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "open", "ctypes.dlsym")
ADDED = {"engine": "engine", "report.json": "built"}


def check_files(folder, names):
    """Check a folder against its manifest, which lists at least these names."""
    assert set(names) <= set(check_folder(folder))


def make(folder: Path) -> None:
    """Write a finished folder with a subfolder."""
    with output_folder(folder, force=False) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text("weights")
        (partial / "report.json").write_text("deferred")


def add(folder: Path) -> None:
    """Add an engine, and replace the report."""
    with output_lock(folder), staging_folder(folder) as staging:
        new = staging / "new"
        new.mkdir()
        for name, text in ADDED.items():
            (new / name).write_text(text)
        write_merged_manifest(folder, ("sub/weights", "report.json"), new)
        add_files(folder, new, first=MANIFEST, last="report.json")


def is_consistent(folder: Path) -> str:
    """Return ``before`` or ``complete``, or what else the folder holds; check that a next run can use it."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    listed = set(json.loads((folder / MANIFEST).read_text())["files"])
    state = {"deferred": "before", "built": "complete"}[(folder / "report.json").read_text()]
    try:
        check_files(folder, listed)
        exact = files == listed == {"sub/weights", "report.json", *(["engine"] if state == "complete" else [])}
    except Exception:
        exact = False
    add(folder)  # the next build
    check_files(folder, ["engine", "report.json", "sub/weights"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with output_folder(folder, force=True):  # the next export
        pass
    return state if exact else "between"


@pytest.mark.parametrize("mode", ["exchange", "without exchange", "in place"])
def test_a_kill_at_any_moment(tmp_path: Path, mode: str) -> None:
    """Files that are replaced one by one pass through other states, which the next build and export accept."""
    command = [sys.executable, "-c", KILLER, str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    outcomes = done.stdout.split()
    assert (done.returncode, done.stderr) == (0, "")
    assert outcomes[0] == "before"
    assert outcomes[-1] == "complete"
    assert len(outcomes) > 5
    if mode == "exchange":
        if not exchange(*(_folder(tmp_path / name) for name in ("a", "b"))):
            pytest.skip("the file system cannot exchange two names")
        assert set(outcomes) == {"before", "complete"}
        assert outcomes == sorted(outcomes)  # first all before, then all complete


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_files_are_linked_and_files_of_the_user_stay(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "out" / "link").symlink_to("sub/weights")
    (tmp_path / "out" / "sub").chmod(0o750)
    os.link(tmp_path / "out" / "report.json", tmp_path / "report elsewhere")
    weights = (tmp_path / "out" / "sub" / "weights").stat()
    add(tmp_path / "out")
    after = (tmp_path / "out" / "sub" / "weights").stat()
    assert (after.st_ino, after.st_nlink, after.st_mtime_ns) == (weights.st_ino, 1, weights.st_mtime_ns)
    assert (tmp_path / "out" / "sub").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    assert (tmp_path / "out" / "link").readlink() == Path("sub/weights")
    assert (tmp_path / "report elsewhere").read_text() == "deferred"  # not written through the link
    assert (tmp_path / "out" / "report.json").read_text() == "built"


def test_the_current_folder_is_not_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell of the user would stay in the old folder."""
    make(tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino
    monkeypatch.chdir(tmp_path / "out" / "sub")
    add(Path(".."))
    assert (tmp_path / "out").stat().st_ino == inode
    check_files(tmp_path / "out", ["engine", "report.json", "sub/weights"])
    assert names(tmp_path / "out") == ["engine", "manifest.json", "report.json", "sub"]
    assert names(tmp_path) == ["out"]


def test_without_hard_links_the_files_are_replaced_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    make(tmp_path / "out")
    monkeypatch.setattr(module.os, "link", refused)
    add(tmp_path / "out")
    check_files(tmp_path / "out", ["engine", "report.json", "sub/weights"])
    assert names(tmp_path) == ["out"]
