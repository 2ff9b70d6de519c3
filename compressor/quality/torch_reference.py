"""Outputs of a graph in torch as the reference of a parity check: their channels, their rounding and their ties.

Rounding is the difference of torch's float32 outputs from its float64 outputs. A *tie* is a row in which a decision,
such as a top-k, changes within that rounding, so that the outputs of correct implementations differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx

from compressor.models.base import first_line
from compressor.quality.parity import TOLERANCE, Array, Reference, row_differences
from passes.execute.float64 import run_beside
from passes.execute.interpreter import run
from passes.execute.offloaded_weights import has_offloaded
from passes.graph.graph import CASTS, COPIES, VIEWS, Graph, aten, output_values, value_of
from passes.graph.random_operators import described
from passes.torch_internals import operators

Tensors = Mapping[str, torch.Tensor]

# Functions with values from 0 or -1 to 1. Engines approximate them to a rounding error of 1, not of their value: in
# ONNX Runtime, a sigmoid of 3e-7 is off by 17 %.
BOUNDED = operators(
    "sigmoid.default", "hardsigmoid.default", "softmax.int", "_softmax.default", "tanh.default", "erf.default"
)
UNCHANGED = VIEWS | COPIES | CASTS | {aten.reshape.default, aten.squeeze.dim, aten.unsqueeze.default, aten.select.int}
NAMED = 3  # largest number of operators in a sentence


def torch_outputs(graph: Graph, feeds: Tensors) -> dict[str, Array]:
    """Run a graph and return its outputs by name."""
    return _by_name(graph, run(graph, feeds))


def channel_axes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Return the axes of each output that form its channels: those with a static size, except the first.

    All axes but the first are taken if tracing recorded no shape.
    """
    axes = {}
    for name, node in zip(graph.outputs, output_values(graph), strict=True):
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            axes[name] = tuple(axis for axis, size in enumerate(value.shape) if axis > 0 and isinstance(size, int))
    return axes


def reference_of(graph: Graph, feeds: Tensors) -> Reference:
    """Run a graph and return its outputs as the reference of a parity check, without rounding and ties."""
    return Reference.of(torch_outputs(graph, feeds), channel_axes(graph))


def with_rounding(reference: Reference, graph: Graph, batches: Sequence[Tensors]) -> Reference:
    """Return a reference that knows the rounding and the ties of torch, from runs in float64.

    Args:
        reference: the float32 outputs of the graph for the concatenated batches.
        graph: the graph. If its weights stay on disk, or it has an operator without float64, the rounding is not
            measured, and a note says so.
        batches: batches of feeds. If the graph has no decisions that rounding changes, the first one is enough.
    """
    if has_offloaded(graph):
        return _unknown(reference, "its weights stay on disk")
    found: list[_Exact] = []
    rows = len(next(iter(reference.expected.values())))
    try:
        for batch in batches:
            start = sum(len(each.ties) for each in found)
            size = len(next(iter(batch.values())))
            found.append(_exact(reference.part(slice(start, start + size)), graph, batch))
            if not found[-1].decides:
                break
    except (RuntimeError, TypeError, NotImplementedError, IndexError) as error:
        return _unknown(reference, first_line(error))
    single, double = (
        {name: np.concatenate([outputs[name] for outputs in side]) for name in graph.outputs}
        for side in ([each.single for each in found], [each.double for each in found])
    )
    ties = np.concatenate([each.ties for each in found])
    ties = np.concatenate([ties, np.zeros(rows - len(ties))]) if len(ties) < rows else ties[:rows]
    notes = _notes(ties, list(dict.fromkeys(place for each in found for place in each.places)))
    return reference.with_rounding(single, double, ties, _floor(graph), notes)


@dataclasses.dataclass(frozen=True)
class _Exact:
    """Outputs of one batch in both types, the difference that ties cause in each row, and the decisions that cause it.

    `decides` states whether rounding can change a decision at all.
    """

    single: dict[str, Array]
    double: dict[str, Array]
    ties: Array
    places: list[str]
    decides: bool


def _exact(reference: Reference, graph: Graph, feeds: Tensors) -> _Exact:
    beside = run_beside(graph, feeds)
    single, double = _by_name(graph, beside.single), _by_name(graph, beside.double)
    ties, places = np.zeros(len(next(iter(feeds.values())))), list[str]()

    def record(difference: Array, flips: Mapping[fx.Node, torch.Tensor]) -> None:
        for node, flipped in flips.items():
            tied = np.where(flipped.numpy() & (difference > TOLERANCE), difference, 0.0)
            np.maximum(ties, tied, out=ties)
            if tied.any():
                places.append(described(node, graph))

    record(row_differences(reference, single, double), beside.flips)
    for disturbed, flips in beside.disturbed(graph, feeds):
        record(row_differences(reference, double, _by_name(graph, disturbed)), flips)
    return _Exact(single, double, ties, places, bool(beside.disturbance))


def _notes(ties: Array, places: Sequence[str]) -> tuple[str, ...]:
    tied = int((ties > 0).sum())
    if not tied:
        return ()
    named = ", ".join(places[:NAMED]) + (f" and {len(places) - NAMED} more" if len(places) > NAMED else "")
    rest = "the others are compared strictly" if tied < len(ties) else "no row is compared strictly"
    return (
        f"{tied} of {len(ties)} rows are ties, in which torch itself decides otherwise within the rounding of float32 "
        f"({named}); they may differ by twice what the tie changes in torch, and {rest}",
    )


def _unknown(reference: Reference, reason: str) -> Reference:
    note = f"the rounding of torch and its ties were not measured, because the model did not run in float64 ({reason})"
    return dataclasses.replace(reference, notes=(note,))


def _floor(graph: Graph) -> dict[str, float]:
    """Return the rounding error of 1 for outputs of functions whose values are at most 1."""
    eps = float(np.finfo(np.float32).eps)
    return {
        name: eps
        for name, node in zip(graph.outputs, output_values(graph), strict=True)
        if _producer(node).target in BOUNDED
    }


def _producer(node: fx.Node) -> fx.Node:
    """Return the node that computes the values of a node, before reshapes and casts."""
    while node.op == "call_function" and node.target in UNCHANGED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _by_name(graph: Graph, outputs: Sequence[torch.Tensor]) -> dict[str, Array]:
    return {name: np.atleast_1d(value.detach().numpy()) for name, value in zip(graph.outputs, outputs, strict=True)}
