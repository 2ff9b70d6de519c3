"""The --data argument: splits, formats, caching and rejected data."""

from __future__ import annotations

import io
import json
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from compressor.data.readers import FORMS
from compressor.data.sample_cache import Store
from compressor.data.splits import Data, DataError, Shares, Split, load, shuffled
from compressor.errors import CompressorError
from compressor.models.preprocess import Preprocess
from tests.paths import SHARED_DATA

SHARED = SHARED_DATA
SIDE = 4


@dataclass
class Calls:
    """A fake preprocessing that counts its calls."""

    images: int = 0
    texts: list[int] = field(default_factory=list)

    def image(self, picture: Image.Image) -> npt.NDArray[np.float32]:
        self.images += 1
        pixels = np.asarray(picture.resize((SIDE, SIDE)), dtype=np.float32) / np.float32(255)
        return np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32)

    def text(self, first: list[str], second: list[str] | None) -> dict[str, npt.NDArray[Any]]:
        """Return one token per character, with a separator 1 before a second text and padding of 0."""
        self.texts.append(len(first))
        rows = first if second is None else [f"{a}\x01{b}" for a, b in zip(first, second, strict=True)]
        width = max(len(row) for row in rows)
        ids = np.array([[ord(c) for c in row] + [0] * (width - len(row)) for row in rows], dtype=np.int64)
        return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "unused": ids}


def vision(calls: Calls | None = None, *, mode: str = "RGB") -> Preprocess:
    channels = {"L": 1, "RGB": 3}[mode]
    example = {"pixel_values": np.zeros((2, channels, SIDE, SIDE), np.float32)}
    return Preprocess(("pixel_values",), "image", example, image=(calls or Calls()).image)


def language(calls: Calls | None = None, *, inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Preprocess:
    example = {name: np.ones((2, 6), np.int64) for name in inputs}
    return Preprocess(inputs, "text", example, text=(calls or Calls()).text)


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> Preprocess:
    return Preprocess(
        tuple(shapes), "tensor", {name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()}
    )


def paint(path: Path, level: int, *, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 5), level if mode == "L" else (level,) * 3).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two classes of six images; the grey level is ten times the number of the image."""
    for number in range(12):
        paint(tmp_path / "images" / ("b" if number % 2 else "a") / f"{number:02}.png", 10 * number)
    return tmp_path / "images"


def parts(data: Data) -> tuple[Split, Split, Split]:
    return data.calibration, data.validation, data.test


def everything(data: Data, size: int = 5) -> dict[str, Any]:
    """Return all samples of all splits by id: (row or rows of the first input, label)."""
    samples: dict[str, Any] = {}
    for part in parts(data):
        for batch in part.batches(size):
            rows = next(iter(batch.feeds.values()))
            rows = rows.reshape(len(batch.ids), batch.rows_per_sample, *rows.shape[1:])
            labels = [None] * len(batch.ids) if batch.labels is None else batch.labels.tolist()
            samples.update((id, (row, label)) for id, row, label in zip(batch.ids, rows, labels, strict=True))
    return samples


def spell(row: npt.NDArray[Any]) -> str:
    return "".join(chr(code) for code in row if code)


def texts_of(data: Data) -> dict[str, tuple[tuple[str, ...], Any]]:
    return {id: (tuple(spell(row) for row in rows), label) for id, (rows, label) in everything(data).items()}


# ------------------------------------------------------------------------------------------------ splits


@given(
    count=st.integers(3, 5000),
    a=st.floats(0.01, 0.9),
    b=st.floats(0.01, 0.9),
    c=st.floats(0.0, 0.9),
    cap=st.integers(1, 600),
)
def test_the_sizes_add_up_and_only_the_decision_may_be_empty(
    count: int, a: float, b: float, c: float, cap: int
) -> None:
    total = max(1.0, (a + b + c) * 1.001)
    shares = Shares(a / total, b / total, c / total, calibration_cap=cap, validation_cap=cap, decision_cap=cap)
    calibration, validation, decision, test = shares.sizes(count)
    assert calibration + validation + decision + test == count
    assert min(calibration, validation, test) >= 1
    assert max(calibration, validation, decision) <= cap
    assert 0 <= decision <= c * count


@settings(max_examples=40)
@given(count=st.integers(3, 60), seed=st.integers(0, 10**6), decision=st.sampled_from([0.0, 0.25]))
def test_the_parts_are_disjoint_complete_and_deterministic(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, decision: float
) -> None:
    path = tmp_path_factory.mktemp("rows") / "x.npy"
    np.save(path, np.arange(count * 2, dtype=np.float32).reshape(count, 2))
    shares = Shares(decision=decision)
    first, again = (
        load(str(path), tensors({"x": (2,)}), task="feature-extraction", seed=seed, shares=shares) for _ in range(2)
    )
    ids = [id for part in first.parts for id in part.ids]
    assert sorted(ids, key=int) == [str(row) for row in range(count)]
    assert [part.ids for part in first.parts] == [part.ids for part in again.parts]
    assert [len(part) for part in first.parts] == [size for size in shares.sizes(count) if size]
    assert (first.decision is not None) == (shares.sizes(count)[2] > 0)


@given(ids=st.lists(st.text(max_size=5), unique=True, max_size=30), seed=st.integers(0, 9), data=st.data())
def test_the_order_depends_on_names_not_on_positions(ids: list[str], seed: int, data: st.DataObject) -> None:
    permuted = data.draw(st.permutations(ids))
    ordered = [ids[index] for index in shuffled(ids, seed)]
    assert [permuted[index] for index in shuffled(permuted, seed)] == ordered
    kept = set(data.draw(st.lists(st.sampled_from(ids)))) if ids else set()
    fewer = [id for id in ids if id in kept]
    assert [fewer[index] for index in shuffled(fewer, seed)] == [id for id in ordered if id in kept]


def test_another_seed_gives_another_split() -> None:
    data = [load("random", vision(), task="image-classification", seed=seed) for seed in (0, 1)]
    assert data[0].test.ids != data[1].test.ids


def test_caps_send_the_rest_to_test(folder: Path) -> None:
    shares = Shares(calibration_cap=1, validation_cap=2)
    data = load(str(folder), vision(), task="image-classification", shares=shares)
    assert [len(part) for part in parts(data)] == [1, 2, 9]


def test_a_total_limits_the_samples_that_are_read(folder: Path) -> None:
    calls = Calls()
    data = load(str(folder), vision(calls), task="image-classification", shares=Shares(total=5))
    assert [len(part) for part in parts(data)] == [1, 1, 3]
    assert calls.images == 5


def test_head_is_evenly_spaced_and_shares_prepared_samples(folder: Path) -> None:
    calls = Calls()
    test = load(str(folder), vision(calls), task="image-classification").test
    decoded = calls.images
    head = test.head(3)
    assert head.ids == test.ids[::2]
    assert head.name == test.name
    assert test.head(6) is test
    assert test.head(100) is test
    assert [len(batch.ids) for batch in head.batches(2)] == [2, 1]
    assert calls.images == decoded


def test_beside_is_disjoint_from_the_other_subset(folder: Path) -> None:
    test = load(str(folder), vision(), task="image-classification").test
    head = test.head(3)
    rest = test.beside(head, 10)
    assert sorted((*head.ids, *rest.ids)) == sorted(test.ids)
    assert test.beside(head, 2).ids == (rest.ids[0], rest.ids[1])
    assert len(test.beside(test, 5)) == 0
    assert rest.name == test.name


def test_batches_repeat_in_the_same_order_with_an_odd_last_one(folder: Path) -> None:
    test = load(str(folder), vision(), task="image-classification").test
    passes = [list(test.batches(4)) for _ in range(2)]
    assert [len(batch.ids) for batch in passes[0]] == [4, 2]
    assert tuple(id for batch in passes[0] for id in batch.ids) == test.ids
    for one, two in zip(*passes, strict=True):
        assert one.ids == two.ids
        np.testing.assert_array_equal(one.feeds["pixel_values"], two.feeds["pixel_values"])
    whole = np.concatenate([batch.labels for batch in passes[0] if batch.labels is not None])
    assert test.labels is not None
    np.testing.assert_array_equal(whole, test.labels)


def test_batches_are_prepared_one_at_a_time(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((40, 5, 5), np.uint8))
    calls = Calls()
    data = load(str(tmp_path / "x.npy"), vision(calls), task="feature-extraction")
    assert calls.images == 0
    batches = data.test.batches(4)
    assert calls.images == 0
    next(batches)
    assert calls.images == 4


def test_a_changed_batch_does_not_change_the_next_pass(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\nthree\nfour\n")
    np.save(tmp_path / "x.npy", np.ones((4, 2), np.float32))
    for spec, prepare in (("t.txt", language()), ("x.npy", tensors({"x": (2,)}))):
        test = load(str(tmp_path / spec), prepare, task="feature-extraction").test
        for batch in test.batches(2):
            for array in batch.feeds.values():
                array[...] = 0
        assert all(array.any() for batch in test.batches(2) for array in batch.feeds.values())


def test_describe_is_json_and_names_the_test_samples(folder: Path) -> None:
    (folder / "a" / "broken.png").write_bytes(b"no image")
    data = load(str(folder), vision(), task="image-classification", seed=3)
    content = json.loads(json.dumps(data.describe()))
    assert content["sizes"] == {"calibration": 3, "validation": 3, "test": 6}
    assert content["seed"] == 3
    assert content["skipped"] == [{"id": "a/broken.png", "reason": "not an image that can be identified"}]
    assert tuple(content["test_ids"]) == data.test.ids


# ------------------------------------------------------------------------------------------------ image folders


def test_sorted_class_folders_are_the_labels(folder: Path) -> None:
    data = load(str(folder), vision(), task="image-classification")
    assert data.label_kind == "class"
    samples = everything(data)
    assert len(samples) == 12
    for id, (row, label) in samples.items():
        assert label == "ab".index(id[0])
        # A grey picture stays grey under any resampling; 1e-6 is float32 rounding of level / 255
        np.testing.assert_allclose(row, 10 * int(id[2:4]) / 255, atol=1e-6)


def test_copies_in_hidden_folders_are_no_samples(folder: Path) -> None:
    """Jupyter keeps copies in such folders, also below a class, where they became samples."""
    for hidden in (folder / ".cache", folder / "a" / ".ipynb_checkpoints", folder / "a" / "more" / ".trash"):
        hidden.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(hidden / "copy.png")
        (hidden / "notes.txt").write_text("nothing")
    data = load(str(folder), vision(), task="image-classification")
    assert len(everything(data)) == 12
    assert not [each for each in data.limitations if each.feature == "files of the data"]


def test_a_linked_folder_below_a_class_is_a_limitation(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Class folders that are links are read; links below them may form a circle."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (8, 8)).save(elsewhere / "one.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "a" / ".trash").mkdir()
    (folder / "a" / ".trash" / "more").symlink_to(elsewhere)  # below a hidden folder, which is not read at all
    data = load(str(folder), vision(), task="image-classification")
    assert len(everything(data)) == 13
    assert not [each for each in data.limitations if each.feature == "linked folders"]
    (folder / "a" / "more").symlink_to(elsewhere)
    data = load(str(folder), vision(), task="image-classification")
    (found,) = [each for each in data.limitations if each.feature == "linked folders"]
    assert found.reason.startswith("1 is a link to a folder and was not read (a/more); ")
    assert len(everything(data)) == 13


def test_an_empty_class_folder_keeps_its_index(folder: Path) -> None:
    (folder / "aa").mkdir()
    (folder / ".cache").mkdir()
    labels = {
        id: label for id, (_, label) in everything(load(str(folder), vision(), task="image-classification")).items()
    }
    assert labels["a/00.png"] == 0
    assert labels["b/01.png"] == 2


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for number, ending in enumerate(("png", "JPG", "jpeg", "bmp", "webp", "gif")):
        paint(tmp_path / f"{number}.{ending}", 40)
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "._1.jpg").write_bytes(b"resource fork of macOS")
    data = load(str(tmp_path), vision(), task="image-classification")
    assert data.label_kind is None
    assert data.skipped == ()
    assert {label for _, label in everything(data).values()} == {None}
    assert len(everything(data)) == 6


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_have_the_mode_of_the_model(tmp_path: Path, mode: str) -> None:
    for number, own in enumerate(("L", "RGB", "RGBA", "P", "1", "CMYK")):
        Image.new("RGB", (6, 5), (90, 90, 90)).convert(own).save(
            tmp_path / f"{number}.{'tif' if own == 'CMYK' else 'png'}"
        )
    data = load(str(tmp_path), vision(mode=mode), task="image-classification")
    assert {row.shape for row, _ in everything(data).values()} == {(1, {"L": 1, "RGB": 3}[mode], SIDE, SIDE)}


def test_a_palette_with_transparent_entries_is_read_without_a_warning(tmp_path: Path) -> None:
    for number in range(3):
        picture = Image.new("P", (6, 5))
        picture.putpalette([0, 0, 0, 90, 90, 90])
        picture.save(tmp_path / f"{number}.png", transparency=bytes([0, 255]))
    assert len(everything(load(str(tmp_path), vision(), task="image-classification"))) == 3


def test_one_class_and_empty_class_folders_are_limitations(folder: Path) -> None:
    """The accuracy of a model that always answers the same would be 100 %, and nobody would see that a copy failed."""

    def limitations() -> dict[str, str]:
        data = load(str(folder), vision(), task="image-classification")
        return {each.feature: each.reason for each in data.limitations}

    assert not {"class folders", "classes of the data"} & set(limitations())
    for file in (folder / "b").iterdir():
        file.unlink()
    found = limitations()
    assert found["class folders"].startswith("1 of 2 hold no images (b), so the figures say nothing of these classes")
    assert found["classes of the data"].startswith("all 6 samples have the class 'a', so that a model which always")


def test_corrupt_and_truncated_images_are_skipped_named_and_counted(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "JPEG")
    (folder / "a" / "short.jpg").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    (folder / "b" / "empty.png").write_bytes(b"")
    (folder / "b" / "words.jpg").write_text("these are words")
    steps: list[tuple[int, int]] = []
    data = load(
        str(folder), vision(), task="image-classification", progress=lambda done, total: steps.append((done, total))
    )
    assert [sample.id for sample in data.skipped] == ["a/short.jpg", "b/empty.png", "b/words.jpg"]
    assert "truncated" in data.skipped[0].reason
    (left_out,) = (each for each in data.limitations if each.feature == "samples left out")
    assert left_out.reason == (
        f"3 of 15 cannot be used: a/short.jpg, b/empty.png, b/words.jpg (the first: {data.skipped[0].reason})"
    )
    assert set(everything(data)) == {f"{'ab'[n % 2]}/{n:02}.png" for n in range(12)}
    assert steps[-1] == (15, 15)


def test_every_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = Image.open

    def watched(path: Any) -> Image.Image:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(Image, "open", watched)
    calls = Calls()
    data = load(str(folder), vision(calls), task="image-classification")
    first = everything(data, size=5)
    second = everything(data, size=2)
    assert len(opened) == calls.images == 12
    for id, (row, _) in first.items():
        np.testing.assert_array_equal(row, second[id][0])


def test_a_full_store_prepares_again_with_the_same_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(load(str(folder), vision(), task="image-classification"))
    monkeypatch.setattr(Store.__init__, "__kwdefaults__", {"limit": 3 * SIDE * SIDE * 4 * 5})
    calls = Calls()
    data = load(str(folder), vision(calls), task="image-classification")
    again = everything(data)
    assert calls.images == 12 + 7
    for id, (row, _) in whole.items():
        np.testing.assert_array_equal(row, again[id][0])


# ------------------------------------------------------------------------------------------------ the store


@given(order=st.permutations(range(8)))
def test_the_store_returns_the_stored_arrays(order: list[int]) -> None:
    store = Store((2, 3), np.float32)
    for number in order:
        store.put(number, np.full((2, 3), number, np.float32))
    for number in range(8):
        np.testing.assert_array_equal(store.get(number), np.full((2, 3), number, np.float32))


def test_the_store_respects_its_limit() -> None:
    store = Store((4,), np.float32, limit=40)
    for number in range(5):
        store.put(number, np.zeros(4, np.float32))
    assert [number in store for number in range(5)] == [True, True, False, False, False]


def test_a_full_disk_does_not_stop_the_store() -> None:
    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(28, "No space left on device")

    store = Store((4,), np.float32)
    store.put(0, np.ones(4, np.float32))
    kept, store._file = store._file, Full()
    store.put(1, np.ones(4, np.float32))
    assert 1 not in store
    store._file = kept
    assert store.get(0).tolist() == [1, 1, 1, 1]


def test_the_store_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store((4,), np.float32)
    store.put(0, np.ones(4, np.float32))
    assert 0 in store
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ arrays


def saved(path: Path, **arrays: npt.NDArray[Any]) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


@pytest.mark.parametrize(
    ("shape", "mode"), [((6, 5, 7), "L"), ((6, 5, 7, 1), "L"), ((6, 5, 7, 3), "RGB"), ((6, 5, 7), "RGB")]
)
def test_uint8_arrays_are_raw_images(tmp_path: Path, shape: tuple[int, ...], mode: str) -> None:
    levels = np.arange(6, dtype=np.uint8).reshape(6, *[1] * (len(shape) - 1))
    np.save(tmp_path / "x.npy", np.broadcast_to(levels * 20, shape))
    calls = Calls()
    data = load(str(tmp_path / "x.npy"), vision(calls, mode=mode), task="image-classification")
    for id, (row, label) in everything(data).items():
        assert label is None
        np.testing.assert_allclose(row, int(id) * 20 / 255, atol=1e-6)  # float32 rounding of level / 255
    everything(data)
    assert calls.images == 6


def test_float_arrays_are_ready_inputs_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(7, 3, SIDE, SIDE))
    np.save(tmp_path / "x.npy", values)
    samples = everything(load(str(tmp_path / "x.npy"), vision(), task="image-classification"))
    for id, (row, _) in samples.items():
        assert row.dtype == np.float32
        np.testing.assert_array_equal(row[0], values[int(id)].astype(np.float32))


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("pixel_values", "labels"), ("anything", "y")])
def test_npz_keys_and_labels(tmp_path: Path, keys: tuple[str, str]) -> None:
    content = {keys[0]: np.zeros((6, 5, 5, 3), np.uint8), keys[1]: np.arange(6, dtype=np.uint8)[:, None]}
    data = load(saved(tmp_path / "x.npz", **content), vision(), task="image-classification")
    assert data.label_kind == "class"
    assert {id: label for id, (_, label) in everything(data).items()} == {str(row): row for row in range(6)}


def test_npz_labels_of_other_types(tmp_path: Path) -> None:
    def labels(values: npt.NDArray[Any]) -> tuple[str | None, list[Any]]:
        spec = saved(tmp_path / "x.npz", x=np.zeros((3, 2), np.float32), y=values)
        data = load(spec, tensors({"x": (2,)}), task="feature-extraction")
        samples = everything(data)
        return data.label_kind, [samples[str(row)][1] for row in range(3)]

    assert labels(np.array([0.5, 1.0, 2.0])) == ("score", [0.5, 1.0, 2.0])
    assert labels(np.array([0.0, 1.0, 2.0])) == ("class", [0, 1, 2])
    assert labels(np.array(["dog", "ant", "dog"])) == ("class", [1, 0, 1])


def test_npz_with_every_input_by_name(tmp_path: Path) -> None:
    a, b = np.arange(10, dtype=np.float32).reshape(5, 2), np.arange(5, dtype=np.float32).reshape(5, 1)
    data = load(saved(tmp_path / "x.npz", b=b, a=a), tensors({"a": (2,), "b": (1,)}), task="feature-extraction")
    batch = next(data.test.batches(2))
    assert list(batch.feeds) == ["a", "b"]
    np.testing.assert_array_equal(batch.feeds["a"][:, 0], 2 * batch.feeds["b"][:, 0])


@pytest.mark.parametrize(("task", "kind"), [("text-generation", "tokens"), ("feature-extraction", None)])
def test_integer_arrays_are_token_ids(tmp_path: Path, task: str, kind: str | None) -> None:
    tokens = np.arange(20, dtype=np.uint16).reshape(4, 5)
    np.save(tmp_path / "t.npy", tokens)
    data = load(str(tmp_path / "t.npy"), language(inputs=("input_ids", "attention_mask", "token_type_ids")), task=task)
    batch = next(data.test.batches(2))
    assert data.label_kind == kind
    assert list(batch.feeds) == ["input_ids", "attention_mask", "token_type_ids"]
    assert {array.dtype for array in batch.feeds.values()} == {np.dtype(np.int64)}
    np.testing.assert_array_equal(batch.feeds["input_ids"], tokens[[int(id) for id in batch.ids]])
    assert batch.feeds["attention_mask"].all()
    assert not batch.feeds["token_type_ids"].any()


# ------------------------------------------------------------------------------------------------ texts


def table(tmp_path: Path, content: str, task: str, *, name: str = "t.csv", calls: Calls | None = None) -> Data:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return load(str(tmp_path / name), language(calls), task=task)


def test_txt_has_one_text_a_line_and_line_numbers_as_ids(tmp_path: Path) -> None:
    data = table(tmp_path, "\ufeffone, with a comma\n\ntwo\r\nthree \u2028 four\n", "text-generation", name="t.txt")
    assert data.label_kind == "tokens"
    assert texts_of(data) == {
        "0": (("one, with a comma",), None),
        "2": (("two",), None),
        "3": (("three \u2028 four",), None),
    }


def test_texts_are_padded_per_batch_and_only_the_inputs_of_the_model_are_fed(tmp_path: Path) -> None:
    data = table(tmp_path, "a\nbbb\n" * 10, "feature-extraction", name="t.txt")
    widths = {batch.feeds["input_ids"].shape[1] for part in parts(data) for batch in part.batches(1)}
    assert widths == {1, 3}
    assert set(next(data.test.batches(1)).feeds) == {"input_ids", "attention_mask"}


def test_texts_are_tokenised_once_for_repeated_sweeps(tmp_path: Path) -> None:
    calls = Calls()
    data = table(tmp_path, "a\nbbb\n" * 10, "feature-extraction", name="t.txt", calls=calls)
    assert calls.texts == []
    for _ in range(3):
        assert sum(len(batch.ids) for batch in data.test.batches(4)) == 10
    assert calls.texts == [4, 4, 2]


PAIR = (("a1", "b1"), ("a2", "b2"), ("a3", "b3"))


@pytest.mark.parametrize(
    "content",
    [
        "a1,b1,5.0\na2,b2,0\na3,b3,2.5\n",
        "sentence1,sentence2,score\na1,b1,5.0\na2,b2,0\na3,b3,2.5\n",
        "idx;Score;Sentence1;Sentence2\n7;5.0;a1;b1\n8;0;a2;b2\n9;2.5;a3;b3\n",
        "5.0\ta1\tb1\n0\ta2\tb2\n2.5\ta3\tb3\n",
        "left,right,how close\na1,b1,5.0\na2,b2,0\na3,b3,2.5\n",
    ],
    ids=["no header", "header", "semicolons, other order, numbering", "tabs, score first", "header of unknown names"],
)
def test_scored_pairs_become_interleaved_rows(tmp_path: Path, content: str) -> None:
    data = table(tmp_path, content, "sentence-similarity")
    assert data.label_kind == "score"
    assert texts_of(data) == {str(row): (PAIR[row], (5.0, 0.0, 2.5)[row]) for row in range(3)}
    assert all(batch.rows_per_sample == 2 for batch in data.test.batches(1))


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ("good,1\nbad,0\nfine,1\n", (1, 0, 1)),
        ("label,text\n1,good\n0,bad\n1,fine\n", (1, 0, 1)),
        ("text,label\ngood,pos\nbad,neg\nfine,pos\n", (1, 0, 1)),
        ("good,pos\nbad,neg\nfine,pos\n", (1, 0, 1)),
        (",comment,stars\n0,good,3.0\n1,bad,1\n2,fine,4\n", (3, 1, 4)),
        ("0,good,3\n1,bad,1\n2,fine,4\n", (3, 1, 4)),
    ],
    ids=["content", "header", "strings", "strings by content", "unknown names", "row numbers"],
)
def test_one_text_and_a_label(tmp_path: Path, content: str, labels: tuple[int, ...]) -> None:
    data = table(tmp_path, content, "text-classification")
    assert data.label_kind == "class"
    assert texts_of(data) == {str(row): ((("good", "bad", "fine")[row],), labels[row]) for row in range(3)}


def test_row_numbers_are_not_labels(tmp_path: Path) -> None:
    content = "".join(f"{row},text {row},{('pos', 'neg')[row % 2]}\n" for row in range(12))
    samples = texts_of(table(tmp_path, content, "text-classification"))
    assert samples == {str(row): ((f"text {row}",), 1 - row % 2) for row in range(12)}


def test_two_texts_for_a_classifier_are_one_row(tmp_path: Path) -> None:
    content = "premise,hypothesis,label\na1,b1,entailment\na2,b2,neutral\na3,b3,contradiction\n"
    samples = texts_of(table(tmp_path, content, "text-classification"))
    assert samples["0"] == (("a1\x01b1",), 1)
    assert samples["1"] == (("a2\x01b2",), 2)


def test_a_regression_score_of_single_texts(tmp_path: Path) -> None:
    data = table(tmp_path, "good,0.9\nbad,0.1\nfine,0.7\n", "text-classification")
    assert data.label_kind == "score"
    assert texts_of(data)["1"] == (("bad",), 0.1)


def test_a_class_named_like_a_title_is_not_a_header(tmp_path: Path) -> None:
    samples = texts_of(table(tmp_path, "who,question\nrun,command\nwhy,question\ngo,command\n", "text-classification"))
    assert samples["0"] == (("who",), 1)
    assert len(samples) == 4


def test_csv_for_a_language_model_uses_the_text_and_no_label(tmp_path: Path) -> None:
    data = table(tmp_path, "text,label\ngood,1\nbad,0\nfine,1\n", "text-generation")
    assert data.label_kind == "tokens"
    assert texts_of(data)["2"] == (("fine",), None)


def test_quoted_cells_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    samples = texts_of(table(tmp_path, 'text\n"a, ""b""\nc"\nd\ne\n', "feature-extraction"))
    assert samples["0"] == (('a, "b"\nc',), None)


def test_unusable_rows_are_skipped_with_a_reason(tmp_path: Path) -> None:
    content = "sentence1,sentence2,score\na,b,1\na,,2\na,b,\na,b,nan\na,b,x\na,b,c,3\nd,e,4\nf,g,5\n"
    data = table(tmp_path, content, "sentence-similarity")
    assert {(sample.id, sample.reason) for sample in data.skipped} == {
        ("1", "the text is empty"),
        ("2", "the score is empty"),
        ("3", "the score 'nan' is not a finite number"),
        ("4", "the score 'x' is not a finite number"),
        ("5", "4 columns, expected 3"),
    }
    assert set(texts_of(data)) == {"0", "6", "7"}


# ------------------------------------------------------------------------------------------------ random


def test_random_inputs_are_shaped_typed_and_seeded_like_the_example() -> None:
    example: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.array([[7, 3, 0]], np.int64),
        "attention_mask": np.array([[1, 1, 0]], np.int64),
        "values": np.zeros((1, 2), np.float16),
    }
    prepare = Preprocess(tuple(example), "text", example)
    data = load("random", prepare, task="feature-extraction", seed=1)
    assert data.random
    assert data.label_kind is None
    batch = next(data.calibration.batches(32))
    assert {name: (array.dtype, array.shape[1:]) for name, array in batch.feeds.items()} == {
        name: (array.dtype, array.shape[1:]) for name, array in example.items()
    }
    assert set(np.unique(batch.feeds["input_ids"])) == set(range(8))
    assert (batch.feeds["attention_mask"] == [1, 1, 0]).all()
    alone = next(load("random", prepare, task="feature-extraction", seed=1).calibration.batches(1))
    np.testing.assert_array_equal(alone.feeds["values"][0], batch.feeds["values"][0])
    other = next(load("random", prepare, task="feature-extraction", seed=2).calibration.batches(32))
    assert not np.array_equal(other.feeds["values"], batch.feeds["values"])


# ------------------------------------------------------------------------------------------------ hub


class FakeDataset:
    """The part of `datasets.Dataset` that the reader uses."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features

    column_names = property(lambda self: list(self.columns))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | slice) -> dict[str, Any]:
        return {name: values[key] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset({name: self.columns[name] for name in names}, self.features)

    def with_format(self, kind: str | None) -> FakeDataset:
        return self


def feature(kind: str, dtype: str = "") -> Any:
    return type(kind, (), {"dtype": dtype})()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeDataset], list[Any]]:
    """Return a function that installs a fake `datasets` library with one dataset and returns its list of requests."""

    def serve(dataset: FakeDataset) -> list[Any]:
        requests: list[Any] = []

        def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> FakeDataset:
            requests.append((name, config, split, revision))
            return dataset

        library = types.ModuleType("datasets")
        library.load_dataset = load_dataset  # type: ignore[attr-defined]
        library.get_dataset_config_names = lambda name, revision: ["small", "large"]  # type: ignore[attr-defined]
        library.get_dataset_split_names = lambda *_, revision: ["train", "validation"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", library)
        return requests

    return serve


def test_a_hub_dataset_of_texts(hub: Callable[[FakeDataset], list[Any]]) -> None:
    columns: dict[str, list[Any]] = {"idx": [9, 8, 7], "Sentence": ["good", "bad", "fine"], "label": [1, 0, 1]}
    features = {
        "idx": feature("Value", "int32"),
        "Sentence": feature("Value", "string"),
        "label": feature("ClassLabel"),
    }
    requests = hub(FakeDataset(columns, features))
    read = {"": "validation", ":large": "validation", ":train": "train", ":large:test": "test"}
    for part, split in read.items():
        data = load(f"nobody/texts{part}", language(), task="text-classification", revision="v1")
        assert texts_of(data) == {"0": (("good",), 1), "1": (("bad",), 0), "2": (("fine",), 1)}
        assert data.reading.startswith(f"hub dataset (split {split!r}): ")  # by which the card names the data set
    parts_requested = [(None, "validation"), ("large", "validation"), (None, "train"), ("large", "test")]
    assert requests == [("nobody/texts", config, split, "v1") for config, split in parts_requested]


def test_a_hub_dataset_with_a_revision_in_its_name(hub: Callable[[FakeDataset], list[Any]]) -> None:
    requests = hub(FakeDataset({"text": ["a", "b", "c"]}, {"text": feature("Value", "string")}))
    specs = ("nobody/texts", "nobody/texts@v2", "nobody/texts@refs/convert/parquet:train", "nobody/texts@v2:large:test")
    for spec in specs:
        assert len(texts_of(load(spec, language(), task="feature-extraction"))) == 3
    assert [(name, *rest) for name, _, *rest in requests] == [
        ("nobody/texts", "validation", None),
        ("nobody/texts", "validation", "v2"),
        ("nobody/texts", "train", "refs/convert/parquet"),
        ("nobody/texts", "test", "v2"),
    ]


def test_a_datasets_library_that_may_run_code_is_rejected(hub: Callable[[FakeDataset], list[Any]]) -> None:
    requests = hub(FakeDataset({"text": ["a", "b", "c"]}, {"text": feature("Value", "string")}))
    for version in ("3.6.0", "2.14.dev0"):
        sys.modules["datasets"].__version__ = version  # type: ignore[attr-defined]
        assert refused("nobody/texts", language()) == (
            f"found datasets {version}, which may run code of a dataset repository; expected 4 or later: "
            'pip install "datasets>=4"'
        )
    assert requests == []
    sys.modules["datasets"].__version__ = "4.0.0"  # type: ignore[attr-defined]
    assert len(texts_of(load("nobody/texts", language(), task="feature-extraction"))) == 3


def test_a_hub_dataset_of_images(hub: Callable[[FakeDataset], list[Any]]) -> None:
    pictures: list[Any] = [Image.new("L", (5, 5), 10 * number) for number in range(5)]
    columns: dict[str, list[Any]] = {"image": [*pictures, None], "label": [0, 1, 2, 3, 4, 5]}
    hub(FakeDataset(columns, {"image": feature("Image"), "label": feature("ClassLabel")}))
    data = load("nobody/images", vision(), task="image-classification")
    assert {id: label for id, (_, label) in everything(data).items()} == {str(row): row for row in range(5)}
    assert [(sample.id, sample.reason) for sample in data.skipped] == [("5", "no image in this row")]


def test_a_hub_dataset_that_cannot_be_loaded_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("datasets")

    def refuse(name: str, revision: str | None) -> list[str]:
        raise ConnectionError("no route\nto the hub")

    library.get_dataset_config_names = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert refused("nobody/nothing", vision()) == (
        "nobody/nothing is not a local file or folder and cannot be loaded as a hub dataset (no route); check the "
        "path, or the name and the network"
    )
    assert refused("folder/typo.csv", vision()) == f"there is no file or folder 'folder/typo.csv'; expected {FORMS}"


def test_a_missing_datasets_library_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        load("nobody/nothing", vision(), task="image-classification")
    assert str(caught.value) == (
        "nobody/nothing is not a local file or folder; to read it as a hub dataset, install the datasets library: "
        "pip install datasets"
    )


# ------------------------------------------------------------------------------------------------ rejected data


def refused(spec: str, prepare: Preprocess, task: str = "feature-extraction") -> str:
    with pytest.raises(DataError) as caught:
        load(spec, prepare, task=task)
    assert isinstance(caught.value, CompressorError)
    return str(caught.value)


def test_rejected_paths_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("x.xml").write_text("<a/>")
    for number in range(2):
        paint(Path(f"few/{number}.png"), 9)
        paint(Path(f"mixed/{number}.png"), 9)
        paint(Path(f"split/{('train', 'val')[number]}/cat/0.png"), 9)
        Path(f"few/{number}-broken.png").write_bytes(b"")
    paint(Path("mixed/cat/0.png"), 9)
    Path("broken").mkdir()
    for number in range(4):
        Path(f"broken/{number}.png").write_text("words")
    assert refused("./nowhere", vision()) == f"there is no file or folder './nowhere'; expected {FORMS}"
    assert refused("x.xml", vision()) == f"the file x.xml has the extension .xml; expected {FORMS}"
    assert refused("empty", vision()).startswith("the folder empty holds no images; expected image files (.avif, .bmp,")
    assert refused("few", language()) == ("few holds images, but the model takes text inputs; pass --data of that kind")
    assert refused("few", vision()) == (
        "found 2 usable samples in few (2 skipped, first 0-broken.png: not an image that can be identified); expected "
        "at least 3, one each for calibration, validation and test; pass more data"
    )
    assert refused("mixed", vision()) == (
        "the folder mixed holds images (2) beside folders (1); expected either images or class folders only; move one "
        "of the two away"
    )
    assert refused("split", vision()) == (
        "the folder split holds splits of a dataset (train, val); pass one of them as --data"
    )
    assert refused("broken", vision()) == (
        "none of the 4 files in broken can be decoded (first: 0.png: not an image that can be identified); check "
        "that the files were copied completely"
    )


def test_a_model_without_preprocessing_is_distinguished_from_one_of_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        paint(Path(f"few/{number}.png"), 9)
    Path("x.txt").write_text("a\nb\nc\n")
    assert refused("few", replace(vision(), image=None)) == (
        "few holds images, but the model has no image preprocessing; add its preprocessor_config.json, or pass "
        "preprocessed model inputs as .npy"
    )
    assert refused("x.txt", replace(language(), text=None)) == (
        "x.txt holds texts, but the model has no tokenizer; add its tokenizer files (tokenizer.json, "
        "tokenizer_config.json), or pass token ids as .npy"
    )
    assert refused("x.txt", vision()) == "x.txt holds texts, but the model takes image inputs; pass --data of that kind"


def test_class_folders_are_counted_with_the_empty_ones(folder: Path) -> None:
    (folder / "c").mkdir()
    samples = load(str(folder), vision(), task="image-classification").calibration.samples
    assert samples.class_names == ("a", "b", "c")
    assert load(str(folder / "a"), vision(), task="image-classification").calibration.samples.class_names is None


def test_rejected_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def of(array: Any, prepare: Preprocess) -> str:
        np.save("x.npy", np.asarray(array))
        return refused("x.npy", prepare)

    spoilt = np.zeros((5, 2), np.float32)
    spoilt[3, 1] = np.nan
    pair = tensors({"a": (2,), "b": (2,)})
    one = tensors({"x": (2,)})
    assert of(np.array([{}, {}, {}], dtype=object), one) == (
        "x.npy holds Python objects, which are refused because reading them can run code; save arrays of numbers (or "
        "of fixed-width strings for labels)"
    )
    assert of(spoilt, one) == "x.npy holds NaN or infinite values (first in row 3); expected finite model inputs"
    assert of(np.zeros((5, 3), np.float32), one) == "x.npy holds float32 [5, 3] for x; expected float32 [N, 2]"
    assert of(np.zeros((5, 2), np.int64), one) == "x.npy holds int64 [5, 2] for x; expected float32 [N, 2]"
    assert of(np.zeros((5, 1, 4, 4), np.float32), vision()) == (
        "x.npy holds float32 [5, 1, 4, 4] for pixel_values; expected float32 [N, 3, 4, 4] or raw uint8 or uint16 "
        "images [N, H, W] or [N, H, W, C]"
    )
    assert of(np.zeros((5, 3, 4, 7), np.uint8), vision()) == (
        "x.npy holds uint8 [5, 3, 4, 7]; expected images as [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels"
    )
    assert of(np.float32(1), one) == "x.npy holds an array of shape []; expected samples along the first axis"
    assert of(np.zeros((5, 2), np.float32), language()) == (
        "x.npy holds float32 [5, 2] for input_ids; expected integer token ids [N, T]"
    )
    assert of(np.full((5, 2), -1), language()) == (
        "x.npy holds the token id -1; expected ids from 0; remove or replace the padding"
    )
    assert of(np.zeros((5, 2), np.float32), pair) == (
        "x.npy has no array for the model's input b; save one under that name in a .npz file"
    )
    Path("x.npy").write_bytes(b"not an array")
    unreadable = "{} is not a readable NumPy file; expected .npy or .npz as numpy.save writes them"
    assert refused("x.npy", one) == unreadable.format("x.npy")
    header = "{'descr': '<f4', 'shape': " + "(" * 3000 + "\n"
    Path("x.npy").write_bytes(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header.encode())
    assert refused("x.npy", one) == unreadable.format("x.npy")  # a header nested too deeply for Python's parser
    saved(Path("x.npz"), x=np.zeros((3, 2), np.float32))
    content = Path("x.npz").read_bytes()
    for local, central, value in ((6, 8, b"\x01\x00"), (8, 10, b"\x63\x00")):  # encrypted; an unknown compression
        changed = bytearray(content)
        for start, offset in ((content.find(b"PK\x03\x04"), local), (content.find(b"PK\x01\x02"), central)):
            changed[start + offset : start + offset + 2] = value
        Path("x.npz").write_bytes(changed)
        assert refused("x.npz", one) == unreadable.format("x.npz")
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("x.txt", "no array")
    assert refused("x.npz", one) == unreadable.format("x.npz")


def test_rejected_labels_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, one = np.zeros((3, 2), np.float32), tensors({"x": (2,)})

    def of(**arrays: Any) -> str:
        return refused(saved(Path("x.npz"), **arrays), one)

    assert of(x=x, y=np.array([0, -2, 1])) == "x.npz holds the class label -2; expected whole numbers from 0"
    assert of(x=x, y=np.array([0, -1, 1])) == (
        "x.npz holds the class label -1, which marks samples without a label; remove them, or remove all labels"
    )
    for label, shown in (
        (1e300, "1e+300"),
        (np.uint64(2**63), "9223372036854775808"),
    ):  # int64 would make another number of it
        assert of(x=x, y=np.array([0, 1, label], dtype=type(label))) == (
            f"x.npz holds the class label {shown}, which is too large; expected whole numbers from 0"
        )
    assert of(x=x, y=np.zeros(4)) == "x.npz holds labels of shape [4]; expected [3], one for each sample"
    assert of(x=x, y=np.array([0, np.nan, 1])) == (
        "x.npz holds the label nan in row 1; expected finite scores or whole class numbers"
    )
    assert of(x=x, y=np.zeros(3, complex)) == (
        "x.npz holds labels of type complex128; expected whole numbers, scores or strings"
    )
    assert of(p=x, q=x) == (
        "x.npz holds the arrays p, q; expected one array, one named images or x, or the model's inputs x"
    )


def test_rejected_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def of(content: str | bytes, prepare: Preprocess | None = None, task: str = "text-classification") -> str:
        Path("t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return refused("t.csv", prepare or language(), task)

    Path("t.txt").write_text("\n\n")
    assert refused("t.txt", language()) == "t.txt holds no text; expected one text per line"
    assert of("") == "t.csv holds no rows; expected texts with optional labels"
    assert of("text,label\n") == "t.csv holds a header but no rows; expected texts with optional labels"
    assert of(b"caf\xe9,1\n") == "t.csv is not UTF-8 text (byte 3); save it as UTF-8"
    assert of("a,0\nb,-2\nc,1\n") == "t.csv holds the class label -2; expected whole numbers from 0"
    assert of("a,0\nb,1e300\nc,1\n") == (
        "t.csv holds the class label 1e300, which is too large; expected whole numbers from 0"
    )
    assert of("a,5,7\nb,6,9\nc,7,1\n") == (
        "t.csv has the numeric columns 1 and 2; expected one; name the label column 'label' or 'score' in a header"
    )
    assert of("1,2\n2,3\n5,4\n").startswith("t.csv has the numeric columns 0 and 1; expected one;")
    assert of("a b,c d,e f\ng h,i j,k l\n") == (
        "t.csv has 3 columns that look like texts; expected one or two; add a header with the names text, or "
        "sentence1 and sentence2, and label or score"
    )
    assert of("a,0\nb,1\nc,1\n", vision()) == (
        "t.csv holds texts, but the model takes image inputs; pass --data of that kind"
    )
    assert of("a,0\nb,1\n") == (
        "found 2 usable samples in t.csv; expected at least 3, one each for calibration, validation and test; "
        "pass more data"
    )


def test_a_tokenizer_without_an_input_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\nb\nc\n")
    data = load(str(tmp_path / "t.txt"), language(inputs=("input_ids", "bbox")), task="feature-extraction")
    with pytest.raises(DataError) as caught:
        next(data.test.batches(1))
    assert str(caught.value) == (
        "the tokenizer returns input_ids, attention_mask, unused, but the model also takes bbox; pass token arrays as "
        ".npz with all inputs"
    )


@pytest.mark.parametrize("call", [lambda part: part.batches(0), lambda part: part.head(0)])
def test_sizes_below_one_are_rejected_immediately(call: Callable[[Split], Any]) -> None:
    part = load("random", vision(), task="image-classification").test
    with pytest.raises(DataError, match="expected at least 1"):
        call(part)


def test_rejected_shares() -> None:
    with pytest.raises(DataError, match="expected positive numbers with a sum below 1"):
        Shares(0.5, 0.5)
    with pytest.raises(DataError, match="leaves a split empty"):
        Shares(calibration_cap=0)


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.skipif(not (SHARED / "stsb").is_dir(), reason="the real data in ../shared/data is not here")
def test_the_real_sts_benchmark() -> None:
    data = load(str(SHARED / "stsb" / "stsb-en-test.csv"), language(), task="sentence-similarity")
    assert [len(part) for part in parts(data)] == [344, 344, 691]
    assert (data.label_kind, data.skipped) == ("score", ())
    samples = texts_of(data)
    assert samples["0"] == (("A girl is styling her hair.", "A girl is brushing her hair."), 2.5)
    assert all(0 <= score <= 5 for _, score in samples.values())
    assert len(samples) == 1379


@pytest.mark.skipif(not (SHARED / "imagenet_sample").is_dir(), reason="the real data in ../shared/data is not here")
def test_the_real_image_folder() -> None:
    folder, calls = SHARED / "imagenet_sample", Calls()
    data = load(str(folder), vision(calls), task="image-classification", shares=Shares(total=40))
    samples = everything(data, size=7)
    classes = sorted(entry.name for entry in folder.iterdir())
    assert (len(classes), len(samples), calls.images, data.skipped) == (1000, 40, 40, ())
    assert all(classes[label] == id.split("/")[0] for id, (_, label) in samples.items())
