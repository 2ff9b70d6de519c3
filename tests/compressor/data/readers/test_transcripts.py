"""Clips with transcripts: the metadata files of the package datasets, and tables of files."""

import json

import numpy as np
import pytest

from compressor.data.readers.audio.clips import read_clip_table, read_clips
from compressor.errors import DataError
from compressor.models.preprocess import DecoderSide, Preprocess
from tests.sound_models import RATE, tone, write

TASK = "automatic-speech-recognition"


def preprocess(*, decoder=True):
    side = DecoderSide(None, lambda labels: labels, lambda feeds: [], 8, 1, 8)
    return Preprocess(
        ("input_features",), "audio", {}, audio=lambda clips: {"input_features": np.stack([c[:100] for c in clips])},
        rate=RATE, seconds=1.0, decoder=side if decoder else None,
    )  # fmt: skip


def clips(folder, count=4):
    for number in range(count):
        write(folder / "clips" / f"{number}.wav", tone(0.3, 200.0 * (1 + number), number))
    return [{"file_name": f"clips/{number}.wav", "transcription": f"text {number}"} for number in range(count)]


def as_jsonl(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(folder, rows):
    lines = [",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))]
    (folder / "metadata.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("write_metadata", [as_jsonl, as_csv])
def test_metadata_names_files_and_texts(write_metadata, tmp_path):
    rows = clips(tmp_path)
    rows[2] |= {"transcription": ""}
    rows[3] |= {"file_name": "clips/none.wav"}
    write_metadata(tmp_path, rows)
    samples = read_clips(tmp_path, "speech", preprocess(), TASK)
    assert samples.target_texts == ("text 0", "text 1", "text 3")
    assert samples.reading == "table of sound files 'file_name', transcript 'transcription'"
    assert [(skip.id, skip.reason) for skip in samples.skipped] == [("2", "its transcript is empty")]
    faults = samples.faults(range(3), None)
    assert list(faults) == [2]
    assert "No such file" in faults[2]
    assert samples.feeds([0, 1])["input_features"].shape == (2, 100)
    assert (samples.labels, samples.limitations) == (None, ())


def test_further_fields_are_named(tmp_path):
    rows = [row | {"speaker": 3, "words": ["a"]} for row in clips(tmp_path)]
    as_jsonl(tmp_path, rows)
    samples = read_clip_table(tmp_path / "metadata.jsonl", "metadata.jsonl", preprocess(), TASK)
    assert list(map(str, samples.limitations)) == ["columns of the data: 'speaker', 'words' not read."]


def test_classes_are_no_transcripts(tmp_path):
    clips(tmp_path)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "a.wav", tone(0.3, 200.0, 9))
    samples = read_clips(tmp_path, "speech", preprocess(), TASK)
    assert (len(samples.ids), samples.labels, samples.target_texts) == (5, None, None)
    assert "labels of the data: classes of clips are no transcripts; they are not read." in map(
        str, samples.limitations
    )


def test_metadata_labels_clips_of_a_classifier(tmp_path):
    as_csv(tmp_path, [row | {"label": name} for row, name in zip(clips(tmp_path), "abab", strict=True)])
    samples = read_clips(tmp_path, "speech", preprocess(decoder=False), "audio-classification")
    assert samples.labels.tolist() == [0, 1, 0, 1]
    assert samples.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("metadata.parquet", "holds metadata.parquet, which is not read; convert it to metadata.csv"),
        ("train/metadata.csv", "holds train/metadata.csv, which describes a folder of its own; pass speech/train"),
    ],
)
def test_metadata_that_is_not_read_is_named(file, reason, tmp_path):
    clips(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    with pytest.raises(DataError, match=reason):
        read_clips(tmp_path, "speech", preprocess(), TASK)
