"""Equal samples in several splits are counted, for every kind of data, and said as a limitation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from compressor.data.splits import Data, Shares, Split, load
from compressor.models.preprocess import Preprocess

SHARES = Shares(decision=0.25)
COUNT = re.compile(r"(\d+) of (\d+) (\w+) samples \(such as (\S+), equal to (\S+)\)")


def from_image(picture: Image.Image) -> npt.NDArray[np.float32]:
    return np.asarray(picture.resize((4, 4)), dtype=np.float32).transpose(2, 0, 1)


def from_text(first: list[str], second: list[str] | None) -> dict[str, npt.NDArray[Any]]:
    rows = first if second is None else [f"{a}|{b}" for a, b in zip(first, second, strict=True)]
    width = max(map(len, rows))
    return {"input_ids": np.array([[ord(each) for each in row.ljust(width)] for row in rows], dtype=np.int64)}


VISION = Preprocess(("pixel_values",), "image", {"pixel_values": np.zeros((2, 3, 4, 4), np.float32)}, image=from_image)
LANGUAGE = Preprocess(("input_ids",), "text", {"input_ids": np.ones((2, 6), np.int64)}, text=from_text)
TENSOR = Preprocess(("x",), "tensor", {"x": np.zeros((2, 5), np.float32)})
MANY = [number % 30 for number in range(40)]  # the last ten samples are copies of the first ten
DISTINCT = list(range(40))
Write = Callable[[Path, list[int]], Path]


def image_folder(path: Path, values: list[int]) -> Path:
    """Write copies in another format: they are equal to the model."""
    for place, value in enumerate(values):
        suffix = "png" if place < 30 else "bmp"
        Image.new("RGB", (6, 5), (value, 3 * value, 100)).save(path / f"{place:02}.{suffix}")
    return path


def lines(path: Path, values: list[int]) -> Path:
    (path / "texts.txt").write_text("".join(f"text number {value}\n" for value in values))
    return path / "texts.txt"


def pairs(path: Path, values: list[int]) -> Path:
    """Write pairs whose first sentence is always the same, with scores that differ between copies."""
    rows = (f"a man sings\tsong {value}\t{place / 10}\n" for place, value in enumerate(values))
    (path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(rows))
    return path / "pairs.tsv"


def records(path: Path, values: list[int]) -> Path:
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": f"number {value}"}) + "\n" for value in values))
    return path / "rows.jsonl"


def raw_images(path: Path, values: list[int]) -> Path:
    array = np.stack([np.full((6, 5, 3), value, np.uint8) for value in values])
    np.save(path / "images.npy", array)
    return path / "images.npy"


def inputs(path: Path, values: list[int]) -> Path:
    np.savez(path / "inputs.npz", x=np.stack([np.full(5, value, np.float32) for value in values]))
    return path / "inputs.npz"


KINDS = pytest.mark.parametrize(
    ("write", "preprocess", "task"),
    [
        (image_folder, VISION, "image-classification"),
        (raw_images, VISION, "image-classification"),
        (lines, LANGUAGE, "feature-extraction"),
        (pairs, LANGUAGE, "text-classification"),
        (records, LANGUAGE, "feature-extraction"),
        (inputs, TENSOR, ""),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)


def rows_of(split: Split) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the id and the values of every sample, read one by one."""
    found = []
    for batch in split.batches(1):
        values = tuple(value for array in batch.feeds.values() for value in array.ravel().tolist())
        found.append((batch.ids[0], values))
    return found


def expected(data: Data) -> dict[str, int]:
    """Count the samples of the decision and test split whose values an earlier split has."""
    counts: dict[str, int] = {}
    seen: list[tuple[Any, ...]] = []
    for split in data.parts:
        values = [value for _, value in rows_of(split)]
        counts[split.name] = sum(value in seen for value in values)
        seen += values
    return {name: count for name, count in counts.items() if count and name in ("decision", "test")}


@KINDS
def test_copies_are_counted(tmp_path: Path, write: Write, preprocess: Preprocess, task: str) -> None:
    data = load(str(write(tmp_path, MANY)), preprocess, task=task, shares=SHARES)
    (limitation,) = (each for each in data.limitations if each.feature == "equal samples")
    found = {part: (int(count), int(size)) for count, size, part, _, _ in COUNT.findall(limitation.reason)}
    sizes = {split.name: len(split) for split in data.parts}
    assert found == {part: (count, sizes[part]) for part, count in expected(data).items()}
    assert found
    values = {id: value for split in data.parts for id, value in rows_of(split)}
    for *_, copy, original in COUNT.findall(limitation.reason):
        assert copy != original
        assert values[copy] == values[original]


@KINDS
def test_distinct_samples_have_no_limitation(tmp_path: Path, write: Write, preprocess: Preprocess, task: str) -> None:
    data = load(str(write(tmp_path, DISTINCT)), preprocess, task=task, shares=SHARES)
    assert not expected(data)
    assert "equal samples" not in [each.feature for each in data.limitations]


def test_random_inputs_have_no_limitation() -> None:
    data = load("random", TENSOR, task="", shares=SHARES)
    assert "equal samples" not in [each.feature for each in data.limitations]
