"""Vision-language models of transformers, with their processor of images and texts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from compressor.limitations import Limitation
from compressor.models.base import Model, as_numpy
from compressor.models.preprocess import GridInput, Preprocess
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import processor_of, save_vision_language
from compressor.models.pretrained.text import max_length
from compressor.models.text.experts import use_writable_experts
from compressor.models.text.padding import causal_padding
from compressor.models.vision_language.images import Images, OneSize
from compressor.models.vision_language.padded_grids import has_windows
from compressor.models.vision_language.parts import Parts, parts_of
from compressor.models.vision_language.patch_grids import PatchGrids
from compressor.models.vision_language.processor import lead_of, prepare
from runtimes.base.vision_language import grid_input


def wrap(loaded: Loaded) -> Model:
    """Return the model: one call for images, texts and the cache.

    Raises:
        ModelError: the model takes images in another form, or has no cache that can be detected.
    """
    module, location = loaded.module, loaded.location
    processor = processor_of(location, loaded.options)
    tokenizer = getattr(processor, "tokenizer", None)
    experts = use_writable_experts(module)
    parts = parts_of(module, location, cache=loaded.cache)
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
            if processor is None
            else partial(
                prepare, processor, parts.call.images, parts.call.data_inputs, lead_of(processor, module.config)
            ),
            placeholder=str(getattr(processor, "image_token", "")),
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
    if any(hasattr(part, "get_video_features") for part in (module, getattr(module, "model", None))):
        yield Limitation("videos", "the files take images and texts, no videos")
    if getattr(module.config, "audio_config", None) is not None:
        yield Limitation("sound", "the files take images and texts, no sound")
