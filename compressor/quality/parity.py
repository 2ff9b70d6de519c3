"""Parity check of an engine with torch on real inputs; torch's outputs are passed in, so torch is not imported.

Every value of an output is compared on the scale of its own channel, so that no large channel hides a small one:

    difference = |engine - torch| / scale[channel]

``scale[channel]`` is the largest magnitude of the channel. It is at least so large that the rounding of torch itself,
its float32 outputs against float64, amounts to a `ROUNDING`-th of the tolerance (see `Reference.with_rounding`). A
channel is one combination of positions on the static axes of an output: a class of logits [batch, classes], a head and
a feature of a KV cache [batch, heads, tokens, features].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.errors import CompressorError

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

# Largest allowed difference, relative to the scale of the channel: float32 sums in another order differ by about
# 1e-6 per layer; a wrong operator is off by 1e-2 or more.
TOLERANCE = 1e-4
# The difference from torch may be this many times the rounding of torch, which is its difference from float64. With
# ONNX Runtime it was at most 5.2 times the rounding of the channel on DeiT-Tiny, MiniLM and a small Llama.
ROUNDING = 16.0
SLACK = 2.0  # a row with a tie may differ by this many times the largest difference that the tie causes in torch
# A channel with fewer values does not show its scale: one value near zero would make it too small. Such channels have
# at least the median scale of their output.
ENOUGH = 8
# Masks add a large negative number, -1e4 or below, to values that must not count. These values do not set the scale of
# a channel if they are MASK_GAP times as large as any other value of the output.
MASKED, MASK_GAP = -5e3, 100.0
PIECE = 2**17  # values of an output that are compared at a time, 1 MiB in float64
REPORT_IT = "this is a bug in the export, not in your model: please report it"


class ParityError(CompressorError):
    """The outputs of a file or an engine differ from those of torch.

    Attributes:
        place: output, row, channel and the two values, as a phrase; empty if the shapes differ.
    """

    place = ""


class NotFiniteError(ParityError):
    """The outputs of torch are NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """Largest difference of an output from torch's, relative to the scale of its channel.

    Attributes:
        output: name of the output.
        difference: the largest difference among the rows without ties.
        rows: number of compared rows, with ties.
        notes: sentences without a full stop about ties and the rounding of torch, if they widened the tolerance.
    """

    output: str
    difference: float
    rows: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reference:
    """Outputs of torch, and how far an engine may differ from them.

    Attributes:
        expected: output name to torch's value [rows, ...].
        scale: output name to the scale of each channel, with size 1 on the axes that are not channels.
        allowed: output name to the largest difference of each channel, relative to its scale; broadcasts to `scale`.
        ties: largest difference of each row [rows], 0 for rows without a tie; None if no row has a tie.
        notes: see `Parity`.
    """

    expected: Arrays
    scale: Arrays
    allowed: Arrays
    ties: Array | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(
        expected: Arrays,
        channel_axes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        allowed: float = TOLERANCE,
    ) -> Reference:
        """Return the reference of these outputs, whose scales are the largest magnitudes of the channels.

        Args:
            expected: output name to torch's value [rows, ...].
            channel_axes: the static axes of each output; None for all axes but the first.
            allowed: largest difference, relative to the scale; infinity disables the check.
        """
        expected = {name: np.atleast_1d(value) for name, value in expected.items()}
        axes = {name: tuple(range(1, value.ndim)) for name, value in expected.items()} | dict(channel_axes or {})
        scale = {
            name: _with_zeros(_largest(value, () if is_exact(value) else axes[name], masked_below(value)))
            for name, value in expected.items()
        }
        return Reference(expected, scale, {name: np.array(allowed) for name in expected})

    def part(self, rows: slice, expected: Arrays | None = None) -> Reference:
        """Return the reference of some rows, on the scales of all rows.

        Args:
            rows: the rows.
            expected: torch's outputs for these rows alone; None takes the rows of the outputs.
        """
        chosen = {name: value[rows] for name, value in self.expected.items()} if expected is None else expected
        chosen = {name: np.atleast_1d(value) for name, value in chosen.items()}
        return dataclasses.replace(self, expected=chosen, ties=None if self.ties is None else self.ties[rows])

    def ties_of(self, expected: Array) -> Array | None:
        """Return the ties of the rows of an output; one with other rows, such as texts, has the largest."""
        if self.ties is None or len(self.ties) == len(expected):
            return self.ties
        return np.full(len(expected), self.ties.max(initial=0.0))

    def with_rounding(
        self, single: Arrays, double: Arrays, ties: Array, floor: Mapping[str, float], notes: tuple[str, ...]
    ) -> Reference:
        """Return the reference with scales on which `ROUNDING` times the rounding of torch is within the tolerance.

        Args:
            single: torch's outputs for the first rows or all.
            double: the same in float64.
            ties: largest difference of each row that a tie causes, 0 for rows without a tie.
            floor: output name to the least rounding error of an engine, for outputs of a bounded function.
            notes: see `Parity`.
        """
        scale = dict(self.scale)
        for name, value in single.items():
            if is_exact(value):
                continue
            counts = np.isfinite(value) & (value > masked_below(value))
            error = np.where(counts, _deviation(value, double[name]), 0.0)
            if len(value) <= len(ties):
                error = error[ties[: len(value)] == 0]
            axes = tuple(axis for axis, size in enumerate(scale[name].shape) if size != 1)
            rounding = np.maximum(_largest(error, axes, -np.inf), floor.get(name, 0.0) / ROUNDING)
            scale[name] = np.maximum(scale[name], rounding * ROUNDING / TOLERANCE)
        allowed = np.where(ties > 0, SLACK * ties + TOLERANCE, 0.0)
        return dataclasses.replace(self, scale=scale, ties=allowed if allowed.any() else None, notes=notes)


def check_parity(
    reference: Reference,
    run: Callable[[], Arrays],
    *,
    name: str,
    refine: Callable[[], Reference] | None = None,
    advice: str = REPORT_IT,
) -> Parity:
    """Compare an engine's outputs on real inputs with torch's.

    Args:
        reference: torch's outputs and the allowed differences.
        run: runs the engine on the same inputs and returns its outputs by name.
        name: name of the engine in the error message.
        refine: returns the reference with the rounding and the ties of torch, which cost further runs; called if the
            engine differs by more than `reference` allows.
        advice: end of the error message.

    Returns:
        The output with the largest difference.

    Raises:
        ParityError: an output differs by more than is allowed or in shape, or torch's output is not finite.
    """
    outputs = run()
    found = [_compare(output, reference, np.atleast_1d(outputs[output]), name) for output in reference.expected]
    if refine is not None and any(each.fault is not None for each in found):
        reference = refine()
        found = [_compare(output, reference, np.atleast_1d(outputs[output]), name) for output in reference.expected]
    faults = [each for each in found if each.fault is not None]
    if faults:
        worst = max(faults, key=_excess)
        notes = f" ({'; '.join(reference.notes)})" if reference.notes else ""
        error = ParityError(f"{name}: output {worst.parity.output} {worst.fault}{notes}; {advice}.")
        error.place = worst.place
        raise error
    return dataclasses.replace(max((each.parity for each in found), key=magnitude), notes=reference.notes)


def magnitude(parity: Parity) -> float:
    """Return the difference as a sort key, with NaN as infinity."""
    return np.inf if np.isnan(parity.difference) else parity.difference


def largest_parity(parities: Sequence[Parity]) -> Parity:
    """Return the parity with the largest difference, with the notes of all."""
    notes = tuple(dict.fromkeys(note for each in parities for note in each.notes))
    return dataclasses.replace(max(parities, key=magnitude), notes=notes)


def differences(reference: Reference, outputs: Arrays) -> dict[str, Array]:
    """Return the largest difference of each channel, relative to its scale, by output.

    Rows with ties and outputs of integers and booleans are left out.
    """
    found = {}
    for name, value in reference.expected.items():
        if not is_exact(value):
            scale, ties = reference.scale[name], reference.ties_of(value)
            clear = slice(None) if ties is None else ties == 0
            relative = _relative(value, np.atleast_1d(outputs[name]), scale)[clear]
            found[name] = relative.max(axis=_pooled(scale), keepdims=True, initial=0.0)
    return found


def row_differences(reference: Reference, left: Arrays, right: Arrays) -> Array:
    """Return the largest difference of two sets of outputs in each row [rows], relative to the scales of a reference.

    A different integer or boolean is an infinite difference.
    """
    rows = np.zeros(len(next(iter(reference.expected.values()))))
    for name, scale in reference.scale.items():
        relative = _relative(left[name], right[name], scale)
        if len(relative) == len(rows):
            rows = np.maximum(rows, relative.reshape(len(rows), -1).max(1, initial=0.0))
        else:  # an output without rows belongs to all of them
            rows = np.maximum(rows, relative.max(initial=0.0))
    return rows


def is_exact(value: Array) -> bool:
    """Return whether an output holds integers or booleans, which must be equal."""
    return not np.issubdtype(value.dtype, np.floating)


def masked_below(value: Array) -> float:
    """Return the number at and below which values come from a mask; minus infinity if the output has no such values."""
    if not value.size or value.min() > MASKED:
        return -np.inf
    finite = value[np.isfinite(value)]
    masked = finite <= MASKED
    if not masked.any() or masked.all():
        return -np.inf
    others = float(np.abs(finite[~masked]).max())
    return MASKED if -float(finite[masked].max()) >= MASK_GAP * others else -np.inf


@dataclasses.dataclass(frozen=True)
class _Compared:
    """The comparison of one output: its parity, the difference over the allowed one, and the fault in words, if any."""

    parity: Parity
    excess: float
    fault: str | None
    place: str


def _excess(compared: _Compared) -> float:
    return compared.excess


def _compare(output: str, reference: Reference, value: Array, name: str) -> _Compared:
    """Compare one output with torch's, piece by piece, so that float64 copies of large outputs do not add up.

    Raises:
        ParityError: the shapes differ, or torch's output is not finite.
    """
    expected, scale = reference.expected[output], reference.scale[output]
    if expected.shape != value.shape:
        raise ParityError(f"{name}: output {output} has shape {value.shape}, expected {expected.shape} as in torch.")
    _check_finite(expected, output, name)
    largest, excess, faulty = 0.0, 0.0, set[int]()
    place: tuple[int, ...] = ()
    ties = reference.ties_of(expected)
    for piece in _pieces(expected.shape):
        row = piece[0].start
        relative = _relative(expected[piece], value[piece], _channels(scale, piece))
        tie = 0.0 if ties is None else float(ties[row])
        over = _over(relative, np.maximum(_channels(reference.allowed[output], piece), tie))
        largest = largest if tie else max(largest, float(relative.max()))
        faulty |= {row} if (over > 1.0).any() else set()
        if over.max() > excess:
            excess = float(over.max())
            indices = np.unravel_index(int(over.argmax()), over.shape)
            starts = (*(each.start for each in piece), *[0] * (over.ndim - len(piece)))
            place = tuple(start + int(index) for start, index in zip(starts, indices, strict=True))
    fault, where = None, ""
    if excess > 1.0:
        where = _described(place, expected, value, scale)
        extent = f"in {len(faulty)} of {len(expected)} rows, {_fault(place, reference, output, value)}"
        fault = f"differs from torch {extent}: {where}"
    return _Compared(Parity(output, largest, len(expected)), excess, fault, f"output {output}, {where}")


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the pieces of an output of some shape: of one row each, and of about `PIECE` values on its second axis."""
    if 0 in shape:
        return
    positions, size = shape[1] if len(shape) > 1 else 1, math.prod(shape[2:])
    step = max(1, PIECE // size)
    for row in range(shape[0]):
        for start in range(0, positions, step):
            piece = slice(row, row + 1), slice(start, min(start + step, positions))
            yield piece[: len(shape)]


def _channels(values: Array, piece: tuple[slice, ...]) -> Array:
    """Return what belongs to a piece of an output from a value for each channel, or one for all."""
    return values[:, piece[1]] if len(piece) > 1 and values.ndim > 1 and values.shape[1] > 1 else values


def _described(place: tuple[int, ...], expected: Array, value: Array, scale: Array) -> str:
    """Name the row, the position, the channel and both values at one place of an output."""
    sizes = list(zip(place[1:], scale.shape[1:], strict=True))
    parts = {
        "position": [str(index) for index, size in sizes if size == 1],
        "channel": [str(index) for index, size in sizes if size != 1],
    }
    where = [f"row {place[0]}", *(f"{part} {' '.join(indices)}" for part, indices in parts.items() if indices)]
    return f"{', '.join(where)}: found {value[place]:.7g}, expected {expected[place]:.7g}"


def _fault(place: tuple[int, ...], reference: Reference, output: str, value: Array) -> str:
    """State the difference at one place in units of the scale, the scale and the tolerance."""
    expected, scale = reference.expected[output], reference.scale[output]
    if is_exact(expected):
        return "which must be equal"
    channel = (0, *(index if size != 1 else 0 for index, size in zip(place[1:], scale.shape[1:], strict=True)))
    value_here, channel_here = (tuple(slice(index, index + 1) for index in each) for each in (place, channel))
    reach = _scales(expected[value_here], scale[channel_here])
    relative = float(_relative(expected[value_here], value[value_here], reach).max())
    allowed = float(np.broadcast_to(reference.allowed[output], scale.shape)[channel])
    ties = reference.ties_of(expected)
    allowed = allowed if ties is None else max(allowed, float(ties[place[0]]))
    return f"by {relative:.2e} of its channel's scale ({float(reach.max()):.3g}), expected at most {allowed:g}"


def _check_finite(expected: Array, output: str, name: str) -> None:
    """Refuse outputs of torch with NaN, or with rows of nothing but infinity; a mask may set some values to it.

    Raises:
        NotFiniteError: see above.
    """
    if is_exact(expected) or not expected.size:
        return
    finite = np.isfinite(expected).reshape(len(expected), -1)
    if np.isnan(expected).any() or not finite.any(1).all():
        raise NotFiniteError(
            f"{name}: output {output} of the torch model has NaN or infinity on samples of the data; check the weights "
            "and the preprocessing."
        )


def _largest(value: Array, axes: tuple[int, ...], below: float) -> Array:
    """Return the largest finite magnitude of each channel, without masked values, as [1, ...] with the size of `axes`.

    Args:
        value: an output [rows, ...].
        axes: the axes of the channels.
        below: values at and below it are masked.
    """
    pooled = tuple(axis for axis in range(value.ndim) if axis not in axes)
    largest = np.zeros([value.shape[axis] if axis in axes else 1 for axis in range(value.ndim)])
    for piece in _pieces(value.shape):
        part = value[piece]
        kept = np.isfinite(part) & (part > below)
        magnitudes = np.where(kept, np.abs(np.where(kept, part, 0.0)), 0.0).max(axis=pooled, keepdims=True)
        channels = _channels(largest, piece)
        np.maximum(channels, magnitudes, out=channels)
    if largest.size and value.size // largest.size < ENOUGH:
        largest = np.maximum(largest, np.median(largest))
    return largest


def _with_zeros(scale: Array) -> Array:
    """Return scales in which a channel of zeros has the rounding of the largest channel as its tolerance."""
    rounding = np.finfo(np.float32).eps * scale.max(initial=0.0) / TOLERANCE
    return np.maximum(np.where(scale == 0.0, rounding, scale), np.finfo(np.float32).tiny / TOLERANCE)


def _pooled(scale: Array) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(scale.shape) if size == 1)


def _deviation(expected: Array, value: Array) -> Array:
    """Return absolute differences in float64: 0 for equal infinities, infinity for NaN and unequal infinities."""
    with np.errstate(invalid="ignore"):
        difference: Array = np.abs(value.astype(np.float64) - expected.astype(np.float64))
    difference[expected == value] = 0.0
    difference[np.isnan(difference)] = np.inf
    return difference


def _scales(expected: Array, scale: Array) -> Array:
    """Return the scale of each value: that of its channel, or its own magnitude if that is larger, as of a mask."""
    finite = np.where(np.isfinite(expected), expected, 0.0).astype(np.float64)
    scales: Array = np.maximum(scale, np.abs(finite))
    return scales


def _relative(expected: Array, value: Array, scale: Array) -> Array:
    """Return the difference of each value, relative to its scale; infinity for integers that are not equal."""
    if is_exact(expected):
        return np.where(expected == value, 0.0, np.inf)
    relative: Array = _deviation(expected, value) / _scales(expected, scale)
    return relative


def _over(relative: Array, allowed: Array) -> Array:
    """Return differences in units of the allowed ones; an infinite one allows any difference."""
    limited = np.isfinite(allowed)
    over: Array = np.where(limited, relative / np.where(limited, allowed, 1.0), 0.0)
    return over
