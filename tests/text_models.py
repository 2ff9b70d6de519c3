"""Small text models with a tokenizer of letters, whose special tokens and padding side vary."""

import string

import tokenizers
import torch
import transformers

WORDS = ("<unk>", "<s>", "</s>", "<pad>", *string.ascii_lowercase)
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 34, "initializer_range": 0.2,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 34, "eos_token_id": 2}
XLNET = {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 32, "pad_token_id": 3}
OPT = SIZES | {"ffn_dim": 16, "word_embed_proj_dim": 32}


def save_letters(folder, *, suffix=False, length=10**30, **options):
    """Save a tokenizer whose words are letters; `options` are special tokens, padding_side and truncation_side.

    With `suffix`, it ends every text with ``</s>``.
    """
    vocabulary = {word: token for token, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token=options.get("unk_token", "none"))
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if suffix:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **options)
    fast.save_pretrained(folder)
    return folder


def save_model(folder, name, config, **fields):
    """Save a model with random weights of a class and a config class of transformers; return the folder."""
    torch.manual_seed(0)
    getattr(transformers, name)(getattr(transformers, config)(**fields)).save_pretrained(folder)
    return folder
