"""How much work a graph is at given input sizes, read from its traced shapes: nothing is run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.analysis.multiply_adds import counted, multiply_adds
from passes.analysis.token_liveness import read_parts
from passes.graph.graph import value_of
from passes.graph.sites import ATTENTION_OPS, CONV_OPS, LINEAR_OPS, PRODUCTS, aten
from passes.torch_internals import expression

if TYPE_CHECKING:
    from passes.analysis.slicing_rules import Part
    from passes.graph.graph import Graph

# With padding by name ("valid", "same") a convolution is another overload.
CONVOLUTIONS = CONV_OPS | {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
# They hand on what is there already, under another shape.
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
    """What one run of a graph takes.

    `products` are the multiply-adds of linear maps and convolutions, `attention` those of products of two activations,
    `elements` the values that all other operators write, `operators` how many there are of any kind.
    """

    products: int
    attention: int
    elements: int
    operators: int

    @property
    def multiply_adds(self) -> int:
        """All multiply-adds: what `passes.cost` counts by running."""
        return self.products + self.attention


class Shapes:
    """Turns the symbolic sizes of traced values into numbers, given the sizes of the inputs.

    Args:
        graph: any fork of the traced model.
        inputs: input name to shape.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, tuple[int, ...]]) -> None:
        self.known: dict[str, int] = {}
        self.symbols: dict[Any, int] = {}
        for node, name in zip(graph.placeholders(), graph.inputs, strict=True):
            for size, number in zip(value_of(node).shape, inputs[name], strict=True):
                if isinstance(size, torch.SymInt):
                    self.symbols[expression(size)] = int(number)

    def number(self, size: Any) -> int:
        """A size as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        text = str(size)
        if text not in self.known:
            self.known[text] = int(expression(size).subs(self.symbols))
        return self.known[text]

    def learn(self, node: fx.Node) -> None:
        """Work out a size that stands for itself (`passes.edit.name_size`) from those it was computed of."""
        size = value_of(node)
        symbol = expression(size) if isinstance(size, torch.SymInt) else None
        if symbol is not None and symbol.is_Symbol and symbol not in self.symbols:
            args = fx.node.map_arg(node.args, lambda source: self.number(value_of(source)))
            self.symbols[symbol] = int(node.target(*args))  # type: ignore[operator]

    def of(self, value: torch.Tensor) -> tuple[int, ...]:
        """A traced value's shape in numbers."""
        return tuple(self.number(size) for size in value.shape)


class Counter:
    """Counts the work of graphs traced from one model, at one size of the inputs; what it has counted it remembers."""

    def __init__(self, graph: Graph, inputs: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = Shapes(graph, inputs)
        self.counted: dict[str, int] = {}

    def count(self, graph: Graph) -> Work:
        """The work of one forward pass at those sizes, once what nobody reads is left out (`passes.unread`)."""
        read = read_parts(graph)
        products = attention = elements = operators = 0
        for node in graph.nodes():
            self.shapes.learn(node)
            if (
                node.op != "call_function"
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

    def _share(self, node: fx.Node, part: Part | None) -> float:
        """How much of a node's value is read: rows of linear maps and attention cost the same each."""
        if part is None:
            return 1.0
        value = value_of(node)
        first = value if isinstance(value, torch.Tensor) else value[0]
        return part.width / self.shapes.number(first.shape[part.axis])

    def _elements(self, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return torch.Size(self.shapes.of(value)).numel()
        return sum(self._elements(each) for each in value if isinstance(each, torch.Tensor))

    def _multiply_adds(self, node: fx.Node) -> int:
        """The multiply-adds of an operator on tensors without data of these shapes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._empty(value_of(source)))
        key = str((node.target, fx.node.map_aggregate((args, kwargs), _described)))
        if key not in self.counted:
            call: Callable[..., Any] = node.target  # type: ignore[assignment]
            by_formula = multiply_adds(call, args, self._empty(value_of(node)))
            self.counted[key] = counted(call, args, kwargs) if by_formula is None else by_formula
        return self.counted[key]

    def _empty(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty(self.shapes.of(value), dtype=value.dtype, device="meta")
        return self.shapes.number(value) if isinstance(value, torch.SymInt) else value


def _described(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value
