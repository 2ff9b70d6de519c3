"""Execution of a graph in float64, beside float32: the rounding of a model, and its decisions that rounding changes.

Weights are cast one at a time when an operator reads them, so that there is no second copy of the model in memory.

A *decision* is an operator whose result changes in steps: top-k, sorting, comparisons, rounding to integers. If two
candidates differ by less than the rounding of float32, two correct implementations may decide differently, and their
outputs differ by more than rounding. The order of candidates that are equal is not defined at all: torch's top-k takes
another one of them than ONNX's, which takes the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.execute.interpreter import Program
from passes.execute.offloaded_weights import in_memory
from passes.graph.graph import aten
from passes.torch_internals import operators, tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from passes.graph.graph import Graph

    Outputs = tuple[torch.Tensor, ...]
    Rows = torch.Tensor

# Operators with an integer or boolean result decide by that result; those below return rounded floating numbers.
ROUNDING = operators(
    "round.default", "round.decimals", "floor.default", "ceil.default", "trunc.default", "fix.default", "sign.default",
    "sgn.default", "floor_divide.default", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode",
    "heaviside.default", "fake_quantize_per_tensor_affine.default", "fake_quantize_per_channel_affine.default",
)  # fmt: skip
# Operators that order candidates, without a rule for equal ones. Of several largest, argmax takes the first everywhere.
ORDERING = operators(
    "topk.default", "sort.default", "sort.stable", "argsort.default", "argsort.stable", "kthvalue.default"
)
# Two implementations of float32 differ by a few times the difference of either from float64: sums in another order,
# approximations of exp and erf. Measured with ONNX Runtime on DeiT-Tiny, MiniLM and a small Llama: at most 5.2 times.
SPREAD = 16.0
DRAWS = (
    4  # runs with disturbed decisions; a candidate within SPREAD / 2 of another is missed by all in few of 100 cases
)


class Float64Program(Program):
    """A program that computes in float64: weights, inputs and casts are widened as operators read them.

    Args:
        graph: traced model.
        disturbance: for decisions, the largest error to add to each of their operands, by row (see `run_beside`).
        seed: seed of these errors.
    """

    def __init__(
        self, graph: Graph, disturbance: Mapping[fx.Node, Mapping[fx.Node, Rows]] | None = None, *, seed: int = 0
    ) -> None:
        super().__init__(graph)
        self.disturbance = {} if disturbance is None else disturbance
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Compute the value of one node from the values of its inputs, in float64."""
        if node.op != "call_function" or node.target is aten.embedding.default:  # a lookup does not round
            return super().step(node, values)
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda argument: self._argument(node, argument, values)
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _argument(self, node: fx.Node, argument: Any, values: Mapping[fx.Node, Any]) -> Any:
        if isinstance(argument, torch.dtype):
            return torch.float64 if argument.is_floating_point else argument
        if not isinstance(argument, fx.Node):
            return argument
        value = _widened(in_memory(values[self._resolve(argument)]))
        bound = self.disturbance.get(node, {}).get(argument)
        return value if bound is None else value + _by_row(bound, value) * self._noise(value)

    def _noise(self, value: torch.Tensor) -> torch.Tensor:
        """Return numbers uniformly distributed from -1 to 1."""
        return 2 * torch.rand(value.shape, generator=self.generator, dtype=value.dtype) - 1


@dataclass(frozen=True)
class BesideFloat64:
    """Outputs of a graph in float32 and float64, and the decisions that differ.

    Attributes:
        single: outputs in the type of the model.
        double: outputs in float64.
        flips: node to the rows [rows] in which float32 and float64 decide differently.
        decisions: node to its result in float64, for nodes whose floating operands were rounded, or that order them.
        disturbance: node to the rounding of each of its floating operands [rows], times `SPREAD`; of an operator that
            orders them, at least what parts equal ones.
    """

    single: Outputs
    double: Outputs
    flips: Mapping[fx.Node, Rows]
    decisions: Mapping[fx.Node, torch.Tensor]
    disturbance: Mapping[fx.Node, Mapping[fx.Node, Rows]]

    @torch.inference_mode()
    def disturbed(
        self, graph: Graph, feeds: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[Outputs, dict[fx.Node, Rows]]]:
        """Yield the float64 outputs and flips of `DRAWS` runs whose decisions read operands with rounding errors."""
        rows = _rows(feeds)
        for seed in range(DRAWS if self.disturbance else 0):
            program = Float64Program(graph, self.disturbance, seed=seed)
            values, flips = program.start(feeds), dict[fx.Node, "Rows"]()
            for node in program.walk(values):
                if node in self.decisions:
                    flips[node] = _differing(self.decisions[node], _decided(node, values[node]), rows)
            yield program.results(values), flips


@torch.inference_mode()
def run_beside(graph: Graph, feeds: Mapping[str, torch.Tensor]) -> BesideFloat64:
    """Run a graph in float32 and float64 side by side on one batch.

    Args:
        graph: traced model; offloaded weights are read from disk for every operator.
        feeds: input name to tensor; the first axis is the rows.
    """
    single, double, rows = Program(graph), Float64Program(graph), _rows(feeds)
    left, right = single.start(feeds), double.start(feeds)
    flips, decisions, disturbance = {}, {}, {}
    for node, _ in zip(single.walk(left), double.walk(right), strict=True):  # the operands are freed after this body
        if node.op != "call_function" or (decided := _decided(node, right[node])) is None:
            continue
        rounding = {source: _rounding(left[source], right[source], rows) for source in _floating(node, left)}
        if node.target in ORDERING:
            rounding = {source: errors.maximum(_resolution(right[source], rows)) for source, errors in rounding.items()}
        rounding = {source: errors for source, errors in rounding.items() if errors.any()}
        if rounding:
            decisions[node], disturbance[node] = decided, rounding
            flips[node] = _differing(decided, _decided(node, left[node]), rows)
    return BesideFloat64(single.results(left), double.results(right), flips, decisions, disturbance)


def _rows(feeds: Mapping[str, torch.Tensor]) -> int:
    return len(next(iter(feeds.values())))


def _widened(value: Any) -> Any:
    """Return a value with its floating tensors in float64; lists and tuples keep their members."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _floating(node: fx.Node, values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    operands = ((source, values[source]) for source in node.all_input_nodes)
    return [source for source, value in operands if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _decided(node: fx.Node, value: Any) -> Any:
    """Return the integer or boolean part of a decision's result, or its rounded value; None for other operators."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if node.target in ROUNDING:
        return tensors[0]
    return next((each for each in tensors if not (each.is_floating_point() or each.is_complex())), None)


def _rounding(single: torch.Tensor, double: torch.Tensor, rows: int) -> Rows:
    """Return the largest difference of each row [rows], times `SPREAD`; infinite and NaN values count as equal."""
    difference = (single.double() - double.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    return SPREAD * _per_row(difference, rows).amax(1) if difference.numel() else torch.zeros(rows)


def _resolution(value: torch.Tensor, rows: int) -> Rows:
    """Return the distance of neighbouring float32 numbers at the largest of each row [rows], which parts equal ones."""
    size = value.abs().nan_to_num(0.0, 0.0, 0.0)
    eps = torch.finfo(torch.float32).eps
    return eps * _per_row(size, rows).amax(1).clamp(min=1e-30) if size.numel() else torch.zeros(rows)


def _differing(left: torch.Tensor, right: torch.Tensor, rows: int) -> Rows:
    """Return the rows [rows] in which two results differ."""
    if left.shape != right.shape:  # such as those of nonzero
        return torch.ones(rows, dtype=torch.bool)
    return _per_row(left.double() != right.double(), rows).any(1)


def _per_row(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a tensor as [rows, ...]; one that does not have the rows in its first axis belongs to all of them."""
    if value.ndim and len(value) and len(value) % rows == 0:
        return value.reshape(rows, -1)
    return value.reshape(1, -1).expand(rows, -1)


def _by_row(bound: Rows, value: torch.Tensor) -> torch.Tensor:
    """Return a bound for each row in a shape that broadcasts to a value whose first axis holds the rows."""
    if value.ndim and len(value) % len(bound) == 0:
        return bound.repeat_interleave(len(value) // len(bound)).reshape(-1, *[1] * (value.ndim - 1))
    return bound.amax()
