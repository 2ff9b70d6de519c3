"""The nodes of a program as plain data, which can be sent to another process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from passes.torch_internals import OpOverload

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph


class Read(NamedTuple):
    """An argument that is the value of another instruction, by its position."""

    position: int


@dataclass(eq=False, slots=True)
class Instruction:
    """A node of a graph, whose arguments name other nodes by position in place of links, which pickle cannot follow.

    Attributes:
        name: name of the node.
        op: kind of the node, as in `torch.fx`; a called module is the target itself.
        target: what is called, or the name of a method or attribute.
        args: positional arguments, in which a `Read` stands for the value of another instruction.
        kwargs: keyword arguments, likewise.
    """

    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def reads(self) -> tuple[int, ...]:
        """Return the positions of the instructions whose values are read."""
        found: list[int] = []
        self.arguments(found.append)
        return tuple(found)

    def arguments(self, value_of: Callable[[int], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the values of other instructions, by their positions, filled in."""
        filled: tuple[tuple[Any, ...], dict[str, Any]] = _filled((self.args, self.kwargs), value_of)
        return filled

    def __reduce__(self) -> tuple[Any, ...]:
        target = _Operator(str(self.target)) if isinstance(self.target, OpOverload) else self.target
        return _restored, (self.name, self.op, target, self.args, self.kwargs)


class _Operator(NamedTuple):
    """An operator of torch by name, such as ``aten.add.Tensor``; the operator itself cannot be pickled."""

    name: str


def instructions_of(
    nodes: Iterable[fx.Node], graph: Graph, resolve: Callable[[fx.Node], fx.Node]
) -> dict[fx.Node, Instruction]:
    """Return the instruction of each node, in order.

    Args:
        nodes: nodes of `graph` and all nodes that they read, in execution order.
        graph: holds the modules that are called.
        resolve: returns the node that is read in place of a node.
    """
    positions = {node: position for position, node in enumerate(dict.fromkeys(nodes))}

    def read(node: fx.Node) -> Read:
        return Read(positions[resolve(node)])

    found = {}
    for node in positions:
        target = graph.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        args, kwargs = _with_reads((node.args, node.kwargs), read)
        found[node] = Instruction(node.name, node.op, target, args, kwargs)
    return found


def _with_reads(argument: Any, read: Callable[[fx.Node], Read]) -> Any:
    """Return plain arguments with `Read` in place of nodes."""
    from torch.fx import Node

    return _mapped(argument, lambda value: read(value) if isinstance(value, Node) else value)


def _filled(argument: Any, value_of: Callable[[int], Any]) -> Any:
    if isinstance(argument, Read):
        return value_of(argument.position)
    if isinstance(argument, tuple | list | dict | slice):
        return _mapped(argument, lambda value: _filled(value, value_of))
    return argument


def _mapped(argument: Any, change: Callable[[Any], Any]) -> Any:
    """Return an argument with its innermost values changed; containers become plain tuples, lists, dicts and slices."""
    if isinstance(argument, Read):
        return change(argument)
    if isinstance(argument, tuple | list):
        members = [_mapped(member, change) for member in argument]
        return tuple(members) if isinstance(argument, tuple) else members
    if isinstance(argument, dict):
        return {key: _mapped(value, change) for key, value in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_mapped(bound, change) for bound in (argument.start, argument.stop, argument.step)))
    return change(argument)


def _restored(name: str, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Instruction:
    if isinstance(target, _Operator):
        target = functools.reduce(getattr, target.name.split("."), torch.ops)
    return Instruction(name, op, target, args, kwargs)
