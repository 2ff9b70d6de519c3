"""The parts of a vision-language model of transformers: its call with the cache, its example, and what is refused."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.models.auto import modeling_auto

from compressor.internals.transformers import made_by
from compressor.models.base import ModelError, first_line
from compressor.models.config_shapes import shape_of_timm
from compressor.models.text.kv_cache import NoCacheError, detect_cache
from compressor.models.text.probe import TEXTS_ALONE, reads_texts_alone
from compressor.models.vision_language.call import (
    FULL,
    MODALITIES,
    SLIDING,
    TYPES,
    VisionLanguage,
    embedded,
    language_of,
)
from compressor.models.vision_language.image_features import MASK, sees_clips_alone, source_of, takes_tiles
from compressor.models.vision_language.images import Images, Instructed, OneSize
from compressor.models.vision_language.padded_images import padded_images
from compressor.models.vision_language.padded_rows import placed_patches
from compressor.models.vision_language.patch_grids import PatchGrids, patch_grids
from compressor.models.vision_language.tile_grids import tile_grids
from runtimes.base.vision_language import GRID, PIXELS, PLACES, QUERY_IDS, QUERY_MASK, SIZES

# Arguments of get_image_features that are no inputs: those of the config stand for them.
KNOWN = {
    PIXELS, MASK, "kwargs", "vision_feature_layer", "vision_feature_select_strategy", "interpolate_pos_encoding",
}  # fmt: skip
PLACEHOLDERS = ("video_token_id", "audio_token_id", "vision_start_token_id", "audio_start_token_id")
ROWS, WINDOW = 2, 2
FRAMES = 4  # of a clip: InstructBLIP for videos takes no other number in transformers
TASK = "image-text-to-text"
TEXT_TOKENS = 8  # of the example behind the image
SAME = 1e-4  # of the largest logit: the same products, of which some are computed in another order
EXPECTED = "expected a model such as LLaVA, SmolVLM, LLaVA-NeXT or Qwen2-VL"
OWN_MODULE = "pass it as a module of your own, package.module:factory, with example inputs"


@dataclass(frozen=True)
class Parts:
    """How a vision-language model is called, its example inputs from the data, and the tokens of their first image."""

    call: VisionLanguage
    data_example: dict[str, torch.Tensor]
    image_tokens: int


def is_vision_language(architecture: str) -> bool:
    """Return whether a class of transformers generates texts from images and texts."""
    values = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return architecture in {name for value in values for name in ((value,) if isinstance(value, str) else value)}


class PartsError(ModelError):
    """A vision-language model that cannot be exported in parts.

    Attributes:
        reason: why, a clause without a full stop.
        texts_alone: it can be exported for texts alone.
    """

    def __init__(self, module: Any, location: str, reason: str) -> None:
        self.reason, self.texts_alone = reason, reads_texts_alone(module)
        other = TEXTS_ALONE if self.texts_alone else _language_model_alone(module) or OWN_MODULE
        super().__init__(f"{location} is a {type(module).__name__}, which {reason}; {EXPECTED}, or {other}.")


def parts_of(module: Any, location: str) -> Parts:
    """Return how a vision-language model is called and evaluated.

    Args:
        module: the model.
        location: name of the model in messages.

    Raises:
        PartsError: the model takes images in another form, has no cache, or computes something else than the parts.
    """
    kind = "video" if sees_clips_alone(module) else "image"
    image_token = getattr(module.config, f"{kind}_token_id", None)
    compute = getattr(source_of(module), f"get_{kind}_features", None)
    if compute is None or not isinstance(image_token, int):
        missing = f"{kind}_token_id in its config{_other_places(module)}"
        raise PartsError(module, location, f"has no {missing if image_token is None else f'get_{kind}_features'}")
    if getattr(module.config, "use_decoder_only_language_model", True) is False:
        raise PartsError(module, location, "has a language model with an encoder, whose caches these files do not hold")
    others = sorted(set(inspect.signature(compute).parameters) - KNOWN)
    images = _images(module, location, others)
    pictures = images.example()
    try:
        with torch.inference_mode():
            features = images.features(module, *pictures.values())
    except Exception as error:  # modules raise errors of all kinds
        shape = list(pictures[PIXELS].shape)
        raise PartsError(module, location, f"does not take images {shape} alone ({first_line(error)})") from error
    images = images.of_length(features.shape[1])
    try:
        module.get_input_embeddings()
    except NotImplementedError as error:
        raise PartsError(module, location, "names no table of its token embeddings (get_input_embeddings)") from error
    try:
        causal = detect_cache(language_of(module), ("input_ids", "attention_mask"))
    except NoCacheError as error:
        raise PartsError(module, location, f"has no cache that can be detected: {error}") from error
    counts = [images.tokens({name: value[row] for name, value in pictures.items()}) for row in range(ROWS)]
    example = pictures | _tokens(module, image_token, counts)
    types = _token_types(module, images, example, image_token)
    merge = images.merge if isinstance(images, PatchGrids) and _places_in_grids(module) else None
    call = VisionLanguage(images, causal, image_token, merge=merge, embeds_itself=_embeds_itself(module, image_token))
    call = _same(_with_masks(call, types), module, example, types, location)
    return Parts(call, example, counts[0])


def _other_places(module: Any) -> str:
    """Return which masks tell the places of images in place of a token, a clause; empty without any."""
    names = [name for name in inspect.signature(module.forward).parameters if name.startswith("image_")]
    masks = [name for name in names if name.endswith("_mask")]
    return f", but takes {' and '.join(masks)}" if masks else ""


def _language_model_alone(module: Any) -> str | None:
    """Return how to export the language model of a class, a clause; None if it has none that can be loaded alone."""
    parts = [(name, part) for name, part in module.named_children() if isinstance(part, GenerationMixin)]
    names = [name for name, part in parts if made_by(AutoModelForCausalLM, part.config)]
    return f"save its {names[0]} alone by save_pretrained, and pass that folder" if names else None


def _embeds_itself(module: Any, image_token: int) -> bool:
    """Return whether a class does not look up the tokens of its config, such as those around an image, in its table.

    Its blocks may also add embeddings of the tokens.
    """
    table = module.get_input_embeddings()
    stated = [each for name, each in vars(module.config).items() if name.endswith(("_token_id", "_token_index"))]
    known = {each for each in stated if isinstance(each, int) and 0 <= each < table.weight.shape[0]}
    ids = torch.tensor([[0, *sorted(known - {image_token})]])
    try:
        with torch.inference_mode():
            found, *layers = embedded(module, ids)
            return bool(layers) or not torch.allclose(found, table(ids))
    except Exception:  # modules raise errors of all kinds; they are called with embeddings anyway
        return False


def _images(module: Any, location: str, others: Sequence[str]) -> Images:
    """Return the form of the images of a module, given the arguments of its features beside the pixels.

    Raises:
        PartsError: it is none that is known.
    """
    forms: dict[tuple[str, ...], Callable[[Any], Images | str]] = {
        (GRID,): patch_grids,
        (SIZES,): _sized,
        (PLACES,): placed_patches,
    }
    form = forms.get(tuple(others))
    if form is not None:
        found = form(module)
        if isinstance(found, str):
            raise PartsError(module, location, found)
        return found
    vocabulary = getattr(getattr(module.config, "qformer_config", None), "vocab_size", None)
    if others == sorted((QUERY_IDS, QUERY_MASK)) and isinstance(vocabulary, int):
        frames = FRAMES if sees_clips_alone(module) else 0
        return Instructed(_shape(module, location), tiled=False, vocabulary=vocabulary, frames=frames)
    if sees_clips_alone(module):
        raise PartsError(module, location, "sees clips, and no text that tells it what to read of them")
    if others:
        raise PartsError(module, location, f"takes {' and '.join(others)} beside the pixels")
    return OneSize(_shape(module, location), takes_tiles(module))


def _shape(module: Any, location: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a module.

    Raises:
        PartsError: its config does not state them.
    """
    vision = getattr(module.config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        return getattr(vision, "num_channels", 3), height, width
    shape = shape_of_timm(module)
    if shape is None:
        raise PartsError(module, location, "has no image_size in the vision_config of its config, as its images vary")
    return shape


def _sized(module: Any) -> Images | str:
    """Return the images of a model that takes their sizes: tiles, if it has a vector for the ends of lines."""
    return tile_grids(module) if hasattr(module.model, "image_newline") else padded_images(module)


def _places_in_grids(module: Any) -> bool:
    """Return whether image tokens have positions on three axes, frames, rows and columns, as in Qwen2-VL."""
    return any(hasattr(part, "get_rope_index") for part in (module, getattr(module, "model", None)))


def _tokens(module: Any, image_token: int, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return two texts: a token, the placeholders of an image, and a few tokens, of which the second has less.

    The first token is the one that starts an image, if the config names one: Qwen2.5-Omni counts images by it.

    Args:
        module: the model.
        image_token: token id of the placeholders.
        counts: number of placeholders of the image of each text; shorter texts are padded behind.
    """
    vocabulary = module.config.get_text_config().vocab_size
    longest = 1 + max(counts) + TEXT_TOKENS
    ids = torch.randint(0, vocabulary, (ROWS, longest), generator=torch.Generator().manual_seed(0))
    reserved = _reserved(module.config, image_token)
    ids = torch.where(torch.isin(ids, reserved), _unreserved(reserved, vocabulary), ids)
    mask, start = torch.ones_like(ids), getattr(module.config, "vision_start_token_id", None)
    for row, count in enumerate(counts):
        ids[row, 1 : 1 + count] = image_token
        if start not in (None, image_token):
            ids[row, 0] = start
        mask[row, 1 + count + TEXT_TOKENS :] = 0
    mask[1, -TEXT_TOKENS // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _reserved(config: Any, image_token: int) -> torch.Tensor:
    """Return the ids that a text of the example does not hold: the placeholders of images, videos and sound."""
    others = (getattr(config, name, None) for name in PLACEHOLDERS)
    return torch.tensor([image_token, *(each for each in others if isinstance(each, int))])


def _unreserved(reserved: torch.Tensor, vocabulary: int) -> int:
    """Return the first id above the reserved ones, or 0 behind the end, that is not reserved."""
    ids = ((int(reserved[0]) + number) % vocabulary for number in range(1, vocabulary))
    return next(each for each in ids if each not in reserved)


def _token_types(
    module: Any, images: Images, example: dict[str, torch.Tensor], image_token: int
) -> dict[str, torch.Tensor]:
    """Return the token types with which a module reads a prompt; empty if it reads each token in order.

    They are zero where it reads the whole prompt at once, as PaliGemma does, and 1 at image tokens that attend to later
    ones of their image, as in Gemma 3 and Gemma 4. The processors return them for a prompt.
    """
    is_image = (example["input_ids"] == image_token).to(torch.int64)
    arguments = images.arguments(example, is_image.bool())
    taken = inspect.signature(module.forward).parameters
    name = next((name for name in (TYPES, MODALITIES) if name in taken and name not in arguments), None)
    if name is None:
        return {}
    with torch.inference_mode():
        plain, prompt, both = (
            module(**arguments, **types).logits for types in ({}, {name: torch.zeros_like(is_image)}, {name: is_image})
        )
    if not torch.allclose(plain, prompt, atol=SAME):
        return {name: torch.zeros_like(is_image)}
    if not torch.allclose(plain, both, atol=SAME):
        return {name: is_image}
    return {}


def _with_masks(call: VisionLanguage, types: dict[str, torch.Tensor]) -> Iterator[VisionLanguage]:
    """Yield a call with the masks that the token types of a prompt may stand for."""
    if not types:
        yield call
    elif not any(value.any() for value in types.values()):
        yield replace(call, bidirectional=True)
    else:
        every = (FULL, SLIDING)
        yield replace(call, within_images=every, beyond_window=True)
        yield from (replace(call, within_images=layers) for layers in (every, (SLIDING,)))


def _same(
    calls: Iterator[VisionLanguage],
    module: Any,
    example: dict[str, torch.Tensor],
    types: dict[str, torch.Tensor],
    location: str,
) -> VisionLanguage:
    """Return the first of some calls whose parts compute together what the module computes.

    Raises:
        PartsError: the logits of all differ, or the module fails on its example.
    """
    differences = []
    for call in calls:
        differences.append(_difference(call, module, example, types, location))
        if differences[-1] <= SAME:
            return call
    raise PartsError(
        module,
        location,
        f"computes other logits than its vision tower, projector and language model do one after the other (by "
        f"{min(differences):.1e} of the largest)",
    )


def _narrow_window(config: Any, call: VisionLanguage) -> contextlib.AbstractContextManager[Any]:
    """Let a sliding window be narrower than the images of the example, so that what it leaves out matters."""
    if not call.within_images or getattr(config, "sliding_window", None) is None:
        return contextlib.nullcontext()
    return mock.patch.object(config, "sliding_window", WINDOW)


def _difference(
    call: VisionLanguage,
    module: Any,
    example: dict[str, torch.Tensor],
    types: dict[str, torch.Tensor],
    location: str,
) -> float:
    """Return the largest difference between the logits of a call and of its module, relative to the largest.

    Raises:
        PartsError: one of them fails.
    """
    tokens = example["input_ids"].shape[1]
    empty = call.complete({name: value.numpy() for name, value in example.items()})
    feeds = [torch.from_numpy(empty[name]) for name in call.inputs]
    arguments = call.images.arguments(example, example["input_ids"] == call.image_token)
    try:
        with torch.inference_mode(), _narrow_window(module.config.get_text_config(), call):
            expected = module(**arguments, **types).logits
            found = call.call(module, *feeds)[0]
    except Exception as error:  # modules raise errors of all kinds
        raise PartsError(module, location, f"fails on an image and {tokens} tokens ({first_line(error)})") from error
    kept = example["attention_mask"].bool()
    return float((found - expected)[kept].abs().max() / expected[kept].abs().max().clamp(min=1e-12))
