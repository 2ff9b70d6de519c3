"""Vision-language models of transformers, with their processor of images and texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import GenerationMixin

from compressor.limitations import Limitation
from compressor.models import several_inputs
from compressor.models.base import LEFT_OUT, Model, ModelError, UndetectedCacheError, as_numpy
from compressor.models.preprocess import GridInput, Preprocess
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import processor_of, save_vision_language
from compressor.models.pretrained.text import max_length
from compressor.models.text.experts import use_writable_experts
from compressor.models.text.padding import causal_padding
from compressor.models.vision_language.image_features import sees_clips_alone
from compressor.models.vision_language.images import Images, OneSize
from compressor.models.vision_language.padded_grids import has_windows
from compressor.models.vision_language.parts import OWN_MODULE, Parts, PartsError, parts_of
from compressor.models.vision_language.patch_grids import PatchGrids
from compressor.models.vision_language.processor import lead_of, prepare
from runtimes.base.vision_language import PIXELS, grid_input

LOGITS = "logits"


def wrap(loaded: Loaded) -> Model:
    """Return the model: one call for images, texts and the cache; without the cache, one for all that it takes.

    Raises:
        ModelError: the model takes images in another form, or has no cache that can be detected.
    """
    module, location = loaded.module, loaded.location
    if not loaded.cache or not isinstance(module, GenerationMixin):
        return _in_one_file(loaded)
    try:
        parts = parts_of(module, location)
    except PartsError as error:
        uncached = None if error.texts_alone or _has_placeholders(module) else several_inputs.wrap(loaded, only=LOGITS)
        if uncached is None:
            raise
        reason = f"it is a {type(module).__name__}, which {error.reason}"
        raise UndetectedCacheError(reason, _without_cache(uncached)) from error
    return _in_parts(loaded, parts)


def _in_one_file(loaded: Loaded) -> Model:
    """Return a model that computes the logits of all its inputs at once.

    Raises:
        ModelError: it fails on the inputs that its config suggests, or it has a cache and is to keep it.
    """
    found = None if _has_placeholders(loaded.module) else several_inputs.wrap(loaded, only=LOGITS)
    if found is None:
        advice = ": leave --no-cache out" if not loaded.cache else f"; {OWN_MODULE}"
        raise ModelError(
            f"{loaded.location} is a {type(loaded.module).__name__}, which gives no logits of arrays of images and "
            f"texts of the sizes in its config{advice}."
        )
    return found if loaded.cache else _without_cache(found)


def _has_placeholders(module: Any) -> bool:
    """Return whether tokens of a text stand for its images or clips, so that no other text can be a trial."""
    return any(isinstance(getattr(module.config, name, None), int) for name in ("image_token_id", "video_token_id"))


def _without_cache(model: Model) -> Model:
    return replace(model, limitations=(*model.limitations, LEFT_OUT))


def _in_parts(loaded: Loaded, parts: Parts) -> Model:
    """Return a model that is exported as one file for each of its parts."""
    module, location = loaded.module, loaded.location
    processor = processor_of(location, loaded.options)
    tokenizer = getattr(processor, "tokenizer", None)
    experts = use_writable_experts(module)
    return Model(
        **loaded.fields,
        call=parts.call.call,
        inputs=parts.call.inputs,
        outputs=parts.call.outputs,
        answer="logits",
        example=parts.call.example(parts.data_example),
        dynamic_axes=parts.call.dynamic_axes,
        preprocess=Preprocess(
            parts.call.data_inputs,
            "image-text",
            as_numpy(parts.data_example),
            complete=parts.call.complete,
            image_text=None
            if processor is None or sees_clips_alone(module)
            else partial(
                prepare, processor, parts.call.images, parts.call.data_inputs, lead_of(processor, module.config)
            ),
            placeholder=str(getattr(processor, "video_token" if sees_clips_alone(module) else "image_token", "")),
            padding=0 if tokenizer is None else causal_padding(tokenizer, module.config.get_text_config()).token,
            tokenizer=type(processor).__name__,
            longest=max_length(module, tokenizer, {}),
            image_token=parts.call.image_token,
            image_tokens=parts.call.images.tokens,
            grid=_grid(parts.call.images, module),
            bidirectional=parts.call.bidirectional,
        ),
        save=partial(save_vision_language, module, processor),
        tokenizer=tokenizer,
        state=parts.call.causal.state,
        limitations=(*_limitations(parts, module), *experts),
    )


def _grid(images: Images, module: Any) -> GridInput | None:
    """Return how the vision encoder takes grids of patches."""
    return GridInput(images.merge, grid_input(module.config.model_type)) if isinstance(images, PatchGrids) else None


def _limitations(parts: Parts, module: Any) -> Iterator[Limitation]:
    """Yield which image is timed where images vary in size, what windows cost, and what is not taken."""
    images = parts.call.images
    if not isinstance(images, OneSize):
        count = parts.image_tokens
        yield Limitation("size of the timed image", f"images vary in size, and one of {count} image tokens is timed")
    if isinstance(images, PatchGrids) and has_windows(module):
        yield Limitation(
            "windows of the vision tower",
            "computed by masks, so a block with windows takes the time of one whose patches all attend to each other",
        )
    if sees_clips_alone(module):
        frames = f"in clips of {parts.data_example[PIXELS].shape[1]} frames"
        yield Limitation("data", f"the model sees images {frames}, of which no data are read but random ones")
    elif any(hasattr(part, "get_video_features") for part in (module, getattr(module, "model", None))):
        yield Limitation("videos", "the files take images and texts, no videos")
    if getattr(module.config, "audio_config", None) is not None:
        yield Limitation("sound", "the files take images and texts, no sound")
