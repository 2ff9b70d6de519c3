"""The parts of an encoder-decoder of transformers: its call with caches, its example and its decoder's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.auto import modeling_auto

from compressor.models.base import ModelError
from compressor.models.encoder_decoder.caches import DECODER_IDS, EncoderDecoder, detect_caches
from compressor.models.encoder_decoder.decoder_side import decoder_side
from compressor.models.preprocess import DecoderSide
from compressor.models.text.kv_cache import NoCacheError

TASKS = TEXT, SPEECH, IMAGE = "text2text-generation", "automatic-speech-recognition", "image-to-text"
SOURCE_TOKENS, TARGET_TOKENS = 16, 6  # of the example
USUAL_TARGET = 448  # maximum number of tokens of a target, if the config states none


@dataclass(frozen=True)
class Source:
    """What the encoder reads: a batch of two, and the dynamic axes of each input."""

    example: dict[str, torch.Tensor]
    axes: dict[str, dict[int, str]]


@dataclass(frozen=True)
class Parts:
    """How an encoder-decoder is called, its example inputs from the data, and how its decoder inputs are made."""

    call: EncoderDecoder
    data_example: dict[str, torch.Tensor]
    decoder: DecoderSide


def task_of(config: Any, architecture: str) -> str | None:
    """Return the task of an encoder-decoder that generates texts; None for other models."""
    if not getattr(config, "is_encoder_decoder", False) or not architecture:
        return None
    if architecture in _classes(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return TEXT
    if architecture in _classes(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
        return SPEECH
    return IMAGE if architecture in _classes(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) else None


def _classes(mapping: Any) -> set[str]:
    """Return the class names of a mapping of transformers, in which a model type may have several."""
    values = mapping.values()
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def parts_of(module: Any, source: Source, tokenizer: Any, location: str, *, cache: bool) -> Parts:
    """Return how an encoder-decoder is called and evaluated.

    Args:
        module: the model.
        source: what its encoder reads.
        tokenizer: its tokenizer; None without one.
        location: name of the model in messages.
        cache: whether to trace it with its caches.

    Raises:
        ModelError: the model has no caches as transformers has them, takes other inputs, or its cache is not wanted.
    """
    if not cache:
        raise ModelError(
            f"--no-cache is for causal language models; {location} is an encoder-decoder, whose files of the decoder "
            "hold its caches: leave --no-cache out."
        )
    try:
        call = detect_caches(module, source.example, source.axes)
    except NoCacheError as error:
        raise ModelError(
            f"{location} is a {type(module).__name__}, whose encoder and decoder cannot be told apart by their caches: "
            f"{error}; expected an encoder-decoder such as T5, BART, Whisper or TrOCR, or pass it as a module of your "
            "own, package.module:factory, that computes without caches."
        ) from error
    targets = {DECODER_IDS: target_tokens(module)}
    return Parts(
        call, source.example | targets, decoder_side(module, tokenizer, _longest_target(module.config), location)
    )


def target_tokens(module: Any) -> torch.Tensor:
    """Return two rows of target tokens."""
    vocabulary = module.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (2, TARGET_TOKENS), generator=torch.Generator().manual_seed(0))


def text_source(module: Any) -> Source:
    """Return two sources of tokens; the second is padded, so that the mask is not constant."""
    config = getattr(module.get_encoder(), "config", module.config)
    vocabulary = getattr(config, "vocab_size", None) or module.config.get_text_config(decoder=True).vocab_size
    longest = getattr(config, "max_position_embeddings", None) or SOURCE_TOKENS
    size = (2, min(SOURCE_TOKENS, longest))
    ids = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] * 3 // 4 :] = 0
    example = {"input_ids": ids, "attention_mask": mask}
    return Source(example, {name: {0: "batch", 1: "sequence"} for name in example})


def spectrogram_source(module: Any) -> Source | None:
    """Return two spectrograms of the length that an encoder takes: as many frames as it has positions, times strides.

    Return None if the encoder does not take spectrograms of a fixed length, as that of Whisper does.
    """
    config, encoder = module.config, module.get_encoder()
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    strides = [getattr(encoder, name).stride[0] for name in ("conv1", "conv2") if hasattr(encoder, name)]
    if module.main_input_name != "input_features" or bins is None or positions is None or len(strides) != 2:
        return None
    size = (2, int(bins), int(positions) * strides[0] * strides[1])
    features = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return Source({"input_features": features}, {"input_features": {0: "batch"}})


def _longest_target(config: Any) -> int:
    """Return the maximum number of tokens of a target."""
    config = config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((limit for limit in limits if isinstance(limit, int)), USUAL_TARGET)
