"""Run a graph as if some branches were gone, without editing it.

An interpreted run that lets chosen adds stand for their other operand equals the rewritten graph bit for bit, so
scoring and search need no rewriting, no export and no second copy of the model.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.graph import attribute, live_nodes, output_values, resolution

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from passes.graph import Graph, Site


class Program:
    """A graph with some branches skipped, ready to run: the nodes needed, in order, and when each value dies.

    Args:
        graph: the traced model; not changed, and not to be changed while the program is in use.
        skip: sites whose branch counts as zero.
        keep: names of nodes to hold on to until the end although nothing reads them any more.
    """

    def __init__(self, graph: Graph, skip: Collection[Site] = (), *, keep: Collection[str] = ()) -> None:
        self.graph = graph
        self.stand_in = resolution(graph, skip)
        live = live_nodes(graph, self.stand_in) | {self._value(node) for node in graph.nodes() if node.name in keep}
        self.order = [node for node in graph.nodes() if node in live and node.op != "output"]
        self.outputs = [self._value(node) for node in output_values(graph)]
        self.constants = {node: attribute(graph, node) for node in self.order if node.op == "get_attr"}
        self.last_uses = self._last_uses({self._value(node) for node in graph.nodes() if node.name in keep})

    def _value(self, node: fx.Node) -> fx.Node:
        return self.stand_in.get(node, node)

    def _last_uses(self, kept: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            for source in node.all_input_nodes:
                last[self._value(source)] = node
        dying: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source not in kept and source not in self.outputs:
                dying.setdefault(node, []).append(source)
        return dying

    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The value of one node, given those of its inputs."""
        if node.op == "get_attr":
            return self.constants[node]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[self._value(source)])
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.graph.module.get_submodule(str(node.target))(*args, **kwargs)

    def start(self, feeds: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
        """Values of the input nodes."""
        return {node: feeds[name] for node, name in zip(self.graph.placeholders(), self.graph.inputs, strict=True)}

    def walk(self, values: dict[fx.Node, Any], *, start: int = 0) -> Iterator[fx.Node]:
        """Compute the nodes from position `start` of `order` on, yielding each before its inputs may be freed."""
        for node in self.order[start:]:
            if node not in values:
                values[node] = self.step(node, values)
            yield node
            for dead in self.last_uses.get(node, ()):
                values.pop(dead, None)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs for one batch."""
        return _finish(self, self.start(feeds), 0)

    def results(self, values: Mapping[fx.Node, Any]) -> tuple[torch.Tensor, ...]:
        """The outputs, once every node has run."""
        return tuple(values[node] for node in self.outputs)


@torch.inference_mode()
def run(graph: Graph, feeds: Mapping[str, torch.Tensor], *, skip: Collection[Site] = ()) -> tuple[torch.Tensor, ...]:
    """Outputs of the graph for one batch, as if the branches of `skip` were gone.

    Args:
        graph: the traced model.
        feeds: input name to tensor, first axis the samples.
        skip: sites whose branch counts as zero.
    """
    return Program(graph, skip).run(feeds)


class Forks:
    """Outputs under every one of several further drops, sharing all the work before the first difference.

    For each batch the graph runs once under `skip`; just before a candidate's add the run forks: the values alive at
    that point are reused and only the tail is computed again without the candidate's branch. Nothing outlives the
    batch.
    """

    def __init__(self, graph: Graph, skip: Sequence[Site], candidates: Sequence[Site]) -> None:
        position = {node.name: index for index, node in enumerate(graph.nodes())}
        self.main = Program(graph, skip)
        self.main_positions = [position[node.name] for node in self.main.order]
        self.tails: list[tuple[Site, Program, int, int]] = []
        for site in sorted(candidates, key=lambda site: position[site.add]):
            tail = Program(graph, [*skip, site])
            start = bisect.bisect_left([position[node.name] for node in tail.order], position[site.add])
            self.tails.append((site, tail, start, bisect.bisect_left(self.main_positions, position[site.add])))

    @torch.inference_mode()
    def run(
        self, feeds: Mapping[str, torch.Tensor], receive: Callable[[Site | None, tuple[torch.Tensor, ...]], None]
    ) -> None:
        """Run one batch; `receive` gets each candidate's outputs, and with None those without any candidate."""
        values = self.main.start(feeds)
        computed = 0
        trunk_run = self.main.walk(values)
        for site, tail, start, fork in self.tails:
            for _ in range(fork - computed):
                next(trunk_run)
            computed = max(computed, fork)
            receive(site, _finish(tail, dict(values), start))
        for _ in trunk_run:
            pass
        receive(None, self.main.results(values))


def _finish(program: Program, values: dict[fx.Node, Any], start: int) -> tuple[torch.Tensor, ...]:
    for _ in program.walk(values, start=start):
        pass
    return program.results(values)
