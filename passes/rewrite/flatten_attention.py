"""Attention over four axes, as ONNX has it: [rows, heads, tokens, features]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_all_uses
from passes.graph.graph import Graph, aten, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ATTENTION = aten.scaled_dot_product_attention.default
RANK = 4
MASK = 3  # the position of the mask among the arguments


@dataclass(frozen=True)
class FlattenAttention:
    """Rewrite pass that gives each attention four axes.

    Attention in windows has one axis more, which joins the first. Attention without heads gets an axis of size 1.

    Before::

        %y = scaled_dot_product_attention(%q, %k, %v)  # [batch, heads, windows, tokens, features]

    After::

        %a = reshape(%q, [-1, windows, tokens, features]), and so for %k and %v
        %b = scaled_dot_product_attention(%a, ...)
        %y = reshape(%b, [-1, heads, windows, tokens, features])

    An attention is left alone if a size other than the first is dynamic, or if it has a mask of more than three axes
    beside more than four axes of its own.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the replaced nodes."""
        changed = []
        for node in graph.nodes():
            if can_flatten(node):
                replace_all_uses(graph, node, _flattened(graph, node))
                changed.append(node.name)
        remove_dead(graph)
        return Rewritten(changed=tuple(changed))


def can_flatten(node: fx.Node) -> bool:
    """Return whether a node is an attention of another rank than four that this pass rewrites."""
    if node.target is not ATTENTION:
        return False
    shapes = [_shape(each) for each in node.args[:MASK]]
    if {len(shape) for shape in shapes} not in ({RANK - 1}, {RANK + 1}):
        return False
    mask = node.args[MASK] if len(node.args) > MASK else node.kwargs.get("attn_mask")
    static = all(isinstance(size, int) for shape in shapes for size in shape[1:])
    return static and (mask is None or len(_shape(mask)) < RANK)


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value_of(value).shape)


def _flattened(graph: Graph, node: fx.Node) -> fx.Node:
    """Insert the attention over four axes before a node; return the node that replaces it."""
    reshape, shape = aten.reshape.default, _shape(node)
    factors = [_shape(each) for each in node.args[:MASK]]
    added = len(shape) < RANK
    sizes = [[-1, 1, *each[1:]] if added else [-1, *each[-3:]] for each in factors]
    inputs = [
        insert_call(graph, reshape, each, size, before=node) for each, size in zip(node.args[:MASK], sizes, strict=True)
    ]
    options = dict(node.kwargs)
    mask = node.args[MASK] if len(node.args) > MASK else options.pop("attn_mask", None)
    if added and isinstance(mask, fx.Node) and len(_shape(mask)) == len(shape):
        mask = insert_call(graph, aten.unsqueeze.default, mask, 1, before=node)
    arguments = (*inputs, mask, *node.args[MASK + 1 :])
    attention = insert_call(graph, ATTENTION, *arguments, before=node, options=options)
    return insert_call(graph, reshape, attention, [-1, *shape[1:]], before=node)
