"""Interpreter of a graph: runs it node by node, with branches skipped or together with variants of it.

A run that replaces the add of a skipped branch by its other operand equals the rewritten graph bit for bit. Variants
share the weights of the graph, so that scoring and search need neither an export nor a second copy of the model.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import fx

from passes.execute.offloaded_weights import in_memory
from passes.graph.graph import ancestors_of, attribute, live_nodes, output_values, resolve_dropped_adds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from passes.graph.graph import Graph, Site

Key = TypeVar("Key")


class Program:
    """Execution plan of a graph: the nodes to run, in order, and the last use of each value.

    Args:
        graph: traced model; must not be edited while the program is in use.
        skip: sites whose branch counts as zero.
        keep: names of nodes whose values are kept after their last use.
        outputs: names of the outputs to compute; None computes all of them.
    """

    def __init__(
        self,
        graph: Graph,
        skip: Collection[Site] = (),
        *,
        keep: Collection[str] = (),
        outputs: Collection[str] | None = None,
    ) -> None:
        self.graph = graph
        self.stand_in = resolve_dropped_adds(graph, skip)
        kept = {self._resolve(node) for node in graph.nodes() if node.name in keep}
        named_outputs = zip(graph.outputs, output_values(graph), strict=True)
        self.outputs = [self._resolve(node) for name, node in named_outputs if outputs is None or name in outputs]
        live = live_nodes(graph, self.stand_in) if outputs is None else ancestors_of(self.outputs, self.stand_in)
        live = live | ancestors_of(kept, self.stand_in)
        self.order = [node for node in graph.nodes() if node in live and node.op != "output"]
        self.constants = {node: attribute(graph, node) for node in self.order if node.op == "get_attr"}
        self.last_uses = self._last_uses(kept)

    def _resolve(self, node: fx.Node) -> fx.Node:
        return self.stand_in.get(node, node)

    def _last_uses(self, kept: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            for source in node.all_input_nodes:
                last[self._resolve(source)] = node
        last_uses: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source not in kept and source not in self.outputs:
                last_uses.setdefault(node, []).append(source)
        return last_uses

    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Compute the value of one node from the values of its inputs."""
        if node.op == "get_attr":
            return self.constants[node]
        # An offloaded weight is read again for every consumer; `passes.execute.sections` reads it once a section.
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda source: in_memory(values[self._resolve(source)])
        )
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.graph.module.get_submodule(str(node.target))(*args, **kwargs)

    def operands(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
        """Return the positional arguments of a node while its inputs have values, without reading offloaded weights."""
        arguments: tuple[Any, ...] = fx.node.map_arg(node.args, lambda source: values[self._resolve(source)])
        return arguments

    def start(self, feeds: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
        """Return the values of the input nodes."""
        return {node: feeds[name] for node, name in zip(self.graph.placeholders(), self.graph.inputs, strict=True)}

    def walk(self, values: dict[fx.Node, Any], *, start: int = 0, stop: int | None = None) -> Iterator[fx.Node]:
        """Compute the nodes of `order` from `start` to `stop`; yield each before its inputs are freed."""
        for node in self.order[start:stop]:
            if node not in values:
                values[node] = self.step(node, values)
            yield node
            for dead in self.last_uses.get(node, ()):
                values.pop(dead, None)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the outputs for one batch."""
        return _finish(self, self.start(feeds), 0)

    def results(self, values: Mapping[fx.Node, Any]) -> tuple[torch.Tensor, ...]:
        """Return the outputs after every node has run."""
        return tuple(values[node] for node in self.outputs)


@torch.inference_mode()
def run(graph: Graph, feeds: Mapping[str, torch.Tensor], *, skip: Collection[Site] = ()) -> tuple[torch.Tensor, ...]:
    """Run a graph on one batch and return its outputs, with the branches of `skip` left out.

    Args:
        graph: traced model.
        feeds: input name to tensor; the first axis is the samples.
        skip: sites whose branch counts as zero.
    """
    return Program(graph, skip).run(feeds)


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
        self.main = Program(main, keep={name for tail in self.tails for name in tail.shared.values()})

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
        values = self.main.start(feeds)
        by_name = {node.name: node for node in self.main.order}
        computed, trunk_run = 0, self.main.walk(values)
        for tail in self.tails:
            for _ in range(tail.fork - computed):
                next(trunk_run)
            computed = max(computed, tail.fork)
            common = {node: values[by_name[name]] for node, name in tail.shared.items()}
            receive(tail.key, _finish(tail.program, tail.program.constants | common, tail.start))
        for _ in trunk_run:
            pass
        receive(None, self.main.results(values))


@dataclass(frozen=True)
class _Tail(Generic[Key]):
    """Nodes of a variant from position `start` on, which can run after `fork` nodes of the main program.

    `shared` maps each node whose value is reused to the name of that node in the main graph.
    """

    key: Key
    program: Program
    start: int
    fork: int
    shared: Mapping[fx.Node, str]


class PartialRun:
    """Partial run of a graph up to the last of the named nodes.

    Args:
        graph: traced model; must not be edited while this object is in use.
        names: names of nodes; those that no output needs are left out.
    """

    def __init__(self, graph: Graph, names: Collection[str]) -> None:
        self.program = Program(graph, keep=names)
        self.wanted = {node.name: node for node in self.program.order if node.name in names}
        self.last = max(index for index, node in enumerate(self.program.order) if node.name in self.wanted)

    @torch.inference_mode()
    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of the named nodes for one batch."""
        values = self.program.start(feeds)
        for _ in itertools.islice(self.program.walk(values), self.last + 1):
            pass
        return {name: values[node] for name, node in self.wanted.items()}


def _tail(key: Key, main: Graph, variant: Graph, position: Mapping[str, int]) -> _Tail[Key]:
    program = Program(variant)
    same = _unchanged(main, variant, program.order, position)
    changed = (index for index, node in enumerate(program.order) if node.op != "get_attr" and node not in same)
    start = next(changed, len(program.order))
    read = {source for node in program.order[start:] for source in node.all_input_nodes} | set(program.outputs)
    before = {node for node in program.order[:start] if node.op != "get_attr"}
    shared = {node: node.name for node in read & before}
    fork = max((position[name] + 1 for name in shared.values()), default=0)
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


def _finish(program: Program, values: dict[fx.Node, Any], start: int) -> tuple[torch.Tensor, ...]:
    for _ in program.walk(values, start=start):
        pass
    return program.results(values)
