"""Cost of a graph at concrete input sizes, computed from its traced symbolic shapes without running it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.analysis.multiply_adds import counted, multiply_adds
from passes.analysis.token_liveness import live_parts
from passes.base import PassError
from passes.graph.graph import output_values, value_of
from passes.graph.sites import ATTENTION_OPS, CONV_OPS, LINEAR_OPS, PRODUCTS, aten
from passes.torch_internals import expression, tree_leaves

if TYPE_CHECKING:
    from passes.analysis.slicing_rules import AxisRange
    from passes.graph.graph import Graph

# A convolution with string padding ("valid", "same") is a separate overload.
CONVOLUTIONS = CONV_OPS | {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
SIZE = aten.sym_size.int
DATA_DEPENDENT = (
    "the model has sizes that depend on the contents of a tensor, as .item() and a boolean index give, so the cost of "
    "a change is not known to a search; name what to drop (--drop attention:1, --drop plan.json), or compute with "
    "masks in forward."
)
# View operators, which write no elements.
FREE = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.sym_size.int,
        operator.getitem,
    }
)


@dataclass(frozen=True)
class Work:
    """Work of one forward pass.

    `products` is the number of multiply-adds of linear maps and convolutions, `attention` that of products of two
    activations. `elements` is the number of values that all other operators write. `operators` counts operators of any
    kind except views.
    """

    products: int
    attention: int
    elements: int
    operators: int

    @property
    def multiply_adds(self) -> int:
        """Number of all multiply-adds, as `passes.analysis.counted_cost` counts them by running the graph."""
        return self.products + self.attention


class Shapes:
    """Evaluator of the symbolic sizes of traced values at concrete input shapes.

    Args:
        graph: the traced graph or a fork of it.
        inputs: input name to shape.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, tuple[int, ...]]) -> None:
        self.evaluated: dict[str, int] = {}
        self.symbols: dict[Any, int] = {}
        for node, name in zip(graph.placeholders(), graph.inputs, strict=True):
            for size, number in zip(value_of(node).shape, inputs[name], strict=True):
                if isinstance(size, torch.SymInt):
                    self.symbols[expression(size)] = int(number)

    def number(self, size: Any) -> int:
        """Return a size as an integer.

        Raises:
            PassError: it depends on the contents of a tensor.
        """
        if not isinstance(size, torch.SymInt):
            return int(size)
        text = str(size)
        if text not in self.evaluated:
            if not expression(size).free_symbols <= self.symbols.keys():
                raise PassError(DATA_DEPENDENT)
            self.evaluated[text] = int(expression(size).subs(self.symbols))
        return self.evaluated[text]

    def learn(self, node: fx.Node) -> None:
        """Evaluate the new symbol of a size (`passes.graph.edit.resymbolize_size`) from the arguments of its node.

        Raises:
            PassError: it depends on the contents of a tensor.
        """
        size = value_of(node)
        symbol = expression(size) if isinstance(size, torch.SymInt) else None
        if symbol is not None and symbol.is_Symbol and symbol not in self.symbols:
            if any(isinstance(value_of(source), torch.Tensor) for source in node.all_input_nodes):
                raise PassError(DATA_DEPENDENT)
            args = fx.node.map_arg(node.args, lambda source: self.number(value_of(source)))
            self.symbols[symbol] = int(node.target(*args))  # type: ignore[operator]

    def of(self, value: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of a traced value as integers."""
        return tuple(self.number(size) for size in value.shape)


def check_known_sizes(graph: Graph, inputs: Mapping[str, tuple[int, ...]]) -> None:
    """Check that all sizes of a graph follow from those of its inputs; a search needs them for the cost of a change.

    Args:
        graph: the traced graph.
        inputs: input name to shape.

    Raises:
        PassError: a size depends on the contents of a tensor.
    """
    shapes = Shapes(graph, inputs)
    for node in graph.nodes():
        shapes.learn(node)
        for value in tree_leaves(value_of(node)):
            if isinstance(value, torch.Tensor):
                shapes.of(value)


class Counter:
    """Work counter for forks of one traced graph at fixed input shapes. Counts of single operators are cached.

    Args:
        graph: the traced graph.
        inputs: input name to shape.
        given: names of outputs that an earlier call has computed, such as the caches of cross-attentions.
        left_out: names of outputs that the call does not compute and does not need.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, tuple[int, ...]],
        given: Collection[str] = (),
        left_out: Collection[str] = (),
    ) -> None:
        self.shapes = Shapes(graph, inputs)
        self.counted: dict[str, int] = {}
        self.given, self.left_out = given, left_out

    def count(self, graph: Graph) -> Work:
        """Return the work of one forward pass without dead tokens (`passes.rewrite.narrow_tokens`)."""
        read, computed = live_parts(graph), self._computed(graph)
        products = attention = elements = operators = 0
        for node in graph.nodes():
            self.shapes.learn(node)
            if (
                node.op != "call_function"
                or node not in computed
                or node.target in FREE
                or not isinstance(value_of(node), torch.Tensor | list | tuple)
            ):
                continue
            operators += 1
            share = self._share(node, read.get(node.name))
            if node.target in LINEAR_OPS | CONVOLUTIONS:
                products += round(share * self._multiply_adds(node))
            elif node.target in PRODUCTS | ATTENTION_OPS:
                attention += round(share * self._multiply_adds(node))
            else:
                elements += round(share * self._elements(value_of(node)))
        return Work(products, attention, elements, operators)

    def _computed(self, graph: Graph) -> set[fx.Node]:
        """Return the nodes that the call computes. Reading a size of a value does not take the value."""
        if not self.given and not self.left_out:
            return set(graph.nodes())
        outputs = dict(zip(graph.outputs, output_values(graph), strict=True))
        known = {outputs[name] for name in self.given if name in outputs}
        seen = {node for name, node in outputs.items() if name not in self.left_out and node not in known}
        stack = list(seen)
        while stack:
            node = stack.pop()
            needed = () if node.target is SIZE else node.all_input_nodes
            sources = {source for source in needed if source not in known} - seen
            seen |= sources
            stack += sources
        return seen

    def _share(self, node: fx.Node, part: AxisRange | None) -> float:
        """Return the fraction of a value that is read; the cost of an operator is proportional to its rows."""
        if part is None:
            return 1.0
        value = value_of(node)
        first = value if isinstance(value, torch.Tensor) else value[0]
        return part.width / self.shapes.number(first.shape[part.axis])

    def _elements(self, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return torch.Size(self.shapes.of(value)).numel()
        return sum(self._elements(item) for item in value if isinstance(item, torch.Tensor))

    def _multiply_adds(self, node: fx.Node) -> int:
        """Return the multiply-adds of an operator, computed on meta tensors of the evaluated shapes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._empty(value_of(source)))
        key = str((node.target, fx.node.map_aggregate((args, kwargs), _shape_key)))
        if key not in self.counted:
            call: Callable[..., Any] = node.target  # type: ignore[assignment]
            by_formula = multiply_adds(call, args, self._empty(value_of(node)))
            self.counted[key] = counted(call, args, kwargs) if by_formula is None else by_formula
        return self.counted[key]

    def _empty(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty(self.shapes.of(value), dtype=value.dtype, device="meta")
        return self.shapes.number(value) if isinstance(value, torch.SymInt) else value


def _shape_key(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value
