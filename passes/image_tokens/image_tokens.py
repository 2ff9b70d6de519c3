"""Pass that drops image tokens from a language model's prompt, in stages (PyramidDrop)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from passes.base import PassError, Rewritten
from passes.graph.edit import insert_call, insert_input, remove_dead
from passes.graph.graph import value_of
from passes.image_tokens.cached_attention import cached_attentions
from passes.image_tokens.stage import Kept, LanguageModel, Stage, size_of_state
from passes.image_tokens.subset import representatives

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import fx

    from passes.graph.graph import Graph
    from passes.image_tokens.cached_attention import CachedAttention

aten = torch.ops.aten
Method = Literal["attention", "norm", "random"]
IMAGE_MASK, IDS = "image_token_mask", "input_ids"
INDICES = ".tokens"  # end of the names of state that holds which tokens are in a cache


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

    - ``past_key_values.8.tokens`` ``[batch, past_sequence_8]`` and ``present.8.tokens``, for a stage at depth 8: which
      of the tokens so far the caches behind the stage hold, as indices into ``attention_mask``.

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
        attentions = cached_attentions(fork)
        first = attentions[0]
        nodes = fork.nodes()
        image = self._image_mask(fork, first.trunk)
        model = LanguageModel(fork, first, image, self.method, self.seed, representatives(nodes))
        if any(isinstance(size, int) for size in (model.sizes.tokens, model.sizes.past)):
            raise PassError(
                f"the trunk {first.trunk.name} has {model.sizes.tokens} tokens behind a cache of {model.sizes.past}; "
                "expected a dynamic number of both."
            )
        kept: Kept | None = None
        names = []
        for depth, share in self.stages:
            attention = _attention(attentions, depth)
            kept = Stage(model, attention, depth, share, kept).insert()
            names.append(attention.site.name)
        remove_dead(fork)
        graph.module, graph.inputs, graph.outputs, graph.state = fork.module, fork.inputs, fork.outputs, fork.state
        return Rewritten(changed=tuple(names))

    def _image_mask(self, graph: Graph, trunk: fx.Node) -> fx.Node:
        """Return the mask of image tokens, ``[B, S]`` int64."""
        if self.image_token is None:
            return insert_input(graph, IMAGE_MASK, trunk, value_of(trunk).shape[:2], torch.int64)
        named = dict(zip(graph.inputs, graph.placeholders(), strict=True))
        if IDS not in named:
            raise PassError(f"found the inputs {', '.join(named)}; expected {IDS}, which tell image tokens from text.")
        call = functools.partial(insert_call, graph, before=graph.placeholders()[-1].next)
        return call(aten.to.dtype, call(aten.eq.Scalar, named[IDS], self.image_token), torch.int64)


def _attention(attentions: Sequence[CachedAttention], depth: int) -> CachedAttention:
    """Return the first attention at a depth or behind it.

    It is none of the first attention, whose cache tells the number of all tokens so far.
    """
    first, last = attentions[0].depth, attentions[-1].depth
    if first < depth <= last:
        return next(each for each in attentions if each.depth >= depth)
    blocks = f"the attentions are in the blocks {first} to {last}, counted from 0"
    expected = f"a depth from {first + 1} to {last}" if first < last else "a language model with several attentions"
    raise PassError(f"found a stage at depth {depth}, but {blocks}; expected {expected}.")


def around_stages(graph: Graph) -> dict[str, str]:
    """Return the sites that stages need at any depth, with the reason: the first and the last attention with a cache.

    Without the first, no cache tells the number of all tokens, and without the last, a deep stage has no attention
    behind it.

    Raises:
        PassError: the graph has no attention with a KV cache.
    """
    attentions = cached_attentions(graph)
    reason = "stages of image tokens lie between the first and the last attention with a KV cache"
    return {attentions[end].site.name: reason for end in (0, -1)}


def stage_of_state(graph: Graph) -> dict[str, int]:
    """Return the depth of the stage before each input of state; those before the first stage are left out."""
    lengths = {name: size_of_state(graph, name) for name in graph.state.values() if name in graph.inputs}
    depths = {lengths[name]: int(name.split(".")[1]) for name in lengths if name.endswith(INDICES)}
    return {name: depths[length] for name, length in lengths.items() if length in depths}
