"""Small decoders of several architectures with random values in all weights, including biases and norms."""

import torch
import transformers

VOCABULARY, WINDOW, LAYERS = 64, 6, 3
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
SMALL = COMMON | {
    "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
NARROW = GATED | {"head_dim": 8}
OLD = COMMON | {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# The architectures differ in the layout of their weights in files: tied, with biases, Conv1D, several in one tensor.
DECODERS = {
    "Llama": GATED | {"tie_word_embeddings": False},
    "Qwen3": NARROW | {"tie_word_embeddings": True},
    "GPT2": OLD,
    "Gemma": NARROW,
    "OPT": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": SMALL | {"intermediate_size": 48},
    "Falcon": SMALL,
    "Phi3": GATED,
    "Gemma4Text": NARROW
    | {"sliding_window": WINDOW, "layer_types": MIXED, "global_head_dim": 16, "num_kv_shared_layers": 0}
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY},  # has learned scales in buffers
}


def decoder(name, **changed):
    """Return a decoder in evaluation mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**DECODERS[name] | changed)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn_like(value))
    return module


def saved(folder, name, *, dtype=torch.float32, shard="5GB", **changed):
    """Save a decoder to a folder and return the folder."""
    decoder(name, **changed).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def random_tokens(rows, tokens, seed=0):
    """Return random token ids of shape [rows, tokens]."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def sampled_tokens(model, rows, tokens):
    """Draw texts from a model, which it predicts better than chance."""
    llama = transformers.AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    drawn = llama.generate(
        random_tokens(rows, 1), do_sample=True, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, pad_token_id=0
    )
    return drawn.numpy()
