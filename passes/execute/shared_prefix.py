"""Joint run of a graph and variants of it, which share its weights and all computation before their changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from passes.execute.interpreter import Program
from passes.graph.graph import attribute

if TYPE_CHECKING:
    from torch import fx

    from passes.graph.graph import Graph

Key = TypeVar("Key")


class SharedPrefixRun(Generic[Key]):
    """Joint run of a graph and several variants of it, which computes shared nodes once.

    The main graph runs once a batch. As soon as it has computed all values that a variant shares with it, the nodes of
    the variant after its first difference are computed from those values. No value is kept after the batch.

    Args:
        main: graph that the variants are derived from.
        variants: rewritten forks of it, in which unchanged nodes keep their names.
    """

    def __init__(self, main: Graph, variants: Mapping[Key, Graph]) -> None:
        position = {node.name: index for index, node in enumerate(Program(main).order)}
        self.tails = sorted((_tail(key, main, variant, position) for key, variant in variants.items()), key=_fork)
        self.main = Program(main, keep={name for tail in self.tails for name in tail.shared})
        self.to_the_end = True

    def parts(self, count: int) -> list[SharedPrefixRun[Key]]:
        """Divide the variants into at most `count` runs, of which the first also runs the main graph to its end.

        Each of them computes the nodes of the main graph up to its last fork, and all give the values of this run.
        """
        count, parts = max(min(count, len(self.tails)), 1), []
        for number in range(count):
            part = copy.copy(self)
            part.tails, part.to_the_end = self.tails[number::count], self.to_the_end and not number
            parts.append(part)
        return parts

    @property
    def share(self) -> float:
        """Return the cost of one run in forward passes of the main graph, by the number of computed nodes."""
        tails = sum(_calls(tail.program.order[tail.start :]) for tail in self.tails)
        return 1.0 + tails / max(_calls(self.main.order), 1)

    @torch.inference_mode()
    def run(
        self, feeds: Mapping[str, torch.Tensor], receive: Callable[[Key | None, tuple[torch.Tensor, ...]], None]
    ) -> None:
        """Run one batch; pass `receive` each variant's key and outputs, then None and the outputs of the main graph."""
        values, by_name = self.main.start(feeds), self.main.named
        computed, trunk_run = 0, self.main.walk(values)
        for tail in self.tails:
            for _ in range(tail.fork - computed):
                next(trunk_run)
            computed = max(computed, tail.fork)
            common = {tail.program.named[name]: values[by_name[name]] for name in tail.shared}
            receive(tail.key, tail.program.finish(tail.program.constants | common, tail.start))
        if not self.to_the_end:
            return
        for _ in trunk_run:
            pass
        receive(None, self.main.results(values))


@dataclass(frozen=True)
class _Tail(Generic[Key]):
    """Nodes of a variant from position `start` on, which can run after `fork` nodes of the main program.

    `shared` holds the names of the nodes whose values are those of the main graph.
    """

    key: Key
    program: Program
    start: int
    fork: int
    shared: tuple[str, ...]


def _tail(key: Key, main: Graph, variant: Graph, position: Mapping[str, int]) -> _Tail[Key]:
    program = Program(variant)
    same = _unchanged(main, variant, program.order, position)
    changed = (index for index, node in enumerate(program.order) if node.op != "get_attr" and node not in same)
    start = next(changed, len(program.order))
    read = {source for node in program.order[start:] for source in node.all_input_nodes} | set(program.outputs)
    before = {node for node in program.order[:start] if node.op != "get_attr"}
    shared = tuple(node.name for node in program.order[:start] if node in read & before)
    fork = max((position[name] + 1 for name in shared), default=0)
    return _Tail(key, program, start, fork, shared)


def _unchanged(main: Graph, variant: Graph, order: Sequence[fx.Node], position: Mapping[str, int]) -> set[fx.Node]:
    """Return the nodes of a variant that compute the same value as the node of the same name in the main graph."""
    originals = {node.name: node for node in main.nodes() if node.name in position}
    same: set[fx.Node] = set()
    for node in order:
        twin = originals.get(node.name)
        if twin is None or (node.op, node.target) != (twin.op, twin.target) or _args(node) != _args(twin):
            continue
        replaced = node.op == "get_attr" and attribute(variant, node) is not attribute(main, twin)
        if not replaced and same.issuperset(node.all_input_nodes):
            same.add(node)
    return same


def _args(node: fx.Node) -> str:
    return str((node.args, node.kwargs))  # nodes print as their names


def _fork(tail: _Tail[Any]) -> int:
    return tail.fork


def _calls(nodes: Sequence[fx.Node]) -> int:
    """Return the number of nodes that compute; parameters, which precede all other nodes, cost nothing."""
    return sum(node.op.startswith("call") for node in nodes)
