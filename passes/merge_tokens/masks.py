"""Classification of masks and biases on attention scores, by evaluating them on two random inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from passes.analysis.token_axis import UnsupportedOperator, data_dependent_nodes
from passes.execute.interpreter import Program
from passes.graph.graph import value_of
from passes.merge_tokens import matching as arithmetic
from passes.torch_internals import hint

if TYPE_CHECKING:
    from torch import fx

    from passes.analysis.token_axis import Flow
    from passes.graph.graph import Graph
    from passes.merge_tokens.stages import Stages

aten = torch.ops.aten

FORBIDDEN = -1e3  # a score offset below this value is a mask; biases are far smaller


@dataclass(frozen=True)
class Mask:
    """Properties of a mask or bias.

    ``empty``: it never masks a key. ``by_key``: it is the same for every query. ``padding``: it masks keys depending on
    the inputs. ``refused`` is the reason why it cannot be reduced to fewer tokens, or an empty string.
    """

    empty: bool
    by_key: bool
    padding: bool
    refused: str


def read_mask(graph: Graph, table: fx.Node, data: set[fx.Node]) -> Mask:
    """Classify a table as constant bias, padding mask or mask over pairs of tokens.

    Args:
        graph: the graph that computes the table.
        table: node of the mask or bias ``[..., queries, keys]``; its inputs must not have been edited.
        data: nodes that depend on the values of an input.
    """
    samples = [_evaluate(graph, table, seed) for seed in (0, 1)]
    boolean = samples[0].dtype == torch.bool
    by_key = all(bool((sample == sample[..., :1, :]).all()) for sample in samples) if samples[0].dim() > 1 else True
    masks_keys = any(bool((~sample).any() if boolean else (sample < FORBIDDEN).any()) for sample in samples)
    fixed = table not in data and not any(isinstance(size, torch.SymInt) for size in value_of(table).shape[-2:])
    mask_like = boolean or all(bool(((sample == 0) | (sample < FORBIDDEN)).all()) for sample in samples)
    empty = mask_like and not masks_keys and fixed
    reason = ""
    if not by_key and (masks_keys or boolean):
        reason = f"{table.name} masks different tokens for different queries (causal or windowed attention)"
    return Mask(empty, by_key, by_key and mask_like and table in data, reason)


class Masks:
    """Masks and biases on the attention scores of one graph, adapted to the reductions so far."""

    def __init__(self, graph: Graph, past: Stages) -> None:
        self.graph, self.past = graph, past
        self.data = data_dependent_nodes(graph.nodes())
        self.known: dict[fx.Node, Mask] = {}

    def fit(self, node: fx.Node, table: fx.Node, flow: Flow, rank: int) -> fx.Node:
        """Reduce a mask or bias to the remaining tokens. Raises UnsupportedOperator if that is not possible."""
        if table not in self.known:
            self.known[table] = read_mask(self.graph, table, self.data)
        mask = self.known[table]
        if mask.refused and len(flow.tokens) > 1:
            raise UnsupportedOperator(mask.refused)
        if not flow.stage:
            return table
        if mask.by_key:
            table, flow = self._first_row(node, table, flow, rank)
        return self.past.advance(node, table, replace(flow, stage=0), flow.stage, rank)

    def _first_row(self, node: fx.Node, table: fx.Node, flow: Flow, rank: int) -> tuple[fx.Node, Flow]:
        key = ("row", table)
        if len(value_of(table).shape) < 2 or value_of(table).shape[-2] == 1:
            return table, replace(flow, tokens=tuple(pair for pair in flow.tokens if pair[0] == rank - 1))
        if key not in self.past.cache:
            self.past.cache[key] = self.past.call(node)(aten.slice.Tensor, table, len(value_of(table).shape) - 2, 0, 1)
        return self.past.cache[key], replace(flow, tokens=tuple(pair for pair in flow.tokens if pair[0] == rank - 1))

    def real(self, node: fx.Node, table: fx.Node, mask: fx.Node) -> fx.Node | None:
        """Return a bool node ``[B, N]``, False for padding, from a padding mask; None for any other mask."""
        properties = self.known.get(table)
        if properties is None or not properties.padding:
            return None
        call = self.past.call(node)
        row: fx.Node = mask
        while len(value_of(row).shape) > 2:
            row = call(aten.select.int, row, 1, 0)
        return row if value_of(row).dtype == torch.bool else call(aten.gt.Scalar, row, -1.0)

    def with_sizes(self, node: fx.Node, mask: fx.Node | None, bias: fx.Node, rank: int) -> fx.Node:
        """Add the logarithm of the token sizes ``[B, N]`` to a mask, along the keys; None is an empty mask."""
        call, key = self.past.call(node), ("bias", mask, bias, rank)
        if key not in self.past.cache:
            broadcast_bias = arithmetic.spread(call, bias, rank, 0, rank - 1)
            if mask is None:
                self.past.cache[key] = broadcast_bias
            elif value_of(mask).dtype == torch.bool:
                lowest = torch.finfo(value_of(broadcast_bias).dtype).min
                self.past.cache[key] = call(aten.where.ScalarOther, mask, broadcast_bias, lowest)
            else:
                self.past.cache[key] = call(aten.add.Tensor, mask, broadcast_bias)
        return self.past.cache[key]


def _evaluate(graph: Graph, table: fx.Node, seed: int) -> torch.Tensor:
    """Return the value of a node for random inputs."""
    generator = torch.Generator().manual_seed(seed)
    program = Program(graph, keep=[table.name])
    needed = {table}
    for node in reversed(program.order):
        if node in needed:
            needed.update(node.all_input_nodes)
    feeds = {
        name: _random_input(value_of(node), generator)
        for name, node in zip(graph.inputs, graph.placeholders(), strict=True)
    }
    values: dict[fx.Node, Any] = program.start(feeds)
    with torch.no_grad():
        for node in program.order:
            if node in needed and node not in values:
                values[node] = program.step(node, values)
    result: torch.Tensor = values[table]
    return result


def _random_input(value: Any, generator: torch.Generator) -> torch.Tensor:
    """Return random zeros and ones of the traced shape, which are valid token ids and a valid attention mask."""
    bits = torch.randint(0, 2, [hint(size) for size in value.shape], generator=generator)
    return bits.to(value.dtype)
