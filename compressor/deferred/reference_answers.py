"""Real inputs with the answers that torch gives to them, as one small file: written here, held against elsewhere.

Nothing here needs torch: the answers are stored, and engines answer in NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import CompressorError
from compressor.quality.intervals import Array, Columns, bootstrap
from compressor.quality.parity import REPORT_IT, TOLERANCE, Parity, check_parity, magnitude
from runtimes.base.protocols import Engine

Arrays = Mapping[str, Array]

TOP_CLASS = ("accuracy", "agreement", "perplexity")  # metrics of answers that are a class, by its largest value
AT_ONCE = 8  # rows an engine answers at a time: a batch that every engine is built to take
# Int8 may be as far from torch as the same file is on the machine that compressed, twice: another runtime rounds at
# other places, so that values fall on the other side of a step, but a wrong operator is off by far more.
INT8_SLACK = 2.0


class AnswersError(CompressorError):
    """The stored samples are missing or damaged."""


@dataclass(frozen=True)
class Answers:
    """Samples with torch's answers.

    `feeds` are inputs by name, `expected` outputs by name for each graph (``baseline``, ``result``), `labels` classes
    where there are any, and `timed` the inputs to time engines on, repeated where the batch asked for is larger.
    """

    feeds: Arrays
    expected: Mapping[str, Arrays]
    timed: Arrays
    labels: Array | None = None

    def __len__(self) -> int:
        return _rows(self.feeds)

    def save(self, path: Path) -> None:
        """Write everything as one uncompressed .npz."""
        parts = {"feeds": self.feeds, "timed": self.timed}
        parts |= {f"expected/{graph}": outputs for graph, outputs in self.expected.items()}
        arrays: dict[str, Any] = {
            f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()
        }
        np.savez(path, **arrays if self.labels is None else arrays | {"labels": self.labels})

    @staticmethod
    def load(path: Path) -> Answers:
        """Read what `save` wrote.

        Raises:
            AnswersError: there is no such file, or it holds something else.
        """
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            expected: dict[str, dict[str, Array]] = {}
            for name in [name for name in arrays if name.startswith("expected/")]:
                _, graph, output = name.split("/", 2)
                expected.setdefault(graph, {})[output] = arrays[name]
            found = Answers(_part(arrays, "feeds"), expected, _part(arrays, "timed"), arrays.get("labels"))
            len(found)
        except (OSError, ValueError, EOFError, StopIteration) as error:
            raise AnswersError(f"{path.name} cannot be read ({error}); copy the whole folder again.") from error
        return found

    def batch(self, size: int) -> dict[str, Array]:
        """Exactly `size` rows of the inputs to be timed."""
        times = -(-size // _rows(self.timed))
        return {name: np.concatenate([value] * times)[:size] for name, value in self.timed.items()}

    def hold(self, engine: Engine, variant: str, *, allowed: float, advice: str = REPORT_IT) -> Parity:
        """Hold an engine against torch in batches and with a single row (a baked-in batch size shows).

        Args:
            engine: runs the variant.
            variant: its name; ``original`` is the baseline's graph too.
            allowed: the largest difference, relative to the largest value of the output.
            advice: how the error message ends.

        Raises:
            ParityError: it computes something else.
        """
        parts = [slice(0, 1), *self._chunks()]
        found = [
            check_parity(
                _cut(self._expected(variant), part),
                partial(engine.run, _cut(self.feeds, part)),
                name=variant,
                tolerance=allowed,
                advice=advice,
            )
            for part in parts
        ]
        return max(found, key=magnitude)

    def judged(self, engine: Engine, variant: str, *, answer: str, metric: str) -> dict[str, Any]:
        """How often an engine gives torch's answer, and the right one where there are labels, in % with intervals.

        Args:
            engine: runs the variant.
            variant: its name.
            answer: the output that quality is judged by.
            metric: by which; where it is not about a top class, cosine similarity to torch's answer is told instead.
        """
        parts = [self._columns(engine, variant, answer, metric, part) for part in self._chunks()]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: asdict(bootstrap(_percent, {"": column})) for name, column in columns.items()}

    def _columns(self, engine: Engine, variant: str, answer: str, metric: str, part: slice) -> Columns:
        feeds, expected = _cut(self.feeds, part), self._expected(variant)[answer][part]
        found = engine.run(feeds)[answer]
        if metric not in TOP_CLASS:
            return {"similarity": _per_row(_cosine(found, expected), feeds)}
        columns = {"agreement": _per_row(found.argmax(-1) == expected.argmax(-1), feeds)}
        if self.labels is not None:
            columns["accuracy"] = (found.argmax(-1) == self.labels[part]).astype(np.float64)
            columns["torch_accuracy"] = (expected.argmax(-1) == self.labels[part]).astype(np.float64)
        return columns

    def _expected(self, variant: str) -> Arrays:
        return self.expected["baseline" if variant == "original" else variant]

    def _chunks(self) -> Iterator[slice]:
        return (slice(start, start + AT_ONCE) for start in range(0, len(self), AT_ONCE))


def allowed_for(measured: float | None) -> float:
    """The tolerance of an engine: that of float32, or of int8 whose difference from torch here was `measured`."""
    return TOLERANCE if measured is None else INT8_SLACK * measured + TOLERANCE


def bytes_of(*parts: Arrays) -> int:
    """Bytes of some arrays together."""
    return sum(value.nbytes for part in parts for value in part.values())


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _cut(arrays: Arrays, part: slice) -> dict[str, Array]:
    return {name: value[part] for name, value in arrays.items()}


def _part(arrays: Arrays, part: str) -> dict[str, Array]:
    return {name.removeprefix(f"{part}/"): value for name, value in arrays.items() if name.startswith(f"{part}/")}


def _percent(columns: Columns) -> Array:
    percent: Array = columns[""].mean(-1) * 100.0
    return percent


def _cosine(left: Array, right: Array) -> Array:
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    cosine: Array = (left * right).sum(-1) / np.maximum(norms, 1e-12)
    return cosine


def _per_row(values: Array, feeds: Arrays) -> Array:
    """The mean of each row; where there is a value for each token, padding does not count."""
    mask = feeds.get("attention_mask")
    values = values.astype(np.float64)
    if mask is not None and values.shape == mask.shape:
        means: Array = (values * mask).sum(1) / np.maximum(mask.sum(1), 1)
        return means
    flat: Array = values.reshape(len(values), -1).mean(1)
    return flat
