"""Folders of images with texts: each record is a pair, and what cannot be used is said."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.data.readers.image_text.pairs import metadata_of, read_pairs
from compressor.errors import DataError

RECORDS = [
    {"file_name": "a.png", "text": "a grey square"},
    {"file_name": "inner/b.png", "text": "  a darker square "},
    {"file_name": "a.png", "text": "one more text"},
]


def folder_of(path: Path, records, *, form: str = "jsonl", images=("a.png", "inner/b.png")) -> Path:
    for name in images:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 40, np.uint8)).save(path / name)
    with (path / f"metadata.{form}").open("w", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        else:
            file.write("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_each_record_is_a_pair(tmp_path: Path, form: str) -> None:
    metadata = metadata_of(folder_of(tmp_path, RECORDS, form=form))
    assert metadata is not None
    pairs = read_pairs(metadata, "squares")
    assert pairs.ids == ("a.png", "inner/b.png", "a.png#2")
    assert pairs.files == ("a.png", "inner/b.png", "a.png")
    assert pairs.texts == ("a grey square", "a darker square", "one more text")
    assert (pairs.field, pairs.skipped, pairs.limitations) == ("text", (), ())


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path.parent / "outside.png").write_bytes(b"")
    bad = [
        {"file_name": "../outside.png", "text": "x"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "a.png", "text": " "},
        {"text": "x"},
        {"file_name": "inner/b.png", "text": "x\0y"},
    ]
    records = [{"file_name": "a.png", "text": "good", "width": 8}, *bad]
    pairs = read_pairs(folder_of(tmp_path, records) / "metadata.jsonl", "squares")
    assert pairs.texts == ("good",)
    assert [(each.id, each.reason) for each in pairs.skipped] == [
        ("../outside.png", "the path leaves the folder"),
        ("gone.png", "the folder has no such file"),
        ("a.png", "text is no text"),
        ("record 4", "it has no file_name"),
        ("inner/b.png", "the text holds a NUL character, so the file may be damaged"),
    ]
    assert list(map(str, pairs.limitations)) == [
        "files of the data: 1 of 2 images not read, because they have no text.",
        "fields of the data: width not read.",
    ]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ('{"file_name": "a.png"', r"line 1 of metadata\.jsonl of squares is no JSON object"),
        ('{"file": "a.png", "text": "x"}', r"has the fields file, text; expected file_name, the path of an image"),
        ('{"file_name": "a.png", "label": 1}', r"has the fields file_name, label; expected file_name, .* text as text"),
        ('{"file_name": "b.png", "text": "x"}', r"has no usable record \(first: b\.png: the folder has no such file\)"),
        ("", "has the fields none"),
    ],
)
def test_a_file_without_pairs_is_refused(lines: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(DataError, match=reason):
        read_pairs(tmp_path / "metadata.jsonl", "squares")


def test_a_folder_without_such_a_file_has_no_pairs(tmp_path: Path) -> None:
    assert metadata_of(tmp_path) is None


def test_copies_in_hidden_folders_are_not_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{"file_name": name, "text": "good"} for name in ("a.png", "inner/b.png")])
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a.png").write_bytes((folder / "a.png").read_bytes())
    assert read_pairs(folder / "metadata.jsonl", "squares").limitations == ()
