"""Encoder-decoders of transformers, from texts or from sound."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from compressor.models.base import Model, as_numpy
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
    features = feature_extractor(location, loaded.options) if task == SPEECH else None
    # The mask is an input, because the decoder needs it for padded sources.
    inputs = ("input_features",) if task == SPEECH else ("input_ids", "attention_mask")
    parts = parts_of(module, task, inputs, tokenizer, location, cache=loaded.cache)
    encoder = module.get_encoder() if hasattr(module.get_encoder(), "config") else module
    longest = None if task == SPEECH else max_length(encoder, tokenizer, {})
    source = {name: value for name, value in parts.data_example.items() if name in inputs}
    padding = causal_padding(tokenizer, module.config) if tokenizer is not None else None
    preprocess = (
        Preprocess(parts.call.data_inputs, "tensor", as_numpy(parts.data_example))
        if task == SPEECH
        else text_preprocess(inputs, source, tokenizer, longest, padding)
    )
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
        save=partial(save_sound, module, features, tokenizer),
        tokenizer=tokenizer,
        state=parts.call.state,
        limitations=tuple(text_limitations(tokenizer, inputs, longest)) if task == TEXT else (),
    )
