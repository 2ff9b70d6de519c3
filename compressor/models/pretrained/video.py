"""Models of transformers that take videos."""

from __future__ import annotations

from functools import partial

from compressor.models.base import Model
from compressor.models.config_shapes import main_input
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import save, video_processor
from compressor.models.pretrained.signature import other_features, other_inputs, signature_of, with_own_output
from compressor.models.video.inputs import find_input


def wrap(loaded: Loaded) -> Model:
    """Return the model, with its video processor."""
    module = loaded.module
    processor = video_processor(loaded.location, loaded.options)
    signature = signature_of(loaded.task, (main_input(module),))
    found = find_input(module, signature.call, processor, loaded.location)
    signature = with_own_output(signature, module, {found.name: found.example})
    return Model(
        **loaded.fields,
        call=signature.call,
        inputs=(found.name,),
        outputs=signature.outputs,
        answer=signature.answer,
        example={found.name: found.example},
        dynamic_axes={found.name: {0: "batch"}},
        preprocess=found.preprocess,
        save=partial(save, module, processor, {}),
        limitations=(*found.limitations, *other_features(signature), *other_inputs(module, (found.name,))),
        class_names=loaded.class_names,
    )
