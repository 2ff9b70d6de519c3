"""Token reductions of a graph, and their application to later values and tables."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from passes.analysis.token_axis import UnsupportedOperator
from passes.base import PassError
from passes.graph.edit import insert_call, replace_input
from passes.graph.graph import value_of
from passes.merge_tokens import matching as arithmetic

if TYPE_CHECKING:
    from torch import fx

    from passes.analysis.token_axis import Flow
    from passes.graph.graph import Graph
    from passes.merge_tokens.matching import Count, Stage

aten = torch.ops.aten
MERGING = ("merge", "tome", "atm", "unary", "evit")
IN_PAIRS = MERGING[:3]
DROPPING = ("attention", "norm")
LOWEST = -1e30  # replaces minus infinity, because 0 * -inf is NaN


@dataclass(frozen=True)
class Reduction:
    """Options of the token reductions: method, number of protected leading tokens, and unmerging of outputs."""

    method: str
    protected: int
    unmerge: bool | None

    @property
    def merges(self) -> bool:
        """True if tokens are averaged, False if they are dropped."""
        return self.method in MERGING

    @property
    def in_pairs(self) -> bool:
        """True if half of the unprotected tokens at most can be removed at once."""
        return self.method in IN_PAIRS

    @property
    def spreads(self) -> bool:
        """True if a value for each token can be restored to its original length."""
        return self.merges and self.unmerge is not False


class Stages:
    """Token reductions of one graph, oldest first, with a cache of the nodes derived from them."""

    def __init__(self, graph: Graph, reduction: Reduction) -> None:
        self.graph, self.reduction = graph, reduction
        self.done: list[Stage] = []
        self.cache: dict[tuple[Any, ...], fx.Node] = {}

    def call(self, before: fx.Node) -> Any:
        """Return a function ``call(operator, *arguments)`` that inserts a node before `before`."""
        return functools.partial(insert_call, self.graph, before=before)

    def length(self, node: fx.Node, stage: int, start: int) -> Count:
        """Return the number of tokens from `start` on after `stage` reductions, an integer or a node before `node`."""
        return arithmetic.minus(self.call(node), self.done[stage - 1].count, start)

    def advance(self, node: fx.Node, value: fx.Node, flow: Flow, stage: int, rank: int | None = None) -> fx.Node:
        """Apply all reductions up to `stage` to a value or table of an earlier stage, by averaging."""
        call = self.call(node)
        for later in range(flow.stage + 1, stage + 1):
            key = (value, flow.tokens, flow.batch, rank, later)
            if key not in self.cache:
                self.cache[key] = self.average(call, value, replace(flow, stage=later), rank)
            value = self.cache[key]
        return value

    def average(self, call: Any, value: fx.Node, flow: Flow, rank: int | None) -> fx.Node:
        """Average a value or table of the stage before ``flow.stage`` over the tokens that were merged.

        Raises:
            UnsupportedOperator: the value is an integer, or a table axis holds entries in front of the tokens.
        """
        dtype = value_of(value).dtype
        if not (dtype.is_floating_point or dtype == torch.bool):
            raise UnsupportedOperator(f"{value.name} holds an integer for each token")
        mean = self.done[flow.stage - 1].mean
        result: fx.Node = value
        if dtype != value_of(mean).dtype:
            result = call(aten.to.dtype, value, value_of(mean).dtype)
        if len(flow.tokens) > 1 or dtype == torch.bool:
            result = call(aten.clamp_min.default, result, LOWEST)
        for _ in range((rank or 0) - len(value_of(value).shape)):
            result = call(aten.unsqueeze.default, result, 0)
        for axis, start in flow.tokens:
            if start < 0:
                raise UnsupportedOperator("it combines a table with tokens that follow other entries")
            result = arithmetic.apply_matrix(call, mean, result, flow.batch, axis, start)
        if dtype == torch.bool:
            result = call(aten.gt.Scalar, result, 0.5)
        elif value_of(result).dtype != dtype:
            result = call(aten.to.dtype, result, dtype)
        return result

    def log_sizes(self, node: fx.Node, stage: int, start: int) -> fx.Node | None:
        """Return the logarithm of the token sizes ``[B, N]`` from `start` on; None if no token was merged."""
        sizes = self.done[stage - 1].sizes if stage else None
        if sizes is None:
            return None
        key = ("log", stage, start)
        if key not in self.cache:
            call = self.call(node)
            self.cache[key] = call(aten.log.default, arithmetic.from_token(call, sizes, start))
        return self.cache[key]

    def restore(self, reader: fx.Node, source: fx.Node, flow: Flow, *, output: bool) -> None:
        """Restore the original length for a consumer that needs all tokens; a merged token is repeated.

        Raises:
            PassError: the method drops tokens, which have no value, or unmerging is disabled.
        """
        if not flow.stage:
            return
        shifted = any(start < 0 for _, start in flow.tokens)
        if not self.reduction.spreads or shifted:
            if output and self.reduction.unmerge is False:
                return
            raise PassError(
                f"{reader.name} needs {source.name} for each token, but dropped tokens have no value; "
                "use method='merge', or unmerge=False for shorter outputs."
            )
        value = source
        for number in range(flow.stage, 0, -1):
            key = ("restored", source, number)
            if key not in self.cache:
                call, assign = self.call(reader), self.done[number - 1].assign
                transposed = call(aten.transpose.int, assign, 1, 2)
                for axis, start in flow.tokens:
                    value = arithmetic.apply_matrix(call, transposed, value, flow.batch, axis, max(start, 0))
                self.cache[key] = value
            value = self.cache[key]
        replace_input(self.graph, reader, source, value)
