"""Tests of the search journal: recorded values are reused, however the earlier run ended."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import CompressorError
from compressor.workspace.journal import Journal, JournalError

numbers = st.floats(allow_nan=False) | st.integers(-(10**9), 10**9)
values = st.dictionaries(st.text(max_size=30), numbers | st.lists(numbers | st.text(max_size=5), max_size=3))


def never():
    raise AssertionError("measured although the journal holds the value")


def filled(path, count=3, subject="s"):
    journal = Journal(subject, path)
    for number in range(count):
        journal.note(f"key {number}", number / 3)
    return journal


@settings(max_examples=25, deadline=None)
@given(values)
def test_recorded_values_are_recalled_exactly(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("journal") / ".j"
    first = Journal("subject", path)
    for key, value in content.items():
        assert first.recall(key, lambda value=value: value) == value
    again = Journal("subject", path)
    assert len(again) == len(content)
    for key, value in content.items():
        assert again.knows(key)
        assert again.recall(key, never) == value
    assert (first.found, again.found) == (0, len(content))


def test_infinity_survives(tmp_path):
    """A refused candidate is recorded with an infinite cost."""
    Journal("s", tmp_path / "j").note("refused", [math.inf, math.inf, "why"])
    assert Journal("s", tmp_path / "j").recall("refused", never) == [math.inf, math.inf, "why"]


def test_measured_value_is_written_at_once(tmp_path):
    journal = Journal("s", tmp_path / "j")

    def interrupted():
        raise KeyboardInterrupt

    assert journal.recall("a", lambda: 0.1) == 0.1
    with pytest.raises(KeyboardInterrupt):
        journal.recall("b", interrupted)
    again = Journal("s", tmp_path / "j")
    assert again.knows("a")
    assert not again.knows("b")


def test_later_value_of_a_key_wins(tmp_path):
    journal = filled(tmp_path / "j")
    journal.note("key 1", 9.0)
    assert Journal("s", tmp_path / "j").recall("key 1", never) == 9.0
    assert len(Journal("s", tmp_path / "j")) == 3


def test_another_subject_starts_an_empty_journal(tmp_path):
    filled(tmp_path / "j", subject="one")
    other = Journal("two", tmp_path / "j")
    assert len(other) == 0
    assert len(Journal("one", tmp_path / "j")) == 0


@pytest.mark.parametrize("cut", range(1, 25))
def test_incomplete_last_line_is_ignored(tmp_path, cut):
    """The lines before are kept, and a value that is recorded next can be read."""
    filled(tmp_path / "j")
    text = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(text[:-cut])
    again = Journal("s", tmp_path / "j")
    whole = cut == 1  # the line feed alone
    assert [again.knows(f"key {number}") for number in range(3)] == [True, True, whole]
    again.note("next", 1.0)
    assert len(Journal("s", tmp_path / "j")) == 3 + whole


@pytest.mark.parametrize("content", [b"", b"\x80\x81\xff", b"no json\n", b"[1, 2]\n", b"3\n", b"\n"])
def test_file_in_another_format_starts_an_empty_journal(tmp_path, content):
    (tmp_path / "j").write_bytes(content)
    assert len(Journal("s", tmp_path / "j")) == 0
    filled(tmp_path / "j")
    assert len(Journal("s", tmp_path / "j")) == 3


def test_a_search_that_stops_before_its_first_value_leaves_no_file(tmp_path):
    """Such as one whose --prices or --tokens are refused; also where another search had left its values."""
    Journal("s", tmp_path / "j")
    assert list(tmp_path.iterdir()) == []
    filled(tmp_path / "j", subject="another")
    Journal("s", tmp_path / "j")
    assert list(tmp_path.iterdir()) == []
    assert len(filled(tmp_path / "j", count=1)) == len(Journal("s", tmp_path / "j")) == 1


def test_journal_without_path_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    assert journal.recall("a", lambda: 1) == journal.recall("a", never) == 1
    assert list(tmp_path.iterdir()) == []
    assert len(Journal()) == 0  # instances do not share values


def test_what_became_of_an_interrupted_run_is_said(tmp_path):
    assert filled(tmp_path / "j").message() is None
    again = Journal("s", tmp_path / "j")
    assert (again.resumed, again.discarded) == (3, 0)
    assert again.message() == "Resumed an interrupted search: 3 values that it measured are used again."
    other = Journal("another", tmp_path / "j")
    assert (other.resumed, other.discarded) == (0, 3)
    assert other.message() == (
        "3 values of an interrupted search with another version, other settings, another model or other data were "
        "discarded, so the search starts anew."
    )
    assert Journal().message() is None


@pytest.mark.parametrize("new", ["0.25", '"a text"', "[1, 2]", "null"])
def test_an_edited_value_and_those_after_it_are_measured_again(tmp_path, new):
    """It once passed as measured, or ended in a traceback where a search took it apart."""
    path = tmp_path / "j"
    filled(path)
    path.write_text(path.read_text().replace(f'"value": {1 / 3}', f'"value": {new}'))
    again = Journal("s", path)
    assert [again.knows(f"key {number}") for number in range(3)] == [True, False, False]
    assert again.message() == (
        "Resumed an interrupted search: 1 values that it measured are used again; 2 lines of its journal are damaged "
        "or edited, and are measured again."
    )
    again.note("key 1", 1 / 3)
    assert Journal("s", path).damaged == 0


def test_a_damaged_first_line_is_said(tmp_path):
    path = tmp_path / "j"
    filled(path)
    path.write_bytes(b"\0" * 10 + path.read_bytes()[10:])
    assert Journal("s", path).message().endswith("is damaged, or of another version, so the search starts anew.")


def test_opening_a_journal_only_cuts_off_its_incomplete_line(tmp_path):
    """The lines before it are not written again, so a kill at any moment keeps them."""
    path = tmp_path / "j"
    filled(path)
    inode, text = path.stat().st_ino, path.read_bytes()
    path.write_bytes(text + b'{"key": "cut')
    Journal("s", path)
    assert (path.stat().st_ino, path.read_bytes()) == (inode, text)


def test_a_disk_that_is_full_while_a_value_is_noted_is_one_sentence(tmp_path):
    """The limit on the size of a file stands in for the disk."""
    script = f"""
import resource
from compressor.workspace.journal import Journal
journal = Journal("s", __import__("pathlib").Path({str(tmp_path / "j")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (140, 140))
try:
    for number in range(100):
        journal.note(f"key {{number}}", 0.5)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"FolderError a file of {tmp_path / 'j'} is larger than its disk or this process may")
    again = Journal("s", tmp_path / "j")
    assert again.resumed == len(again) == 2  # 17 bytes of the first line and 49 of each value: two are within 140 bytes


def test_every_line_is_json(tmp_path):
    filled(tmp_path / "j", count=2)
    lines = [json.loads(line) for line in (tmp_path / "j").read_text(encoding="utf-8").splitlines()]
    for line in lines[1:]:
        assert len(line.pop("sum")) == 8
    assert lines == [{"subject": "s"}, {"key": "key 0", "value": 0.0}, {"key": "key 1", "value": 1 / 3}]


def test_unwritable_path_is_reported(tmp_path):
    """The parent is a file, because permissions do not restrict root."""
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=r"journal .*file.j cannot be written \(.+\); choose another --output\."):
        Journal("s", tmp_path / "file" / "j")
    with pytest.raises(CompressorError, match="cannot be written"):
        Journal("s", tmp_path / "missing" / "j").note("key", 1.0)
