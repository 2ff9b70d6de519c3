"""Small encoder-decoders with random weights, and their greedy generation in transformers."""

import functools
import random

import numpy as np
import tokenizers
import torch
import transformers

from compressor import models
from compressor.internals.transformers import quiet
from compressor.lower.cut.encoder_decoder import cut
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.base import apply
from passes.rewrite.drop import Drop

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "runs",
    "fast",
    "over",
    "hill",
    "and",
    "river",
    "sees",
    "big",
    "small",
    "red",
    "blue",
    "tree",
    "house",
    "old",
    "new",
    "man",
    "woman",
    "walks",
]
VOCABULARY, FRAMES, BINS = 48, 40, 12
TEXT = ("bart", "t5")
# Pictures: ViT and TrOCR's decoder; speech: sound of any length.
KINDS = (*TEXT, "fsmt", "whisper", "pictures", "speech")
# A self-attention of the decoder and a cross-attention of another layer.
DROPPED = {
    "bart": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.encoder_attn"),
    "t5": ("decoder.block.1.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention"),
    "fsmt": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.encoder_attn"),
    "whisper": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.encoder_attn"),
    "pictures": ("decoder.model.decoder.layers.0.self_attn", "decoder.model.decoder.layers.1.encoder_attn"),
    "speech": ("model.decoder.layers.0.self_attn", "model.decoder.layers.1.encoder_attn"),
}
_TOWERS = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "bart": _TOWERS | {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None},
    "t5": {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    },
    "fsmt": {name: value for name, value in _TOWERS.items() if name != "vocab_size"}
    | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "max_position_embeddings": 64}
    | {"decoder_start_token_id": 2, "forced_eos_token_id": None, "decoder_ffn_dim": 32},
    "whisper": _TOWERS
    | {"max_source_positions": FRAMES // 2, "max_target_positions": 64, "num_mel_bins": BINS}
    | {"decoder_start_token_id": 3, "suppress_tokens": [], "begin_suppress_tokens": []},
    "speech": _TOWERS
    | {"max_source_positions": 64, "max_target_positions": 64, "input_feat_per_channel": BINS, "conv_channels": 16}
    | {"decoder_start_token_id": 2},
}  # fmt: skip
CLASSES = {"bart": "Bart", "t5": "T5", "fsmt": "FSMT", "whisper": "Whisper", "speech": "Speech2Text"}
SIDE = 8  # pixels of a picture


def build(kind, **changes):
    """A model whose branches matter, and whose best token is far from the second best."""
    torch.manual_seed(1)
    module = _reader() if kind == "pictures" else _of_class(kind, changes)
    for name, parameter in module.named_parameters():
        sines = kind == "fsmt" and "embed_positions" in name  # no part of a checkpoint
        if parameter.ndim > 1 and not sines:
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def _reader():
    """A ViT whose patches a decoder of TrOCR reads."""
    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision = transformers.ViTConfig(image_size=SIDE, patch_size=4, **width)
    text = transformers.TrOCRConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    with quiet():
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
        return transformers.VisionEncoderDecoderModel(config).eval()


def _of_class(kind, changes):
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**CONFIGS[kind] | changes)
    return getattr(transformers, f"{CLASSES[kind]}ForConditionalGeneration")(config).eval()


@functools.cache
def saved(kind, folder):
    """The folder of a model, with a tokenizer of words for texts."""
    path = folder / kind
    with quiet():
        build(kind).save_pretrained(path)
    if kind in TEXT:
        tokenizer().save_pretrained(path)
    return path


def tokenizer():
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    end = ("</s>", vocabulary["</s>"])
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[end]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


def speech_tokenizer(**options):
    """A tokenizer of Whisper that knows bytes, the tokens of its prompts, and two languages."""
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *names, "<|notimestamps|>"])}
    found = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], **options)
    found.add_special_tokens({"additional_special_tokens": [*names[1:], "<|notimestamps|>"]})
    found.set_prefix_tokens()
    return found


def listener(folder, *, language="english", **changes):
    """Save a Whisper that reads a second of sound, with its feature extractor and its tokenizer."""
    words = speech_tokenizer(language=language, task="transcribe") if language else speech_tokenizer()
    start, end = (words.convert_tokens_to_ids(f"<|{name}|>") for name in ("startoftranscript", "endoftext"))
    ids = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end}
    module = build("whisper", **ids, max_source_positions=50, vocab_size=len(words), **changes)
    extractor = transformers.WhisperFeatureExtractor(feature_size=BINS, chunk_length=1)
    with quiet():
        for each in (module, words, extractor):
            each.save_pretrained(folder)
    return module, extractor, words


def sentences(count, seed=0):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 9))) for _ in range(count)]


def source(kind, tokens):
    """Two rows of inputs of the encoder; the second text is padded."""
    generator = np.random.default_rng(tokens)
    if kind == "whisper":
        return {"input_features": generator.standard_normal((2, BINS, FRAMES)).astype(np.float32)}
    if kind == "pictures":
        return {"pixel_values": generator.standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)}
    if kind == "speech":
        return {"input_features": generator.standard_normal((2, 4 * tokens, BINS)).astype(np.float32)}
    ids = generator.integers(4, len(WORDS), (2, tokens))
    mask = np.ones_like(ids)
    mask[1, tokens // 2 :], ids[1, tokens // 2 :] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


def without(module, names):
    """The module with branches that are zero: the oracle of a dropped attention."""
    for name in names:
        attention = module.get_submodule(name)
        output = attention.out_proj if hasattr(attention, "out_proj") else attention.o
        for parameter in output.parameters():
            torch.nn.init.zeros_(parameter)
    return module


def generated(module, feeds, new):
    """Greedy tokens of transformers, so many whatever they are, with its own cache."""
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with quiet(), torch.inference_mode():
        found = transformers.GenerationMixin.generate(
            module, **tensors, do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=None, pad_token_id=1
        )
    return found.numpy()


@functools.cache
def traced(kind, folder):
    model = models.load(str(saved(kind, folder)))
    return model, trace(model)


def lowered(kind, dropped, shared, folder):
    """The model, and the path of its encoder beside the whole file, whole.onnx."""
    model, graph = traced(kind, shared)
    graph = graph.fork()
    if dropped:
        apply(Drop(dropped), graph)
    return model, cut(lower(fold_graph(graph), model, folder / "whole.onnx"), folder)
