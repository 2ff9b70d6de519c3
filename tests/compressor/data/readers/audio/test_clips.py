"""Sound files are read as they were written, whatever their rate, channels and depth."""

import numpy as np
import pytest
from scipy.io import wavfile
from transformers import Wav2Vec2FeatureExtractor

from compressor.data.readers import read
from compressor.data.readers.audio.decode import BrokenClipError, decode
from compressor.data.splits import DataError, load
from compressor.models.audio.features import find_features
from compressor.models.preprocess import Preprocess
from tests.sound_models import RATE, TONES, tone, tones, write


def prepared(**options):
    """Return the preprocessing of a model that takes masked waveforms."""
    found = find_features(Wav2Vec2FeatureExtractor(return_attention_mask=True), "input_values")
    example = {"input_values": np.zeros((2, 160), np.float32), "attention_mask": np.ones((2, 160), np.int64)}
    return Preprocess(tuple(example), "audio", example, audio=found, rate=RATE, seconds=found.seconds, **options)


def reading(folder, task="audio-classification", preprocess=None):
    return read(str(folder), preprocess or prepared(), task=task, seed=0, revision=None)


def test_a_model_without_a_reader_of_sound_says_so(tmp_path):
    spectrogram = {"input_features": np.zeros((2, 80, 100), np.float32)}
    with pytest.raises(DataError, match=r"holds sound \(.*\.wav\), .* pass a \.npz with them, .*input_features="):
        reading(tones(tmp_path, 2), preprocess=Preprocess(tuple(spectrogram), "tensor", spectrogram))
    with pytest.raises(DataError, match=r"holds sound \(.*\.wav\), but this model has the inputs input_features"):
        reading(tones(tmp_path, 2), preprocess=Preprocess(tuple(spectrogram), "image", spectrogram))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_every_depth_gives_the_same_values(tmp_path, dtype):
    samples, kind = tone(0.5, 300.0, 0), np.dtype(dtype)
    stored = samples
    if kind.kind != "f":
        middle = 128 if dtype == "uint8" else 0
        stored = (samples * (128 if middle else np.iinfo(kind).max) + middle).round()
    wavfile.write(tmp_path / "x.wav", RATE, stored.astype(kind))
    step = {"uint8": 1 / 128, "int16": 1 / 32768}.get(dtype, 1e-6)
    np.testing.assert_allclose(decode(tmp_path / "x.wav", RATE).samples, samples, atol=step)


def test_channels_are_averaged_and_rates_are_converted(tmp_path):
    low, high = tone(0.5, 200.0, 0, 22_050), tone(0.5, 500.0, 1, 22_050)
    path = write(tmp_path / "x.wav", np.stack([low, high], 1), 22_050)
    clip = decode(path, RATE)
    assert (clip.rate, clip.channels, len(clip.samples)) == (22_050, 2, RATE // 2)
    spectrum = np.abs(np.fft.rfft(clip.samples))
    assert sorted(np.argsort(spectrum)[-2:] * 2) == [200, 500]  # 2 Hz a bin


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(100), "expected at least 0.1 s"),
        (np.array([0.0] * 9000 + [np.nan]), "NaN"),
        (None, "not a sound file"),
    ],
)
def test_clips_that_cannot_be_used(tmp_path, samples, reason):
    path = tmp_path / "x.wav"
    if samples is None:
        path.write_bytes(b"RIFFnothing")
    else:
        wavfile.write(path, RATE, samples.astype(np.float32))
    with pytest.raises(BrokenClipError, match=reason):
        decode(path, RATE)


def test_copies_of_a_clip_have_the_same_content(tmp_path):
    """A copy of another rate or depth is not the same clip to the model, as it is resampled."""
    for name, pitch in (("a", 300.0), ("b", 300.0), ("c", 400.0)):
        write(tmp_path / f"{name}.wav", tone(0.5, pitch, 0), RATE)
    samples = reading(tmp_path)
    contents = [samples.content(index) for index in range(3)]
    assert contents[0] == contents[1] != contents[2]
    data = load(str(tmp_path), prepared(), task="audio-classification")
    copies = [each.reason for each in data.limitations if each.feature == "equal samples"]
    seen = {*data.calibration.ids, *data.validation.ids}
    assert bool(copies) == ("c.wav" not in data.test.ids and len(seen - {"c.wav"}) == 1)


def test_class_folders_are_labels_and_clips_are_padded_with_a_mask(tmp_path):
    samples = reading(tones(tmp_path, 2))
    assert samples.class_names == tuple(sorted(TONES))
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    feeds = samples.feeds([0, 1])
    assert feeds["input_values"].shape == (2, 12_000)
    assert feeds["attention_mask"].sum(1).tolist() == [8_000, 12_000]


def test_frames_of_padding_are_not_scored(tmp_path):
    frames = lambda counts: np.asarray(counts) // 320  # noqa: E731
    samples = reading(tones(tmp_path, 2), "ctc", prepared(frames=frames))
    assert samples.labels is None
    assert "labels of the data" in [limitation.feature for limitation in samples.limitations]
    assert samples.targets([0, 1]).scored.sum(1).tolist() == [25, 37]


def test_a_table_names_files_and_classes(tmp_path):
    tones(tmp_path, 2)
    (tmp_path / "table.csv").write_text(
        "file,label,speaker\nlow/0.wav,a,1\nhigh/1.wav,b,2\nlow/1.wav,a,1\nno.wav,a,1\n"
    )
    samples = reading(tmp_path / "table.csv")
    assert samples.class_names == ("a", "b")
    assert samples.labels.tolist() == [0, 1, 0, 0]
    assert "'speaker' not read" in str(samples.limitations[0])
    assert list(samples.faults(range(4), None).values()) == ["No such file or directory"]


def test_splits_say_what_was_converted_cut_and_left_out(tmp_path):
    tones(tmp_path, 4)
    write(tmp_path / "low" / "fast.wav", tone(0.5, 200.0, 0, 8_000), 8_000)
    write(tmp_path / "low" / "long.wav", tone(31.0, 200.0, 0))
    (tmp_path / "low" / "broken.wav").write_bytes(b"")
    data = load(str(tmp_path), prepared(), task="audio-classification")
    assert [sample.id for sample in data.skipped] == ["low/broken.wav"]
    said = {limitation.feature: str(limitation) for limitation in data.limitations}
    assert "1 of 14 have other rates (8,000 samples a second)" in said["rate of the clips"]
    assert "1 of 14 last longer than 30 s" in said["length of the clips"]
    # the longest clips come first, so that a batch has little padding
    sizes = [batch.feeds["attention_mask"].sum() for batch in data.test.batches(1)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("x.txt", "holds no sounds; expected sound files"), ("x.flac", "holds .flac files, which the package soundfile")],
)
def test_folders_without_files_that_can_be_read(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        reading(tmp_path)


def test_a_table_without_files_and_a_model_without_an_extractor(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match="expected a header with a column of sound files, file or path or file_name"):
        reading(tmp_path / "x.csv")
    plain = Preprocess(("input_values",), "audio", {"input_values": np.zeros((2, 9), np.float32)})
    with pytest.raises(DataError, match="the model has no feature extractor"):
        reading(tones(tmp_path / "tones", 1), preprocess=plain)


def test_arrays_of_another_length_are_taken(tmp_path):
    varying = {"input_values": (1,)}
    example = {"input_values": np.zeros((2, 160), np.float32)}
    preprocess = Preprocess(("input_values",), "audio", example, varying=varying)
    np.save(tmp_path / "x.npy", np.zeros((4, 300), np.float32))
    assert reading(tmp_path / "x.npy", preprocess=preprocess).feeds([0])["input_values"].shape == (1, 300)
    np.save(tmp_path / "y.npy", np.zeros((4, 300, 2), np.float32))
    with pytest.raises(DataError, match=r"expected float32 \[N, T\]"):
        reading(tmp_path / "y.npy", preprocess=preprocess)
