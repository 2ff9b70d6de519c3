"""Tests of the parity check: the measured difference and the errors."""

import numpy as np
import numpy.typing as npt
import pytest

from compressor.quality.parity import TOLERANCE, ParityError, check_parity


def arrays(*values: float) -> dict[str, npt.NDArray[np.float32]]:
    return {"y": np.array(values, dtype=np.float32)}


def test_difference_within_the_tolerance_is_returned() -> None:
    parity = check_parity(arrays(1.0, 100.0), lambda: arrays(1.005, 100.0), name="m")
    assert parity.output == "y"
    assert parity.difference == pytest.approx(0.005 / 100.0, rel=1e-4)  # float32 rounding of 1.005
    assert parity.rows == 2


def test_difference_above_the_tolerance_raises() -> None:
    with pytest.raises(ParityError, match=r"m: output y differs from torch by 1.00e-02 .* expected at most 0.0001"):
        check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m")
    assert TOLERANCE == 1e-4


def test_nan_in_the_engine_alone_is_a_bug_in_the_export() -> None:
    with pytest.raises(ParityError, match="bug in the export"):
        check_parity(arrays(1.0), lambda: arrays(np.nan), name="m")


def test_nan_in_torch_is_a_fault_of_the_model() -> None:
    with pytest.raises(ParityError, match="output y of the torch model has NaN or infinity"):
        check_parity(arrays(np.inf), lambda: arrays(np.inf), name="m")


def test_different_shape_raises() -> None:
    with pytest.raises(ParityError, match=r"shape \(2,\), expected \(1,\) as in torch"):
        check_parity(arrays(1.0), lambda: arrays(1.0, 2.0), name="m")


def test_custom_tolerance_and_advice() -> None:
    assert check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m", tolerance=0.02).rows == 2
    with pytest.raises(ParityError, match=r"expected at most 0.005; look at it\.$"):
        check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m", tolerance=0.005, advice="look at it")
