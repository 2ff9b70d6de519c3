"""Parity check of an engine with torch on real inputs; torch's outputs are passed in, so torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.errors import CompressorError

# Largest allowed difference, relative to the largest value of the output: float32 sums in another order differ by about
# 1e-6 per layer; a wrong operator is off by 1e-2 or more.
TOLERANCE = 1e-4
REPORT_IT = "this is a bug in the export, not in your model: please report it"


class ParityError(CompressorError):
    """The outputs of a file or an engine differ from those of torch."""


@dataclass(frozen=True)
class Parity:
    """Largest difference of an output from torch's, relative to the largest value of that output."""

    output: str
    difference: float
    rows: int


def check_parity(
    expected: Mapping[str, npt.NDArray[Any]],
    run: Callable[[], Mapping[str, npt.NDArray[Any]]],
    *,
    name: str,
    tolerance: float = TOLERANCE,
    advice: str = REPORT_IT,
) -> Parity:
    """Compare an engine's outputs on real inputs with torch's.

    Args:
        expected: output name to torch's value.
        run: runs the engine on the same inputs and returns its outputs by name.
        name: name of the engine in the error message.
        tolerance: largest allowed difference, relative to the largest value of the output; infinity disables the check.
        advice: end of the error message.

    Returns:
        The output with the largest relative difference.

    Raises:
        ParityError: an output differs by more than `tolerance` or in shape, or torch's output is not finite.
    """
    outputs = run()
    worst = max((difference(key, value, outputs[key], name) for key, value in expected.items()), key=magnitude)
    if not worst.difference <= tolerance:
        raise ParityError(
            f"{name}: output {worst.output} differs from torch by {worst.difference:.2e} of its largest value, "
            f"expected at most {tolerance:g}; {advice}."
        )
    return worst


def magnitude(parity: Parity) -> float:
    """Return the difference as a sort key, with NaN as infinity."""
    return np.inf if np.isnan(parity.difference) else parity.difference


def difference(output: str, expected: npt.NDArray[Any], value: npt.NDArray[Any], name: str) -> Parity:
    """Measure the difference of one output from torch's, without comparing it with a tolerance.

    Raises:
        ParityError: the shapes differ, or torch's output is not finite.
    """
    if expected.shape != value.shape:
        raise ParityError(f"{name}: output {output} has shape {value.shape}, expected {expected.shape} as in torch.")
    if not np.isfinite(expected).all():
        raise ParityError(
            f"{name}: output {output} of the torch model has NaN or infinity on samples of the data; check the weights "
            "and the preprocessing."
        )
    scale = float(np.abs(expected).max(initial=1e-12))
    return Parity(output, float(np.abs(value - expected).max(initial=0.0)) / scale, len(expected))
