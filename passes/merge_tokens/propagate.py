"""Propagation of token reductions: adapts every later operator to the shorter token axis."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from passes.analysis import token_axis as axes
from passes.analysis.token_axis import Flow, UnsupportedOperator, option, sizes_of
from passes.base import PassError
from passes.graph.edit import propagate_fake_value, replace_all_uses, replace_input, set_arguments
from passes.graph.graph import unscaled, value_of
from passes.graph.sites import LINEAR_OPS, NORM_OPS, PRODUCTS, SOFTMAX_OPS
from passes.merge_tokens import matching as arithmetic
from passes.merge_tokens.insert_reduction import AttentionOperands, insert_reduction
from passes.merge_tokens.masks import Masks
from passes.merge_tokens.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from passes.graph.graph import Graph, Site
    from passes.merge_tokens.stages import Reduction

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
MOST_LEADING = 64  # class and register tokens have indices below this limit


class ReductionPropagator:
    """Traversal of a graph from the trunk of `first` to the outputs, with reductions inserted on the way.

    Args:
        graph: the graph to edit.
        first: the first attention site after which tokens are removed.
        last: the last such site.
        amounts: root node name of a site to the number or share of tokens removed there; empty for a trial run.
        reduction: options of the reductions.

    Attributes:
        batch: axis of the samples in the trunk, 1 where the tokens are first, as by default in `torch.nn.Transformer`.
        axis: axis of the tokens.
    """

    def __init__(
        self, graph: Graph, first: Site, last: Site, amounts: Mapping[str, float], reduction: Reduction
    ) -> None:
        self.graph, self.amounts = graph, amounts
        self.past = Stages(graph, reduction)
        self.order = graph.nodes()
        self.index = {node: position for position, node in enumerate(self.order)}
        self.before = {node: sizes_of(node) for node in self.order}
        self.rank = {node: len(sizes) for node, sizes in self.before.items()}
        named = {node.name: node for node in self.order}
        self.first = unscaled(named[first.trunk])  # the branch reads it too
        self.trunk = _ancestors(named[last.root])
        self.flows: dict[fx.Node, Flow] = {}
        self.masks = Masks(graph, self.past)
        self.attended: AttentionOperands | None = None
        self.read_by_position = 0
        self._begin(first)

    def _begin(self, first: Site) -> None:
        sizes = self.before[self.first]
        if len(sizes) != 3 or first.channel_dim != 2:
            raise PassError(
                f"{first.name} has a trunk of shape {axes.as_text(sizes)}; expected [samples, tokens, features], or "
                "tokens first. Tokens on a grid (windows, convolutions) depend on their neighbours and cannot be "
                "removed."
            )
        self.batch = int(sizes[1] == axes.batch_size(self.graph) != sizes[0])
        self.axis = 1 - self.batch
        if sizes[self.axis] == 1:
            raise PassError(f"{first.name} has a trunk of one token, so no token can be removed.")
        self.flows[self.first] = Flow(0, self.batch, ((self.axis, 0),))

    # --------------------------------------------------------------------------------------------------- traversal

    def run(self) -> None:
        """Visit all nodes after the trunk of the first site.

        Raises:
            PassError: the tokens cannot be tracked through an operator before the last reduction.
        """
        for node in self.order[self.index[self.first] + 1 :]:
            if node.op == "output":
                for source in [source for source in node.all_input_nodes if source in self.flows]:
                    self.past.restore(node, source, self.flows[source], output=True)
            elif any(source in self.flows for source in node.all_input_nodes):
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        sources = [source for source in node.all_input_nodes if source in self.flows]
        try:
            flow = self._follow(node)
        except UnsupportedOperator as reason:
            if node in self.trunk:
                raise PassError(f"cannot track tokens through {node.name} ({node.target}): {reason}.") from None
            for source in sources:
                self.past.restore(node, source, self.flows[source], output=False)
            flow = None
        if self.past.done and node.op == "call_function" and node.users:
            propagate_fake_value(self.graph, node)
        if flow is not None and flow.tokens:
            self.flows[node] = flow
        if node.name in self.amounts:
            self._reduce(node)

    def _follow(self, node: fx.Node) -> Flow | None:
        """Adapt a node to the reduced tokens and return the flow of its value. Raises UnsupportedOperator."""
        target = node.target
        source = next(source for source in node.all_input_nodes if source in self.flows)
        if target is operator.getitem:
            return self.flows[source]
        if target == aten.sym_size.int:
            if option(node, "dim") % self.rank[source] in dict(self.flows[source].tokens):
                raise UnsupportedOperator("it reads the number of tokens")
            return None
        if target == ATTENTION:
            return self._attend(node)
        if target in PRODUCTS:
            return self._multiply(node)
        if target in SOFTMAX_OPS:
            return self._softmax(node, source)
        if target in LINEAR_OPS | NORM_OPS:
            return self._features(node, source)
        if target in (aten.slice.Tensor, aten.select.int):
            return self._slice_or_select(node, source)
        if target == aten.cat.default:
            return self._concatenate(node)
        return self._follow_axes(node, source)

    def _follow_axes(self, node: fx.Node, source: fx.Node) -> Flow | None:
        target = node.target
        if target in axes.MOVES:
            return self._move(node, source)
        if target in axes.SPLITS:
            self._require_no_tokens(source, option(node, "dim"))
            return self.flows[source]
        if target in axes.REDUCTIONS:
            return self._pool(node, source)
        if target in axes.SAME_SHAPE:
            return self.flows[source] if node.args[0] is source else None
        if target == aten.stack.default:
            return axes.move(node, self._broadcast(node, self.rank[node] - 1), self.before[source], self.before[node])
        if axes.is_pointwise(node):
            return self._broadcast(node, self.rank[node])
        raise UnsupportedOperator("there is no rule for this operator")

    # ------------------------------------------------------------------------------------------------ unary operators

    def _require_no_tokens(self, source: fx.Node, *dims: int) -> None:
        rank = self.rank[source]
        if {dim % rank for dim in dims} & set(dict(self.flows[source].tokens)):
            raise UnsupportedOperator("it operates along the token axis")

    def _features(self, node: fx.Node, source: fx.Node) -> Flow:
        if node.args[0] is not source:
            raise UnsupportedOperator("its weight depends on tokens")
        span = len(option(node, "normalized_shape")) if node.target in NORM_OPS else 1
        self._require_no_tokens(source, *range(-span, 0))
        return self.flows[source]

    def _move(self, node: fx.Node, source: fx.Node) -> Flow:
        flow = axes.move(node, self.flows[source], self.before[source], self.before[node])
        if flow.stage and node.target in axes.SIZES:
            lengths = {axis: self.past.length(node, flow.stage, start) for axis, start in flow.tokens}
            arguments = axes.resized_arguments(node, flow, lengths)
            assert arguments is not None
            set_arguments(self.graph, node, *arguments)
        return flow

    def _slice_or_select(self, node: fx.Node, source: fx.Node) -> Flow | None:
        """Adapt a slice or select, which may read another axis or leading tokens."""
        flow, rank = self.flows[source], self.rank[source]
        dim = option(node, "dim") % rank
        starts = dict(flow.tokens)
        if dim not in starts:
            return axes.move(node, flow, self.before[source], self.before[node])
        if node.target == aten.select.int:
            self._check_position(option(node, "index") + starts[dim], option(node, "index"))
            remaining = replace(flow, tokens=tuple(pair for pair in flow.tokens if pair[0] != dim))
            return axes.move(node, remaining, self.before[source], self.before[node])
        return self._slice(node, flow, dim, starts[dim])

    def _slice(self, node: fx.Node, flow: Flow, dim: int, offset: int) -> Flow | None:
        begin, end, size = option(node, "start") or 0, option(node, "end"), self.before[node.all_input_nodes[0]][dim]
        whole = end is None or end == size or (isinstance(end, int) and end >= arithmetic.LAST)
        if option(node, "step") != 1 or not isinstance(begin, int) or not (whole or isinstance(end, int)):
            raise UnsupportedOperator("it selects tokens by position")
        self._check_position((begin if whole else end) + offset - 1, begin if whole else end)
        if not whole:
            remaining = tuple(pair for pair in flow.tokens if pair[0] != dim)
            return replace(flow, tokens=remaining)
        if flow.stage:
            set_arguments(self.graph, node, node.args[0], dim, begin)
        return replace(flow, tokens=tuple((axis, start + begin * (axis == dim)) for axis, start in flow.tokens))

    def _check_position(self, token: int, index: int) -> None:
        """Record the leading tokens that are read by position, and require them to be protected."""
        if index < 0 or token >= MOST_LEADING:
            raise UnsupportedOperator("it selects a token by position")
        self.read_by_position = max(self.read_by_position, token + 1)
        if self.amounts and token >= self.past.reduction.protected:
            raise UnsupportedOperator(f"it reads token {token}, which is not protected")

    def _concatenate(self, node: fx.Node) -> Flow:
        parts = list(node.args[0])  # type: ignore[arg-type]
        rank = self.rank[node]
        dim = option(node, "dim") % rank
        tracked = [part for part in parts if part in self.flows]
        if not any(dim in dict(self.flows[part].tokens) for part in tracked):
            return self._broadcast(node, rank)
        if len(tracked) > 1 or parts[-1] is not tracked[0]:
            raise UnsupportedOperator("it concatenates values after the tokens")
        lengths = [self.before[part][dim] for part in parts[:-1]]
        if not all(isinstance(length, int) for length in lengths):
            raise UnsupportedOperator("it concatenates a dynamic number of values before the tokens")
        flow, front = self.flows[tracked[0]], sum(map(int, lengths))
        return replace(flow, tokens=tuple((axis, start - front * (axis == dim)) for axis, start in flow.tokens))

    def _pool(self, node: fx.Node, source: fx.Node) -> Flow | None:
        """Adapt a reduction; a mean over tokens is weighted by the token sizes."""
        flow, rank = self.flows[source], self.rank[source]
        dims = option(node, "dim")
        dims = {dim % rank for dim in (range(rank) if dims is None else dims)}
        pooled = [pair for pair in flow.tokens if pair[0] in dims]
        if pooled:
            self._weighted_mean(node, source, flow, dims, pooled)
            flow = replace(flow, tokens=tuple(pair for pair in flow.tokens if pair[0] not in dims))
        return axes.move(node, flow, self.before[source], self.before[node]) if flow.tokens else None

    def _weighted_mean(
        self, node: fx.Node, source: fx.Node, flow: Flow, dims: set[int], pooled: list[tuple[int, int]]
    ) -> None:
        if node.target in (aten.amax.default, aten.amin.default) or not flow.stage:
            return
        sizes = self.past.done[flow.stage - 1].sizes
        if node.target != aten.mean.dim or len(dims) > 1:
            raise UnsupportedOperator("it sums over tokens")
        if sizes is None:
            return
        call, ((axis, start),) = self.past.call(node), pooled
        counts = arithmetic.from_token(call, sizes, start)
        counts = arithmetic.spread(call, counts, self.rank[source], flow.batch, axis)
        keep = bool(option(node, "keepdim"))
        total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, source, counts), [axis], keep)
        replace_all_uses(
            self.graph, node, call(aten.div.Tensor, total, call(aten.sum.dim_IntList, counts, [axis], keep))
        )

    # --------------------------------------------------------------------------------------------- broadcast operands

    def _broadcast(self, node: fx.Node, rank: int) -> Flow:
        """Reduce broadcast operands of an earlier stage, and tables of the original length, to the current tokens."""
        operands = [source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)]
        tracked = [(self.flows[source], self.rank[source]) for source in operands if source in self.flows]
        flow = axes.broadcast_flows(tracked, rank)
        for source in operands:
            shift = rank - self.rank[source]
            wide = [pair for pair in flow.tokens if pair[0] >= shift and self.before[source][pair[0] - shift] != 1]
            if source not in self.flows:
                self._fit_table(node, source, replace(flow, tokens=tuple(wide)), rank, scores=len(flow.tokens) > 1)
                continue
            if len(wide) != len(self.flows[source].tokens):
                raise UnsupportedOperator("it combines tokens with an untracked axis of the same length")
            if self.flows[source].stage < flow.stage:
                replace_input(self.graph, node, source, self.past.advance(node, source, self.flows[source], flow.stage))
        return flow

    def _fit_table(self, node: fx.Node, table: fx.Node, flow: Flow, rank: int, *, scores: bool) -> None:
        """Reduce a table that is combined with tokens: positions, rotations, masks or biases."""
        if not flow.tokens:
            return
        if scores:
            self._fit_scores(node, table, flow, rank)
        elif flow.stage:
            replace_input(
                self.graph, node, table, self.past.advance(node, table, replace(flow, stage=0), flow.stage, rank)
            )

    def _fit_scores(self, node: fx.Node, table: fx.Node, flow: Flow, rank: int) -> None:
        if node.target == aten.masked_fill.Scalar:
            raise UnsupportedOperator("masked_fill masks are not supported")
        fitted = self.masks.fit(node, table, flow, rank)
        if fitted is not table:
            replace_input(self.graph, node, table, fitted)
        if self.attended is not None:
            self.attended = self.attended._replace(real=self._real(node, table, fitted, flow.stage))

    def _real(self, node: fx.Node, table: fx.Node, mask: fx.Node, stage: int) -> fx.Node | None:
        """Return ``[B, N]`` bool, False for padding; None without padding. A stage knows it without rounding."""
        known = self.past.done[stage - 1].real if stage else None
        return self.masks.real(node, table, mask) if known is None else known

    # ----------------------------------------------------------------------------------------------------- attention

    def _multiply(self, node: fx.Node) -> Flow:
        """Adapt a product of two values: attention scores (tokens by tokens), or an average with softmax weights."""
        left, right = (cast("fx.Node", side) for side in node.args[:2])
        if node.target not in (aten.matmul.default, aten.bmm.default):
            raise UnsupportedOperator("this matrix product operator is not supported")
        rank = self.rank[node]
        rows, inner = self._tokens_of(left, (-2, -1))
        across, columns = self._tokens_of(right, (-2, -1))
        flows = [self.flows[side] for side in (left, right) if side in self.flows]
        if inner != across:
            raise UnsupportedOperator("it sums over tokens of one operand only")
        if inner is not None and not any(flow.weighted for flow in flows):
            raise UnsupportedOperator("it sums over tokens without softmax weights")
        if len({flow.stage for flow in flows}) > 1 or len({flow.batch for flow in flows}) > 1:
            raise UnsupportedOperator("it multiplies values from before and after a reduction")
        tokens = tuple((rank + axis, start) for axis, start in ((-2, rows), (-1, columns)) if start is not None)
        if rows is not None and columns is not None:
            self._remember_product(node, left, right)
        return Flow(flows[0].stage, flows[0].batch, tokens, any(flow.weighted for flow in flows))

    def _tokens_of(self, operand: Any, matrix_axes: tuple[int, int]) -> tuple[int | None, int | None]:
        flow = self.flows.get(operand)
        if flow is None:
            return None, None
        starts = {axis - self.rank[operand]: start for axis, start in flow.tokens}
        if set(starts) - set(matrix_axes):
            raise UnsupportedOperator("it has tokens on a batch axis of a matrix product")
        return starts.get(matrix_axes[0]), starts.get(matrix_axes[1])

    def _remember_product(self, node: fx.Node, left: Any, right: Any) -> None:
        self.attended = None if self.flows[right].batch else AttentionOperands(right, turned=True)

    def _softmax(self, node: fx.Node, source: fx.Node) -> Flow:
        """Add the logarithm of the token sizes to the scores: proportional attention (Bolya et al., eq. 1)."""
        flow, rank = self.flows[source], self.rank[source]
        dim = option(node, "dim") % rank
        starts = dict(flow.tokens)
        if dim not in starts:
            return flow
        bias = self.past.log_sizes(node, flow.stage, starts[dim])
        if bias is not None:
            call = self.past.call(node)
            broadcast_bias = arithmetic.spread(call, bias, rank, flow.batch, dim)
            replace_input(self.graph, node, source, call(aten.add.Tensor, source, broadcast_bias))
        if self.attended is not None and len(flow.tokens) > 1 and self.attended.weights is None:
            self.attended = self.attended._replace(weights=node)
        return replace(flow, weighted=True)

    def _attend(self, node: fx.Node) -> Flow | None:
        query, keys, values = (cast("fx.Node", side) for side in node.args[:3])
        rank = self.rank[node]
        if option(node, "is_causal"):
            raise UnsupportedOperator("causal attention would let a merged token attend to later tokens")
        query_start, key_start = (self._tokens_of(side, (-2, -1))[0] for side in (query, keys))
        if self.flows.get(keys) != self.flows.get(values):
            raise UnsupportedOperator("keys and values hold different tokens")
        flow = axes.broadcast_flows([(self.flows[side], rank) for side in (query, keys) if side in self.flows], rank)
        if flow.batch != 0:
            raise UnsupportedOperator("its batch axis is not the first axis")
        if self.flows.get(keys, flow).stage != flow.stage or self.flows.get(query, flow).stage != flow.stage:
            raise UnsupportedOperator("queries and keys hold different tokens")
        pairs = ((rank - 2, query_start), (rank - 1, key_start))
        scores = Flow(flow.stage, 0, tuple((axis, start) for axis, start in pairs if start is not None))
        self._attend_to(node, scores, rank)
        return replace(flow, tokens=scores.tokens[:1], weighted=False) if query_start is not None else None

    def _attend_to(self, node: fx.Node, flow: Flow, rank: int) -> None:
        """Reduce the mask, add the token sizes, and record the operands of the attention."""
        table = option(node, "attn_mask")
        real, mask = None, table
        if table is not None:
            shift = rank - self.rank[table]
            wide = [pair for pair in flow.tokens if pair[0] >= shift and self.before[table][pair[0] - shift] != 1]
            mask = self.masks.fit(node, table, replace(flow, tokens=tuple(wide)), rank)
            real = self._real(node, table, mask, flow.stage)
            mask = None if flow.stage and self.masks.known[table].empty else mask
        starts = dict(flow.tokens)
        bias = self.past.log_sizes(node, flow.stage, starts[rank - 1]) if rank - 1 in starts else None
        if bias is not None:
            mask = self.masks.with_sizes(node, mask, bias, rank)
        if mask is not table:
            set_arguments(self.graph, node, *node.args[:3], mask, *node.args[4:])
        scale = option(node, "scale")
        scale = self.before[node.args[0]][-1] ** -0.5 if scale is None else scale  # type: ignore[index]
        if len(starts) > 1:
            query, keys = node.args[:2]
            self.attended = AttentionOperands(keys, False, query, mask, float(scale), None, real)  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------------------------- reduction

    def _reduce(self, root: fx.Node) -> None:
        """Insert one reduction after a root, and rewire the consumers of the root to the remaining tokens."""
        flow = self.flows.get(root)
        if flow is None or (flow.batch, flow.tokens) != (self.batch, ((self.axis, 0),)):
            raise PassError(f"the sum {root.name} does not hold all tokens, so tokens cannot be reduced after it.")
        if self.attended is None:
            raise PassError(
                f"found no attention scores between tokens before {root.name}, so tokens cannot be reduced after it."
            )
        users, call = list(root.users), self.past.call(root.next)
        rows = call(aten.transpose.int, root, 0, 1) if self.batch else root  # [samples, tokens, features]
        stage = insert_reduction(call, root.name, rows, self.amounts[root.name], self.attended, self.past)
        if self.attended.real is not None:
            stage = arithmetic.with_padding(call, stage, self.attended.real)
        self.past.done.append(stage)
        reduced = call(aten.matmul.default, stage.mean, rows)
        reduced = call(aten.transpose.int, reduced, 0, 1) if self.batch else reduced
        for user in users:
            replace_input(self.graph, user, root, reduced)
        self.flows[reduced] = replace(flow, stage=len(self.past.done))
        self.rank[reduced], self.before[reduced] = 3, self.before[root]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    ancestors, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in ancestors:
                ancestors.add(source)
                stack.append(source)
    return ancestors
