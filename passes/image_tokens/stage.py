"""One stage: the image tokens that it ranks, and the graph behind it at the remaining tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from passes.analysis.token_axis import option, sizes_of
from passes.base import PassError
from passes.graph.edit import (
    empty_like,
    insert_call,
    insert_call_of_value,
    insert_input,
    insert_output,
    move_before,
    new_size,
    replace_input,
    resize,
    set_arguments,
)
from passes.graph.graph import output_values, value_of
from passes.image_tokens import ranking
from passes.image_tokens.subset import Sizes, Subset, take
from passes.torch_internals import expression

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from passes.graph.graph import Graph
    from passes.image_tokens.cached_attention import CachedAttention

aten = torch.ops.aten
INT = torch.int64
# Symbolic sizes need an example. These are larger than any size of an example of a model, so that none is equal.
EXAMPLE = 1_009


@dataclass
class LanguageModel:
    """What the stages of a graph share.

    Attributes:
        graph: the graph, which is edited.
        first: the first attention, whose cache holds all tokens.
        image: ``[B, S]`` int64, 1 for the image tokens of the call.
        method: how image tokens are ranked.
        seed: seed of random ranks.
        representative: see `passes.image_tokens.subset.representatives`.
        origin: values from before any token was dropped, by the value at a subset.
    """

    graph: Graph
    first: CachedAttention
    image: fx.Node
    method: str
    seed: int
    representative: Mapping[fx.Node, fx.Node]
    origin: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        """Read the sizes of the graph, before any edit."""
        rows, tokens = sizes_of(self.first.trunk)[:2]
        self.sizes = Sizes(rows, tokens, sizes_of(self.first.past)[2])


@dataclass(frozen=True)
class Kept:
    """The tokens that a stage keeps.

    Attributes:
        depth: depth of the stage.
        trunk: the value that it narrows.
        original: ``[B, n]``, their indices among the tokens of the call.
        past_tokens: ``[B, past]``, indices of the tokens in the caches behind the stage among all tokens so far.
    """

    depth: int
    trunk: fx.Node
    original: fx.Node
    past_tokens: fx.Node


class Stage:
    """Insertion of one stage before the block of an attention.

    Args:
        model: what the stages share.
        attention: the attention of the block.
        depth: depth that was asked for, which names its inputs and outputs.
        share: share of the image tokens of a call that is kept.
        before: the tokens that the stage before keeps; None for the first stage.
    """

    def __init__(
        self, model: LanguageModel, attention: CachedAttention, depth: int, share: float, before: Kept | None
    ) -> None:
        self.model, self.graph, self.attention = model, model.graph, attention
        self.depth, self.share, self.before = depth, share, before
        self.trunk = attention.trunk
        if before is not None and before.trunk is self.trunk:
            raise PassError(
                f"the stages at the depths {before.depth} and {depth} are both before {attention.site.name}; leave one "
                "out."
            )
        rows, tokens = sizes_of(self.trunk)[:2]
        past = model.sizes.past if before is None else sizes_of(before.past_tokens)[1]
        self.sizes = Sizes(rows, tokens, past)
        self.first_reader = min(self.trunk.users, key=self.graph.nodes().index)
        self.call = functools.partial(insert_call, self.graph, before=self.first_reader)

    def insert(self) -> Kept:
        """Insert the stage; return the tokens that it keeps."""
        past_tokens, caches = self._free_caches()
        readers = [reader for cache in caches for reader in cache.users if reader.target is not aten.sym_size.int]
        region = self._computed_from([self.trunk, *readers]) | set(readers)
        self._move_the_rest_before(region)
        past = self.call(aten.sym_size.int, self.model.first.past, 2)
        tokens = self.call(aten.sym_size.int, self.model.image, 1)
        previous = self._previous(tokens)
        image = self.model.image
        if self.before is not None:
            image = self.call(aten.gather.default, image, 1, previous)
        keys = None if self.model.method == "random" else self._copied(self.attention.keys, region, None)
        score = self._score(region, keys, image, previous, past, tokens)
        relative, count = self._select(score, image, tokens)
        original = relative
        if self.before is not None:
            original = self.call(aten.gather.default, previous, 1, relative)
        columns = self.call(aten.cat.default, [past_tokens, self.call(aten.add.Tensor, original, past)], 1)
        name = f"present.{self.depth}.tokens"
        insert_output(self.graph, name, columns)
        self.graph.state = {**self.graph.state, name: f"past_key_values.{self.depth}.tokens"}
        own_past = self.call(aten.sym_size.int, past_tokens, 1)
        subset = self._subset(original, relative, columns, count, own_past)
        if keys is not None:  # they are known for all tokens, so the projection need not run again
            subset.mapped[self.attention.keys] = take(self.call, keys, 2, relative)
        self._narrow(region, subset)
        return Kept(self.depth, self.trunk, original, past_tokens)

    # ------------------------------------------------------------------------------------------------------- caches

    def _free_caches(self) -> tuple[fx.Node, list[fx.Node]]:
        """Give the caches behind the stage a length of their own; return the indices of their tokens, and the caches.

        The number of all tokens is read from the first cache, as that of a cache behind no longer is it.
        """
        size = new_size(self.graph, f"past_sequence_{self.depth}", EXAMPLE + 2 * self.depth)
        inputs = dict(zip(self.graph.inputs, self.graph.placeholders(), strict=True))
        outputs = dict(zip(self.graph.outputs, output_values(self.graph), strict=True))
        behind = self._computed_from([self.trunk])
        caches = []
        for present, past in self.graph.state.items():
            if past not in inputs or outputs[present] not in behind:
                continue
            node = inputs[past]
            caches.append(node)
            for axis in [axis for axis, length in enumerate(sizes_of(node)) if length == self.sizes.past]:
                for reader in [each for each in node.users if each.target is aten.sym_size.int]:
                    if reader.args[1] == axis:
                        replace_input(self.graph, reader, node, self.model.first.past)
                        set_arguments(self.graph, reader, self.model.first.past, 2)
                resize(self.graph, node, axis, size)
        rows = value_of(self.trunk).shape[0]
        return insert_input(self.graph, f"past_key_values.{self.depth}.tokens", self.trunk, (rows, size), INT), caches

    def _computed_from(self, nodes: Collection[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            for reader in stack.pop().users:
                if reader not in found and reader.op != "output":
                    found.add(reader)
                    stack.append(reader)
        return found

    def _move_the_rest_before(self, region: set[fx.Node]) -> None:
        """Move what does not depend on the trunk before its readers, such as the rotary tables of each layer."""
        order = self.graph.nodes()
        behind = order[order.index(self.first_reader) :]
        move_before([node for node in behind if node not in region and node.op != "output"], self.first_reader)

    # ------------------------------------------------------------------------------------------------------ ranking

    def _previous(self, tokens: fx.Node) -> fx.Node:
        """Return the indices of the trunk's tokens among those of the call, ``[B, S]``."""
        if self.before is not None:
            return self.before.original
        indices = self.call(aten.unsqueeze.default, self._places(tokens), 0)
        return self.call(aten.expand.default, indices, [self.call(aten.sym_size.int, self.trunk, 0), -1])

    def _places(self, count: fx.Node) -> fx.Node:
        options = {"dtype": INT, "device": value_of(self.trunk).device}
        return self.call(aten.arange.default, count, options=options)

    def _score(
        self,
        region: set[fx.Node],
        keys: fx.Node | None,
        image: fx.Node,
        previous: fx.Node,
        past: fx.Node,
        tokens: fx.Node,
    ) -> fx.Node:
        """Insert the score of each token of the trunk, ``[B or 1, S]``."""
        if keys is None:
            return ranking.random_scores(self.call, image, self.model.seed + self.depth)
        if self.model.method == "norm":
            return ranking.low_norm(self.call, keys)
        fused = self.attention.fused([node for node in self.graph.nodes() if node in region])
        last = self._last_token(previous, past, tokens)
        query = self._copied(cast("fx.Node", fused.args[0]), region, last)
        mask = option(fused, "attn_mask")
        if mask is not None and mask in region:
            raise PassError(f"{fused.name} has a mask that depends on tokens; choose the method norm or random.")
        mask = None if mask is None else last.at(fused, mask)
        return ranking.attention_received(self.call, fused, query, keys, mask)

    def _last_token(self, previous: fx.Node, past: fx.Node, tokens: fx.Node) -> Subset:
        """Return the last token of each row that is no padding; its tables have the columns of the trunk's tokens."""
        named = dict(zip(self.graph.inputs, self.graph.placeholders(), strict=True))
        last = ranking.last_token(self.call, named.get("attention_mask"), self.model.image, tokens)
        earlier = self.call(aten.to.dtype, self.call(aten.lt.Tensor, previous, last), INT)
        relative = self.call(aten.sum.dim_IntList, earlier, [1], True)
        return self._subset(last, relative, self.call(aten.add.Tensor, previous, past), 1, None)

    def _subset(self, original: fx.Node, relative: fx.Node, columns: fx.Node, count: Any, past: Any) -> Subset:
        model = self.model
        subset = Subset(
            self.call,
            model.sizes,
            self.sizes,
            original,
            relative,
            columns,
            count,
            past,
            model.origin,
            model.representative,
        )
        subset.mapped[self.trunk] = take(self.call, self.trunk, 1, relative)
        return subset

    def _copied(self, target: fx.Node, region: set[fx.Node], subset: Subset | None) -> fx.Node:
        """Insert a copy of the nodes between the trunk and a node before the stage; `subset` are tokens, None all."""
        needed, stack = {target}, [target]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in region and source not in needed:
                    needed.add(source)
                    stack.append(source)
        copies: dict[fx.Node, fx.Node] = {} if subset is None else subset.mapped
        for node in [node for node in self.graph.nodes() if node in needed]:
            assert callable(node.target)
            if subset is None:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: copies.get(source, source))
            else:
                args, kwargs = subset.arguments(node, region)
            copies[node] = self.call(node.target, *args, options=kwargs)
        return copies[target]

    # ---------------------------------------------------------------------------------------------------- narrowing

    def _select(self, score: fx.Node, image: fx.Node, tokens: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the indices of the remaining tokens among those of the trunk, in order, and their number."""
        ranked = ranking.text_first(self.call, score, image)
        removed = ranking.removed_tokens(self.call, self.model.image, self.share)
        places = self._places(self.call(aten.sym_size.int, self.trunk, 1))
        remaining = self.call(aten.lt.Scalar, self.call(aten.add.Tensor, places, removed), tokens)
        size = new_size(self.graph, f"sequence_{self.depth}", EXAMPLE + 2 * self.depth + 1)
        value = empty_like(self.graph, self.trunk, (size, 1), INT)
        found = insert_call_of_value(
            self.graph, aten.nonzero.default, remaining, value=value, before=self.first_reader
        )  # the one operator whose size depends on data
        first = self.call(aten.squeeze.dim, found, 1)
        kept = self.call(aten.index_select.default, ranked, 1, first)
        return ranking.ascending(self.call, kept), self.call(aten.sym_size.int, first, 0)

    def _narrow(self, region: set[fx.Node], subset: Subset) -> None:
        """Let all nodes of the region compute the remaining tokens."""
        for node in [node for node in self.graph.nodes() if node in region and node not in subset.mapped]:
            args, kwargs = subset.arguments(node, region)
            set_arguments(self.graph, node, *args, options=kwargs)
            if any(sizes.stale(size) for sizes in (self.model.sizes, self.sizes) for size in sizes_of(node)):
                raise PassError(
                    f"image tokens cannot be dropped at depth {self.depth}: {node.name} ({node.target}) has all tokens "
                    "behind the stage."
                )


def size_of_state(graph: Graph, name: str) -> Any:
    """Return the expression of the number of tokens of an input of state; None for state that does not grow."""
    named = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    sizes = [expression(size) for size in value_of(named[name]).shape[1:] if isinstance(size, torch.SymInt)]
    return sizes[0] if sizes else None
