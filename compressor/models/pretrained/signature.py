"""What a module of transformers takes and returns for a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compressor.choices import CTC, ZERO_SHOT
from compressor.limitations import Limitation

OUTPUTS = {
    "image-classification": ("logits",),
    "text-classification": ("logits",),
    "text-generation": ("logits",),
    "token-classification": ("logits",),
    "fill-mask": ("logits",),
    "image-segmentation": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "depth-estimation": ("predicted_depth",),
    "audio-classification": ("logits",),
    "audio-frame-classification": ("logits",),
    CTC: ("logits",),
    "video-classification": ("logits",),
    ZERO_SHOT: ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
}
OTHER_INPUTS = {
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "visual_embeds": "features of images",
    "bbox": "positions on a page",
    "input_features": "sound",
    "input_values": "sound",
    "input_ids": "texts",
}
DECODER_IDS = "decoder_input_ids"


@dataclass(frozen=True)
class Signature:
    """The output names of a module for a task, and the function that computes them."""

    outputs: tuple[str, ...]
    answer: str
    call: Callable[..., tuple[torch.Tensor, ...]]


def signature_of(task: str, inputs: tuple[str, ...]) -> Signature:
    """Return the outputs of a task: those of its head, or the hidden states."""
    names = OUTPUTS.get(task)
    if names is not None:
        extra = {"use_cache": False} if task == "text-generation" else {}
        return Signature(names, names[0], partial(_head_outputs, inputs=inputs, names=names, extra=extra))
    return Signature(("last_hidden_state",), "last_hidden_state", partial(_hidden, inputs=inputs))


def _head_outputs(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], names: tuple[str, ...], extra: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    returned = module(**dict(zip(inputs, tensors, strict=True)), **extra)
    return tuple(returned[name] for name in names)


def _hidden(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return (module(**dict(zip(inputs, tensors, strict=True))).last_hidden_state,)


def other_inputs(module: Any, inputs: tuple[str, ...]) -> Iterator[Limitation]:
    """Yield a limitation for what the forward of a module takes besides its inputs, such as the images of LLaVA."""
    own = inspect.signature(module.forward).parameters
    left_out = [name for name in OTHER_INPUTS if name in own and name not in inputs]
    if left_out:
        kinds = " and ".join(dict.fromkeys(OTHER_INPUTS[name] for name in left_out))
        yield Limitation(f"input {', '.join(left_out)}", f"the model also takes {kinds}, but the export does not")
    if DECODER_IDS in own and DECODER_IDS not in inputs:
        yield Limitation(
            f"input {DECODER_IDS}", "the export does not take it; the decoder reads the text of the encoder, shifted"
        )
