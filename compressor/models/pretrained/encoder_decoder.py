"""Encoder-decoders of transformers, from texts, from sound or from images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from compressor.choices import DYNAMIC
from compressor.limitations import Limitation
from compressor.models.audio.features import Array, find_features, noise
from compressor.models.audio.inputs import find_inputs, sound_input
from compressor.models.base import Model, ModelError, as_numpy
from compressor.models.config_shapes import Call
from compressor.models.encoder_decoder.decoder_side import language_limitations
from compressor.models.encoder_decoder.image_sources import image_token, other_image_source
from compressor.models.encoder_decoder.parts import (
    IMAGE,
    SPEECH,
    TEXT,
    Source,
    parts_of,
    spectrogram_source,
    target_tokens,
    text_source,
)
from compressor.models.preprocess import Preprocess
from compressor.models.pretrained.image import INPUT, channels_of, image_limitations, image_preprocess, sized
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import feature_extractor, image_processor, save_sound, tokenizer_of
from compressor.models.pretrained.signature import DECODER_IDS, other_inputs
from compressor.models.pretrained.text import max_length, text_limitations, text_preprocess
from compressor.models.text.padding import causal_padding


@dataclass(frozen=True)
class _Reader:
    """What prepares the input of an encoder, the source of the example, and what is said about both."""

    source: Source
    preprocess: Preprocess
    processor: Any
    limitations: tuple[Limitation, ...]


def wrap(loaded: Loaded) -> Model:
    """Return the model, with the tokenizer of its decoder and what prepares the input of its encoder.

    Raises:
        ModelError: the model takes other inputs than tokens, sound or an image, or its caches cannot be detected.
    """
    module, location = loaded.module, loaded.location
    tokenizer = tokenizer_of(location, loaded.options)
    reader = {TEXT: _texts, SPEECH: _sound, IMAGE: _images}[loaded.task](loaded, tokenizer)
    parts = parts_of(module, reader.source, tokenizer, location, cache=loaded.cache)
    return Model(
        **loaded.fields,
        call=parts.call.call,
        inputs=parts.call.inputs,
        outputs=parts.call.outputs,
        answer="logits",
        example=parts.call.example(parts.data_example),
        dynamic_axes=parts.call.dynamic_axes,
        preprocess=replace(
            reader.preprocess,
            inputs=parts.call.data_inputs,
            example=as_numpy(parts.data_example),
            complete=parts.call.complete,
            decoder=parts.decoder,
        ),
        save=partial(save_sound, module, reader.processor, tokenizer),
        tokenizer=tokenizer,
        state=parts.call.state,
        limitations=reader.limitations,
    )


def _texts(loaded: Loaded, tokenizer: Any) -> _Reader:
    """Return the reader of sources of texts. The mask is an input, because the decoder needs it for padded sources."""
    module = loaded.module
    source = text_source(module)
    encoder = module.get_encoder() if hasattr(module.get_encoder(), "config") else module
    longest = max_length(encoder, tokenizer, {})
    padding = causal_padding(tokenizer, module.config) if tokenizer is not None else None
    inputs = tuple(source.example)
    preprocess = text_preprocess(inputs, source.example, tokenizer, longest, padding)
    return _Reader(source, preprocess, None, tuple(text_limitations(tokenizer, inputs, longest)))


def _sound(loaded: Loaded, tokenizer: Any) -> _Reader:
    """Return the reader of clips: spectrograms of one length, as Whisper takes them, or features of any length."""
    module, location = loaded.module, loaded.location
    extractor = feature_extractor(location, loaded.options)
    language = tuple(language_limitations(module, tokenizer))
    source = spectrogram_source(module)
    if source is None:
        features = None if extractor is None else find_features(extractor, sound_input(module))
        found = find_inputs(module, partial(_with_targets, target_tokens(module)), features, location, extractor)
        read = Source(found.example, found.axes)
        return _Reader(read, found.preprocess(None), extractor, (*language, *found.limitations))
    preprocess = sound_preprocess(module, extractor, as_numpy(source.example), location)
    if preprocess.audio is not None:
        reason = f"all are padded or cut to {preprocess.seconds:.3g} s, as the model takes them"
        language = (*language, Limitation("length of the clips", reason))
    return _Reader(source, preprocess, extractor, language)


def _images(loaded: Loaded, tokenizer: Any) -> _Reader:
    """Return the reader of images of one size.

    Raises:
        ModelError: the encoder does not take images as pixels alone, or was asked for images of any size.
    """
    module, location = loaded.module, loaded.location
    if loaded.image_size == DYNAMIC:
        raise ModelError(
            f"--image-size dynamic is for models of images alone; {location} also writes texts: give numbers, or leave "
            "--image-size out."
        )
    if (source := other_image_source(module)) is not None:
        return _arrays(module, source, image_token(module))
    call = partial(_with_targets, target_tokens(module))((INPUT,))
    processor = image_processor(location, loaded.options)
    chosen = sized(module, call, processor, loaded.image_size, location)
    source = Source(chosen.sizing.prepared(channels_of(module)), chosen.sizing.axes)
    preprocess = image_preprocess(module, chosen.processor, chosen.sizing)
    return _Reader(source, preprocess, chosen.processor, tuple(image_limitations(module, chosen)))


def _arrays(module: Any, source: Source, token: int | None) -> _Reader:
    """Return the reader of what is prepared already; `token` stands for a feature of an image in texts."""
    names = tuple(source.example)
    varying = {name: tuple(axis for axis in axes if axis) for name, axes in source.axes.items()}
    preprocess = Preprocess(names, "tensor", as_numpy(source.example), varying=varying, image_token=token)
    reason = f"the data must be arrays by the names of the inputs: {', '.join(names)}"
    left_out = other_inputs(module, (*names, DECODER_IDS))
    return _Reader(source, preprocess, None, (Limitation("preprocessing", reason), *left_out))


def _with_targets(targets: torch.Tensor, inputs: tuple[str, ...]) -> Call:
    """Return a function that calls a module with inputs of its encoder, and with target tokens."""

    def call(module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids = targets[: len(tensors[0])]
        return (module(**dict(zip(inputs, tensors, strict=True)), decoder_input_ids=ids).logits,)

    return call


def sound_preprocess(module: Any, extractor: Any, example: Mapping[str, Array], location: str) -> Preprocess:
    """Return the preprocessing of clips for an encoder that takes spectrograms of one length.

    Raises:
        ModelError: the feature extractor makes spectrograms of another shape.
    """
    main = module.main_input_name
    found = None if extractor is None else find_features(extractor, main)
    if found is None:
        return Preprocess(tuple(example), "audio", example)
    features = found.only((main,))
    shape, expected = features([noise(features.rate, 1.0)])[main].shape[1:], example[main].shape[1:]
    if features.axes or shape != expected:
        raise ModelError(
            f"the feature extractor of {location} makes spectrograms {list(shape)} of a second of sound, but its "
            f"encoder takes {list(expected)}; correct preprocessor_config.json, or remove it and pass features as data."
        )
    return Preprocess(tuple(example), "audio", example, audio=features, rate=features.rate, seconds=features.seconds)
