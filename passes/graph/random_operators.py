"""Search for operators of a graph that draw random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from passes.torch_internals import arguments

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph

# Arguments that switch randomness off in operators that have it as an option.
SWITCHES = ("train", "training", "dropout_p", "p")


def random_operators(graph: Graph) -> list[str]:
    """Return the operators that draw random numbers, each with its module, such as ``aten.dropout in head.drop``."""
    return list(dict.fromkeys(described(node, graph) for node in graph.nodes() if is_random(node)))


def is_random(node: fx.Node) -> bool:
    """Return whether a node draws random numbers. Dropout that is switched off, or whose share is zero, does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    values = {
        each.name: node.args[place] if place < len(node.args) else node.kwargs.get(each.name, each.default_value)
        for place, each in enumerate(arguments(node.target))
    }
    return all(values[name] for name in SWITCHES if name in values)


def described(node: fx.Node, graph: Graph) -> str:
    """Return the operator of a node with the module that calls it, such as ``aten.dropout in head.drop``."""
    operator, *overload = str(node.target).removeprefix("aten.").split(".")
    name = f"aten.{operator}" if overload else operator
    stack = node.meta.get("nn_module_stack") or {}
    path = f"{list(stack.values())[-1][0]}.".removeprefix(graph.prefix).rstrip(".") if stack else ""
    return f"{name} in {path}" if path else name
