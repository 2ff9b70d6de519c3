"""Causal language models with their KV cache: one graph for both prefill and decode.

Inputs and outputs have the names of Optimum, so that its ONNX classes and generation loops written for them work. The
inputs ``past_key_values.N.key`` and ``.value`` and the outputs ``present.N.key`` and ``.value`` have the shape
[batch, heads, tokens, head dimension]. Prefill is a call with an empty cache.

A layer with a short convolution in place of attention, as in LFM2, keeps the last inputs of its convolution: the input
``past_conv.N`` and the output ``present_conv.N``, [batch, channels, kernel], as transformers.js names them. Before the
first token they are zero, as the padding of the convolution is.

A layer that reads the keys and values of an earlier one, as the last layers of Gemma 3n do, has no inputs or outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from compressor.limitations import Limitation
from compressor.models.base import LEFT_OUT, RECOMPUTES, Model, UndetectedCacheError, first_line
from compressor.models.text.probe import TOKENS, calling, computes_with, text

Feeds = dict[str, npt.NDArray[Any]]

PAST_TOKENS = 5  # cache length of the example; torch.export treats the sizes 0 and 1 as constants
# Name of the cache in the arguments and outputs of a decoder: since transformers 5.24, and in earlier releases.
CACHE_NAMES = ("cache", "past_key_values")
MATRIX = 4  # axes of keys and values
NEVER = Limitation("KV cache", f"the class of transformers has none, {RECOMPUTES}")
STATES = ("use_cache", *CACHE_NAMES, "mems", "state")  # arguments with which a class is given what it computed before


class NoCacheError(Exception):
    """A module that cannot be called with a cache; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True)
class Convolution:
    """The state of a layer with a short convolution: its last `kernel` inputs."""

    channels: int
    kernel: int


@dataclass(frozen=True)
class NoState:
    """A layer that keeps nothing: it reads the keys and values of an earlier one, or has no attention."""


# Number of heads and head dimension of the keys and of the values.
KeysAndValues = tuple[tuple[int, int], tuple[int, int]]
# State of a layer: that of a convolution, or keys and values.
State = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | NoState


@dataclass(frozen=True)
class Causal:
    """The call of a causal language model with its KV cache.

    Attributes:
        token_inputs: inputs that come from the data.
        derived_inputs: inputs that are derived from them: the position ids.
        sizes: number of heads and head dimension of the keys and of the values of each layer. They differ where the
            cache holds a compressed form of both, as in DeepSeek-V2's latent attention (Liu et al. 2024). For a layer
            with a convolution, its channels and its kernel; some layers have none.
        argument: keyword argument of the module that takes the cache.
        entry: name of the cache in the module's output.
    """

    token_inputs: tuple[str, ...]
    derived_inputs: tuple[str, ...]
    sizes: tuple[KeysAndValues | Convolution | NoState, ...]
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
        names: dict[str, str] = {}
        for layer, size in enumerate(self.sizes):
            if isinstance(size, Convolution):
                names[f"present_conv.{layer}"] = f"past_conv.{layer}"
            elif not isinstance(size, NoState):
                names |= {f"present.{layer}.{part}": f"past_key_values.{layer}.{part}" for part in ("key", "value")}
        return names

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of every input."""
        axes = {name: {0: "batch", 1: "sequence"} for name in (*self.token_inputs, *self.derived_inputs)}
        axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
        return axes | {
            name: {0: "batch"} | ({2: "past_sequence"} if len(shape) == MATRIX else {})
            for name, shape in self._past(1, 0).items()
        }

    def example(self, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add a short, unmasked KV cache to the example inputs.

        Args:
            tokens: input name to int64 [rows, tokens].
        """
        rows = len(tokens["input_ids"])
        mask = torch.cat([torch.ones(rows, PAST_TOKENS, dtype=torch.int64), tokens["attention_mask"]], 1)
        generator = torch.Generator().manual_seed(0)
        past = {name: torch.randn(shape, generator=generator) for name, shape in self._past(rows, PAST_TOKENS).items()}
        position_ids = torch.from_numpy(positions(mask.numpy(), tokens["input_ids"].shape[1]))
        values = {**tokens, "attention_mask": mask, "position_ids": position_ids}
        return {name: values[name] for name in (*self.token_inputs, *self.derived_inputs)} | past

    def complete(self, feeds: Feeds) -> Feeds:
        """Add the derived inputs to feeds of the data: position ids and an empty cache."""
        rows, tokens = feeds["input_ids"].shape
        derived = {"position_ids": positions(feeds["attention_mask"], tokens)} if self.derived_inputs else {}
        past = {name: np.zeros(shape, dtype=np.float32) for name, shape in self._past(rows, 0).items()}
        return {**feeds, **derived, **past}

    def call(self, module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return logits [rows, tokens, vocabulary], then the state of each layer, see `state`."""
        plain = dict(zip((*self.token_inputs, *self.derived_inputs), tensors, strict=False))
        past = tensors[len(plain) :]
        lengths = [part.shape[2] for part in past if part.ndim == MATRIX]
        for length in lengths[1:]:  # torch.export does not know that all layers have the same length
            torch._check(length == lengths[0])
        cache = _cache(self._layers(past))
        output = module(**plain, **{self.argument: cache}, use_cache=True)
        present: list[torch.Tensor] = []
        for layer, size in zip(output_entry(output, self.entry).layers, self.sizes, strict=True):
            if isinstance(size, Convolution):
                present.append(layer.conv_states[0][..., -size.kernel :])
            elif not isinstance(size, NoState):
                present += [layer.keys, layer.values]
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

    def _past(self, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each input of the cache, for a number of rows and of tokens so far."""
        shapes: list[tuple[int, ...]] = []
        for size in self.sizes:
            if isinstance(size, Convolution):
                shapes.append((rows, size.channels, size.kernel))
            elif not isinstance(size, NoState):
                shapes += [(rows, heads, tokens, width) for heads, width in size]
        return dict(zip(self.state.values(), shapes, strict=True))

    def _layers(self, past: tuple[torch.Tensor, ...]) -> Iterator[State]:
        """Yield the state of each layer from the inputs of the cache."""
        parts = iter(past)
        for size in self.sizes:
            if isinstance(size, NoState):
                yield size
            else:
                yield next(parts) if isinstance(size, Convolution) else (next(parts), next(parts))


def _cache(layers: Iterator[State]) -> DynamicCache:
    """Return a cache with the given state of each layer."""
    cache = DynamicCache()
    cache.layers = list(map(_layer, layers))
    return cache


def _layer(state: State) -> Any:
    """Return the cache layer of a state."""
    if isinstance(state, NoState):
        return cache_utils.DummyLayer()
    return _convolution(state) if isinstance(state, torch.Tensor) else filled_layer(*state)


def _convolution(state: torch.Tensor) -> LinearAttentionLayer:
    """Return a cache layer with the last inputs of a convolution.

    It records its past, so that it neither writes into `state` nor takes another path for a single token.
    """
    layer = LinearAttentionLayer()
    layer.lazy_initialization(conv_states=state)
    layer.conv_states[0], layer.has_previous_state[0] = state, True
    layer.activate_past_recording()
    return layer


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
        UndetectedCacheError: the cache is wanted but cannot be detected.
    """
    uncached = replace(model, limitations=(*model.limitations, LEFT_OUT))
    if not wanted:
        return uncached
    try:
        return detect_cache(model.module, model.inputs).of(model)
    except NoCacheError as error:
        if _never_caches(model.module):
            return replace(model, limitations=(*model.limitations, NEVER))
        raise UndetectedCacheError(str(error), uncached) from error


def _never_caches(module: Any) -> bool:
    """Return whether a model is of a class of transformers without any cache, such as that of the first GPT."""
    taken = inspect.signature(module.forward).parameters
    return isinstance(module, PreTrainedModel) and "input_ids" in taken and not any(name in taken for name in STATES)


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
            takes_positions = computes_with(module, text(), "position_ids", torch.arange(TOKENS)[None])
            argument = _argument(module, entry, layers, takes_positions)
        except NoCacheError:
            raise
        except Exception as error:  # a model's own code may raise anything
            raise NoCacheError(f"a call with a cache fails with {type(error).__name__}: {first_line(error)}") from error
    data_inputs = tuple(name for name in data_inputs if name != "position_ids")
    derived = ("position_ids",) if takes_positions else ()
    sizes = tuple(_size(layer) for layer in layers)
    return Causal(data_inputs, derived, sizes, argument, entry)


def _size(state: State) -> KeysAndValues | Convolution | NoState:
    """Return the sizes of the state of a layer."""
    if isinstance(state, NoState):
        return state
    if isinstance(state, torch.Tensor):
        return Convolution(state.shape[1], state.shape[2])
    keys, values = state
    return heads_and_width(keys), heads_and_width(values)


def heads_and_width(part: torch.Tensor) -> tuple[int, int]:
    """Return the number of heads and the head dimension of keys or values."""
    return part.shape[1], part.shape[3]


def _initial_cache(module: Any) -> tuple[str, list[State]]:
    """Call a module with a short text; return the name of the cache in its output, and the state of each layer."""
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
    return caches[0], _states(entries[caches[0]])


def _states(cache: Any) -> list[State]:
    """Return the state of every layer: keys and values, [1, heads, tokens, head dimension] each, of as many tokens.

    That of a convolution is [1, channels, kernel].
    """
    layers: list[State] = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, getattr(cache_utils, "DummyLayer", ())):  # transformers 5.24 makes them
            layers.append(NoState())
            continue
        if isinstance(layer, LinearAttentionLayer):
            layers.append(_of_convolution(layer, number))
            continue
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
    if not any(isinstance(state, tuple) for state in layers):
        raise NoCacheError("no layer of its cache has keys and values")
    return layers


def keys_and_values(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of every layer of a cache, [1, heads, tokens, head dimension] each.

    Raises:
        NoCacheError: a layer has other state, or its keys and values differ in rows or tokens.
    """
    pairs = []
    for number, state in enumerate(_states(cache)):
        if not isinstance(state, tuple):
            kept = "the state of a convolution" if isinstance(state, torch.Tensor) else "no state"
            raise NoCacheError(f"layer {number} of its cache has {kept}, not keys and values")
        pairs.append(state)
    return pairs


def _of_convolution(layer: LinearAttentionLayer, number: int) -> torch.Tensor:
    """Return the state of a layer with one convolution and nothing else."""
    if any(state is not None for state in layer.recurrent_states.values()):
        raise NoCacheError(
            f"layer {number} of its cache keeps a recurrent state; expected keys and values, or the inputs of one "
            "convolution"
        )
    states: list[torch.Tensor | None] = list(layer.conv_states.values())
    if len(states) != 1 or states[0] is None:
        raise NoCacheError(
            f"layer {number} of its cache ({type(layer).__name__}) has {len(states)} states; expected one"
        )
    return states[0]


def _argument(module: Any, entry: str, layers: list[State], takes_positions: bool) -> str:
    """Return the keyword argument for the cache: the one for which the returned cache is longer by the new token.

    Raises:
        NoCacheError: there is none, or the module takes only one token with a cache, as ProphetNet does; a graph takes
            any number.
    """
    names, refusals = tuple(dict.fromkeys((entry, *CACHE_NAMES))), []
    for name in names:
        try:
            output = _continued(module, name, layers, 1, takes_positions)
        except Exception as error:  # a different argument name, or any error of the model's own code
            refusals.append(first_line(error))
            continue
        if _tokens(_states(output_entry(output, entry))) != TOKENS + 1:
            continue
        try:
            _continued(module, name, layers, 2, takes_positions)
        except Exception as error:  # any error of the model's own code
            raise NoCacheError(f"with a cache it takes no more than one token ({first_line(error)})") from error
        return name
    reason = f" ({refusals[0]})" if refusals else ""
    raise NoCacheError(f"it returns a cache but does not accept one as {' or '.join(names)}{reason}")


def _continued(module: Any, argument: str, layers: list[State], tokens: int, takes_positions: bool) -> Any:
    """Return what a module gives for some tokens behind a cache, at their positions if it takes these.

    Without positions, the thinker of Qwen2.5-Omni computes those of all tokens so far.
    """
    mask = torch.ones(1, TOKENS + tokens, dtype=torch.int64)
    inputs = text(tokens) | {"attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = torch.arange(TOKENS, TOKENS + tokens)[None]
    return module(**inputs, **{argument: _cache(iter(layers))}, use_cache=True)


def _tokens(layers: list[State]) -> int:
    """Return the number of tokens of the keys and values."""
    return next(int(state[0].shape[2]) for state in layers if isinstance(state, tuple))
