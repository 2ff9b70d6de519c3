"""The call of a vision-language model with its KV cache: one graph for images, for texts, and for every further token.

The graph reads images and the tokens of a text in which each image has its placeholders, one for each of its features.
It returns, besides the logits and the cache, the values at which it is cut into files, see
`compressor.lower.cut_vision_language`: the features of the images, the embeddings of the tokens, and the embeddings in
which features stand in the places of placeholders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from compressor.models.text.kv_cache import PAST_TOKENS, Causal
from compressor.models.vision_language.images import Images
from runtimes.base.grid_positions import grid_positions
from runtimes.base.vision_language import EMBEDS, FEATURES, GRID, IDS, MASK, POSITIONS, TEXT_EMBEDS

Feeds = dict[str, npt.NDArray[Any]]
TYPES, MODALITIES = "token_type_ids", "mm_token_type_ids"
PER_LAYER = "per_layer_inputs"
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class VisionLanguage:
    """How a vision-language model is called with its cache.

    Attributes:
        images: the images of each row, and their inputs of the vision tower.
        causal: the call of the language model.
        image_token: token id of the placeholders of images.
        bidirectional: tokens of the prompt also attend to later ones, as in PaliGemma; a single further token has none.
        merge: side of the square of patches that an image token stands for, of a model whose positions have three axes,
            ``position_ids`` [rows, tokens, 3]; None for positions of one axis.
        within_images: types of the layers in which tokens of an image also attend to later ones of it: all of Gemma 3,
            those with a sliding window of Gemma 4.
        beyond_window: they also attend to those farther back than a sliding window, as in Gemma 3.
        embeds_itself: the class does not look up each token of a text in the table, see `embedded`.
    """

    images: Images
    causal: Causal
    image_token: int
    bidirectional: bool = False
    merge: int | None = None
    within_images: tuple[str, ...] = ()
    beyond_window: bool = False
    embeds_itself: bool = False

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """Return the inputs of the vision tower, ``pixel_values`` first."""
        return tuple(self.images.dynamic_axes)

    @property
    def data_inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs that come from the data."""
        return (*self.image_inputs, *self.causal.token_inputs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return all input names in order."""
        return (*self.image_inputs, *self.causal.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return all output names in order."""
        return (*self.causal.outputs, FEATURES, TEXT_EMBEDS, EMBEDS)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of every input."""
        return self.images.dynamic_axes | self.causal.dynamic_axes

    def example(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add a short cache to the example inputs of the data."""
        tokens = self.causal.example({name: values[name] for name in self.causal.token_inputs})
        if self.merge is not None:
            places = self._positions({name: value.numpy() for name, value in values.items()})
            tokens[POSITIONS] = torch.from_numpy(places) + PAST_TOKENS
        return {name: values[name] for name in self.image_inputs} | tokens

    def complete(self, feeds: Feeds) -> Feeds:
        """Add position ids and an empty cache to feeds of the data."""
        completed = self.causal.complete(feeds)
        return completed if self.merge is None else completed | {POSITIONS: self._positions(feeds)}

    def _positions(self, feeds: Feeds) -> npt.NDArray[np.int64]:
        """Return the positions of the tokens of prompts on three axes, [rows, tokens, 3]."""
        assert self.merge is not None
        return grid_positions(feeds[IDS], feeds[MASK], feeds.get(GRID), self.image_token, self.merge)

    def _masks(self, is_image: torch.Tensor, mask: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
        return masks_within_images(is_image, mask, config, self.within_images, beyond_window=self.beyond_window)

    def call(self, module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits [rows, tokens, vocabulary], the cache, and the values at which the graph is cut."""
        count = len(self.image_inputs)
        images, (ids, *rest) = tensors[:count], tensors[count:]
        torch._check(images[0].shape[0] == ids.shape[0])
        features = self.images.features(module, *images)
        is_image = ids == self.image_token
        table = module.get_input_embeddings()
        width = table.weight.shape[1]
        if self.embeds_itself:
            text = torch.cat(embedded(module, ids), -1)
        else:
            known = ids if self.image_token < table.weight.shape[0] else torch.where(is_image, 0, ids)
            text = torch.nn.functional.pad(table(known), (0, features.shape[-1] - width))
        merged = merge(features, text, is_image)

        def language(**arguments: Any) -> Any:
            del arguments[IDS]
            if self.bidirectional:
                mask = arguments[MASK].to(torch.bool)[:, None, None, :]
                arguments[MASK] = mask.expand(-1, 1, ids.shape[1], -1)
            if self.within_images:
                arguments[MASK] = self._masks(is_image, arguments[MASK], module.config.get_text_config())
            if self.merge is not None:
                arguments[POSITIONS] = arguments[POSITIONS].permute(2, 0, 1)
            embeds, stacked = merged, tuple[torch.Tensor, ...]()
            if merged.shape[-1] > width:
                embeds, behind = merged[..., :width], merged[..., width:]
                if self.embeds_itself:
                    layers = module.config.get_text_config().num_hidden_layers
                    arguments[PER_LAYER] = behind.reshape(*behind.shape[:2], layers, -1)
                else:
                    stacked = torch.split(behind, width, -1)
            with added_behind_blocks(module, stacked):
                return language_of(module)(inputs_embeds=embeds, **arguments)

        return (*self.causal.call(language, ids, *rest), features, text, merged)


def language_of(module: Any) -> Any:
    """Return what computes the logits from embeddings: the module, or its language model, as in BLIP-2.

    BLIP-2's own forward always reads pixels.
    """
    return module.language_model if getattr(module.config, "use_decoder_only_language_model", False) else module


def embedded(module: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a module hands to its language model for a text, each [rows, tokens, width].

    These are the embeddings of its tokens and, behind them, those of each block that adds its own, as in Gemma 3n and
    Gemma 4. These classes look placeholders up as padding, and the tokens around them in tables of their own.
    """
    found: list[torch.Tensor] = []

    def keep(*, inputs_embeds: torch.Tensor, per_layer_inputs: torch.Tensor | None = None, **_: Any) -> Any:
        found.extend([inputs_embeds] if per_layer_inputs is None else [inputs_embeds, per_layer_inputs.flatten(2)])
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    with mock.patch.object(module.get_decoder(), "forward", keep):
        getattr(module, "model", module)(input_ids=ids, use_cache=False)
    return tuple(found)


@contextlib.contextmanager
def added_behind_blocks(module: Any, stacked: Sequence[torch.Tensor]) -> Iterator[None]:
    """Add a value to the output of each of the first blocks of a language model, as Qwen3-VL does at image tokens."""
    blocks = module.get_decoder().layers if stacked else ()
    with contextlib.ExitStack() as stack:
        for block, each in zip(blocks, stacked, strict=False):
            hook = block.register_forward_hook(lambda _, inputs, output, each=each: output + each)
            stack.callback(hook.remove)
        yield


def masks_within_images(
    is_image: torch.Tensor, mask: torch.Tensor, config: Any, types: Sequence[str], *, beyond_window: bool
) -> dict[str, torch.Tensor]:
    """Return which tokens attend to which by the type of a layer, bool [rows, 1, tokens, all tokens].

    A token attends to those before it and, in an image and in layers of some types, to all tokens of it. In layers with
    a sliding window, it attends to none farther back than the window. A padding token attends to itself, so that none
    attends to nothing.

    Args:
        is_image: which of the tokens of this call stand for an image, bool [rows, tokens].
        mask: 0 at padding, int64 [rows, all tokens so far].
        config: config of the language model.
        types: the types of the layers in which a token attends to later ones of its image.
        beyond_window: a window does not keep it from those of its image.
    """
    every, new = mask.shape[1], is_image.shape[1]
    pad = torch.nn.functional.pad
    begins = is_image & ~pad(is_image, (1, -1))
    image = pad(torch.where(is_image, begins.cumsum(1), 0), (every - new, 0))  # number of the image, 0 for text
    key, query = torch.arange(every)[None, None], torch.arange(every - new, every)[None, :, None]
    same = (image[:, None, :] == image[:, every - new :, None]) & (image[:, None, :] > 0)
    known, earlier = mask.to(torch.bool)[:, None, :], key <= query
    masks = {}
    for kind in dict.fromkeys((FULL, *config.layer_types)):
        inside = key > query - config.sliding_window if kind == SLIDING else torch.ones_like(earlier)
        seen = earlier & inside
        if kind in types:
            seen = seen | (same if beyond_window else same & inside)
        masks[kind] = (seen & known | (key == query))[:, None]
    return masks


def merge(features: torch.Tensor, text: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """Return embeddings [rows, tokens, width] in which placeholder number k of a row is replaced by its feature k.

    transformers does the same with ``masked_scatter`` over all rows, which has no form in ONNX that depends on a row
    alone. Embeddings may be wider: what stands behind the width of the features is that of the placeholder.

    Args:
        features: features of the images of each row, [rows, image tokens, width].
        text: embeddings of all tokens, [rows, tokens, width].
        is_image: whether a token is a placeholder, bool [rows, tokens].
    """
    number = (is_image.to(torch.int64).cumsum(1) - 1).clamp(min=0, max=features.shape[1] - 1)
    placed = features.gather(1, number[..., None].expand(-1, -1, features.shape[2]))
    width = features.shape[2]
    merged = torch.where(is_image[..., None], placed, text[..., :width])
    return merged if text.shape[2] == width else torch.cat([merged, text[..., width:]], -1)
