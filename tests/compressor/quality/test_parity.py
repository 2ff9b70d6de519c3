"""What the parity check measures, and what it refuses."""

import numpy as np
import numpy.typing as npt
import pytest

from compressor.quality.parity import TOLERANCE, ParityError, check_parity


def arrays(*values: float) -> dict[str, npt.NDArray[np.float32]]:
    return {"y": np.array(values, dtype=np.float32)}


def test_a_difference_within_the_tolerance_is_measured() -> None:
    parity = check_parity(arrays(1.0, 100.0), lambda: arrays(1.005, 100.0), name="m")
    assert parity.output == "y"
    assert parity.difference == pytest.approx(0.005 / 100.0, rel=1e-4)  # float32 rounding of 1.005
    assert parity.rows == 2


def test_a_larger_difference_is_an_error() -> None:
    with pytest.raises(ParityError, match=r"m: output y differs from torch by 1.00e-02 .* allowed is 0.0001"):
        check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m")
    assert TOLERANCE == 1e-4


def test_nan_in_the_file_alone_is_a_fault_of_the_export() -> None:
    with pytest.raises(ParityError, match="fault of the export"):
        check_parity(arrays(1.0), lambda: arrays(np.nan), name="m")


def test_nan_in_torch_already_is_a_fault_of_the_model() -> None:
    with pytest.raises(ParityError, match="in torch already, output y is NaN or infinite"):
        check_parity(arrays(np.inf), lambda: arrays(np.inf), name="m")


def test_another_shape_is_an_error() -> None:
    with pytest.raises(ParityError, match=r"shape \(2,\), torch gives \(1,\)"):
        check_parity(arrays(1.0), lambda: arrays(1.0, 2.0), name="m")


def test_another_tolerance_and_advice_are_taken() -> None:
    assert check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m", tolerance=0.02).rows == 2
    with pytest.raises(ParityError, match=r"allowed is 0.005; look at it\.$"):
        check_parity(arrays(1.0, 100.0), lambda: arrays(2.0, 100.0), name="m", tolerance=0.005, advice="look at it")
