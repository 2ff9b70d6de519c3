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

TEXT, SPEECH = "text2text-generation", "automatic-speech-recognition"
TASKS = (TEXT, SPEECH)
SOURCE_TOKENS, TARGET_TOKENS = 16, 6  # of the example
USUAL_TARGET = 448  # maximum number of tokens of a target, if the config states none


@dataclass(frozen=True)
class Parts:
    """How an encoder-decoder is called, its example inputs from the data, and how its decoder inputs are made."""

    call: EncoderDecoder
    data_example: dict[str, torch.Tensor]
    decoder: DecoderSide


def task_of(config: Any, architecture: str, location: str) -> str | None:
    """Return the task of an encoder-decoder that generates texts; None for other models.

    Raises:
        ModelError: the model is an encoder-decoder of another kind.
    """
    if not getattr(config, "is_encoder_decoder", False) or not architecture:
        return None
    if architecture in _classes(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return TEXT
    if architecture in _classes(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
        return SPEECH
    if architecture in _classes(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        raise ModelError(
            f"{location} is a {architecture}, an encoder-decoder from images to texts, which is not supported; "
            "expected an encoder-decoder from texts (T5, BART) or speech (Whisper) to texts."
        )
    return None


def _classes(mapping: Any) -> set[str]:
    """Return the class names of a mapping of transformers, in which a model type may have several."""
    values = mapping.values()
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def parts_of(module: Any, task: str, inputs: tuple[str, ...], tokenizer: Any, location: str, *, cache: bool) -> Parts:
    """Return how an encoder-decoder is called and evaluated.

    Args:
        module: the model.
        task: one of `TASKS`.
        inputs: inputs of the encoder.
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
    example = _example(module, task, inputs, location)
    try:
        call = detect_caches(module, {name: example[name] for name in inputs})
    except NoCacheError as error:
        raise ModelError(
            f"{location} is a {type(module).__name__}, whose encoder and decoder cannot be told apart by their caches: "
            f"{error}; expected an encoder-decoder such as T5, BART or Whisper."
        ) from error
    return Parts(call, example, decoder_side(module, tokenizer, _longest_target(module.config), location))


def _example(module: Any, task: str, inputs: tuple[str, ...], location: str) -> dict[str, torch.Tensor]:
    """Return two rows of the data's inputs; the second source is padded, so that the mask is not constant."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = module.config.get_text_config(decoder=True).vocab_size
    targets = torch.randint(0, vocabulary, (2, TARGET_TOKENS), generator=generator)
    if task == SPEECH:
        return {inputs[0]: torch.randn(2, *_spectrogram(module, location), generator=generator), DECODER_IDS: targets}
    longest = getattr(module.config, "max_position_embeddings", None) or SOURCE_TOKENS
    ids = torch.randint(0, vocabulary, (2, min(SOURCE_TOKENS, longest)), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] * 3 // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, DECODER_IDS: targets}


def _spectrogram(module: Any, location: str) -> tuple[int, int]:
    """Return the bins and frames of a log-mel spectrogram: as many frames as the encoder has positions, times strides.

    Raises:
        ModelError: the encoder does not take spectrograms of a fixed length.
    """
    config, encoder = module.config, module.get_encoder()
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    strides = [getattr(encoder, name).stride[0] for name in ("conv1", "conv2") if hasattr(encoder, name)]
    if module.main_input_name != "input_features" or bins is None or positions is None or len(strides) != 2:
        raise ModelError(
            f"{location} is a {type(module).__name__}, whose encoder does not take spectrograms of one length as "
            "Whisper's does; expected a Whisper."
        )
    return int(bins), int(positions) * strides[0] * strides[1]


def _longest_target(config: Any) -> int:
    """Return the maximum number of tokens of a target."""
    limits = (getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((limit for limit in limits if isinstance(limit, int)), USUAL_TARGET)
