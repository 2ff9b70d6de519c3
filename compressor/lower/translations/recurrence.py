"""Translation of ``compressor::recurrence`` to ONNX: a Scan over the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from compressor.internals.torch_onnx import add_operator
from compressor.models.text.recurrence import OPERATOR

TOKENS = 1  # axis of the tokens
LAST, COLUMN = -1, -2  # axes of the state that are summed or added: values, keys


def _scan(
    query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, rate: ir.Value | None, state: ir.Value
) -> Sequence[ir.Value]:
    """Return the outputs [rows, tokens, heads, values] and the last state, see `compressor.models.text.recurrence`."""
    read = [query, key, value, decay, *([] if rate is None else [rate])]
    last, outputs = add_operator(
        "Scan",
        state,
        *read,
        outputs=2,
        body=_body(state, read),
        num_scan_inputs=len(read),
        scan_input_axes=[TOKENS] * len(read),
        scan_output_axes=[TOKENS],
    )
    return outputs, last


def _body(state: ir.Value, read: Sequence[ir.Value]) -> ir.Graph:
    """Return the graph of one token: the state before it and what it reads to the state behind it and the output."""
    old = _like(state, "state")
    rows = [
        _like(each, name, TOKENS) for each, name in zip(read, ("query", "key", "value", "decay", "rate"), strict=False)
    ]
    query, key, value, decay, *rates = rows
    nodes: list[ir.Node] = []

    def op(name: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(ir.node(name, list(inputs), {"keepdims": 0} if name == "ReduceSum" else {}))
        return nodes[-1].outputs[0]

    def axis(number: int) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value": ir.tensor([number], dtype=ir.DataType.INT64)}))
        return nodes[-1].outputs[0]

    last, column = axis(LAST), axis(COLUMN)
    decayed = op("Mul", old, op("Unsqueeze", decay, last))
    keys = op("Unsqueeze", key, last)
    for rate in rates:
        value = op("Sub", value, op("Mul", rate, op("ReduceSum", op("Mul", keys, decayed), column)))
    new = op("Add", decayed, op("Mul", keys, op("Unsqueeze", value, column)))
    output = op("ReduceSum", op("Mul", op("Unsqueeze", query, last), new), column)
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"recurrence_{number}"
    for result in (new, output):
        result.type = old.type
    return ir.Graph([old, *rows], [new, output], nodes=nodes, name="recurrence")


def _like(value: ir.Value, name: str, without: int | None = None) -> ir.Value:
    """Return an input of the body with the type of a value, without one of its axes."""
    assert value.shape is not None
    sizes = [size for place, size in enumerate(value.shape) if place != without]
    return ir.Value(name=f"recurrence_{name}", shape=ir.Shape(sizes), type=value.type)


TRANSLATIONS: dict[Any, Any] = {OPERATOR: _scan}
