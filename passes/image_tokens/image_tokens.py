"""Pass that drops image tokens from a language model's prompt, in stages (PyramidDrop)."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import fx

from passes.analysis.token_axis import option, sizes_of
from passes.base import PassError, Rewritten
from passes.graph.edit import (
    empty_like,
    insert_call,
    insert_call_of_value,
    insert_input,
    insert_output,
    move_before,
    new_size,
    remove_dead,
    replace_input,
    resize,
    set_arguments,
)
from passes.graph.graph import output_values, value_of
from passes.image_tokens import ranking
from passes.image_tokens.cached_attention import CachedAttention, cached_attentions
from passes.image_tokens.subset import Sizes, Subset, representatives, take
from passes.torch_internals import expression

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from passes.graph.graph import Graph

aten = torch.ops.aten
Method = Literal["attention", "norm", "random"]
IMAGE_MASK, IDS = "image_token_mask", "input_ids"
# Sizes in the traced values, of inputs that the example of the model does not have. They differ from all of its sizes.
EXAMPLE = 1_009


@dataclass(frozen=True)
class DropImageTokens:
    """Rewrite pass that drops image tokens at a few depths of a language model with a KV cache.

    Before::

        %x = add(%y, %mlp); %n = rms_norm(%x); ...; %k = cat(%past_key, %new_key)
        %a = scaled_dot_product_attention(%q, %k, %v, %mask)

    After::

        %r = rank(%last_query, %keys, %image_token_mask); %i = sort(slice(%r, 0, %tokens - %dropped))
        %z = take(%x, %i); %n = rms_norm(%z); ...; %k = cat(%past_key, %new_key)
        %a = scaled_dot_product_attention(%q, %k, %v, take(%mask, %i, cat(%past_tokens, %past + %i)))

    A stage ranks the image tokens of a call before a block, and keeps those of highest rank and all others, in their
    order. Rotary tables and masks are those of the remaining tokens, so each keeps its position. The keys and values of
    dropped tokens are in the cache of the layers before the stage only.

    Image tokens are those whose ``input_ids`` are `image_token`. Without it, the graph gets an input
    ``image_token_mask`` ``[batch, sequence]`` int64, 1 for the image tokens of the call. A call without image tokens
    drops nothing, as that for a further token. The graph gets state besides:

    - ``past_tokens.8`` ``[batch, past_sequence_8]`` and ``present_tokens.8``, for a stage at depth 8: which of the
      tokens so far the caches behind the stage hold, as indices into ``attention_mask``.

    The logits are those of the remaining tokens; the last is that of the last token.

    Rows of a batch must stay of the same length, so each loses as many image tokens as the row with the fewest to lose.

    Args:
        stages: pairs of a depth and the share of the image tokens that is kept behind it. The depth counts blocks: 8 is
            before the ninth. The share is one of all image tokens of the call, rounded down, and falls with the depth.
        method: ``attention`` ranks by the attention of the last token that is no padding, in the block behind the
            stage, averaged over heads (Xing et al., PyramidDrop, CVPR 2025, section 3.2). ``norm`` keeps the keys of
            low norm (Devoto et al., EMNLP 2024), and ``random`` a pseudo-random choice by position.
        seed: seed of ``random``.
        image_token: id of the placeholder of an image token.

    The graph is unchanged if an error is raised.
    """

    stages: tuple[tuple[int, float], ...]
    method: Method = "attention"
    seed: int = 0
    image_token: int | None = None

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check method and stages."""
        if self.method not in get_args(Method):
            raise PassError(f"found the method {self.method!r}; expected {', '.join(get_args(Method))}.")
        if not self.stages:
            raise PassError("found no stage; expected such as ((8, 0.5), (16, 0.25)).")
        depths, shares = [depth for depth, _ in self.stages], [share for _, share in self.stages]
        if depths != sorted(set(depths)) or depths[0] < 1:
            raise PassError(f"found the depths {depths}; expected rising ones from 1.")
        if shares != sorted(shares, reverse=True) or not all(0 <= share <= 1 for share in shares):
            raise PassError(f"found the shares {shares}; expected falling ones between 0 and 1.")

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Insert the stages. Return the names of the attention sites that each is before.

        Raises:
            PassError: the graph has no KV cache or not as many blocks, or holds tokens in a form that is not known.
        """
        fork = graph.fork()
        names = _Stages(fork, self).run()
        remove_dead(fork)
        graph.module, graph.inputs, graph.outputs, graph.state = fork.module, fork.inputs, fork.outputs, fork.state
        return Rewritten(changed=names)


class _Stages:
    """Insertion of all stages into a graph."""

    def __init__(self, graph: Graph, options: DropImageTokens) -> None:
        self.graph, self.options = graph, options
        self.attentions = cached_attentions(graph)
        first = self.attentions[0]
        self.first = Sizes(
            expression(value_of(first.trunk).shape[0]),
            expression(value_of(first.trunk).shape[1]),
            expression(value_of(first.past).shape[2]),
        )
        self._check_sizes(first)
        self.representative = representatives(graph.nodes())
        self.origin: dict[fx.Node, fx.Node] = {}
        self.image = self._image_mask(first.trunk)

    def _image_mask(self, trunk: fx.Node) -> fx.Node:
        """Return the mask of image tokens, ``[B, S]`` int64."""
        if self.options.image_token is None:
            return insert_input(self.graph, IMAGE_MASK, trunk, value_of(trunk).shape[:2], torch.int64)
        named = dict(zip(self.graph.inputs, self.graph.placeholders(), strict=True))
        if IDS not in named:
            raise PassError(f"found the inputs {', '.join(named)}; expected {IDS}, which tell image tokens from text.")
        call = functools.partial(insert_call, self.graph, before=self.graph.placeholders()[-1].next)
        return call(aten.to.dtype, call(aten.eq.Scalar, named[IDS], self.options.image_token), torch.int64)

    def _check_sizes(self, first: CachedAttention) -> None:
        if any(isinstance(size, int) for size in (self.first.tokens, self.first.past)):
            raise PassError(
                f"the trunk {first.trunk.name} has {self.first.tokens} tokens behind a cache of {self.first.past}; "
                "expected a dynamic number of both."
            )

    def run(self) -> tuple[str, ...]:
        """Insert the stages from the first to the last."""
        names = []
        stage: _Stage | None = None
        for depth, share in self.options.stages:
            stage = _Stage(self, self._attention(depth), depth, share, stage)
            stage.run()
            names.append(stage.attention.site.name)
        return tuple(names)

    def _attention(self, depth: int) -> CachedAttention:
        """Return the first attention at a depth or behind it."""
        behind = [each for each in self.attentions if each.depth >= depth]
        if not behind:
            last = self.attentions[-1].depth
            raise PassError(
                f"found a stage at depth {depth}, but the last block with an attention is number {last}, counted from "
                f"0; expected depths from 1 to {last}."
            )
        return behind[0]


class _Stage:
    """One stage: ranks image tokens before an attention, and narrows the graph behind to the remaining ones."""

    def __init__(
        self, stages: _Stages, attention: CachedAttention, depth: int, share: float, before: _Stage | None
    ) -> None:
        self.stages, self.graph = stages, stages.graph
        self.attention, self.depth, self.share, self.before = attention, depth, share, before
        self.trunk = attention.trunk
        if before is not None and before.trunk is self.trunk:
            raise PassError(
                f"the stages at the depths {before.depth} and {depth} are both before {attention.site.name}; "
                "leave one out."
            )
        rows, tokens = sizes_of(self.trunk)[:2]
        past = stages.first.past if before is None else expression(value_of(before.past_tokens).shape[1])
        self.sizes = Sizes(rows, tokens, past)
        self.first_reader = min(self.trunk.users, key=self.graph.nodes().index)
        self.call = functools.partial(insert_call, self.graph, before=self.first_reader)

    def run(self) -> None:
        """Insert the stage."""
        self._free_caches()
        region = self._region()
        outside = [node for node in self.graph.nodes() if node not in region and node.op != "output"]
        position = outside_from(outside, self.graph.nodes().index(self.first_reader), self.graph)
        move_before(position, self.first_reader)
        self.past = self.call(aten.sym_size.int, self.stages.attentions[0].past, 2)
        self.tokens = self.call(aten.sym_size.int, self.stages.image, 1)
        score = self._score(region)
        self._select(score)
        self._narrow(region)

    # ------------------------------------------------------------------------------------------------------- caches

    def _free_caches(self) -> None:
        """Give the caches behind the stage a length of their own, and add the indices of their tokens."""
        size = new_size(self.graph, f"past_sequence_{self.depth}", EXAMPLE + 2 * self.depth)
        first = self.stages.attentions[0].past
        names = dict(zip(self.graph.inputs, self.graph.placeholders(), strict=True))
        behind = self._descendants([self.trunk])
        outputs = dict(zip(self.graph.outputs, output_values(self.graph), strict=True))
        self.pasts = []
        for present, past in self.graph.state.items():
            node = names.get(past)
            if node is None or outputs[present] not in behind:
                continue
            self.pasts.append(node)
            for axis, length in enumerate(sizes_of(node)):
                if length != self.sizes.past:
                    continue
                for reader in [each for each in node.users if each.target is aten.sym_size.int]:
                    if reader.args[1] == axis:
                        replace_input(self.graph, reader, node, first)
                        set_arguments(self.graph, reader, first, 2)
                resize(self.graph, node, axis, size)
        rows = value_of(self.trunk).shape[0]
        name = f"past_tokens.{self.depth}"
        self.past_tokens = insert_input(self.graph, name, self.trunk, (rows, size), torch.int64)

    def _region(self) -> set[fx.Node]:
        """Return all nodes that are computed from the trunk, or from the caches behind the stage."""
        readers = [reader for past in self.pasts for reader in past.users if reader.target is not aten.sym_size.int]
        return self._descendants([self.trunk, *readers]) | set(readers)

    def _descendants(self, nodes: Collection[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            for reader in stack.pop().users:
                if reader not in found and reader.op != "output":
                    found.add(reader)
                    stack.append(reader)
        return found

    # ------------------------------------------------------------------------------------------------------ ranking

    def _previous(self) -> fx.Node:
        """Return the indices of the trunk's tokens among those of the call, ``[B, S]``."""
        if self.before is not None:
            return self.before.original
        options = {"dtype": torch.int64, "device": value_of(self.trunk).device}
        indices = self.call(aten.unsqueeze.default, self.call(aten.arange.default, self.tokens, options=options), 0)
        rows = self.call(aten.sym_size.int, self.trunk, 0)
        return self.call(aten.expand.default, indices, [rows, -1])

    def _score(self, region: set[fx.Node]) -> fx.Node:
        """Insert the score of each token of the trunk, ``[B or 1, S]``."""
        self.previous = self._previous()
        self.image = self.stages.image
        if self.before is not None:
            self.image = self.call(aten.gather.default, self.image, 1, self.previous)
        method, call = self.stages.options.method, self.call
        if method == "random":
            return ranking.random_scores(call, self.image, self.stages.options.seed + self.depth)
        order = [node for node in self.graph.nodes() if node in region]
        keys = self._copied(self.attention.keys, region, None)
        if method == "norm":
            return ranking.low_norm(call, keys)
        fused = self.attention.fused(order)
        last = self._last_token()
        query = self._copied(fused.args[0], region, last)  # type: ignore[arg-type]
        mask = option(fused, "attn_mask")
        if mask is not None and mask in region:
            raise PassError(f"{fused.name} has a mask that depends on tokens; choose the method norm or random.")
        return ranking.attention_received(call, fused, query, keys, None if mask is None else last.at(fused, mask))

    def _last_token(self) -> Subset:
        """Return the last token of each row that is no padding."""
        named = dict(zip(self.graph.inputs, self.graph.placeholders(), strict=True))
        call = self.call
        last = ranking.last_token(call, named.get("attention_mask"), self.stages.image, self.tokens)
        earlier = call(aten.to.dtype, call(aten.lt.Tensor, self.previous, last), torch.int64)
        relative = call(aten.sum.dim_IntList, earlier, [1], True)
        columns = call(aten.add.Tensor, self.previous, self.past)
        return self._subset(last, relative, columns, 1, None)

    def _subset(self, original: fx.Node, relative: fx.Node, columns: fx.Node, count: Any, past: Any) -> Subset:
        origin, representative = self.stages.origin, self.stages.representative
        first, sizes = self.stages.first, self.sizes
        subset = Subset(
            self.call, first, sizes, original, relative, columns, count, past, origin, representative
        )
        subset.mapped[self.trunk] = take(self.call, self.trunk, 1, relative)
        return subset

    def _copied(self, target: fx.Node, region: set[fx.Node], subset: Subset | None) -> fx.Node:
        """Insert a copy of the nodes between the trunk and a node before the stage, at a subset of the tokens."""
        needed, stack = {target}, [target]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in region and source not in needed:
                    needed.add(source)
                    stack.append(source)
        copies: dict[fx.Node, fx.Node] = {} if subset is None else subset.mapped
        for node in self.graph.nodes():
            if node in needed:
                if subset is None:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: copies.get(source, source))
                else:
                    args, kwargs = subset.arguments(node, region)
                copies[node] = self.call(node.target, *args, options=kwargs)
        return copies[target]

    # ---------------------------------------------------------------------------------------------------- narrowing

    def _select(self, score: fx.Node) -> None:
        """Insert the indices of the remaining tokens and of those in the caches behind the stage."""
        call, rows = self.call, value_of(self.trunk).shape[0]
        ranked = ranking.kept_in_order(call, score, self.image)
        removed = ranking.removed_tokens(call, self.stages.image, self.share)
        first = self._first_places(removed)
        kept = call(aten.index_select.default, ranked, 1, first)
        self.count = call(aten.sym_size.int, first, 0)
        self.relative = call(operator.getitem, call(aten.sort.default, kept, 1), 0)
        self.original = self.relative
        if self.before is not None:
            self.original = call(aten.gather.default, self.previous, 1, self.relative)
        new = call(aten.add.Tensor, self.original, self.past)
        self.columns = call(aten.cat.default, [self.past_tokens, new], 1)
        name = f"present_tokens.{self.depth}"
        insert_output(self.graph, name, self.columns)
        self.graph.state = {**self.graph.state, name: f"past_tokens.{self.depth}"}

    def _first_places(self, removed: fx.Node) -> fx.Node:
        """Return the numbers from 0, as many as tokens remain; their number depends on the data."""
        options = {"dtype": torch.int64, "device": value_of(self.trunk).device}
        places = self.call(aten.arange.default, self.call(aten.sym_size.int, self.trunk, 1), options=options)
        remaining = self.call(aten.lt.Scalar, self.call(aten.add.Tensor, places, removed), self.tokens)
        size = new_size(self.graph, f"sequence_{self.depth}", EXAMPLE + 2 * self.depth + 1)
        found = insert_call_of_value(
            self.graph,
            aten.nonzero.default,
            remaining,
            value=empty_like(self.graph, self.trunk, (size, 1), torch.int64),
            before=self.first_reader,
        )
        return self.call(aten.squeeze.dim, found, 1)

    def _narrow(self, region: set[fx.Node]) -> None:
        """Let all nodes behind the stage compute the remaining tokens."""
        past = self.call(aten.sym_size.int, self.past_tokens, 1)
        subset = self._subset(self.original, self.relative, self.columns, self.count, past)
        for node in [node for node in self.graph.nodes() if node in region]:
            args, kwargs = subset.arguments(node, region)
            set_arguments(self.graph, node, *args, options=kwargs)
            if any(sizes.stale(size) for sizes in (self.stages.first, self.sizes) for size in sizes_of(node)):
                raise PassError(
                    f"image tokens cannot be dropped at depth {self.depth}: {node.name} ({node.target}) has all tokens "
                    "behind the stage."
                )


def outside_from(outside: list[fx.Node], start: int, graph: Graph) -> list[fx.Node]:
    """Return those of some nodes that follow a position."""
    behind = set(graph.nodes()[start:])
    return [node for node in outside if node in behind]
