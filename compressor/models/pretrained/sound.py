"""Models of transformers that take sound or a time series."""

from __future__ import annotations

from functools import partial

from compressor.models.audio.features import find_features
from compressor.models.audio.inputs import find_inputs, frames_of, of_one_length
from compressor.models.base import Model
from compressor.models.config_shapes import main_input
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import feature_extractor, save_sound, tokenizer_of
from compressor.models.pretrained.signature import other_features, other_inputs, signature_of, with_own_output


def wrap(loaded: Loaded) -> Model:
    """Return the model, with its feature extractor."""
    module, location, options = loaded.module, loaded.location, loaded.options
    extractor, tokenizer = feature_extractor(location, options), tokenizer_of(location, options)
    features = None if extractor is None else find_features(extractor, main_input(module))
    found = find_inputs(module, lambda names: signature_of(loaded.task, names).call, features, location, extractor)
    if loaded.sequence_length is not None:
        call = signature_of(loaded.task, found.names).call
        found = of_one_length(found, module, call, loaded.sequence_length, location)
    signature = with_own_output(signature_of(loaded.task, found.names), module, found.example)
    frames = frames_of(module, signature.call, found, signature.outputs.index(signature.answer))
    return Model(
        **loaded.fields,
        call=signature.call,
        inputs=found.names,
        outputs=signature.outputs,
        answer=signature.answer,
        example=found.example,
        dynamic_axes=found.axes,
        preprocess=found.preprocess(frames),
        save=partial(save_sound, module, extractor, tokenizer),
        limitations=(*found.limitations, *other_features(signature), *other_inputs(module, found.names)),
        class_names=loaded.class_names,
    )
