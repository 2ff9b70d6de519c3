"""Real inputs with the outputs of torch in one small file, with which engines on another machine are compared.

This module does not need torch: the outputs are stored, and engines return NumPy arrays.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.deferred.array_file import read_arrays
from compressor.errors import CompressorError
from compressor.quality.heads.base import Head
from compressor.quality.heads.features import cosine
from compressor.quality.intervals import Array, Columns, bootstrap
from compressor.quality.parity import (
    REPORT_IT,
    TOLERANCE,
    Parity,
    Reference,
    check_parity,
    differences,
    is_exact,
    largest_parity,
)
from runtimes.base.protocols import Engine

Arrays = Mapping[str, Array]

AT_ONCE = 8  # rows of a batch, a size that every engine is built for
# An int8 engine may differ from torch by twice the difference of the same file on the exporting machine: another
# runtime rounds elsewhere, so some values fall into the next int8 step. A wrong operator causes a far larger
# difference. Each channel has its own limit, so that one channel that int8 spoils does not excuse the others; but the
# largest difference in a few rows varies from channel to channel, so no limit is below that of COMMON of the channels.
INT8_SLACK = 2.0
COMMON = 0.9
# Twice the difference counts up to this, because outputs of zeros alone differ by 1; a channel that was measured with a
# larger difference has that as its limit.
INT8_MOST = 0.9
LARGEST_LIMIT = 2.0  # of any folder: the difference of an output whose sign is reversed
# The scale of a channel can exceed the largest value of the output only where torch itself rounds much; more than ten
# times as much, also for rows with ties, would switch the comparison off.
MOST_SCALES = 10.0
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
        scale: the scale of each channel, by graph and output (see `compressor.quality.parity.Reference`).
        ties: the allowed difference of rows with ties, by graph; graphs without ties are left out.
        allowed: the largest difference of each channel, by variant and output, for variants in a lower precision.
        notes: sentences about the rounding and the ties of torch, for the report; not stored.
    """

    feeds: Arrays
    expected: Mapping[str, Arrays]
    timed: Arrays
    labels: Array | None = None
    scale: Mapping[str, Arrays] = field(default_factory=dict)
    ties: Arrays = field(default_factory=dict)
    allowed: Mapping[str, Arrays] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return _rows(self.feeds)

    def save(self, path: Path) -> None:
        """Write all arrays to an uncompressed .npz file."""
        parts = {"feeds": self.feeds, "timed": self.timed, "ties": self.ties}
        for part, nested in (("expected", self.expected), ("scale", self.scale), ("allowed", self.allowed)):
            parts |= {f"{part}/{key}": outputs for key, outputs in nested.items()}
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
            expected, scale, allowed = (_nested(arrays, part) for part in ("expected", "scale", "allowed"))
            answers = ReferenceOutputs(
                _part(arrays, "feeds"),
                expected,
                _part(arrays, "timed"),
                arrays.get("labels"),
                scale,
                _part(arrays, "ties"),
                allowed,
            )
            answers._check_rows()
            answers._check_limits()
        except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
            raise AnswersError(f"{path.name} cannot be read ({error}); copy the whole folder again.") from error
        if expected.keys() != scale.keys():
            raise AnswersError(f"{path.name} has no scales of the channels; export the model again with this release.")
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

    def _check_limits(self) -> None:
        """Raise ValueError if limits, scales or ties are so large that an engine would not be compared with torch."""
        for variant, limits in self.allowed.items():
            for name, values in limits.items():
                expected = self.expected.get("baseline" if variant == "original" else variant, {}).get(name)
                loosest = np.inf if expected is not None and is_exact(expected) else LARGEST_LIMIT + TOLERANCE
                if expected is None or values.dtype.kind != "f" or not (values <= loosest).all():
                    raise ValueError(f"the limits of {variant}, {name} are looser than {loosest:g}")
        for graph, scales in self.scale.items():
            for name, scale in scales.items():
                finite = np.abs(self.expected[graph][name][np.isfinite(self.expected[graph][name])])
                most = MOST_SCALES * float(finite.max(initial=1.0))
                if scale.dtype.kind != "f" or not (scale <= most).all():
                    raise ValueError(f"the scales of {graph}, {name} are larger than {most:g}")
        if not all(ties.dtype.kind == "f" and (ties <= MOST_SCALES).all() for ties in self.ties.values()):
            raise ValueError(f"the limits of rows with ties are looser than {MOST_SCALES:g}")

    def hold(self, engine: Engine, variant: str, *, allowed: float | None = None, advice: str = REPORT_IT) -> Parity:
        """Compare an engine with torch in batches and on a single row, which reveals a fixed batch size.

        Args:
            engine: runs the variant.
            variant: its name; ``original`` is compared with the outputs of the baseline.
            allowed: largest difference, relative to the scale of the channel; None takes the limits of the channels
                in `allowed`, or the tolerance of float32 for variants without.
            advice: end of the error message.

        Returns:
            The parity with the largest difference.

        Raises:
            ParityError: the outputs differ by more than is allowed.
        """
        reference = self._reference(variant, allowed)
        return largest_parity(
            [
                check_parity(
                    reference.part(part), partial(engine.run, _cut(self.feeds, part)), name=variant, advice=advice
                )
                for part in (slice(0, 1), *self._chunks())
            ]
        )

    def limits(self, engine: Engine, variant: str) -> dict[str, Array]:
        """Return the largest allowed difference of each channel for an engine in a lower precision elsewhere.

        Args:
            engine: runs the same file on the exporting machine.
            variant: its name.

        Returns:
            Output to limits, of which those of integer and boolean outputs are infinite.
        """
        reference = self._reference(variant, None)
        parts = [differences(reference.part(part), engine.run(_cut(self.feeds, part))) for part in self._chunks()]
        limits = {name: np.array(np.inf) for name, value in reference.expected.items() if is_exact(value)}
        return limits | {name: limit_of(np.maximum.reduce([part[name] for part in parts])) for name in parts[0]}

    def with_allowed(self, allowed: Mapping[str, Arrays]) -> ReferenceOutputs:
        """Return the same samples with limits for variants in a lower precision."""
        return replace(self, allowed=allowed)

    def largest_limit(self, variant: str) -> float:
        """Return the largest allowed difference among all channels of the floating outputs of a variant."""
        limits = [float(value.max(initial=0.0)) for value in self.allowed.get(variant, {}).values()]
        return max((limit for limit in limits if np.isfinite(limit)), default=TOLERANCE)

    def _reference(self, variant: str, allowed: float | None) -> Reference:
        graph = "baseline" if variant == "original" else variant
        expected = self.expected[graph]
        limits: Arrays = self.allowed.get(variant, {}) if allowed is None else {}
        everywhere = np.array(TOLERANCE if allowed is None else allowed)
        return Reference(
            expected,
            self.scale[graph],
            {name: limits.get(name, everywhere) for name in expected},
            self.ties.get(graph),
        )

    def judged(
        self, engine: Engine, variant: str, *, answer: str, head: Head, probabilities: bool = False
    ) -> dict[str, Any]:
        """Measure the agreement of an engine with torch, and its accuracy if there are labels.

        Args:
            engine: runs the variant.
            variant: its name.
            answer: name of the output that is evaluated.
            head: how it is evaluated. If its output is no decision, the cosine similarity to the output of torch is
                measured instead.
            probabilities: the output holds probabilities instead of logits.

        Returns:
            ``agreement`` (and ``accuracy``, ``torch_accuracy``) or ``similarity``, in percent with bootstrap intervals.
        """

        def decide(output: Array) -> Array | None:
            return head.decisions(head.logits(output) if probabilities else output)

        parts = [self._columns(engine, variant, answer, decide, part) for part in self._chunks()]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: asdict(bootstrap(_percent, {"": column})) for name, column in columns.items()}

    def _columns(
        self, engine: Engine, variant: str, answer: str, decide: Callable[[Array], Array | None], part: slice
    ) -> Columns:
        feeds, expected = _cut(self.feeds, part), self._expected(variant)[answer][part]
        output = engine.run(feeds)[answer]
        decided, wanted = decide(output), decide(expected)
        if decided is None or wanted is None:
            return {"similarity": _per_row(cosine(output.astype(np.float64), expected.astype(np.float64)), feeds)}
        columns = {"agreement": _per_row(decided == wanted, feeds)}
        if self.labels is not None:
            columns["accuracy"] = (decided == self.labels[part]).astype(np.float64)
            columns["torch_accuracy"] = (wanted == self.labels[part]).astype(np.float64)
        return columns

    def _expected(self, variant: str) -> Arrays:
        return self.expected["baseline" if variant == "original" else variant]

    def _chunks(self) -> Iterator[slice]:
        return (slice(start, start + AT_ONCE) for start in range(0, len(self), AT_ONCE))


def limit_of(differences: Array) -> Array:
    """Return the largest allowed difference of each channel of an engine in a lower precision.

    Args:
        differences: largest difference of each channel on the exporting machine, relative to its scale.
    """
    common = np.quantile(differences, COMMON, method="lower") if differences.size else 0.0
    measured = np.maximum(differences, common)
    most = np.minimum(np.maximum(measured, INT8_MOST), LARGEST_LIMIT)
    limits: Array = np.minimum(INT8_SLACK * measured, most) + TOLERANCE
    return limits


def bytes_of(*parts: Arrays) -> int:
    """Return the total bytes of all arrays."""
    return sum(value.nbytes for part in parts for value in part.values())


def _rows(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def _cut(arrays: Arrays, part: slice) -> dict[str, Array]:
    return {name: value[part] for name, value in arrays.items()}


def _part(arrays: Arrays, part: str) -> dict[str, Array]:
    return {name.removeprefix(f"{part}/"): value for name, value in arrays.items() if name.startswith(f"{part}/")}


def _nested(arrays: Arrays, part: str) -> dict[str, dict[str, Array]]:
    """Return arrays named ``part/key/output`` by key and output."""
    nested: dict[str, dict[str, Array]] = {}
    for name, value in _part(arrays, part).items():
        key, output = name.split("/", 1)
        nested.setdefault(key, {})[output] = value
    return nested


def _percent(columns: Columns) -> Array:
    percent: Array = columns[""].mean(-1) * 100.0
    return percent


def _per_row(values: Array, feeds: Arrays) -> Array:
    """Return the mean of each row; the mean over tokens excludes padding."""
    mask = feeds.get("attention_mask")
    values = values.astype(np.float64)
    if mask is not None and values.shape == mask.shape:
        means: Array = (values * mask).sum(1) / np.maximum(mask.sum(1), 1)
        return means
    flat: Array = values.reshape(len(values), -1).mean(1)
    return flat
