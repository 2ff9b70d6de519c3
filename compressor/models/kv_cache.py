"""Causal language models with their key-value cache: one graph for the prompt and for every further token.

Inputs and outputs are named as Optimum names them, so that its ONNX classes, and plain loops written for them, can
generate: ``past_key_values.N.key`` and ``.value`` go in, ``present.N.key`` and ``.value`` come out, each
[batch, heads, tokens, width of a head]. A prompt is a call with a cache of no tokens.
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
from compressor.models.probe import TOKENS, calling, computes_with, text

Feeds = dict[str, npt.NDArray[Any]]

PAST_TOKENS = 5  # of the example: neither 0 nor 1, which torch.export takes for constants
# What holds the cache in the arguments and in the answer of a decoder: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
LEFT_OUT = Limitation("KV cache", "left out by --no-cache, so each new token computes the whole text again")


class NoCacheError(Exception):
    """A module cannot be called with a cache; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True)
class Causal:
    """How a causal language model is called with its cache.

    `told` are the inputs that come from the data, `followed` those that follow from them (positions), and `heads` the
    number of key-value heads and their width, layer by layer. `argument` is the keyword that the module takes a cache
    under, `entry` the name under which its answer holds one.
    """

    told: tuple[str, ...]
    followed: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    argument: str
    entry: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """All input names in order."""
        return (*self.told, *self.followed, *self.state.values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """All output names in order."""
        return ("logits", *self.state)

    @property
    def state(self) -> dict[str, str]:
        """Which output of one call is which input of the next."""
        return {
            f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
            for layer in range(len(self.heads))
            for part in ("key", "value")
        }

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Free axes of every input."""
        axes = {name: {0: "batch", 1: "sequence"} for name in (*self.told, *self.followed)}
        axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
        return axes | {name: {0: "batch", 2: "past_sequence"} for name in self.state.values()}

    def example(self, told: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Example inputs: those told, behind a cache of a few tokens that are all attended to.

        Args:
            told: int64 [rows, tokens] each.
        """
        rows = len(told["input_ids"])
        mask = torch.cat([torch.ones(rows, PAST_TOKENS, dtype=torch.int64), told["attention_mask"]], 1)
        numbers = torch.Generator().manual_seed(0)
        past = {
            name: torch.randn(rows, heads, PAST_TOKENS, width, generator=numbers)
            for name, (heads, width) in self._past().items()
        }
        places = torch.from_numpy(positions(mask.numpy(), told["input_ids"].shape[1]))
        values = {**told, "attention_mask": mask, "position_ids": places}
        return {name: values[name] for name in (*self.told, *self.followed)} | past

    def complete(self, feeds: Feeds) -> Feeds:
        """Feeds of the data with what follows from them: positions, and a cache of no tokens."""
        rows, tokens = feeds["input_ids"].shape
        followed = {"position_ids": positions(feeds["attention_mask"], tokens)} if self.followed else {}
        past = {
            name: np.zeros((rows, heads, 0, width), dtype=np.float32) for name, (heads, width) in self._past().items()
        }
        return {**feeds, **followed, **past}

    def call(self, module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits [rows, tokens, vocabulary], then keys and values of all tokens so far, layer by layer."""
        plain = dict(zip((*self.told, *self.followed), tensors, strict=False))
        past = tensors[len(plain) :]
        tokens = past[0].shape[2]
        for part in past[1:]:  # all layers are as long; torch.export cannot know
            torch._check(part.shape[2] == tokens)
        cache = _cache(zip(past[::2], past[1::2], strict=True))
        answer = module(**plain, **{self.argument: cache}, use_cache=True)
        present = [part for layer in _entry(answer, self.entry).layers for part in (layer.keys, layer.values)]
        return (_entry(answer, "logits"), *present)

    def of(self, model: Model) -> Model:
        """A model with its cache as further inputs and outputs."""
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
        return dict(zip(self.state.values(), (heads for heads in self.heads for _ in "kv"), strict=True))


def _cache(layers: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds the keys and values of each layer."""
    cache = DynamicCache()
    cache.layers = [_layer(keys, values) for keys, values in layers]
    return cache


def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """A layer of the cache that holds these already; `update` would put them behind an empty tensor."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _entry(answer: Any, name: str) -> Any:
    """An entry of an answer by name: a mapping (as the answers of transformers are) or an object with attributes."""
    return answer[name] if isinstance(answer, Mapping) else getattr(answer, name)


def positions(mask: npt.NDArray[Any], tokens: int) -> npt.NDArray[np.int64]:
    """Position of each of the last `tokens` tokens, padding not counted, as generation in transformers has it.

    Args:
        mask: [rows, all tokens so far], 0 at padding.
        tokens: how many are new.
    """
    counted: npt.NDArray[np.int64] = (mask.cumsum(1) - 1).clip(min=0)[:, mask.shape[1] - tokens :].astype(np.int64)
    return counted


def with_cache(model: Model, wanted: bool) -> Model:
    """A language model with its KV cache as further inputs and outputs, or without it where it is not wanted.

    Raises:
        ModelError: the cache is wanted and not found.
    """
    if not wanted:
        return replace(model, limitations=(*model.limitations, LEFT_OUT))
    try:
        return causal(model.module, model.inputs).of(model)
    except NoCacheError as error:
        raise ModelError(
            f"the KV cache of {model.name} was not found: {error}; pass --no-cache to export it without one, so that "
            "each new token computes the whole text again."
        ) from error


def causal(module: Any, told: tuple[str, ...]) -> Causal:
    """Find out how a module is called with its cache, by calling it.

    A short text is given once, and one further token behind the cache that came of it: the argument is the one under
    which the cache grows by that token.

    Args:
        module: a causal language model of transformers, or one that is called as those are.
        told: the inputs that come from the data.

    Raises:
        NoCacheError: it keeps no cache of keys and values, or takes none; the message says why.
    """
    missing = [name for name in ("input_ids", "attention_mask") if name not in told]
    if missing:
        raise NoCacheError(f"it takes no {missing[0]}")
    with calling(module):
        try:
            entry, layers = _kept(module)
            argument = _argument(module, entry, layers)
            positioned = computes_with(module, text(), "position_ids", torch.arange(TOKENS)[None])
        except NoCacheError:
            raise
        except Exception as error:  # a model's own code may raise anything
            raise NoCacheError(f"a call with it fails: {type(error).__name__}: {first_line(error)}") from error
    told = tuple(name for name in told if name != "position_ids")
    followed = ("position_ids",) if positioned else ()
    return Causal(told, followed, tuple((keys.shape[1], keys.shape[3]) for keys, _ in layers), argument, entry)


def _kept(module: Any) -> tuple[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The entry of a module's answer that holds the cache, and the keys and values that each layer keeps of a text."""
    try:
        answer = module(**text(), use_cache=True)
    except TypeError as error:  # no such argument
        raise NoCacheError(f"its forward pass does not take use_cache ({first_line(error)})") from error
    entries = dict(answer.items()) if isinstance(answer, Mapping) else dict(getattr(answer, "__dict__", {}))
    legacy = [name for name, value in entries.items() if name in CACHE_NAMES and isinstance(value, tuple | list)]
    if legacy:
        raise NoCacheError(
            f"its answer holds {legacy[0]} as tuples of tensors, the form before the Cache classes of transformers"
        )
    found = [name for name, value in entries.items() if hasattr(value, "layers")]
    if not found:
        raise NoCacheError(f"its answer holds no cache, only {', '.join(entries) or type(answer).__name__}")
    return found[0], _keys_and_values(entries[found[0]])


def _keys_and_values(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer, [1, heads, tokens, width] each."""
    layers = []
    for number, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.ndim != 4:
            raise NoCacheError(f"layer {number} of its cache ({type(layer).__name__}) holds no keys and values")
        if keys.shape != values.shape:
            raise NoCacheError(
                f"layer {number} of its cache holds keys {list(keys.shape)} and values {list(values.shape)} of "
                "different shapes"
            )
        layers.append((keys, values))
    if not layers:
        raise NoCacheError("its cache has no layers")
    return layers


def _argument(module: Any, entry: str, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """The keyword under which a module takes a cache: the one under which it comes back longer by the new token."""
    names, refusals = tuple(dict.fromkeys((entry, *CACHE_NAMES))), []
    for name in names:
        inputs = text(1) | {"attention_mask": torch.ones(1, TOKENS + 1, dtype=torch.int64)}
        try:
            answer = module(**inputs, **{name: _cache(iter(layers))}, use_cache=True)
        except Exception as error:  # another name, or whatever a model's own code raises
            refusals.append(first_line(error))
            continue
        if _keys_and_values(_entry(answer, entry))[0][0].shape[2] == TOKENS + 1:
            return name
    said = f" ({refusals[0]})" if refusals else ""
    raise NoCacheError(f"it answers with a cache but goes on from none given as {' or '.join(names)}{said}")
