"""What a module of transformers takes and returns for a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compressor.choices import CTC, ZERO_SHOT
from compressor.limitations import Limitation
from compressor.models.base import OtherInputsError, first_line
from compressor.models.config_shapes import NO_FEATURES
from compressor.models.text.probe import adds_noise, call_without_cache

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
    "object-detection": ("logits", "pred_boxes"),
    "audio-xvector": ("embeddings", "logits"),
    ZERO_SHOT: ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
}
OTHER_INPUTS = {
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "visual_embeds": "features of images",
    "bbox": "positions on a page",
    "input_features": "sound",
    "input_values": "sound",
    "protein_input_ids": "proteins",
    "audio_prompt_latents": "sound",
    "audio_latents": "sound",
    "input_ids": "texts",
}
DECODER_IDS = "decoder_input_ids"
HIDDEN = "last_hidden_state"


@dataclass(frozen=True)
class Signature:
    """The output names of a module for a task, and the function that computes them.

    Attributes:
        outputs: names of the outputs in order.
        answer: name of the output that quality is measured on.
        call: calls a module with its inputs.
        parts: number of tensors under the name of the only output, of which the first is taken.
    """

    outputs: tuple[str, ...]
    answer: str
    call: Callable[..., tuple[torch.Tensor, ...]]
    parts: int = 1


def signature_of(task: str, inputs: tuple[str, ...]) -> Signature:
    """Return the outputs of a task: those of its head, or the hidden states."""
    names = OUTPUTS.get(task)
    if names is not None:
        extra = {"use_cache": False} if task == "text-generation" else {}
        return Signature(names, names[0], partial(_head_outputs, inputs=inputs, names=names, extra=extra))
    return Signature((HIDDEN,), HIDDEN, partial(_features, inputs=inputs))


def with_own_output(signature: Signature, module: Any, values: Mapping[str, torch.Tensor]) -> Signature:
    """Return the signature of a module whose output has no hidden states, such as the pooled output of DPR.

    Its output is the first tensor of floats that the module returns, see `_features`. That of a head whose class
    returns hidden states in place of the outputs of its task are these, see `_head_outputs`.

    Args:
        signature: the signature of the module's task.
        module: a module of transformers.
        values: inputs of the module in order.

    Raises:
        OtherInputsError: the module fails on these inputs alone, or returns no features.
    """
    if signature.outputs != (HIDDEN,):
        return Signature((HIDDEN,), HIDDEN, signature.call) if _is_renamed(signature, module, values) else signature
    try:
        with torch.no_grad():
            returned, told = call_without_cache(module, **values)
            name, _ = _own_output(returned)
    except Exception as error:  # modules raise errors of all kinds
        raise OtherInputsError(
            f"a {type(module).__name__} does not compute features of {' and '.join(values)} alone "
            f"({first_line(error)}); pass it as a module of your own, package.module:factory, with example inputs."
        ) from error
    parts = len(returned[name]) if isinstance(returned[name], list | tuple) else 1
    return Signature((name,), name, partial(signature.call, told=told), parts)


def _is_renamed(signature: Signature, module: Any, values: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a module returns hidden states in place of several outputs of its task, such as boxes."""
    if len(signature.outputs) < 2:
        return False
    try:
        with torch.no_grad():
            return len(signature.call(module, *values.values())) == 1
    except Exception:  # modules raise errors of all kinds; it is told when the model is traced
        return False


def other_features(signature: Signature) -> Iterator[Limitation]:
    """Yield a limitation for features that are no hidden states, see `with_own_output`."""
    (*others, name) = signature.outputs
    if signature.parts > 1:
        yield Limitation("features", f"the model returns {signature.parts} tensors as {name}; this is the first")
    elif not others and name != HIDDEN and (name,) not in OUTPUTS.values():
        yield Limitation("features", f"the model returns no {HIDDEN}, so its features are the output {name}")


def _own_output(returned: Any) -> tuple[str, torch.Tensor]:
    """Return the name and value of the hidden states in an output, else of its first tensor of floats.

    Of an output that has only several tensors under one name, such as the logits of MGP-STR, it is the first.

    Raises:
        TypeError: there is none.
    """
    if not isinstance(returned, Mapping):
        raise TypeError(f"it returns {type(returned).__name__}, not outputs by name")
    entries = [(name, returned[name]) for name in (HIDDEN, *returned) if name in returned]
    firsts = [(name, value[0]) for name, value in entries if isinstance(value, list | tuple) and value]
    for name, value in (*entries, *firsts):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return name, value
    raise TypeError(f"{NO_FEATURES}, only {', '.join(returned)}")


def _features(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], told: Mapping[str, bool] | None = None
) -> tuple[torch.Tensor, ...]:
    """Return the features of a module; `told` is the argument that it makes no cache by, None finds it out."""
    values = dict(zip(inputs, tensors, strict=True))
    returned = call_without_cache(module, **values)[0] if told is None else module(**values, **told)
    return (_own_output(returned)[1],)


def _head_outputs(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], names: tuple[str, ...], extra: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a head by their names.

    The classifiers and the text detectors of PaddleOCR return their only result under the name of hidden states: logits
    [rows, classes], or a map in place of several outputs.
    """
    returned = module(**dict(zip(inputs, tensors, strict=True)), **extra)
    renamed = HIDDEN in returned and not any(name in returned for name in names)
    if renamed and (len(names) > 1 or returned[HIDDEN].shape[1:] == (getattr(module.config, "num_labels", None),)):
        return (returned[HIDDEN],)
    return tuple(returned[name] for name in names)


def other_inputs(module: Any, inputs: tuple[str, ...]) -> Iterator[Limitation]:
    """Yield a limitation for what the forward of a module takes besides its inputs, such as the images of LLaVA."""
    if adds_noise(module):
        reason = "the class adds random noise to its latents unless it is told not to; the export adds none"
        yield Limitation("noise", reason)
    own = inspect.signature(module.forward).parameters
    left_out = [name for name in OTHER_INPUTS if name in own and name not in inputs]
    if left_out:
        kinds = " and ".join(dict.fromkeys(OTHER_INPUTS[name] for name in left_out))
        yield Limitation(f"input {', '.join(left_out)}", f"the model also takes {kinds}, but the export does not")
    if DECODER_IDS in own and DECODER_IDS not in inputs:
        yield Limitation(
            f"input {DECODER_IDS}", "the export does not take it; the decoder reads the text of the encoder, shifted"
        )
