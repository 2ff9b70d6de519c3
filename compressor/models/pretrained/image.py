"""Models of transformers that take images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compressor.choices import ImageSize
from compressor.limitations import Limitation
from compressor.models.base import Model, OtherInputsError, as_numpy
from compressor.models.image_size import CONFIG_SIZE, Call, SizedModel, Sizing, fit_statistics, pixels, sized_model
from compressor.models.image_size import text as size_text
from compressor.models.preprocess import Preprocess
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import image_processor, save
from compressor.models.pretrained.signature import (
    OUTPUTS,
    other_features,
    other_inputs,
    signature_of,
    with_own_output,
)

INPUT, FEATURES = "pixel_values", "image-feature-extraction"
NO_BOXES = Limitation(
    "quality of the boxes", "not stated: agreement with the original compares the classes of its object queries"
)
IMAGE_DEFAULTS = {"image_size": 224, "num_channels": 3}  # if the config lacks them, as the configs of ResNets do


def wrap(loaded: Loaded) -> Model:
    """Return the model at the requested size of images, with its image processor.

    Raises:
        OtherInputsError: the module needs other inputs beside the pixels.
    """
    module = loaded.module
    if others := _required_beside_pixels(module):
        raise OtherInputsError(
            f"a {type(module).__name__} takes {' and '.join(others)} beside {INPUT}; pass it as a module of your own, "
            "package.module:factory, with example inputs."
        )
    signature = signature_of(loaded.task, (INPUT,))
    processor = image_processor(loaded.location, loaded.options)
    chosen = sized(module, signature.call, processor, loaded.image_size, loaded.location)
    signature = with_own_output(signature, module, chosen.sizing.prepared(channels_of(module)))
    task, found = loaded.task, list[Limitation]()
    if len(OUTPUTS.get(task, ())) > len(signature.outputs):
        task = FEATURES
        found.append(Limitation("task", f"the head for {loaded.task} returns {signature.answer} alone, as features"))
    elif task == "object-detection":
        found.append(NO_BOXES)
    return Model(
        **(loaded.fields | {"task": task}),
        call=chosen.call,
        inputs=(INPUT,),
        outputs=signature.outputs,
        answer=signature.answer,
        example=chosen.sizing.example(channels_of(module)),
        dynamic_axes=chosen.sizing.axes,
        preprocess=image_preprocess(module, chosen.processor, chosen.sizing),
        save=partial(save, module, chosen.processor, loaded.sentence_files),
        sizes=chosen.sizing.checked,
        interpolates=chosen.interpolates,
        limitations=(
            *image_limitations(module, chosen),
            *found,
            *other_features(signature),
            *other_inputs(module, (INPUT,)),
        ),
        class_names=loaded.class_names,
    )


def _required_beside_pixels(module: torch.nn.Module) -> list[str]:
    """Return the inputs without a default besides the pixels, such as the tokens of Grounding DINO."""
    taken = inspect.signature(module.forward).parameters.values()
    named = [each for each in taken if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != INPUT]
    return [each.name for each in named if each.default is each.empty]


def image_limitations(module: Any, sized: SizedModel) -> Iterator[Limitation]:
    """Yield the limitations of an image model."""
    if sized.processor is None:
        yield Limitation("preprocessing", "the model has no image processor, so the data must be preprocessed arrays")
    config = _vision_config(module)
    yield from sized.limitations
    for name, assumed in IMAGE_DEFAULTS.items():
        if getattr(config, name, None) is None and not (name == "image_size" and _stated_size(module)):
            known = name == "image_size" and sized.sizing.size != configured_size(module)
            used = f"{size_text(sized.sizing.size)} is used" if known else f"{assumed} is assumed"
            yield Limitation(f"{name} of the config", f"the config does not specify it, so {used}")


def _vision_config(module: Any) -> Any:
    """Return the config of the part of a model that reads the images: that with their size, if one states it."""
    config = getattr(module.config, "vlm_config", module.config)  # PI0 has a vision-language model as a part
    part = next(
        (part for name in ("vision_config", "image_config", "encoder") if (part := getattr(config, name, None))), config
    )
    backbone = getattr(part, "backbone_config", None)  # SAM 2 states the size there
    stated = getattr(part, "image_size", None) is None and getattr(backbone, "image_size", None) is not None
    return backbone if stated else part


def channels_of(module: Any) -> int:
    """Return the number of channels of the images of a model."""
    return int(getattr(_vision_config(module), "num_channels", None) or IMAGE_DEFAULTS["num_channels"])


def configured_size(module: Any) -> tuple[int, int]:
    """Return height and width of the images in the config of a model, by default those of most models."""
    size = _stated_size(module) or IMAGE_DEFAULTS["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _stated_size(module: Any) -> Any:
    """Return the size of the images that a config states, as a number or a pair; None if it states none.

    EdgeTAM, whose images are encoded by timm, states it for the encoder of its prompts.
    """
    parts = (_vision_config(module), getattr(module.config, "prompt_encoder_config", None))
    sizes = [getattr(part, name, None) for part in parts for name in ("image_size", "max_img_size")]
    return next((each for each in sizes if each), None)


def sized(module: Any, call: Call, processor: Any, image_size: ImageSize, location: str) -> SizedModel:
    """Return the model at the requested size of images, or at that of its image processor."""
    channels = channels_of(module)
    _, limits = fit_statistics(processor, channels)
    found = sized_model(module, call, processor, configured_size(module), channels, image_size, location)
    own = found.limitations
    if getattr(_vision_config(module), "image_size", None) is None:  # there is no size that could differ
        own = tuple(limitation for limitation in own if limitation.feature != CONFIG_SIZE)
    return replace(found, limitations=(*own, *limits))


def image_preprocess(module: Any, processor: Any, sizing: Sizing) -> Preprocess:
    """Return what makes inputs of images; without an image processor, the data must be arrays."""
    channels = channels_of(module)
    refused, _ = fit_statistics(processor, channels)
    convert = None if processor is None or refused else partial(pixels, processor)
    arrays = as_numpy(sizing.prepared(channels))
    reduces = any(getattr(processor, name, False) is True for name in ("do_reduce_labels", "reduce_labels"))
    return Preprocess(("pixel_values",), "image", arrays, image=convert, no_image=refused, reduces_labels=reduces)
