"""Small GGUF files of Llamas, in the format of llama.cpp's converter."""

import gguf
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

LAYERS, WIDTH, HEADS, KEY_HEADS = 2, 32, 4, 2
BYTES = list(bytes_to_unicode().values())
MERGES = ["h e", "l l", "he ll", "hell o"]
TOKENS = [*BYTES, *("".join(merge.split()) for merge in MERGES), "<s>", "</s>"]
VOCABULARY = len(TOKENS)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def small(**changed):
    """Return a Llama with random weights, including the norms."""
    config = transformers.LlamaConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 64,
        "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    } | changed)  # fmt: skip
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def stored_name(name):
    """Return llama.cpp's name of a tensor."""
    path, _, leaf = name.rpartition(".")
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if path in outer:
        return f"{outer[path]}.{leaf}"
    _, _, block, inner = path.split(".", 3)
    return f"blk.{block}.{NAMES[inner]}.{leaf}"


def interleaved(weight, heads):
    """Interleave the two rotated halves of the query or key rows, as llama.cpp's converter does."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def written(
    path, module, kind="F32", *, architecture="llama", tokenizer=True, pre_tokenizer="gpt-2", metadata=None, more=None
):
    """Write the GGUF file of a Llama with matrices of a type; round the weights of `module` to the stored values."""
    config, quantization = module.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer)
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (VOCABULARY - 2) + [3, 3])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(VOCABULARY - 2)
        writer.add_eos_token_id(VOCABULARY - 1)
        writer.add_add_bos_token(False)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    for name, parameter in module.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        value = parameter.detach().numpy()
        if value.ndim > 1 and kind != "F32":
            packed = gguf.quants.quantize(value, quantization)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(packed, quantization).astype(np.float32))
            # The blocks of a type lie along a row, so rows can be reordered after quantization.
            packed = packed if heads is None else interleaved(packed, heads)
            writer.add_tensor(stored_name(name), packed, raw_dtype=quantization)
        else:
            writer.add_tensor(
                stored_name(name), value if heads is None or value.ndim < 2 else interleaved(value, heads)
            )
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
