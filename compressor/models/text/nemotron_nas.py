"""Llama checkpoints whose blocks differ: `DeciLMForCausalLM` with `block_configs`, model type ``nemotron-nas``.

Serving engines open this form (vLLM, SGLang, TensorRT-LLM, the converter of llama.cpp). transformers 5.24 does not: it
records `per_layer_config` with ``skip``, but builds every layer. NVIDIA's checkpoints bring code of their own for it,
which is not run. The classes here replace that code, and are registered with transformers by `register`.

Weights have the names that they have in Llama. A block without attention has no ``self_attn`` and no
``input_layernorm``, a block without MLP no ``mlp`` and no ``post_attention_layernorm``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from compressor.models.base import ModelError
from compressor.models.text.block_configs import MODEL_TYPE, BlockShape, mlp_width
from compressor.models.text.kv_cache import CACHE_NAMES

# Entries of a branch that its module here carries out. Any other entry must be empty or false.
_ATTENTION = {"no_op", "n_heads_in_group"}
_FFN = {"no_op", "ffn_mult", "intermediate_size", "hidden_act", "gated"}


@strict
class NemotronNasConfig(transformers.LlamaConfig):  # type: ignore[misc]  # transformers has no types
    """The config of a Llama with one entry of `block_configs` for each block."""

    model_type = MODEL_TYPE
    intermediate_size: int | None = None
    block_configs: list[Any] | None = None


def block_shapes(config: Any, location: str) -> tuple[BlockShape, ...]:
    """Return what each block holds, by `block_configs`.

    Args:
        config: a `NemotronNasConfig`.
        location: name of the checkpoint in messages.

    Raises:
        ModelError: the entries do not fit the other fields, or ask for something that is not supported.
    """
    entries, count = config.block_configs, config.num_hidden_layers
    if not isinstance(entries, list) or len(entries) != count:
        found = len(entries) if isinstance(entries, list) else "none"
        raise ModelError(
            f"the config of {location} has {count} layers; expected as many block_configs, found {found}: it is "
            "damaged or of another model."
        )
    return tuple(_block_shape(entry, number, config, location) for number, entry in enumerate(entries))


def _block_shape(entry: Any, number: int, config: Any, location: str) -> BlockShape:
    parts = [entry.get(name) if isinstance(entry, Mapping) else None for name in ("attention", "ffn")]
    attention, ffn = (part if isinstance(part, Mapping) else {} for part in parts)
    if not all(isinstance(part, Mapping) and isinstance(part.get("no_op"), bool) for part in parts):
        raise ModelError(
            f"block_configs[{number}] of {location} lacks attention.no_op or ffn.no_op; expected true or false."
        )
    unsupported = [*_set_beside(attention, _ATTENTION, "attention"), *_set_beside(ffn, _FFN, "ffn")]
    if ffn.get("hidden_act") not in (None, config.hidden_act):
        unsupported.append("another ffn.hidden_act than the config's")
    if ffn.get("gated") is False:
        unsupported.append("an MLP without a gate")
    if unsupported:
        raise ModelError(
            f"block_configs[{number}] of {location} has {unsupported[0]}, which Compressor does not run; it opens "
            "blocks with attention and a gated MLP, or without one of them."
        )
    return BlockShape(
        None if attention["no_op"] else _key_value_heads(attention, number, config, location),
        None if ffn["no_op"] else _width(ffn, number, config, location),
    )


def _set_beside(part: Mapping[str, Any], known: set[str], name: str) -> Iterator[str]:
    return (f"{name}.{key}" for key, value in part.items() if key not in known and value)


def _key_value_heads(part: Mapping[str, Any], number: int, config: Any, location: str) -> int:
    group, heads = part.get("n_heads_in_group"), config.num_attention_heads
    if type(group) is not int or group < 1 or heads % group:
        raise ModelError(
            f"block_configs[{number}] of {location} sets n_heads_in_group to {group}; expected a divisor of its "
            f"{heads} heads."
        )
    return int(heads // group)


def _width(part: Mapping[str, Any], number: int, config: Any, location: str) -> int:
    multiple, width = part.get("ffn_mult"), part.get("intermediate_size")
    if isinstance(multiple, int | float) and multiple > 0:
        return mlp_width(multiple, config.hidden_size)
    if multiple is None and type(width) is int and width > 0:
        return width
    raise ModelError(
        f"block_configs[{number}] of {location} sets ffn_mult to {multiple} and intermediate_size to {width}; expected "
        "one of them, above 0."
    )


# ----------------------------------------------------------------------------------------------------------- modules


class NemotronNasBlock(LlamaDecoderLayer):  # type: ignore[misc]  # transformers has no types
    """A block of Llama without the branches that its checkpoint lacks; nothing stands in their place."""

    def __init__(self, config: Any, shape: BlockShape, cache_layer: int) -> None:
        super(LlamaDecoderLayer, self).__init__()  # LlamaDecoderLayer would create both branches
        self.hidden_size = config.hidden_size
        self.self_attn = self.input_layernorm = self.mlp = self.post_attention_layernorm = None
        if shape.key_value_heads is not None:
            self.self_attn = LlamaAttention(_with(config, "num_key_value_heads", shape.key_value_heads), cache_layer)
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if shape.width is not None:
            self.mlp = LlamaMLP(_with(config, "intermediate_size", shape.width))
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """Add the branches that the block has.

        Args:
            hidden_states: [rows, tokens, features].
            options: as `LlamaModel` passes them to its blocks.
        """
        if self.self_attn is not None:
            assert self.input_layernorm is not None
            added, _ = self.self_attn(self.input_layernorm(hidden_states), **options)
            hidden_states = hidden_states + added
        if self.mlp is not None:
            assert self.post_attention_layernorm is not None
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def _with(config: Any, name: str, value: int) -> Any:
    """Return the config with another value of a field; the config itself if it has this value."""
    if getattr(config, name) == value:
        return config
    changed = copy.copy(config)
    setattr(changed, name, value)
    return changed


class NemotronNasModel(LlamaModel):  # type: ignore[misc]  # transformers has no types
    """The trunk of the model; its cache has a layer for each attention that is left, numbered without gaps."""

    def __init__(self, config: Any) -> None:
        super(LlamaModel, self).__init__(config)  # LlamaModel would create all blocks
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        shapes = block_shapes(config, config.name_or_path or "the checkpoint")
        layers = [sum(each.key_value_heads is not None for each in shapes[:number]) for number in range(len(shapes))]
        self.layers = nn.ModuleList(
            NemotronNasBlock(config, shape, layer) for shape, layer in zip(shapes, layers, strict=True)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *, use_cache: bool | None = None, **options: Any) -> Any:
        """Run `LlamaModel`, with a cache that grows by the layers that are used."""
        wanted = self.config.use_cache if use_cache is None else use_cache
        if wanted and all(options.get(name) is None for name in CACHE_NAMES):
            taken = inspect.signature(LlamaModel.forward).parameters
            options[next(name for name in CACHE_NAMES if name in taken)] = DynamicCache()
        return super().forward(use_cache=use_cache, **options)


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]  # transformers has no types
    """The language model; the name is that of the architecture in its config."""

    config_class = NemotronNasConfig

    def __init__(self, config: Any) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = NemotronNasModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Let the auto classes of transformers open these checkpoints, with the classes here and without other code."""
    transformers.AutoConfig.register(MODEL_TYPE, NemotronNasConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(NemotronNasConfig, DeciLMForCausalLM, exist_ok=True)
