"""Models of transformers with a tower of images and a tower of texts, such as CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

from compressor.choices import DYNAMIC, ZERO_SHOT
from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, OtherInputsError, as_numpy, first_line
from compressor.models.image_size import Call, SizedModel, call_interpolating
from compressor.models.pretrained.image import INPUT, channels_of, image_limitations, image_preprocess, sized
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import image_processor, save_sound, tokenizer_of
from compressor.models.pretrained.signature import signature_of
from compressor.models.pretrained.text import EXAMPLE_TOKENS, max_length, text_inputs, text_limitations, text_preprocess
from compressor.models.text.padding import Padding, causal_padding, find_padding

TEXTS = 3  # rows of the example; another number than that of its images, so that both are free
SOFTMAX_TEMPLATE = "a photo of a {}."  # CLIP (Radford et al. 2021, section 3.1.4)
SIGMOID_TEMPLATE = "This is a photo of {}."  # SigLIP, and the pipeline of transformers


class TextTower(torch.nn.Module):
    """The tower of texts alone, for finding out what it takes."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.whole, self.config = module, module.config

    def forward(self, **texts: torch.Tensor) -> torch.Tensor:
        """Return the features of texts, [rows, width]."""
        features = self.whole.get_text_features(**texts)
        value: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
        return value


def wrap(loaded: Loaded) -> Model:
    """Return the model, with its tokenizer and its image processor.

    Raises:
        ModelError: it is no model of images of a fixed size and texts, or it was asked for images of any size.
    """
    module, location = loaded.module, loaded.location
    if loaded.image_size == DYNAMIC:
        raise ModelError(
            f"--image-size dynamic is for models of images alone; {location} also takes texts: give numbers, or leave "
            "--image-size out."
        )
    tokenizer, processor = tokenizer_of(location, loaded.options), image_processor(location, loaded.options)
    tower = _text_tower(module, location)
    names = text_inputs(tower, tokenizer, location)
    longest = max_length(tower, tokenizer, {})
    padding, padded = _padding(tower, names, tokenizer, longest)
    texts = _example(module, names, longest)
    inputs = (INPUT, *names)
    signature = signature_of(ZERO_SHOT, inputs)
    with_texts = partial(_with_texts, signature.call, tuple(texts.values()))
    _check_call(module, with_texts, location)
    chosen = sized(module, with_texts, processor, loaded.image_size, location)
    images = image_preprocess(module, chosen.processor, chosen.sizing)
    written = text_preprocess(names, texts, tokenizer, longest, padding)
    example = chosen.sizing.example(channels_of(module)) | texts
    return Model(
        **loaded.fields,
        call=_sized_call(signature.call, chosen),
        inputs=inputs,
        outputs=signature.outputs,
        answer=signature.answer,
        example=example,
        dynamic_axes=chosen.sizing.axes | {name: {0: "text_batch", 1: "sequence"} for name in names},
        preprocess=replace(
            written,
            inputs=inputs,
            kind="image",
            example=as_numpy(example),
            image=images.image,
            no_image=images.no_image,
            padded=None if padding is None else padding.least or None,
            template=SIGMOID_TEMPLATE if hasattr(module, "logit_bias") else SOFTMAX_TEMPLATE,
        ),
        save=partial(save_sound, module, chosen.processor, tokenizer),
        tokenizer=tokenizer,
        interpolates=chosen.interpolates,
        limitations=(
            *image_limitations(module, chosen),
            *text_limitations(tokenizer, names, longest),
            *padded,
        ),
    )


def _text_tower(module: Any, location: str) -> TextTower:
    """Return the tower of texts.

    Raises:
        ModelError: the model has none.
    """
    if not (hasattr(module, "get_text_features") and hasattr(module, "get_image_features")):
        raise OtherInputsError(
            f"{location} is a {type(module).__name__}, which does not give features of images alone and of texts "
            "alone; expected a model such as CLIP or SigLIP."
        )
    return TextTower(module).eval()


def _padding(
    tower: TextTower, names: tuple[str, ...], tokenizer: Any, longest: int | None
) -> tuple[Padding | None, list[Limitation]]:
    """Return the padding of texts, which the features of a text must not depend on, and its limitations.

    If no padding leaves them unchanged, as in SigLIP, which reads the last token, all texts have the same length: the
    longest that the model takes. The pipeline of transformers pads so too.
    """
    if tokenizer is None:
        return None, []

    def answer(feeds: dict[str, npt.NDArray[Any]]) -> torch.Tensor:
        with torch.inference_mode():
            features: torch.Tensor = tower(**{name: torch.from_numpy(feeds[name]) for name in names})
        return features

    config = tower.config.get_text_config()
    padding, limitations = find_padding(answer, tokenizer, config, names, longest)
    if not any(each.feature == "padding" for each in limitations) or longest is None:
        return padding, limitations
    fixed = replace(causal_padding(tokenizer, config), side=tokenizer.padding_side, least=longest)
    reason = f"every text is padded to {longest} tokens, because the features of a text depend on its padding"
    return fixed, [Limitation("length of texts", reason)]


def _example(module: Any, names: tuple[str, ...], longest: int | None) -> dict[str, torch.Tensor]:
    """Return `TEXTS` rows of tokens; the second ends early, so that the mask is not constant."""
    config = module.config.get_text_config()
    tokens = EXAMPLE_TOKENS if longest is None else min(EXAMPLE_TOKENS, longest)
    ids = torch.randint(0, config.vocab_size, (TEXTS, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, tokens * 3 // 4 :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in names}


def _with_texts(call: Call, texts: tuple[torch.Tensor, ...], module: Any, pixels: torch.Tensor) -> tuple[Any, ...]:
    """Call the model with some texts beside images."""
    return call(module, pixels, *texts)


def _sized_call(call: Call, chosen: SizedModel) -> Call:
    return partial(call_interpolating, call) if chosen.interpolates else call


def _check_call(module: Any, call: Call, location: str) -> None:
    """Raise `ModelError` if the model does not take images as pixels, as SigLIP 2 for any size, which takes patches."""
    outputs = signature_of(ZERO_SHOT, ()).outputs
    size = getattr(getattr(module.config, "vision_config", None), "image_size", None)
    try:
        with torch.inference_mode():
            side = size if isinstance(size, int) else 224
            call(module, torch.zeros(1, channels_of(module), side, side))
    except Exception as error:  # modules raise errors of all kinds
        raise OtherInputsError(
            f"{location} is a {type(module).__name__}, which does not give {', '.join(outputs)} for images [rows, "
            f"channels, height, width] and texts ({first_line(error)}); pass it as a module of your own, "
            "package.module:factory."
        ) from error
