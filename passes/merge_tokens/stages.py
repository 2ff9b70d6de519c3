"""The reductions made so far, and every value that has to take part in them later."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from passes.analysis.token_axis import Unfollowed
from passes.base import PassError
from passes.graph.edit import insert_call, rewire
from passes.graph.graph import value_of
from passes.merge_tokens import matching as arithmetic

if TYPE_CHECKING:
    from torch import fx

    from passes.analysis.token_axis import Flow
    from passes.graph.graph import Graph
    from passes.merge_tokens.matching import Count, Stage

aten = torch.ops.aten
LOWEST = -1e30  # stands for minus infinity, which times zero is no number


@dataclass(frozen=True)
class Reduction:
    """How tokens are taken away: the method, the number of leading tokens that stay, and what outputs get back."""

    method: str
    protected: int
    unmerge: bool | None

    @property
    def spreads(self) -> bool:
        """Whether a value for each token can have its old length back."""
        return self.method == "merge" and self.unmerge is not False


class Stages:
    """The reductions of one graph, oldest first, and what was already computed from them."""

    def __init__(self, graph: Graph, reduction: Reduction) -> None:
        self.graph, self.reduction = graph, reduction
        self.done: list[Stage] = []
        self.cache: dict[tuple[Any, ...], fx.Node] = {}

    def call(self, before: fx.Node) -> Any:
        """Writes a node ahead of `before`: ``call(operator, *arguments)``."""
        return functools.partial(insert_call, self.graph, before=before)

    def length(self, node: fx.Node, stage: int, start: int) -> Count:
        """Number of tokens after so many reductions, from token `start` on; a node ahead of `node` if symbolic."""
        return arithmetic.minus(self.call(node), self.done[stage - 1].count, start)

    def advance(self, node: fx.Node, value: fx.Node, flow: Flow, stage: int, rank: int | None = None) -> fx.Node:
        """A value or table of an earlier stage, with the reductions since then done to it (averages)."""
        call = self.call(node)
        for later in range(flow.stage + 1, stage + 1):
            key = (value, flow.tokens, flow.batch, rank, later)
            if key not in self.cache:
                self.cache[key] = self.average(call, value, replace(flow, stage=later), rank)
            value = self.cache[key]
        return value

    def average(self, call: Any, value: fx.Node, flow: Flow, rank: int | None) -> fx.Node:
        """A value or table of the stage before ``flow.stage``, averaged over what became one token."""
        kind = value_of(value).dtype
        if not (kind.is_floating_point or kind == torch.bool):
            raise Unfollowed(f"{value.name} holds a whole number for each token")
        mean = self.done[flow.stage - 1].mean
        result: fx.Node = value
        if kind != value_of(mean).dtype:
            result = call(aten.to.dtype, value, value_of(mean).dtype)
        if len(flow.tokens) > 1 or kind == torch.bool:
            result = call(aten.clamp_min.default, result, LOWEST)
        for _ in range((rank or 0) - len(value_of(value).shape)):
            result = call(aten.unsqueeze.default, result, 0)
        for axis, start in flow.tokens:
            if start < 0:
                raise Unfollowed("it joins a table with tokens that others were put in front of")
            result = arithmetic.apply_matrix(call, mean, result, flow.batch, axis, start)
        if kind == torch.bool:
            result = call(aten.gt.Scalar, result, 0.5)
        elif value_of(result).dtype != kind:
            result = call(aten.to.dtype, result, kind)
        return result

    def log_sizes(self, node: fx.Node, stage: int, start: int) -> fx.Node | None:
        """The logarithm of the sizes ``[B, N]`` from token `start` on; None where no token was merged."""
        sizes = self.done[stage - 1].sizes if stage else None
        if sizes is None:
            return None
        key = ("log", stage, start)
        if key not in self.cache:
            call = self.call(node)
            self.cache[key] = call(aten.log.default, arithmetic.from_token(call, sizes, start))
        return self.cache[key]

    def restore(self, reader: fx.Node, source: fx.Node, flow: Flow, *, output: bool) -> None:
        """Let a reader that cannot take fewer tokens read as many as there were: each the one that it became.

        Raises:
            PassError: dropped tokens have no value to give back.
        """
        if not flow.stage:
            return
        shifted = any(start < 0 for _, start in flow.tokens)
        if not self.reduction.spreads or shifted:
            if output and self.reduction.unmerge is False:
                return
            raise PassError(
                f"{reader.name} needs a value for each token ({source.name}), and those that are dropped have none: "
                "merge, or let the outputs be shorter (unmerge=False)."
            )
        value = source
        for number in range(flow.stage, 0, -1):
            key = ("restored", source, number)
            if key not in self.cache:
                call, assign = self.call(reader), self.done[number - 1].assign
                turned = call(aten.transpose.int, assign, 1, 2)
                for axis, start in flow.tokens:
                    value = arithmetic.apply_matrix(call, turned, value, flow.batch, axis, max(start, 0))
                self.cache[key] = value
            value = self.cache[key]
        rewire(self.graph, reader, source, value)
