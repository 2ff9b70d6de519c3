"""Whether an engine computes what torch does, on real inputs; without torch, whose answers are handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.errors import CompressorError

# Largest difference allowed, relative to the largest value of the output: float32 sums in another order differ by about
# 1e-6 a layer; a wrong operator is off by 1e-2 or more.
TOLERANCE = 1e-4
REPORT_IT = "this is a fault of the export, not of your model: please report it"


class ParityError(CompressorError):
    """A file or an engine computes something else than torch."""


@dataclass(frozen=True)
class Parity:
    """Largest difference of an engine's outputs from torch's, relative to the largest output value."""

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
        run: runs the engine on the same inputs.
        name: for the error message.
        tolerance: largest difference allowed, relative to the largest value of the output; infinite only measures.
        advice: how the error message ends.

    Raises:
        ParityError: an output differs by more than `tolerance`, or in shape, or torch's own is not finite.
    """
    found = run()
    worst = max((difference(key, value, found[key], name) for key, value in expected.items()), key=magnitude)
    if not worst.difference <= tolerance:
        raise ParityError(
            f"{name}: output {worst.output} differs from torch by {worst.difference:.2e} of its largest value, "
            f"allowed is {tolerance:g}; {advice}."
        )
    return worst


def magnitude(parity: Parity) -> float:
    """The difference as something to sort by: NaN is the largest."""
    return np.inf if np.isnan(parity.difference) else parity.difference


def difference(output: str, expected: npt.NDArray[Any], found: npt.NDArray[Any], name: str) -> Parity:
    """The difference of one output from torch's, allowed or not.

    Raises:
        ParityError: it has another shape, or torch's own is not finite.
    """
    if expected.shape != found.shape:
        raise ParityError(f"{name}: output {output} has shape {found.shape}, torch gives {expected.shape}.")
    if not np.isfinite(expected).all():
        raise ParityError(
            f"{name}: in torch already, output {output} is NaN or infinite on samples of the data; check the weights "
            "and the preprocessing."
        )
    scale = float(np.abs(expected).max(initial=1e-12))
    return Parity(output, float(np.abs(found - expected).max(initial=0.0)) / scale, len(expected))
