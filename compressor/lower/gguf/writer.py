"""Write a rewritten graph as a GGUF file with float32 weights."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.choices import GGUF
from compressor.lower.gguf.rules import GgufError
from compressor.lower.gguf.vocabulary import add_vocabulary
from passes.rewrite.remove_blocks import weights_read

if TYPE_CHECKING:
    import numpy.typing as npt

    from compressor.models import Model
    from passes.graph.graph import Graph

# llama.cpp's names of the modules of a block (gguf-py/gguf/tensor_mapping.py), and of those around the blocks.
INNER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FREQUENCIES = "rope_freqs.weight"
_BLOCK_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Block:
    """A block that the graph still computes.

    Attributes:
        number: its number in the original model.
        attention: whether its attention is left.
    """

    number: int
    attention: bool


def blocks_of(graph: Graph) -> tuple[Block, ...]:
    """Return the blocks of which the graph reads weights, in order.

    Raises:
        GgufError: a block has lost its MLP alone, or the first block its attention.
    """
    read: dict[int, set[str]] = {}
    for matched in map(_BLOCK_WEIGHT.fullmatch, weights_read(graph)):
        if matched is not None:
            read.setdefault(int(matched[1]), set()).add(matched[2].partition(".")[0])
    blocks = tuple(Block(number, "self_attn" in read[number]) for number in sorted(read))
    alone = next((block.number for block in blocks if "mlp" not in read[block.number]), None)
    if alone is not None or not blocks or not blocks[0].attention:
        raise GgufError(
            f"--target {GGUF}: the rewritten graph has "
            + (f"no MLP in block {alone}" if alone is not None else "no attention in its first block")
            + ", which llama.cpp cannot compute; drop whole blocks or the attention of later blocks."
        )
    return blocks


def write(graph: Graph, model: Model, path: Path) -> Path:
    """Write a graph as a GGUF file, one tensor at a time, with the tokenizer of the model.

    Without dropped attention, the architecture is ``llama``, else ``deci``.

    Args:
        graph: the traced model after all rewrites; it need not be folded.
        model: the model that the graph was traced from.
        path: output path.

    Returns:
        `path`.

    Raises:
        GgufError: the file cannot express the graph or its tokenizer.
    """
    import gguf

    blocks = blocks_of(graph)
    equal = all(block.attention for block in blocks)
    with contextlib.closing(gguf.GGUFWriter(path, "llama" if equal else "deci")) as writer:
        _write(writer, graph, model, blocks, equal=equal)
    return path


def _write(writer: Any, graph: Graph, model: Model, blocks: tuple[Block, ...], *, equal: bool) -> None:
    import gguf

    writer.add_name(model.name.rpartition("/")[2])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_sizes(writer, model.module.config, blocks, equal=equal)
    tensors = list(_tensors(graph, model, blocks))
    rows = next(len(weight) for name, weight, _ in tensors if name == "token_embd.weight")
    add_vocabulary(writer, model, rows)
    for name, weight, _ in tensors:
        writer.add_tensor_info(name, weight.shape, _float32(), weight.numel() * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight, heads in tensors:
        writer.write_tensor_data(_array(weight, heads))


def _add_sizes(writer: Any, config: Any, blocks: tuple[Block, ...], *, equal: bool) -> None:
    """Write the sizes of the model; those that differ by block as one number for each."""
    heads, cached = config.num_attention_heads, config.num_key_value_heads
    writer.add_block_count(len(blocks))
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size if equal else [config.intermediate_size] * len(blocks))
    writer.add_head_count(heads if equal else [heads * block.attention for block in blocks])
    writer.add_head_count_kv(cached if equal else [cached * block.attention for block in blocks])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def context_length(config: Any) -> int:
    """Return the longest text of a config; a sliding window bounds it, because llama.cpp's Llama attends to all."""
    window = getattr(config, "sliding_window", None)
    most = int(config.max_position_embeddings)
    return most if window is None else min(most, int(window))


def _tensors(graph: Graph, model: Model, blocks: tuple[Block, ...]) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Yield name and weight of each tensor, and the number of heads of those that the file holds interleaved."""
    config: Any = model.module.config
    places = {block.number: place for place, block in enumerate(blocks)}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    read = weights_read(graph)
    tied = "model.embed_tokens.weight" not in read  # the graph then reads one weight for both, under either name
    for name, weight in _weights(graph, model.module).items():
        matched = _BLOCK_WEIGHT.fullmatch(name)
        if name not in read:
            continue
        if matched is not None:
            inner = INNER[matched[2]]
            yield f"blk.{places[int(matched[1])]}.{inner}.{matched[3]}", weight, heads.get(inner)
            continue
        path, _, leaf = name.rpartition(".")
        yield f"{OUTER['model.embed_tokens' if tied and path == 'lm_head' else path]}.{leaf}", weight, None
    if config.rope_parameters.get("rope_type") == "llama3":
        yield FREQUENCIES, _divisors(config), None


def _weights(graph: Graph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the graph, which healing may have changed, by their names in the module."""
    names = {f"{graph.prefix}{name}": name for name, _ in module.named_parameters(remove_duplicate=False)}
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    return {name: parameters[path].detach() for path, name in names.items() if path in parameters}


def _divisors(config: Any) -> torch.Tensor:
    """Return the divisors of the rotary frequencies of a Llama 3, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain: torch.Tensor = config.rope_parameters["rope_theta"] ** -exponents
    divisors: torch.Tensor = plain / scaled
    return divisors


def _array(weight: torch.Tensor, heads: int | None) -> npt.NDArray[Any]:
    """Return a weight as float32; with `heads`, the two rotated halves of each head's rows are interleaved.

    transformers rotates a head's first half against its second, llama.cpp each even row against the odd one behind it.
    """
    values = weight.float()
    if heads is not None:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return values.contiguous().numpy()


def _float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)
