"""Causal language models with their KV cache: one graph for both prefill and decode.

Inputs and outputs have the names of Optimum, so that its ONNX classes and generation loops written for them work. The
inputs ``past_key_values.N.key`` and ``.value`` and the outputs ``present.N.key`` and ``.value`` have the shape
[batch, heads, tokens, head dimension]. Prefill is a call with an empty cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, first_line
from compressor.models.text.probe import TOKENS, calling, computes_with, text

Feeds = dict[str, npt.NDArray[Any]]

PAST_TOKENS = 5  # cache length of the example; torch.export treats the sizes 0 and 1 as constants
# Name of the cache in the arguments and outputs of a decoder: since transformers 5.24, and in earlier releases.
CACHE_NAMES = ("cache", "past_key_values")
LEFT_OUT = Limitation("KV cache", "left out by --no-cache, so every new token recomputes the whole text")


class NoCacheError(Exception):
    """A module that cannot be called with a cache; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True)
class Causal:
    """The call of a causal language model with its KV cache.

    Attributes:
        token_inputs: inputs that come from the data.
        derived_inputs: inputs that are derived from them: the position ids.
        sizes: number of heads and head dimension of the keys and of the values of each layer. They differ where the
            cache holds a compressed form of both, as in DeepSeek-V2's latent attention (Liu et al. 2024).
        argument: keyword argument of the module that takes the cache.
        entry: name of the cache in the module's output.
    """

    token_inputs: tuple[str, ...]
    derived_inputs: tuple[str, ...]
    sizes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    argument: str
    entry: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return all input names in order."""
        return (*self.token_inputs, *self.derived_inputs, *self.state.values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return all output names in order."""
        return ("logits", *self.state)

    @property
    def state(self) -> dict[str, str]:
        """Return the mapping from an output of one call to the input of the next call."""
        return {
            f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
            for layer in range(len(self.sizes))
            for part in ("key", "value")
        }

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of every input."""
        axes = {name: {0: "batch", 1: "sequence"} for name in (*self.token_inputs, *self.derived_inputs)}
        axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
        return axes | {name: {0: "batch", 2: "past_sequence"} for name in self.state.values()}

    def example(self, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add a short, unmasked KV cache to the example inputs.

        Args:
            tokens: input name to int64 [rows, tokens].
        """
        rows = len(tokens["input_ids"])
        mask = torch.cat([torch.ones(rows, PAST_TOKENS, dtype=torch.int64), tokens["attention_mask"]], 1)
        generator = torch.Generator().manual_seed(0)
        past = {
            name: torch.randn(rows, heads, PAST_TOKENS, width, generator=generator)
            for name, (heads, width) in self._past().items()
        }
        position_ids = torch.from_numpy(positions(mask.numpy(), tokens["input_ids"].shape[1]))
        values = {**tokens, "attention_mask": mask, "position_ids": position_ids}
        return {name: values[name] for name in (*self.token_inputs, *self.derived_inputs)} | past

    def complete(self, feeds: Feeds) -> Feeds:
        """Add the derived inputs to feeds of the data: position ids and an empty cache."""
        rows, tokens = feeds["input_ids"].shape
        derived = {"position_ids": positions(feeds["attention_mask"], tokens)} if self.derived_inputs else {}
        past = {
            name: np.zeros((rows, heads, 0, width), dtype=np.float32) for name, (heads, width) in self._past().items()
        }
        return {**feeds, **derived, **past}

    def call(self, module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits [rows, tokens, vocabulary], then the keys and values of all tokens so far for each layer."""
        plain = dict(zip((*self.token_inputs, *self.derived_inputs), tensors, strict=False))
        past = tensors[len(plain) :]
        tokens = past[0].shape[2]
        for part in past[1:]:  # torch.export does not know that all layers have the same length
            torch._check(part.shape[2] == tokens)
        cache = _cache(zip(past[::2], past[1::2], strict=True))
        output = module(**plain, **{self.argument: cache}, use_cache=True)
        present = [part for layer in output_entry(output, self.entry).layers for part in (layer.keys, layer.values)]
        return (output_entry(output, "logits"), *present)

    def of(self, model: Model) -> Model:
        """Return the model with its cache as additional inputs and outputs."""
        return replace(
            model,
            call=self.call,
            inputs=self.inputs,
            outputs=self.outputs,
            answer="logits",
            example=self.example(model.example),
            dynamic_axes=self.dynamic_axes,
            preprocess=replace(model.preprocess, complete=self.complete),
            state=self.state,
        )

    def _past(self) -> dict[str, tuple[int, int]]:
        return dict(zip(self.state.values(), (size for layer in self.sizes for size in layer), strict=True))


def _cache(layers: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Return a cache with the given keys and values of each layer."""
    cache = DynamicCache()
    cache.layers = [filled_layer(keys, values) for keys, values in layers]
    return cache


def filled_layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """Return a cache layer with these keys and values; `update` would concatenate them to an empty tensor."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def output_entry(output: Any, name: str) -> Any:
    """Return an entry of an output by name; the output is a mapping, as in transformers, or has attributes."""
    return output[name] if isinstance(output, Mapping) else getattr(output, name)


def positions(mask: npt.NDArray[Any], tokens: int) -> npt.NDArray[np.int64]:
    """Return the positions of the last `tokens` tokens, without padding, as generation in transformers computes them.

    Args:
        mask: [rows, all tokens so far], 0 at padding.
        tokens: number of new tokens.
    """
    counted: npt.NDArray[np.int64] = (mask.cumsum(1) - 1).clip(min=0)[:, mask.shape[1] - tokens :].astype(np.int64)
    return counted


def with_cache(model: Model, wanted: bool) -> Model:
    """Return a language model with its KV cache as additional inputs and outputs, or without one if not `wanted`.

    Raises:
        ModelError: the cache is wanted but cannot be detected.
    """
    if not wanted:
        return replace(model, limitations=(*model.limitations, LEFT_OUT))
    try:
        return detect_cache(model.module, model.inputs).of(model)
    except NoCacheError as error:
        raise ModelError(
            f"the KV cache of {model.name} could not be detected: {error}; pass --no-cache to export without a cache, "
            "so that every new token recomputes the whole text."
        ) from error


def detect_cache(module: Any, data_inputs: tuple[str, ...]) -> Causal:
    """Detect how a module is called with its cache, by calling it.

    The module is called with a short text, then with one more token and the cache of the first call. The cache argument
    is the one for which the returned cache is longer by that token.

    Args:
        module: a causal language model with the calling convention of transformers.
        data_inputs: names of the inputs that come from the data.

    Raises:
        NoCacheError: the module does not return or does not accept a KV cache; the message is the reason.
    """
    missing = [name for name in ("input_ids", "attention_mask") if name not in data_inputs]
    if missing:
        raise NoCacheError(f"the model has no input {missing[0]}")
    with calling(module):
        try:
            entry, layers = _initial_cache(module)
            argument = _argument(module, entry, layers)
            takes_positions = computes_with(module, text(), "position_ids", torch.arange(TOKENS)[None])
        except NoCacheError:
            raise
        except Exception as error:  # a model's own code may raise anything
            raise NoCacheError(f"a call with a cache fails with {type(error).__name__}: {first_line(error)}") from error
    data_inputs = tuple(name for name in data_inputs if name != "position_ids")
    derived = ("position_ids",) if takes_positions else ()
    sizes = tuple((heads_and_width(keys), heads_and_width(values)) for keys, values in layers)
    return Causal(data_inputs, derived, sizes, argument, entry)


def heads_and_width(part: torch.Tensor) -> tuple[int, int]:
    """Return the number of heads and the head dimension of keys or values."""
    return part.shape[1], part.shape[3]


def _initial_cache(module: Any) -> tuple[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Call a module with a short text; return the name of the cache in its output, and each layer's keys and values."""
    try:
        output = module(**text(), use_cache=True)
    except TypeError as error:  # no such argument
        raise NoCacheError(f"its forward method has no argument use_cache ({first_line(error)})") from error
    entries = dict(output.items()) if isinstance(output, Mapping) else dict(getattr(output, "__dict__", {}))
    legacy = [name for name, value in entries.items() if name in CACHE_NAMES and isinstance(value, tuple | list)]
    if legacy:
        raise NoCacheError(
            f"its output contains {legacy[0]} as tuples of tensors, but a Cache object of transformers is expected"
        )
    caches = [name for name, value in entries.items() if hasattr(value, "layers")]
    if not caches:
        raise NoCacheError(f"its output contains no cache, only {', '.join(entries) or type(output).__name__}")
    return caches[0], keys_and_values(entries[caches[0]])


def keys_and_values(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of every layer, [1, heads, tokens, head dimension] each, of as many tokens."""
    layers = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if (
            not isinstance(keys, torch.Tensor)
            or not isinstance(values, torch.Tensor)
            or {keys.ndim, values.ndim} != {4}
        ):
            raise NoCacheError(f"layer {number} of its cache ({type(layer).__name__}) has no keys and values")
        if (keys.shape[0], keys.shape[2]) != (values.shape[0], values.shape[2]):
            raise NoCacheError(
                f"layer {number} of its cache has keys {list(keys.shape)} and values {list(values.shape)}; expected "
                "the same number of rows and tokens"
            )
        layers.append((keys, values))
    if not layers:
        raise NoCacheError("its cache has no layers")
    return layers


def _argument(module: Any, entry: str, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Return the keyword argument for the cache: the one for which the returned cache is longer by the new token."""
    names, refusals = tuple(dict.fromkeys((entry, *CACHE_NAMES))), []
    for name in names:
        inputs = text(1) | {"attention_mask": torch.ones(1, TOKENS + 1, dtype=torch.int64)}
        try:
            output = module(**inputs, **{name: _cache(iter(layers))}, use_cache=True)
        except Exception as error:  # a different argument name, or any error of the model's own code
            refusals.append(first_line(error))
            continue
        if keys_and_values(output_entry(output, entry))[0][0].shape[2] == TOKENS + 1:
            return name
    reason = f" ({refusals[0]})" if refusals else ""
    raise NoCacheError(f"it returns a cache but does not accept one as {' or '.join(names)}{reason}")
