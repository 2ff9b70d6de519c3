"""Causal language models with their key-value cache: one graph for the prompt and for every further token.

Inputs and outputs are named as Optimum names them, so that its ONNX classes, and plain loops written for them, can
generate: ``past_key_values.N.key`` and ``.value`` go in, ``present.N.key`` and ``.value`` come out, each
[batch, heads, tokens, width of a head]. A prompt is a call with a cache of no tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicCache, DynamicLayer

from passes.offload import is_offloaded

Feeds = dict[str, npt.NDArray[Any]]

PAST_TOKENS = 5  # of the example: neither 0 nor 1, which torch.export takes for constants
PROBED_TOKENS = 3


@dataclass(frozen=True)
class Causal:
    """How a causal language model is called with its cache.

    `told` are the inputs that come from the data, `followed` those that follow from them (positions), and `heads` the
    number of key-value heads and their width, layer by layer.
    """

    told: tuple[str, ...]
    followed: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]

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
        cache = DynamicCache()
        cache.layers = [_layer(keys, values) for keys, values in zip(past[::2], past[1::2], strict=True)]
        answer = module(**plain, past_key_values=cache, use_cache=True)
        present = [part for layer in answer.past_key_values.layers for part in (layer.keys, layer.values)]
        return (answer.logits, *present)

    def _past(self) -> dict[str, tuple[int, int]]:
        return dict(zip(self.state.values(), (heads for heads in self.heads for _ in "kv"), strict=True))


def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """A layer of the cache that holds these already; `update` would put them behind an empty tensor."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def positions(mask: npt.NDArray[Any], tokens: int) -> npt.NDArray[np.int64]:
    """Position of each of the last `tokens` tokens, padding not counted, as generation in transformers has it.

    Args:
        mask: [rows, all tokens so far], 0 at padding.
        tokens: how many are new.
    """
    counted: npt.NDArray[np.int64] = (mask.cumsum(1) - 1).clip(min=0)[:, mask.shape[1] - tokens :].astype(np.int64)
    return counted


def causal(module: Any, told: tuple[str, ...]) -> Causal | None:
    """The way to call a module with its cache; None where it keeps none of this kind (state-space models and the like).

    Args:
        module: a causal language model of transformers.
        told: the inputs that come from the data.
    """
    accepted = inspect.signature(module.forward).parameters
    if not {"past_key_values", "use_cache"} <= set(accepted) or not {"input_ids", "attention_mask"} <= set(told):
        return None
    layers = _kept(module)
    if layers is None:
        return None
    followed = ("position_ids",) if "position_ids" in accepted else ()
    return Causal(told, followed, tuple((keys.shape[1], keys.shape[3]) for keys in layers))


@torch.inference_mode()
def _kept(module: Any) -> list[torch.Tensor] | None:
    """The keys that each layer keeps of a short text, where every layer keeps all of them."""
    # Weights that stay on disk have no values to compute with, and shapes are all that is asked for.
    shapes_only = any(map(is_offloaded, module.parameters()))
    with FakeTensorMode(allow_non_fake_inputs=True) if shapes_only else contextlib.nullcontext():
        ids = torch.zeros(1, PROBED_TOKENS, dtype=torch.int64)
        cache = getattr(module(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    keys = [key for key in layers if isinstance(key, torch.Tensor) and key.ndim == 4]
    return keys if keys and len(keys) == len(layers) else None
