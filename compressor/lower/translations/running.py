"""Translations of running maxima and of places in sorted values to ONNX, which has no operators for them.

All values are compared with one another, so they suit axes of tokens, as in Grounding DINO's phrases of a text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import opset20

from passes.graph.graph import aten

op: Any = opset20  # its annotations are those of functions that onnxscript compiles


def searchsorted(
    sorted_sequence: ir.Value,
    self: ir.Value,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: ir.Value | None = None,
) -> Any:
    """Return the place of each value of `self` in sorted values: the number of those below it.

    Args:
        sorted_sequence: [values], or with the leading axes of `self`.
        self: values of any shape.
        out_int32: places are int32, not int64.
        right: values that are equal count as below; so they do for the side ``right``.
        side: ``left`` or ``right``.
        sorter: order of unsorted values, which is not translated.

    Raises:
        NotImplementedError: an order is given.
    """
    if sorter is not None:
        raise NotImplementedError("aten.searchsorted with a sorter")
    assert sorted_sequence.shape is not None
    places = sorted_sequence if len(sorted_sequence.shape) == 1 else op.Unsqueeze(sorted_sequence, _axes(-2))
    compare = op.LessOrEqual if right or side == "right" else op.Less
    below = op.Cast(compare(places, op.Unsqueeze(self, _axes(-1))), to=ir.DataType.INT64)
    found = op.ReduceSum(below, _axes(-1), keepdims=0)
    return op.Cast(found, to=ir.DataType.INT32) if out_int32 else found


def cummax(self: ir.Value, dim: int) -> Any:
    """Return the largest value up to each place of an axis, and the last place that holds it."""
    assert self.dtype is not None
    return _running(self, dim, op.ReduceMax, self.dtype.min)


def cummin(self: ir.Value, dim: int) -> Any:
    """Return the smallest value up to each place of an axis, and the last place that holds it."""
    assert self.dtype is not None
    return _running(self, dim, op.ReduceMin, self.dtype.max)


def _running(values: ir.Value, dim: int, reduce: Callable[..., Any], fill: Any) -> Any:
    """Return what `reduce` gives of the values up to each place, and the last place of it; `fill` hides the others."""
    assert values.shape is not None
    assert values.dtype is not None
    axis, last = dim % len(values.shape), len(values.shape) - 1
    order = [each for each in range(last + 1) if each != axis] + [axis]
    back = [order.index(each) for each in range(last + 1)]
    size = op.Shape(values, start=axis, end=axis + 1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Concat(size, size, axis=0))
    before = op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL)
    whole = values.dtype.is_integer() and values.dtype != ir.DataType.BOOL
    hidden = op.Constant(value=ir.tensor(int(fill) if whole else float(fill), dtype=values.dtype))
    rows = op.Unsqueeze(op.Transpose(values, perm=order), _axes(-2))
    found = reduce(op.Where(before, rows, hidden), _axes(-1), keepdims=1)
    equal = op.And(before, op.Equal(rows, found))
    numbers = op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))
    places = op.ReduceMax(op.Where(equal, numbers, op.Constant(value_int=-1)), _axes(-1), keepdims=0)
    return op.Transpose(op.Squeeze(found, _axes(-1)), perm=back), op.Transpose(places, perm=back)


def _axes(axis: int) -> Any:
    return op.Constant(value_ints=[axis])


TRANSLATIONS: dict[Any, Any] = {
    aten.searchsorted.Tensor: searchsorted,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
}
