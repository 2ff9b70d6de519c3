"""The input of a model of videos, and its preprocessing by the processor that belongs to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.limitations import Limitation
from compressor.models.base import ModelError
from compressor.models.config_shapes import CLIPS, Call, find_shape, main_input, refusal
from compressor.models.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

SIDE = 64  # pixels of the black frames that a processor is tried with
MAIN = ("pixel_values", "pixel_values_videos")
ARGUMENTS = ("videos", "images")  # of a processor, for the frames of one clip


@dataclass(frozen=True)
class VideoInput:
    """The input of a model of videos.

    Attributes:
        name: its name.
        example: a batch of two, [2, frames, channels, height, width].
        preprocess: the preprocessing of clips.
        limitations: what is missing or was assumed.
    """

    name: str
    example: torch.Tensor
    preprocess: Preprocess
    limitations: tuple[Limitation, ...]


def takes_videos(module: Any) -> bool:
    """Return whether a model of transformers takes clips: its main input is pixels, and its config counts frames."""
    counts = [getattr(getattr(module, "config", None), name, None) for name in CLIPS]
    return main_input(module) in MAIN and any(isinstance(count, int) for count in counts)


def find_input(module: Any, call: Call, processor: Any, location: str) -> VideoInput:
    """Find the input of a model of videos, by its processor if it has one, else by its config.

    Args:
        module: a model of transformers.
        call: calls it with its main input.
        processor: its video or image processor, or None.
        location: name of the model in messages.

    Raises:
        ModelError: the model fails on every input that was tried.
    """
    name = main_input(module)
    count = next(count for each in CLIPS if isinstance(count := getattr(module.config, each, None), int))
    prepared = None if processor is None else _prepared(processor, name, count)
    if prepared is None:
        example, _ = find_shape(module, call, name, location)
        preprocess = Preprocess((name,), "video", {name: example.numpy()}, clip=count)
        return VideoInput(name, example, preprocess, tuple(_without(processor)))
    argument, shape = prepared
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    reason = refusal(module, call, [example])
    if reason is not None:
        raise ModelError(
            f"{location} is a {type(module).__name__}, which fails on what its processor returns for {count} frames, "
            f"{name} {list(example.shape)} ({reason}); check its config and its preprocessor config."
        )
    convert = partial(_frames, processor, argument, name)
    return VideoInput(
        name, example, Preprocess((name,), "video", {name: example.numpy()}, video=convert, clip=count), ()
    )


def _without(processor: Any) -> Iterator[Limitation]:
    reason = "the model has no video processor" if processor is None else "its processor does not take frames"
    yield Limitation("preprocessing", f"{reason}, so the data must be preprocessed arrays")


def _prepared(processor: Any, name: str, count: int) -> tuple[str, tuple[int, ...]] | None:
    """Return the argument of a processor that takes the frames of a clip, and the shape of what it returns for them."""
    from PIL import Image

    frames = [Image.new("RGB", (SIDE, SIDE)) for _ in range(count)]
    for argument in ARGUMENTS:
        try:
            value = _frames(processor, argument, name, frames)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # of another argument
            continue
        if value.ndim == 4:
            return argument, value.shape
    return None


def _frames(processor: Any, argument: str, name: str, frames: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
    """Return the frames of a clip as the model takes them, float32 [frames, channels, height, width]."""
    options = {"do_sample_frames": False} if argument == "videos" else {}
    values = processor(**{argument: [list(frames)]}, return_tensors="pt", **options)
    array: npt.NDArray[np.float32] = values[name][0].float().numpy()
    return array
