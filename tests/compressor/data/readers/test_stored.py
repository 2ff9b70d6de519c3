"""Data sets in files: what the package datasets and other tools write holds the samples of a folder of images."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from compressor import models
from compressor.data.readers import read
from compressor.data.readers.base import Samples
from compressor.data.readers.dataset.stored import is_stored
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

COUNT = 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the Arrow files that the library writes for Parquet files away from the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def language() -> Preprocess:
    """A model of texts whose tokens are their numbers of characters."""

    def tokenize(first: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Any]:
        return {"input_ids": np.array([[len(text)] for text in first])}

    return Preprocess(("input_ids",), "text", {"input_ids": np.ones((2, 1), np.int64)}, text=tokenize)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)) for _ in range(COUNT)]


def encoded(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def image_set() -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("0123456789")))
    return datasets.Dataset.from_dict({"image": pictures(), "label": list(range(COUNT))}, features=features)


def samples_of(path: Path) -> Samples:
    model = models.load()
    return read(str(path), model.preprocess, task=model.task, seed=0, revision=None)


def expected(tmp_path: Path) -> Any:
    """The pixels of the same pictures in a folder of classes."""
    for number, picture in enumerate(pictures()):
        (tmp_path / "png" / str(number)).mkdir(parents=True)
        picture.save(tmp_path / "png" / str(number) / "0.png")
    return samples_of(tmp_path / "png").feeds(range(COUNT))


def same(samples: Samples, tmp_path: Path) -> None:
    feeds = samples.feeds(range(COUNT))
    for name, pixels in expected(tmp_path).items():
        np.testing.assert_array_equal(feeds[name], pixels)
    assert samples.labels is not None
    assert samples.labels.tolist() == list(range(COUNT))


def test_a_parquet_file_of_datasets(tmp_path: Path) -> None:
    image_set().to_parquet(tmp_path / "photos.parquet")
    samples = samples_of(tmp_path / "photos.parquet")
    assert samples.reading == "data set: images 'image', class 'label'"
    same(samples, tmp_path)


@pytest.mark.parametrize("stored", ["bytes", "objects"])
def test_encoded_images_without_a_type(tmp_path: Path, stored: str) -> None:
    """pandas and others write Parquet files that do not say which bytes are an image."""
    content = [encoded(picture) for picture in pictures()]
    cells: list[Any] = content if stored == "bytes" else [{"bytes": each, "path": None} for each in content]
    pq.write_table(pa.table({"img": cells, "label": list(range(COUNT))}), tmp_path / "plain.parquet")
    same(samples_of(tmp_path / "plain.parquet"), tmp_path)


def test_a_folder_that_was_saved(tmp_path: Path) -> None:
    image_set().with_format("numpy").save_to_disk(tmp_path / "saved")
    assert is_stored(tmp_path / "saved")
    same(samples_of(tmp_path / "saved"), tmp_path)


def test_of_several_splits_the_validation_split_is_read_and_named(tmp_path: Path) -> None:
    half = image_set().select(range(2))
    datasets.DatasetDict(train=half, validation=image_set()).save_to_disk(tmp_path / "saved")
    samples = samples_of(tmp_path / "saved")
    assert samples.reading.startswith("data set (split 'validation'): ")
    same(samples, tmp_path)


def test_a_folder_of_shards_as_the_hub_stores_them(tmp_path: Path) -> None:
    data = tmp_path / "snapshot" / "data"
    data.mkdir(parents=True)
    (tmp_path / "snapshot" / "README.md").write_text("A data set.")
    image_set().select(range(2)).to_parquet(data / "train-00000-of-00001.parquet")
    for shard in range(2):
        image_set().shard(2, shard, contiguous=True).to_parquet(data / f"test-0000{shard}-of-00002.parquet")
    samples = samples_of(tmp_path / "snapshot")
    assert samples.reading.startswith("data set (split 'test'): ")
    same(samples, tmp_path)


def test_shards_of_several_data_sets_are_refused(tmp_path: Path) -> None:
    for name in ("cola", "sst2"):
        (tmp_path / "glue" / name).mkdir(parents=True)
        image_set().to_parquet(tmp_path / "glue" / name / "test.parquet")
    with pytest.raises(DataError, match=r"holds Parquet files of one split in 2 folders \(cola, sst2\); pass one of"):
        samples_of(tmp_path / "glue")
    same(samples_of(tmp_path / "glue" / "sst2"), tmp_path)


def test_a_table_beside_images_is_not_read_in_their_place(tmp_path: Path) -> None:
    expected(tmp_path)
    image_set().to_parquet(tmp_path / "png" / "features.parquet")
    assert samples_of(tmp_path / "png").reading == "image folder, 6 class folders"


def test_files_without_rows_are_left_out_and_refused_alone(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    image_set().select(range(0)).to_parquet(folder / "test-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"shards contains no rows"):
        samples_of(folder)
    image_set().to_parquet(folder / "test-00001-of-00002.parquet")
    same(samples_of(folder), tmp_path)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"^the data set .*broken\.parquet cannot be read \(.*\); check the files$"):
        samples_of(tmp_path / "broken.parquet")


def test_without_the_library_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set().to_parquet(tmp_path / "photos.parquet")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"photos\.parquet holds a data set; to read it, install the datasets library"):
        samples_of(tmp_path / "photos.parquet")


# ----------------------------------------------------------------------------------------------------------------- JSON

ROWS = [{"sentence1": f"a {word}", "sentence2": "b", "score": number / 5} for number, word in enumerate("uvwxyz")]


@pytest.mark.parametrize("form", ["lines", "list", "field"])
def test_json_in_every_form(tmp_path: Path, language: Any, form: str) -> None:
    path = tmp_path / ("rows.jsonl" if form == "lines" else "rows.json")
    lines = "\n".join(map(json.dumps, ROWS))
    path.write_text({"lines": lines, "list": json.dumps(ROWS), "field": json.dumps({"v": 1, "data": ROWS})}[form])
    samples = read(str(path), language, task="feature-extraction", seed=0, revision=None)
    assert [samples.shown(row) for row in range(6)] == [f"a {word}\nb" for word in "uvwxyz"]  # type: ignore[misc]
    assert samples.label_kind == "score"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "is no list of JSON objects"),
        ("[]", "holds no samples"),
        ("[1]", "is no list of JSON objects"),
        ('{"data": [', "is no list of JSON objects"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, language: Any, content: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=reason):
        read(str(tmp_path / "x.json"), language, task="feature-extraction", seed=0, revision=None)
