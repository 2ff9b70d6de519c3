"""Parameters and multiply-adds of a graph and of each site, counted in one run of the graph or of its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from passes.analysis.multiply_adds import multiply_adds
from passes.execute.interpreter import Program
from passes.execute.offloaded_weights import fake_values, has_offloaded
from passes.graph.graph import attribute, live_nodes, resolve_dropped_adds

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import fx

    from passes.graph.graph import Graph, Site


@dataclass(frozen=True)
class Cost:
    """Number of parameters, with shared ones counted once, and multiply-adds of one forward pass of one sample."""

    parameters: int
    multiply_adds: int

    def __sub__(self, other: Cost) -> Cost:
        """Return the difference to another cost."""
        return Cost(self.parameters - other.parameters, self.multiply_adds - other.multiply_adds)


@dataclass(frozen=True)
class SiteCosts:
    """The cost of a graph, and what dropping each site alone saves, by name; unlike `Costs`, without the graph."""

    total: Cost
    by_site: Mapping[str, Cost]

    def saved(self, site: Site) -> Cost:
        """Return the cost that dropping one site saves."""
        return self.by_site[site.name]


class Costs:
    """Costs of a graph with any set of dropped sites, from one counted run.

    Multiply-adds of matrix products, convolutions and attention are counted by `passes.analysis.multiply_adds`.
    Element-wise operators are not counted.

    Args:
        graph: the traced model.
        example: input name to tensor with a batch of at least 1; counts are divided by the batch.
    """

    def __init__(self, graph: Graph, example: Mapping[str, torch.Tensor]) -> None:
        self.graph = graph
        self.example = example
        self.by_node = _count(graph, example)
        self.total = self.under(())

    def under(self, skip: Collection[Site]) -> Cost:
        """Return the cost of the graph without the branches of `skip`."""
        live = live_nodes(self.graph, resolve_dropped_adds(self.graph, skip))
        tensors = [attribute(self.graph, node) for node in live if node.op == "get_attr"]
        parameters = {id(tensor): tensor.numel() for tensor in tensors if isinstance(tensor, torch.nn.Parameter)}
        return Cost(sum(parameters.values()), sum(self.by_node.get(node.name, 0) for node in live))

    def saved(self, site: Site) -> Cost:
        """Return the cost that dropping one site saves."""
        return self.total - self.under([site])

    def of_sites(self, sites: Collection[Site]) -> SiteCosts:
        """Return what remains of the costs where the graph is not kept, as in a result that is pickled."""
        return SiteCosts(self.total, {site.name: self.saved(site) for site in sites})


@torch.inference_mode()
def _count(graph: Graph, example: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Count by shapes alone, which costs no arithmetic.

    Token ids are looked up, so that those beyond the vocabulary fail here, and so are contents that sizes depend on.
    """
    program = Program(graph)
    offloaded = has_offloaded(graph)  # shapes also load no weights
    if offloaded or all(value.is_floating_point() for value in example.values()):
        try:
            with fake_values(program, example) as values:
                return _counted(program, values)
        except RuntimeError:  # a size depends on the contents of a tensor
            if offloaded:
                raise
    return _counted(program, program.start(example))


def _counted(program: Program, values: dict[fx.Node, Any]) -> dict[str, int]:
    batch = len(values[program.graph.placeholders()[0]])
    counts: dict[str, int] = {}
    with FlopCounterMode(display=False) as counter:
        previous_total = 0
        for node in program.walk(values):
            total = counter.get_total_flops()
            by_formula = multiply_adds(node.target, program.operands(node, values), values[node])
            counts[node.name] = ((total - previous_total) // 2 if by_formula is None else by_formula) // batch
            previous_total = total
    return counts
