"""Encoder-decoders of transformers, from texts or from sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from compressor.limitations import Limitation
from compressor.models.audio.features import Array, find_features, noise
from compressor.models.base import Model, ModelError, as_numpy
from compressor.models.encoder_decoder.decoder_side import language_limitations
from compressor.models.encoder_decoder.parts import SPEECH, TEXT, parts_of
from compressor.models.preprocess import Preprocess
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import feature_extractor, save_sound, tokenizer_of
from compressor.models.pretrained.text import max_length, text_limitations, text_preprocess
from compressor.models.text.padding import causal_padding


def wrap(loaded: Loaded) -> Model:
    """Return the model, with the tokenizer of its decoder and what prepares the input of its encoder."""
    module, location, task = loaded.module, loaded.location, loaded.task
    tokenizer = tokenizer_of(location, loaded.options)
    extractor = feature_extractor(location, loaded.options) if task == SPEECH else None
    limitations = tuple(language_limitations(module, tokenizer)) if task == SPEECH else ()
    # The mask is an input, because the decoder needs it for padded sources.
    inputs = ("input_features",) if task == SPEECH else ("input_ids", "attention_mask")
    parts = parts_of(module, task, inputs, tokenizer, location, cache=loaded.cache)
    encoder = module.get_encoder() if hasattr(module.get_encoder(), "config") else module
    longest = None if task == SPEECH else max_length(encoder, tokenizer, {})
    source = {name: value for name, value in parts.data_example.items() if name in inputs}
    padding = causal_padding(tokenizer, module.config) if tokenizer is not None else None
    preprocess = (
        sound_preprocess(module, extractor, as_numpy(parts.data_example), location)
        if task == SPEECH
        else text_preprocess(inputs, source, tokenizer, longest, padding)
    )
    if preprocess.audio is not None:
        reason = f"all are padded or cut to {preprocess.seconds:.3g} s, as the model takes them"
        limitations = (*limitations, Limitation("length of the clips", reason))
    return Model(
        **loaded.fields,
        call=parts.call.call,
        inputs=parts.call.inputs,
        outputs=parts.call.outputs,
        answer="logits",
        example=parts.call.example(parts.data_example),
        dynamic_axes=parts.call.dynamic_axes,
        preprocess=replace(
            preprocess,
            inputs=parts.call.data_inputs,
            example=as_numpy(parts.data_example),
            complete=parts.call.complete,
            decoder=parts.decoder,
        ),
        save=partial(save_sound, module, extractor, tokenizer),
        tokenizer=tokenizer,
        state=parts.call.state,
        limitations=tuple(text_limitations(tokenizer, inputs, longest)) if task == TEXT else limitations,
    )


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
