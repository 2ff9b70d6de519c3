"""The call of an encoder-decoder with its caches: one graph for the encoder and for every step of its decoder.

Inputs and outputs have the names of Optimum. ``past_key_values.N.decoder.key`` and ``present.N.decoder.key`` are the
cache of the self-attention of layer N, [batch, heads, tokens so far, head dimension]. ``present.N.encoder.key`` are the
keys of its cross-attention, [batch, heads, source tokens, head dimension], which depend on the encoder alone. They have
no input here: the file of the decoder that is cut from the graph reads them as ``past_key_values.N.encoder.key``, see
`compressor.lower.cut.encoder_decoder`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from compressor.models.base import first_line
from compressor.models.encoder_decoder.causal_mask import mask_later_tokens, reads_ahead
from compressor.models.text.kv_cache import (
    CACHE_NAMES,
    PAST_TOKENS,
    NoCacheError,
    filled_layer,
    heads_and_width,
    keys_and_values,
    output_entry,
)

Feeds = dict[str, npt.NDArray[Any]]
Sizes = tuple[tuple[tuple[int, int], tuple[int, int]], ...]

DECODER_IDS = "decoder_input_ids"
HIDDEN = "encoder_last_hidden_state"
TOKENS = 3  # decoder tokens of the call that detects the caches
SELF, CROSS = "decoder", "encoder"  # the parts of a layer's cache, by the tower that its keys are computed from


def names(part: str, layers: int) -> dict[str, str]:
    """Return the outputs of a part of the cache, each with the input that it becomes in the next call.

    >>> names("encoder", 1)["present.0.encoder.key"]
    'past_key_values.0.encoder.key'
    """
    return {
        f"present.{layer}.{part}.{tensor}": f"past_key_values.{layer}.{part}.{tensor}"
        for layer in range(layers)
        for tensor in ("key", "value")
    }


@dataclass(frozen=True)
class EncoderDecoder:
    """How an encoder-decoder is called with its caches.

    Attributes:
        encoder_inputs: inputs of the encoder, from the data.
        sizes: number of heads and head dimension of the keys and of the values of each self-attention.
        cross_layers: number of cross-attentions.
        argument: keyword argument of the module that takes the cache.
        entry: name of the cache in the module's output.
        axes: dynamic axes of the inputs of the encoder.
        told: whether the module is told to return a cache; one whose encoder refuses that does it by its config.
    """

    encoder_inputs: tuple[str, ...]
    sizes: Sizes
    cross_layers: int
    argument: str
    entry: str
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    told: bool = True

    @property
    def data_inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs that come from the data."""
        return (*self.encoder_inputs, DECODER_IDS)

    @property
    def pasts(self) -> dict[str, str]:
        """Return the outputs of the self-attention caches with their inputs."""
        return names(SELF, len(self.sizes))

    @property
    def state(self) -> dict[str, str]:
        """Return the mapping from an output of one call to the input of the next call."""
        return self.pasts | names(CROSS, self.cross_layers)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return all input names in order."""
        return (*self.data_inputs, *self.pasts.values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return all output names in order."""
        return ("logits", HIDDEN, *self.state)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of every input."""
        source = {name: dict(self.axes.get(name, {0: "batch"})) for name in self.encoder_inputs}
        past = {name: {0: "batch", 2: "past_decoder_sequence"} for name in self.pasts.values()}
        return source | {DECODER_IDS: {0: "batch", 1: "decoder_sequence"}} | past

    def example(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add short caches of the self-attentions to the example inputs of the data."""
        rows, generator = len(values[DECODER_IDS]), torch.Generator().manual_seed(0)
        past = {
            name: torch.randn(rows, heads, PAST_TOKENS, width, generator=generator)
            for name, (heads, width) in self._past_sizes().items()
        }
        return {name: values[name] for name in self.data_inputs} | past

    def complete(self, feeds: Feeds) -> Feeds:
        """Add empty caches of the self-attentions to feeds of the data."""
        rows = len(feeds[DECODER_IDS])
        past = {
            name: np.zeros((rows, heads, 0, width), dtype=np.float32)
            for name, (heads, width) in self._past_sizes().items()
        }
        return {**feeds, **past}

    def call(self, module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits [rows, decoder tokens, vocabulary], the encoder's hidden states, and the caches.

        The decoder reads no padding: padded targets end in it, and no earlier token attends to it.
        """
        plain = dict(zip(self.data_inputs, tensors, strict=False))
        past = tensors[len(plain) :]
        tokens = past[0].shape[2]
        for part in past[1:]:  # torch.export does not know that all layers have the same length
            torch._check(part.shape[2] == tokens)
        cache = _cache([filled_layer(*pair) for pair in zip(past[::2], past[1::2], strict=True)], self.cross_layers)
        output = self._output(module, plain, cache, tokens)
        present = output_entry(output, self.entry)
        layers = [*present.self_attention_cache.layers, *present.cross_attention_cache.layers]
        parts = [part for layer in layers for part in (layer.keys, layer.values)]
        return (output_entry(output, "logits"), output_entry(output, HIDDEN), *parts)

    def _output(self, module: Any, plain: Mapping[str, torch.Tensor], cache: Cache, tokens: int) -> Any:
        ids = plain[DECODER_IDS]
        mask = ids.new_ones(ids.shape[0], ids.shape[1] + tokens)
        told = {"use_cache": True} if self.told else {}
        return module(**plain, decoder_attention_mask=mask, **{self.argument: cache}, **told)

    def _past_sizes(self) -> dict[str, tuple[int, int]]:
        return dict(zip(self.pasts.values(), (size for layer in self.sizes for size in layer), strict=True))


class _ComputedOnce(DynamicLayer):  # type: ignore[misc]
    """An empty layer of a cache that holds the keys and values that it gets, without appending them to an empty one."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store and return the keys and values."""
        self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _cache(layers: list[DynamicLayer], cross_layers: int) -> EncoderDecoderCache:
    """Return a cache with the given layers of self-attentions, and none of the cross-attentions computed."""
    own, cross = DynamicCache(), DynamicCache()
    own.layers, cross.layers = layers, [_ComputedOnce() for _ in range(cross_layers)]
    return EncoderDecoderCache(own, cross)


def detect_caches(
    module: Any, encoder_feeds: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[int, str]]
) -> EncoderDecoder:
    """Detect how a module is called with its caches, by calling it.

    Args:
        module: an encoder-decoder with the calling convention of transformers.
        encoder_feeds: inputs of the encoder, one row or more.
        axes: their dynamic axes.

    Raises:
        NoCacheError: the module does not return or does not accept a cache with both parts; the message is the reason.
    """
    mask_later_tokens(module)
    rows = len(next(iter(encoder_feeds.values())))
    feeds = {**encoder_feeds, DECODER_IDS: torch.zeros(rows, TOKENS, dtype=torch.int64)}
    with torch.inference_mode():
        output, told = _with_cache(module, feeds)
        entry = next((name for name in CACHE_NAMES if isinstance(output.get(name), EncoderDecoderCache)), None)
        if entry is None:
            raise NoCacheError("its output contains no cache of self-attentions and cross-attentions")
        if output.get(HIDDEN) is None:
            raise NoCacheError(f"its output contains no {HIDDEN}")
        own = keys_and_values(output[entry].self_attention_cache)
        cross = keys_and_values(output[entry].cross_attention_cache)
        sizes = tuple((heads_and_width(keys), heads_and_width(values)) for keys, values in own)
        reasons = []
        for argument in dict.fromkeys((entry, *CACHE_NAMES)):
            found = EncoderDecoder(tuple(encoder_feeds), sizes, len(cross), argument, entry, axes, told)
            try:
                outputs = dict(zip(found.outputs, found.call(module, *found.example(feeds).values()), strict=True))
            except Exception as error:
                reasons.append(first_line(error))
                continue
            if all(outputs[name].shape[2] == PAST_TOKENS + TOKENS for name in found.pasts):
                _check_causal(found, module, feeds)
                return found
    raise NoCacheError(f"it returns a cache but does not accept one{f' ({reasons[0]})' if reasons else ''}")


def _with_cache(module: Any, feeds: Mapping[str, torch.Tensor]) -> tuple[Any, bool]:
    """Return the output of a module with its caches, and whether the module is told to return them.

    Switch Transformers hands the argument on to its encoder, which refuses it.

    Raises:
        NoCacheError: it fails either way.
    """
    try:
        return module(**feeds, use_cache=True), True
    except Exception as error:  # a model's own code may raise anything
        with contextlib.suppress(Exception):
            return module(**feeds), False
        raise NoCacheError(f"a call with {' and '.join(feeds)} fails ({first_line(error)})") from error


def _check_causal(found: EncoderDecoder, module: Any, feeds: Mapping[str, torch.Tensor]) -> None:
    """Raise `NoCacheError` if the decoder predicts a token from those behind it."""
    example = found.example(feeds)
    if reads_ahead(lambda ids: found.call(module, *{**example, DECODER_IDS: ids}.values())[0], feeds[DECODER_IDS]):
        raise NoCacheError("with a cache, its decoder reads the tokens behind the one that it predicts")
