"""Interpreter of a graph: runs it node by node, with branches skipped.

A run that replaces the add of a skipped branch by its other operand equals the rewritten graph bit for bit, so that
scoring needs neither an export nor a second copy of the model.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from passes.execute.instructions import Instruction, instructions_of
from passes.execute.linear_kernels import kernel_of
from passes.execute.offloaded_weights import in_memory
from passes.graph.graph import ancestors_of, attribute, live_nodes, output_values, resolve_dropped_adds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from passes.graph.graph import Graph, Site


class Program:
    """Execution plan of a graph: the nodes to run, in order, and the last use of each value.

    A pickled program is restored as an `InstructionProgram`, because fx nodes cannot be sent to another process.

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
        self.inputs = dict(zip(graph.inputs, graph.placeholders(), strict=True))
        self.stand_in = resolve_dropped_adds(graph, skip)
        kept = {self._resolve(node) for node in graph.nodes() if node.name in keep}
        named_outputs = zip(graph.outputs, output_values(graph), strict=True)
        self.outputs = [self._resolve(node) for name, node in named_outputs if outputs is None or name in outputs]
        live = live_nodes(graph, self.stand_in) if outputs is None else ancestors_of(self.outputs, self.stand_in)
        live = live | ancestors_of(kept, self.stand_in)
        self.order = [node for node in graph.nodes() if node in live and node.op != "output"]
        self.constants = {node: attribute(graph, node) for node in self.order if node.op == "get_attr"}
        self.last_uses = self._last_uses(kept)

    @functools.cached_property
    def named(self) -> dict[str, fx.Node]:
        """Return the nodes of `order` by name."""
        return {node.name: node for node in self.order}

    def reads(self, node: fx.Node) -> Collection[fx.Node]:
        """Return the nodes that a node reads."""
        return node.all_input_nodes

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
            return kernel_of(node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self.graph.module.get_submodule(str(node.target))(*args, **kwargs)

    def operands(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
        """Return the positional arguments of a node while its inputs have values, without reading offloaded weights."""
        arguments: tuple[Any, ...] = fx.node.map_arg(node.args, lambda source: values[self._resolve(source)])
        return arguments

    def start(self, feeds: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
        """Return the values of the input nodes."""
        return {node: feeds[name] for name, node in self.inputs.items()}

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
        return self.finish(self.start(feeds))

    def finish(self, values: dict[fx.Node, Any], start: int = 0) -> tuple[torch.Tensor, ...]:
        """Compute all nodes of `order` from `start` on, and return the outputs."""
        for _ in self.walk(values, start=start):
            pass
        return self.results(values)

    def results(self, values: Mapping[fx.Node, Any]) -> tuple[torch.Tensor, ...]:
        """Return the outputs after every node has run."""
        return tuple(values[node] for node in self.outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        nodes = instructions_of((*self.inputs.values(), *self.order), self.graph, self._resolve)
        return InstructionProgram, (
            tuple(nodes.values()),
            {name: nodes[node] for name, node in self.inputs.items()},
            [nodes[node] for node in self.order],
            [nodes[node] for node in self.outputs],
            {nodes[node]: value for node, value in self.constants.items()},
            {nodes[node]: [nodes[source] for source in sources] for node, sources in self.last_uses.items()},
        )


class InstructionProgram(Program):
    """A program without its graph, restored in another process. It computes the same values."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        inputs: dict[str, Any],
        order: list[Any],
        outputs: list[Any],
        constants: dict[Any, Any],
        last_uses: dict[Any, list[Any]],
    ) -> None:
        self.instructions = instructions
        self.inputs, self.order, self.outputs = inputs, order, outputs
        self.constants, self.last_uses = constants, last_uses

    def reads(self, node: Any) -> Collection[Any]:
        """Return the instructions that an instruction reads."""
        return [self.instructions[position] for position in node.reads]

    def step(self, node: Any, values: dict[Any, Any]) -> Any:
        """Compute the value of one instruction from the values that it reads."""
        if node.op == "get_attr":
            return self.constants[node]
        args, kwargs = node.arguments(lambda position: values[self.instructions[position]])
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return kernel_of(node.target)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        state = self.instructions, self.inputs, self.order, self.outputs, self.constants, self.last_uses
        return InstructionProgram, state


@torch.inference_mode()
def run(graph: Graph, feeds: Mapping[str, torch.Tensor], *, skip: Collection[Site] = ()) -> tuple[torch.Tensor, ...]:
    """Run a graph on one batch and return its outputs, with the branches of `skip` left out.

    Args:
        graph: traced model.
        feeds: input name to tensor; the first axis is the samples.
        skip: sites whose branch counts as zero.
    """
    return Program(graph, skip).run(feeds)


class PartialRun:
    """Partial run of a graph up to the last of the named nodes.

    Args:
        graph: traced model; must not be edited while this object is in use.
        names: names of nodes; those that no output needs are left out.
    """

    def __init__(self, graph: Graph, names: Collection[str]) -> None:
        self.program = Program(graph, keep=names)
        self.wanted = tuple(node.name for node in self.program.order if node.name in names)
        self.last = max(index for index, node in enumerate(self.program.order) if node.name in names)

    @torch.inference_mode()
    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of the named nodes for one batch."""
        values = self.program.start(feeds)
        for _ in itertools.islice(self.program.walk(values), self.last + 1):
            pass
        return {name: values[self.program.named[name]] for name in self.wanted}
