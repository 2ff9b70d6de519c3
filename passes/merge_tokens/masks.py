"""What a mask or bias on attention scores depends on, found by computing it for two made-up inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from passes.analysis.token_axis import Unfollowed, from_data
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

FORBIDDEN = -1e3  # what a mask adds to a score; biases are far smaller


@dataclass(frozen=True)
class Mask:
    """``empty`` hides nothing ever; ``by_key`` is the same for every query; ``padding`` hides keys by the inputs.

    ``refused`` is the reason why it cannot be had for fewer tokens, empty where it can.
    """

    empty: bool
    by_key: bool
    padding: bool
    refused: str


def read_mask(graph: Graph, table: fx.Node, data: set[fx.Node]) -> Mask:
    """Tell a constant bias, a padding mask and a mask over pairs of tokens apart.

    Args:
        graph: where it is computed.
        table: its node, ``[..., queries, keys]``; nothing that it depends on may have been edited.
        data: nodes that depend on the values of an input.
    """
    samples = [_computed(graph, table, seed) for seed in (0, 1)]
    boolean = samples[0].dtype == torch.bool
    by_key = all(bool((sample == sample[..., :1, :]).all()) for sample in samples) if samples[0].dim() > 1 else True
    hides = any(bool((~sample).any() if boolean else (sample < FORBIDDEN).any()) for sample in samples)
    fixed = table not in data and not any(isinstance(size, torch.SymInt) for size in value_of(table).shape[-2:])
    mask_like = boolean or all(bool(((sample == 0) | (sample < FORBIDDEN)).all()) for sample in samples)
    empty = mask_like and not hides and fixed
    reason = ""
    if not by_key and (hides or boolean):
        reason = f"{table.name} hides different tokens from different queries (causal or windowed)"
    return Mask(empty, by_key, by_key and mask_like and table in data, reason)


class Masks:
    """The masks and biases on the scores of one graph, as they are after the reductions so far."""

    def __init__(self, graph: Graph, past: Stages) -> None:
        self.graph, self.past = graph, past
        self.data = from_data(graph.nodes())
        self.known: dict[fx.Node, Mask] = {}

    def fit(self, node: fx.Node, table: fx.Node, flow: Flow, rank: int) -> fx.Node:
        """What stands for a mask or bias on scores at this stage. Raises Unfollowed."""
        if table not in self.known:
            self.known[table] = read_mask(self.graph, table, self.data)
        mask = self.known[table]
        if mask.refused and len(flow.tokens) > 1:
            raise Unfollowed(mask.refused)
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
        """Which tokens are no padding, ``[B, N]``, from a mask that is the same for every query."""
        found = self.known.get(table)
        if found is None or not found.padding:
            return None
        call = self.past.call(node)
        row: fx.Node = mask
        while len(value_of(row).shape) > 2:
            row = call(aten.select.int, row, 1, 0)
        return row if value_of(row).dtype == torch.bool else call(aten.gt.Scalar, row, -1.0)

    def with_sizes(self, node: fx.Node, mask: fx.Node | None, bias: fx.Node, rank: int) -> fx.Node:
        """A mask or None, with the logarithm of the sizes ``[B, N]`` added to what every key gets."""
        call, key = self.past.call(node), ("bias", mask, bias, rank)
        if key not in self.past.cache:
            wide = arithmetic.spread(call, bias, rank, 0, rank - 1)
            if mask is None:
                self.past.cache[key] = wide
            elif value_of(mask).dtype == torch.bool:
                lowest = torch.finfo(value_of(wide).dtype).min
                self.past.cache[key] = call(aten.where.ScalarOther, mask, wide, lowest)
            else:
                self.past.cache[key] = call(aten.add.Tensor, mask, wide)
        return self.past.cache[key]


def _computed(graph: Graph, table: fx.Node, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    program = Program(graph, keep=[table.name])
    needed = {table}
    for node in reversed(program.order):
        if node in needed:
            needed.update(node.all_input_nodes)
    feeds = {
        name: _made_up(value_of(node), generator) for name, node in zip(graph.inputs, graph.placeholders(), strict=True)
    }
    values: dict[fx.Node, Any] = program.start(feeds)
    with torch.no_grad():
        for node in program.order:
            if node in needed and node not in values:
                values[node] = program.step(node, values)
    found: torch.Tensor = values[table]
    return found


def _made_up(value: Any, generator: torch.Generator) -> torch.Tensor:
    """Zeros and ones of the traced shape: valid as ids and as a mask."""
    drawn = torch.randint(0, 2, [hint(size) for size in value.shape], generator=generator)
    return drawn.to(value.dtype)
