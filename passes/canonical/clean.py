"""Removal of inference no-ops: dropout, copies, casts to the same dtype, assertions and dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.edit import (
    name_squeezed_axes,
    remove_assertions,
    remove_dead,
    remove_redundant_expansions,
    replace_all_uses,
    views_to_reshapes,
)
from passes.graph.graph import ADDS, CASTS, COPIES, DROPOUTS, Graph, aten, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Clean:
    """Rewrite pass that removes no-ops and dead code.

    It also replaces views by reshapes, which allow any strides, names the axes of squeezes, so that a batch of one row
    stays, and removes expansions that the next operator does by broadcasting.

    Before::

        %a = dropout(%x, 0.1, False); %b = to(%a, float32); %dead = linear(%b, %w); return add(%b, 1)

    After::

        return add(%x, 1)
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Clean the graph. Return the names of the removed nodes."""
        views_to_reshapes(graph)  # first, because a view may depend on the strides of a copy that is removed next
        name_squeezed_axes(graph)
        remove_redundant_expansions(graph)
        removed = remove_assertions(graph)
        for node in graph.nodes():
            if is_identity(node):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                replace_all_uses(graph, node, source)
                removed.append(node.name)
        remove_dead(graph)
        return Rewritten(changed=tuple(removed))


def is_identity(node: fx.Node) -> bool:
    """Return whether a node returns its first input unchanged at inference time."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in COPIES or _adds_nothing(node):
        return True
    if node.target in DROPOUTS:
        return not node.args[2] if len(node.args) > 2 else not node.kwargs.get("train", True)
    return node.target in CASTS and _same_type(node, node.args[0])


def _adds_nothing(node: fx.Node) -> bool:
    """Return whether a node adds 0, as Python's ``sum`` does to its first term, or multiplies by 1."""
    neutral = 0 if node.target in ADDS else 1 if node.target is aten.mul.Tensor else None
    source = node.args[0]
    return (
        neutral is not None
        and len(node.args) == 2
        and isinstance(node.args[1], (int, float))
        and node.args[1] == neutral
        and isinstance(source, fx.Node)
        and _same_type(node, source)
    )


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a cast changes neither dtype nor device and has no ``memory_format``."""
    after, before = value_of(node), value_of(source)
    if not isinstance(after, torch.Tensor) or not isinstance(before, torch.Tensor):
        return False
    return (after.dtype, after.device) == (before.dtype, before.device) and "memory_format" not in node.kwargs
