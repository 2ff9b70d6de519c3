"""Complex numbers as pairs of real ones, as ONNX has no operators of complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_all_uses
from passes.graph.graph import Graph, aten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Pair = fx.Node  # [..., 2]: the real and the imaginary part of each number


@dataclass(frozen=True)
class RealArithmetic:
    """Rewrite pass that computes rotations of pairs, as in Llama 4's positions, without complex numbers.

    Before::

        %a = polar(%ones, %angles); %z = view_as_complex(%x); %y = view_as_real(mul(%z, %a))

    After::

        %p = stack([%ones * cos(%angles), %ones * sin(%angles)], -1)
        %y = stack([%x.re * %p.re - %x.im * %p.im, %x.re * %p.im + %x.im * %p.re], -1)

    The graph stays as it is if an operator of complex numbers has no rule here.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the replaced nodes."""
        numbers = [node for node in graph.nodes() if is_complex(node)]
        read = [node for node in graph.nodes() if any(map(is_complex, node.all_input_nodes)) and not is_complex(node)]
        if any(node.target not in RULES for node in numbers) or any(node.target is not REAL for node in read):
            return Rewritten()
        pairs: dict[fx.Node, Pair] = {}
        for node in numbers:
            pairs[node] = RULES[node.target](graph, node, pairs)
        for node in read:
            replace_all_uses(graph, node, pairs[node.all_input_nodes[0]])
        remove_dead(graph)
        return Rewritten(changed=tuple(node.name for node in (*numbers, *read)))


def is_complex(node: fx.Node) -> bool:
    """Return whether the value of a node is a tensor of complex numbers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _polar(graph: Graph, node: fx.Node, pairs: Mapping[fx.Node, Pair]) -> Pair:
    size, angle = node.args[:2]
    parts = [insert_call(graph, each, angle, before=node) for each in (aten.cos.default, aten.sin.default)]
    return _stack(graph, node, [insert_call(graph, aten.mul.Tensor, size, part, before=node) for part in parts])


def _viewed(graph: Graph, node: fx.Node, pairs: Mapping[fx.Node, Pair]) -> Pair:
    return node.all_input_nodes[0]


def _along_an_axis(graph: Graph, node: fx.Node, pairs: Mapping[fx.Node, Pair]) -> Pair:
    """Apply an operator along the same axis, counted from the front, as the pair has one axis more at the end."""
    number, axis, *others = node.args
    assert isinstance(number, fx.Node)
    assert isinstance(axis, int)
    last = axis - 1 if axis < 0 else axis
    return insert_call(graph, _target(node), pairs[number], last, *others, before=node)


def _product(graph: Graph, node: fx.Node, pairs: Mapping[fx.Node, Pair]) -> Pair:
    """Multiply two complex numbers, or one and a real one."""

    def op(target: Callable[..., Any], *args: Any) -> fx.Node:
        return insert_call(graph, target, *args, before=node)

    one, two = (pairs.get(each, each) if isinstance(each, fx.Node) else each for each in node.args[:2])
    numbers = [each for each in node.args[:2] if isinstance(each, fx.Node) and is_complex(each)]
    if len(numbers) == 1:
        pair, real = (one, two) if node.args[0] is numbers[0] else (two, one)
        return op(aten.mul.Tensor, pair, op(aten.unsqueeze.default, real, -1) if isinstance(real, fx.Node) else real)
    (a, b), (c, d) = ([op(aten.select.int, each, -1, part) for part in (0, 1)] for each in (one, two))
    mul = aten.mul.Tensor
    real = op(aten.sub.Tensor, op(mul, a, c), op(mul, b, d))
    return _stack(graph, node, [real, op(aten.add.Tensor, op(mul, a, d), op(mul, b, c))])


def _stack(graph: Graph, node: fx.Node, parts: list[fx.Node]) -> Pair:
    return insert_call(graph, aten.stack.default, parts, -1, before=node)


def _target(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


REAL = aten.view_as_real.default
RULES: Mapping[Any, Callable[[Graph, fx.Node, Mapping[fx.Node, Pair]], Pair]] = {
    aten.polar.default: _polar,
    aten.view_as_complex.default: _viewed,
    aten.mul.Tensor: _product,
    aten.unsqueeze.default: _along_an_axis,
    aten.slice.Tensor: _along_an_axis,
}
