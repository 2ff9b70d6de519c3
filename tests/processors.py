"""Skip conditions that depend on the processor."""

import pytest

from compressor.target.saturation import int8_saturates

EXACT = "ONNX Runtime's int8 products saturate at 16 bits on this processor, which has no VNNI"

exact_int8 = pytest.mark.skipif(int8_saturates(), reason=EXACT)
"""Mark of tests that compare int8 outputs with exact integer arithmetic."""


def need_exact_int8(precision):
    """Skip the test if `precision` is int8 and int8 products saturate."""
    if precision.startswith("int8") and int8_saturates():
        pytest.skip(EXACT)
