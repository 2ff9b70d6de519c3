"""Text files that are large, damaged, or in another format than expected: read, or refused with a reason."""

import csv

import pytest

from compressor.data.readers.tables import parse
from compressor.data.readers.texts import read_lines, text_of
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

LONG = 300_000  # characters; the csv module refuses cells of more than 131,072 by default


def fake():
    return Preprocess(("input_ids",), "text", {}, text=lambda texts, second: {})


def test_a_long_cell_with_quotes_and_line_ends_is_read():
    cells = ["x" * LONG, 'said "so",\nand left', "c"]
    limit = csv.field_size_limit()
    rows = "\n".join(f'"{cell.replace(chr(34), chr(34) * 2)}",{row % 2}' for row, cell in enumerate(cells))
    table, skipped = parse(f"text,label\n{rows}\n", "t.csv")
    assert table.column(0) == cells
    assert (table.quoted, skipped) == (True, ())
    assert csv.field_size_limit() == limit  # the limit of the process is unchanged


def test_a_quoted_cell_that_does_not_end_is_refused():
    """csv.reader would return the rest of the file as one cell."""
    with pytest.raises(DataError, match=r"t.csv has a quoted cell that does not end \(.*, line 3\)"):
        parse('a,1\n"b,0\nc,1\n', "t.csv")


@pytest.mark.parametrize("second", ['"b', '"e" f', 'd "x'])
def test_quotes_in_a_tab_separated_corpus_are_characters(second):
    table, _ = parse(f"a\t1\n{second}\t0\nc\t1\n", "t.tsv")
    assert table.rows == (("a", "1"), (second, "0"), ("c", "1"))
    assert table.quoted == (second == 'd "x')


def test_lines_with_nul_characters_are_skipped_and_long_lines_are_read(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntw\0o\r\n" + b"y" * LONG + b"\r\nthree")
    samples = read_lines(tmp_path / "t.txt", "t.txt", fake(), "feature-extraction")
    assert [samples.shown(row) for row in range(3)] == ["one", "y" * LONG, "three"]
    assert [(each.id, "NUL" in each.reason) for each in samples.skipped] == [("2", True)]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [("utf-16", "is UTF-16 text"), ("utf-16-le", "as UTF-16 text does"), ("latin-1", r"not UTF-8 text \(byte 3\)")],
)
def test_other_encodings_are_refused_and_not_guessed(encoding, words, tmp_path):
    text = "abcé" if encoding == "latin-1" else "some text"
    (tmp_path / "t.txt").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"t.txt .*{words}.*; save it as UTF-8"):
        text_of(tmp_path / "t.txt", "t.txt")
