"""Operators of a traced model that Compressor does not take: graphs in the graph, and products in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from passes.analysis.multiply_adds import FORMULAS
from passes.graph.random_operators import described
from passes.torch_internals import is_higher_order

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph

HALVES = (torch.float16, torch.bfloat16)


def unsupported_operator(graph: Graph) -> str | None:
    """Return the first operator that Compressor does not take and a remedy, as a clause; None if it takes all.

    The weights are float32 when a model is traced, so a product in half precision is a cast of the model's own code.
    """
    for node in graph.nodes():
        if is_higher_order(node.target):
            return (
                f"calls {described(node, graph)}, which runs graphs of its own, and Compressor does not see into them; "
                "write that part with plain operators"
            )
        if node.target in FORMULAS and _dtype(node) in HALVES:
            return (
                f"computes {described(node, graph)} in {_dtype(node)} by torch.autocast or a cast of its own; "
                "Compressor expects float32, and --precision converts the engine, so remove the autocast or the cast"
            )
    return None


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
