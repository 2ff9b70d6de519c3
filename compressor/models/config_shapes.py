"""Shapes of inputs from the numbers in a config of transformers, for models without a preprocessor.

The first shape with which a call of the model succeeds is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from compressor.models.base import OtherInputsError, first_line

NO_FEATURES = "it returns no tensor of features"  # begins the reason of a call that succeeds
# The main inputs of models of sound: a waveform, or a spectrogram.
SOUND = ("input_values", "input_features", "audio_mel")
SAMPLES = 16_000  # of a waveform
MULTIPLE = 19_200  # of a waveform; a multiple of 40, 60, 80 and 120 ms at 16 and 24 kHz
FRAMES = 128  # of a spectrogram
STACKED = 120  # of one whose frames are stacked; no multiple of a block of attention, which would be fixed
STEPS = 2  # frames of a spectrogram in each position, of Whisper's encoder
# Names of sizes in the configs of transformers.
WIDTHS = (
    "num_mel_bins",
    "feature_projection_input_dim",
    "input_feat_per_channel",
    "num_mel_features",
    "input_feat_size",
    "num_mel_channels",
    "input_dim",
    "input_size",
    "feature_size",
    "num_chroma",
)
USUAL_WIDTHS = (128, 80)  # mel channels, for a config that states none, as that of Gemma 4's encoder
STATES = ("d_model", "hidden_size")  # widths of features that an encoder takes as its states, as Pop2Piano's
LENGTHS = ("max_length", "max_source_positions")
CLIPS = ("num_frames", "frames_per_clip")
SIDES = ("image_size", "crop_size")
COLOURS = ("num_channels", "in_chans")

Call = Callable[..., tuple[torch.Tensor, ...]]


def main_input(kind: Any) -> str:
    """Return the name of the main input of a model of transformers, or of its class.

    It is ``main_input_name``, or the first argument of a class that takes no input of that name.
    """
    taken = list(inspect.signature(kind.forward).parameters) if hasattr(kind, "forward") else []
    stated = str(getattr(kind, "main_input_name", ""))
    arguments = [name for name in taken if name not in ("self", "args", "kwargs")]
    return arguments[0] if arguments and stated not in arguments else stated


def find_shape(module: Any, call: Call, main: str, location: str) -> tuple[torch.Tensor, int]:
    """Return a batch of two random samples that a model takes, and the axis that may have any size; 0 without one.

    Args:
        module: a model of transformers.
        call: calls it with its main input.
        main: name of this input.
        location: name of the model in messages.

    Raises:
        OtherInputsError: the model fails on every shape that was tried.
    """
    reasons, fixed = [], None
    for shape, axis in (*sample_shapes(module.config, main), *_stacked(module, main), *_multiples(main)):
        example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        reason = refusal(module, call, [example])
        if reason is not None:
            reasons.append(reason)
        elif not axis or _varies(module, call, example, axis):
            return example, axis
        elif fixed is None:  # a size that the config states is better than one that was made up
            fixed = example
    if fixed is not None:
        return fixed, 0
    if (computed := next((reason for reason in reasons if reason.startswith(NO_FEATURES)), None)) is not None:
        raise OtherInputsError(
            f"{location} is a {type(module).__name__}, whose outputs are no features, as {computed}; pass it as a "
            "module of your own, package.module:factory, whose forward returns tensors of floats, such as those that "
            "its codes are chosen by."
        )
    raise OtherInputsError(
        f"{location} is a {type(module).__name__} without a preprocessor, and it fails on every shape of {main} that "
        f"its config suggests ({reasons[-1] if reasons else 'none'}); add its preprocessor_config.json, or pass it as "
        "a module of your own, package.module:factory, with example inputs."
    )


def refusal(module: Any, call: Call, tensors: Sequence[torch.Tensor]) -> str | None:
    """Return the reason why a module fails on some inputs; None if it does not."""
    try:
        with torch.inference_mode():
            call(module, *tensors)
    except Exception as error:  # modules raise errors of all kinds
        return first_line(error)
    return None


def sample_shapes(config: Any, main: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shapes of a sample, each with the axis of time, counted with the batch as axis 0."""
    if main == "input_values":
        yield (SAMPLES,), 1
        yield (1, SAMPLES), 2
    if main in SOUND:
        unstated = [*USUAL_WIDTHS, *numbers(config, STATES)] if main != "input_values" else []
        for width in numbers(config, WIDTHS) or unstated:
            yield (FRAMES, width), 1
            yield (width, FRAMES), 2
            yield from (((length, width), 0) for length in numbers(config, LENGTHS))
            yield from (((width, STEPS * length), 0) for length in numbers(config, LENGTHS))
    if main.startswith("pixel_values"):
        for frames in numbers(config, CLIPS):
            for side in numbers(config, SIDES):
                yield from (((frames, channels, side, side), 0) for channels in numbers(config, COLOURS))
    if main == "past_values":
        for length in numbers(config, ("context_length",)):
            yield from (((length, channels), 0) for channels in numbers(config, ("num_input_channels",)))


def shape_of_timm(module: Any) -> tuple[int, int, int] | None:
    """Return channels, height and width of the images of a vision tower that timm makes; None for other towers.

    They are those of its pretrained weights, or the height and width that its embedding of patches was made for.
    """
    made = ((part, getattr(part, "pretrained_cfg", None)) for part in module.modules())
    tower, facts = next(((part, facts) for part, facts in made if facts), (None, None))
    if facts is None:
        return None
    channels, *size = facts["input_size"]
    height, width = getattr(getattr(tower, "patch_embed", None), "img_size", None) or size
    return int(channels), int(height), int(width)


def _multiples(main: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shapes of waveforms for models that take multiples of the samples of a frame, such as Muse Spark's."""
    if main == "input_values":
        yield (MULTIPLE,), 1
        yield (1, MULTIPLE), 2


def _stacked(module: Any, main: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shapes of spectrograms whose frames stand beside each other, as Granite Speech reads four as one.

    Their width is what a layer of the module reads: a multiple of a width in the config.
    """
    widths = numbers(module.config, WIDTHS) if main in SOUND else []
    read = dict.fromkeys(part.in_features for part in module.modules() if isinstance(part, torch.nn.Linear))
    for size in read:
        if any(size > width and size % width == 0 for width in widths):
            yield (STACKED, size), 1


def numbers(config: Any, names: Sequence[str]) -> list[int]:
    """Return the whole numbers of these names in a config and in its parts, such as that of an encoder."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    found = [getattr(part, name, None) for part in parts for name in names]
    return list(dict.fromkeys(number for number in found if isinstance(number, int) and number > 0))


def _varies(module: Any, call: Call, example: torch.Tensor, axis: int) -> bool:
    return refusal(module, call, [example.narrow(axis, 0, example.shape[axis] * 3 // 4)]) is None
