"""Real inputs with the outputs of torch in one small file, with which engines on another machine are compared.

This module does not need torch: the outputs are stored, and engines return NumPy arrays.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.deferred.array_file import read_arrays
from compressor.errors import CompressorError
from compressor.quality.intervals import Array, Columns, bootstrap
from compressor.quality.parity import REPORT_IT, TOLERANCE, Parity, check_parity, magnitude
from runtimes.base.protocols import Engine

Arrays = Mapping[str, Array]

TOP_CLASS = ("accuracy", "agreement", "perplexity")  # metrics of outputs whose largest value selects a class
AT_ONCE = 8  # rows of a batch, a size that every engine is built for
# An int8 engine may differ from torch by twice the difference of the same file on the exporting machine: another
# runtime rounds elsewhere, so some values fall into the next int8 step. A wrong operator causes a far larger
# difference.
INT8_SLACK = 2.0
# Largest part of this, whatever was measured: outputs of zeros alone differ by 1. On a processor whose int8 products
# saturate, a small random model was measured with 0.48, of which twice is more.
INT8_MOST = 0.9
BATCH_LIMIT = 8 * 1024**3  # bytes of the inputs of one timed batch


class AnswersError(CompressorError):
    """Stored samples that are missing or damaged."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """Samples with the outputs of torch.

    Attributes:
        feeds: inputs by name.
        expected: outputs by name, for each graph (``baseline``, ``result``).
        timed: inputs for the timing of engines; repeated if the batch is larger.
        labels: classes of the samples; None without labels.
    """

    feeds: Arrays
    expected: Mapping[str, Arrays]
    timed: Arrays
    labels: Array | None = None

    def __len__(self) -> int:
        return _rows(self.feeds)

    def save(self, path: Path) -> None:
        """Write all arrays to an uncompressed .npz file."""
        parts = {"feeds": self.feeds, "timed": self.timed}
        parts |= {f"expected/{graph}": outputs for graph, outputs in self.expected.items()}
        arrays: dict[str, Any] = {
            f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()
        }
        np.savez(path, **arrays if self.labels is None else arrays | {"labels": self.labels})

    @staticmethod
    def load(path: Path) -> ReferenceOutputs:
        """Read a file that `save` wrote.

        Raises:
            AnswersError: the file is missing or damaged.
        """
        try:
            arrays = read_arrays(path)
            expected: dict[str, dict[str, Array]] = {}
            for name in [name for name in arrays if name.startswith("expected/")]:
                _, graph, output = name.split("/", 2)
                expected.setdefault(graph, {})[output] = arrays[name]
            answers = ReferenceOutputs(_part(arrays, "feeds"), expected, _part(arrays, "timed"), arrays.get("labels"))
            answers._check_rows()
        except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
            raise AnswersError(f"{path.name} cannot be read ({error}); copy the whole folder again.") from error
        return answers

    def batch(self, size: int) -> dict[str, Array]:
        """Return exactly `size` rows of the timed inputs."""
        times = -(-size // _rows(self.timed))
        return {name: np.concatenate([value] * times)[:size] for name, value in self.timed.items()}

    def check_batch(self, size: int) -> None:
        """Raise AnswersError if `size` rows of the timed inputs would take more memory than `BATCH_LIMIT`."""
        needed = bytes_of(self.timed) // _rows(self.timed) * size
        if needed > BATCH_LIMIT:
            raise AnswersError(
                f"a batch of {size} takes {needed / 1024**3:.1f} GiB; expected at most {BATCH_LIMIT // 1024**3} GiB, "
                "so export with a smaller --batch."
            )

    def _check_rows(self) -> None:
        """Raise ValueError unless all arrays of a part have the same number of rows, and at least one."""
        kept = [*self.feeds.values(), *(value for outputs in self.expected.values() for value in outputs.values())]
        labels = [] if self.labels is None else [self.labels]
        for part, arrays in (("stored", [*kept, *labels]), ("timed", list(self.timed.values()))):
            rows = {len(value) if value.ndim else 0 for value in arrays}
            if len(rows) != 1 or rows == {0}:
                raise ValueError(f"the {part} arrays have {sorted(rows)} rows; expected one number for all")

    def hold(self, engine: Engine, variant: str, *, allowed: float, advice: str = REPORT_IT) -> Parity:
        """Compare an engine with torch in batches and on a single row, which reveals a fixed batch size.

        Args:
            engine: runs the variant.
            variant: its name; ``original`` is compared with the outputs of the baseline.
            allowed: largest difference, relative to the largest value of the output.
            advice: end of the error message.

        Returns:
            The parity with the largest difference.

        Raises:
            ParityError: the outputs differ by more than `allowed`.
        """
        parts = [slice(0, 1), *self._chunks()]
        parities = [
            check_parity(
                _cut(self._expected(variant), part),
                partial(engine.run, _cut(self.feeds, part)),
                name=variant,
                tolerance=allowed,
                advice=advice,
            )
            for part in parts
        ]
        return max(parities, key=magnitude)

    def judged(self, engine: Engine, variant: str, *, answer: str, metric: str) -> dict[str, Any]:
        """Measure the agreement of an engine with torch, and its accuracy if there are labels.

        Args:
            engine: runs the variant.
            variant: its name.
            answer: name of the output that is evaluated.
            metric: the quality metric. If it does not compare top classes, the cosine similarity to the output of torch
                is measured instead.

        Returns:
            ``agreement`` (and ``accuracy``, ``torch_accuracy``) or ``similarity``, in percent with bootstrap intervals.
        """
        parts = [self._columns(engine, variant, answer, metric, part) for part in self._chunks()]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: asdict(bootstrap(_percent, {"": column})) for name, column in columns.items()}

    def _columns(self, engine: Engine, variant: str, answer: str, metric: str, part: slice) -> Columns:
        feeds, expected = _cut(self.feeds, part), self._expected(variant)[answer][part]
        output = engine.run(feeds)[answer]
        if metric not in TOP_CLASS:
            return {"similarity": _per_row(_cosine(output, expected), feeds)}
        columns = {"agreement": _per_row(output.argmax(-1) == expected.argmax(-1), feeds)}
        if self.labels is not None:
            columns["accuracy"] = (output.argmax(-1) == self.labels[part]).astype(np.float64)
            columns["torch_accuracy"] = (expected.argmax(-1) == self.labels[part]).astype(np.float64)
        return columns

    def _expected(self, variant: str) -> Arrays:
        return self.expected["baseline" if variant == "original" else variant]

    def _chunks(self) -> Iterator[slice]:
        return (slice(start, start + AT_ONCE) for start in range(0, len(self), AT_ONCE))


def allowed_for(measured: float | None) -> float:
    """Return the tolerance of an engine: relative to the largest value of the output, at most `INT8_MOST` + TOLERANCE.

    Args:
        measured: difference of an int8 file from torch on the exporting machine; None for float32.
    """
    return TOLERANCE if measured is None else min(INT8_SLACK * measured, INT8_MOST) + TOLERANCE


def bytes_of(*parts: Arrays) -> int:
    """Return the total bytes of all arrays."""
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
    """Return the mean of each row; the mean over tokens excludes padding."""
    mask = feeds.get("attention_mask")
    values = values.astype(np.float64)
    if mask is not None and values.shape == mask.shape:
        means: Array = (values * mask).sum(1) / np.maximum(mask.sum(1), 1)
        return means
    flat: Array = values.reshape(len(values), -1).mean(1)
    return flat
