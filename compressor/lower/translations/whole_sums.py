"""Translation of sums of whole numbers to ONNX.

ONNX Runtime adds int64 values in double precision, so a sum beyond 2^53 is another number; torch's sum is exact, and
goes on behind the largest number from the smallest. Hashes of bytes (BLT) are such sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import onnx_ir as ir
from onnxscript import opset20

from compressor.internals.onnxscript import plain_sum
from passes.graph.graph import aten

op: Any = opset20  # its annotations are those of functions that onnxscript compiles

TERMS = 64  # longest axis whose values are added one by one; longer ones count tokens or members of a mask


def whole_sum(self: ir.Value, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: int = -1) -> Any:
    """Return a sum over axes; that of int64 values over one short axis of known size is exact.

    Args:
        self: values of any shape and type.
        dim: axes; None for all.
        keepdim: whether the axes remain, with size 1.
        dtype: type of the sum in ONNX; -1 for that of torch.
    """
    size = _terms(self, dim)
    if size is None or dtype not in (-1, ir.DataType.INT64):
        return plain_sum(self, dim, keepdim, dtype)
    assert dim is not None
    values = op.Split(self, axis=dim[0], num_outputs=size) if size > 1 else (self,)
    found = reduce(op.Add, values)
    return found if keepdim else op.Squeeze(found, op.Constant(value_ints=[dim[0]]))


def _terms(values: ir.Value, dim: Sequence[int] | None) -> int | None:
    """Return the size of the only axis of a sum of int64 values; None for other sums, and sizes above `TERMS`."""
    if values.dtype != ir.DataType.INT64 or values.shape is None or dim is None or len(dim) != 1:
        return None
    size = values.shape[dim[0]]
    return size if isinstance(size, int) and 0 < size <= TERMS else None


TRANSLATIONS: dict[Any, Any] = {aten.sum.dim_IntList: whole_sum}
