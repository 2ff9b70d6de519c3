"""What tests need of the processor they run on."""

import pytest

from compressor.quantize.saturation import int8_saturates

EXACT = "ONNX Runtime's int8 products saturate at 16 bits on this processor, which has no VNNI"

exact_int8 = pytest.mark.skipif(int8_saturates(), reason=EXACT)
"""For tests that hold int8 answers to exact integer arithmetic."""


def need_exact_int8(precision):
    """Skip a case in int8 where its products saturate."""
    if precision.startswith("int8") and int8_saturates():
        pytest.skip(EXACT)
