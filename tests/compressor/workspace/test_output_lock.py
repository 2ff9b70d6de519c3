"""Tests of the lock of an output: one run at a time, and the leftovers of killed runs are removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.workspace.folder_errors import FolderError
from compressor.workspace.output_folder import output_folder, scratch_folder
from compressor.workspace.output_lock import hidden_path, output_lock, temporary_folder

RUN = """
import sys, time
from pathlib import Path
from compressor.workspace.output_folder import output_folder, scratch_folder
with output_folder(Path(sys.argv[1]), force=True) as folder, scratch_folder(Path(sys.argv[1])) as scratch:
    (folder / "half").write_text("x")
    (scratch / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def running(tmp_path: Path):
    """A run that writes ``out`` in another process."""
    with subprocess.Popen([sys.executable, "-c", RUN, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_second_run_ends_and_a_killed_run_is_cleaned_up(tmp_path: Path, running: "subprocess.Popen[str]") -> None:
    before = names(tmp_path)
    assert [name.rpartition(".")[2] for name in before if name != ".out.lock"] in (
        ["partial", "scratch"],
        ["scratch", "partial"],
    )
    expected = (
        rf"another run \(process {running.pid}\) is writing .*out; wait until it ends, or choose another --output"
    )
    with pytest.raises(FolderError, match=expected), output_folder(tmp_path / "out", force=True):
        pass
    assert names(tmp_path) == before
    with output_folder(tmp_path / "out2", force=False):  # another output
        pass
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert names(tmp_path) == sorted([*before, "out2"])
    said: list[str] = []
    with output_folder(tmp_path / "out", force=False, say=said.append) as folder:
        (folder / "a").write_text("x")
    assert names(tmp_path) == ["out", "out2"]
    assert names(tmp_path / "out") == ["a", "manifest.json"]
    assert sorted(said) == sorted(
        f"{name}, which a run that was killed left beside out, was removed." for name in before if name != ".out.lock"
    )


def test_the_lock_is_released_and_deleted_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with output_lock(tmp_path / "new" / "out"):
            assert names(tmp_path / "new") == [".out.lock"]
            with pytest.raises(FolderError, match="another run"), output_lock(tmp_path / "new" / "out"):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []  # nor an empty parent
    with output_lock(tmp_path / "out"):
        pass


def test_only_leftovers_of_the_same_output_are_removed(tmp_path: Path) -> None:
    """Names that begin with the name of the output, files, and links belong to others."""
    others = [".out.b.abcdefgh.partial", ".out2.abcdefgh.partial", ".out.abc.partial", ".out.abcdefgh.keep"]
    for name in (*others, ".out.abcdefgh.partial", ".out.01234567.scratch", ".out.________.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.link0000.partial").symlink_to(tmp_path / others[0])
    (tmp_path / ".out.file0000.partial").write_text("x")
    with output_lock(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted([*others, ".out.link0000.partial", ".out.file0000.partial", "out"])
    assert (tmp_path / others[0] / "file").exists()


def test_long_names_with_the_same_beginning_have_other_temporary_names(tmp_path: Path) -> None:
    first, second = tmp_path / ("x" * 150 + "1"), tmp_path / ("x" * 150 + "2")
    with output_lock(first), scratch_folder(first) as scratch, output_lock(second):
        assert scratch.is_dir()


def test_an_output_that_a_killed_run_moved_away_is_restored(tmp_path: Path) -> None:
    """Only a file system that cannot exchange two names has this moment, between two renames."""
    (tmp_path / ".out.abcdefgh.old").mkdir()
    (tmp_path / ".out.abcdefgh.old" / "file").write_text("mine")
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    said: list[str] = []
    with output_lock(tmp_path / "out", said.append):
        pass
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "mine"
    assert any("out is restored" in sentence for sentence in said)


def test_the_journal_is_deleted_with_a_complete_output_only(tmp_path: Path) -> None:
    journal = hidden_path(tmp_path / "out", "journal")

    def fail() -> None:
        with output_folder(tmp_path / "out", force=False):
            journal.write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == [".out.journal"]
    with output_folder(tmp_path / "out", force=False):
        assert journal.is_file()
    assert names(tmp_path) == ["out"]


def test_a_lock_file_of_a_killed_run_does_not_stop_the_next(tmp_path: Path) -> None:
    """Its number may meanwhile be that of another process."""
    (tmp_path / ".out.lock").write_text(str(os.getppid()))
    with output_lock(tmp_path / "out"):
        assert (tmp_path / ".out.lock").read_text() == str(os.getpid())
    assert names(tmp_path) == []


def test_a_full_disk_in_a_temporary_folder_is_one_sentence(tmp_path: Path) -> None:
    def fill(kind: type[OSError]) -> None:
        with scratch_folder(tmp_path / "out") as scratch:
            (scratch / "x").write_text("x")
            raise kind(28, "No space left on device")

    with pytest.raises(FolderError, match=r"the disk that holds .*out is full; free some space or choose another"):
        fill(OSError)
    assert names(tmp_path) == []
    with temporary_folder(tmp_path / "out", "partial") as folder:
        assert folder.parent == tmp_path
