"""The inputs of models of transformers that take sound, found out by calling the models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from compressor.limitations import Limitation
from compressor.models.audio.features import MASK, Array, Features, noise
from compressor.models.base import ModelError, OtherInputsError
from compressor.models.config_shapes import SOUND, Call, find_shape, main_input, refusal
from compressor.models.preprocess import Kind, Preprocess

SERIES = "past_values"  # the main input of models of time series
WAVEFORMS = "input_values"
SEQUENCE = "sequence"
SECONDS = (1.0, 0.75)  # lengths of the two clips of the example
WAVEFORM = 2  # axes of a batch of waveforms
TIME = (2, 1)  # axes of the frames of a spectrogram that are tried
FRAMEWISE = 3  # axes of an output with one row for each frame


@dataclass(frozen=True)
class SoundInputs:
    """The inputs of a model of sound.

    Attributes:
        names: names of the inputs in order.
        example: a batch of two, the second clip shorter where clips have any length.
        axes: the dynamic axes of each input.
        features: the features of clips; None if the model has no feature extractor.
        limitations: what is missing or was assumed.
        unfit: the reason why its feature extractor cannot be used; empty without one, or if it can.
        fixed: samples or frames of every clip; None for any.
    """

    names: tuple[str, ...]
    example: dict[str, torch.Tensor]
    axes: dict[str, dict[int, str]]
    features: Features | None
    limitations: tuple[Limitation, ...]
    unfit: str = ""
    fixed: int | None = None

    def preprocess(self, frames: Callable[[Sequence[int]], Array] | None) -> Preprocess:
        """Return the preprocessing of clips; `frames` counts the frames of the output, see `Preprocess`."""
        arrays = {name: value.numpy() for name, value in self.example.items()}
        varying = {name: tuple(axis for axis in axes if axis) for name, axes in self.axes.items()}
        found = self.features
        if found is None:
            kind: Kind = "tensor" if SERIES in self.names else "audio"
            return Preprocess(self.names, kind, arrays, varying=varying, no_audio=self.unfit, padded=self.fixed)
        return Preprocess(
            self.names,
            "audio",
            arrays,
            audio=found,
            rate=found.rate,
            seconds=found.seconds,
            frames=frames,
            varying=varying,
            padded=self.fixed,
        )


def of_one_length(found: SoundInputs, module: Any, call: Call, length: int, location: str) -> SoundInputs:
    """Return the inputs for clips of one number of samples or frames.

    Args:
        found: the inputs for clips of any length.
        module: the model.
        call: calls it with them.
        length: samples of a waveform, or frames of a spectrogram.
        location: name of the model in messages.

    Raises:
        ModelError: the model takes clips of another fixed length, several axes of time, or fails on clips of this one.
    """
    times = {
        name: next((axis for axis, each in axes.items() if each == SEQUENCE), 0) for name, axes in found.axes.items()
    }
    main = found.names[0]
    sizes = {name: found.example[name].shape[axis] for name, axis in times.items() if axis}
    if set(sizes) != set(found.names) or len(set(sizes.values())) > 1:
        shapes = ", ".join(f"{name} {list(found.example[name].shape)}" for name in found.names)
        raise ModelError(
            f"--sequence-length {length}, but {location} takes {shapes}, which have no length in common that may vary; "
            "leave --sequence-length out."
        )
    example = {name: _repeated(found.example[name], times[name], length) for name in found.names}
    unit = unit_of(main)
    if (reason := refusal(module, call, list(example.values()))) is not None:
        raise ModelError(
            f"--sequence-length {length}, but {location} fails on clips of {length} {unit} ({reason}); give another "
            "number."
        )
    features = None if found.features is None else found.features.of_one_length(length, samples=main == WAVEFORMS)
    clips = "give arrays of as many" if features is None else "shorter ones are padded, longer ones cut"
    limit = Limitation("length of the clips", f"the export takes only clips of {length} {unit}; {clips}")
    axes = {name: {0: "batch"} for name in found.names}
    return replace(
        found, example=example, axes=axes, features=features, limitations=(*found.limitations, limit), fixed=length
    )


def unit_of(main: str) -> str:
    """Return what the axis of time of the main input of a model of sound counts."""
    return "samples" if main == WAVEFORMS else "frames"


def _repeated(values: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """Return values that are repeated, or cut, to a size of an axis."""
    times = [-(-length // size) if each == axis else 1 for each, size in enumerate(values.shape)]
    return values.repeat(times).narrow(axis, 0, length).contiguous()


def sound_input(module: Any) -> str:
    """Return the name of the input of a model that is sound or a time series; its main input if it has none."""
    parts = (module, getattr(module, "encoder", module))  # a model that joins two reads what its encoder reads
    taken = [name for name in inspect.signature(module.forward).parameters if name in SOUND]
    mains = [main_input(part) for part in parts]
    return next((name for name in (*mains, *taken) if name in (*SOUND, SERIES)), mains[0])  # Pop2Piano's is tokens


def takes_series(kind: Any) -> bool:
    """Return whether the main input of a model is a time series."""
    return main_input(kind) == SERIES


def takes_sound(kind: Any) -> bool:
    """Return whether the main input of a class of transformers, or of a model, is sound."""
    return main_input(kind) in SOUND


def find_inputs(
    module: Any,
    call: Callable[[tuple[str, ...]], Call],
    features: Features | None,
    location: str,
    extractor: Any = None,
) -> SoundInputs:
    """Find the inputs that a model takes, of those that its feature extractor returns.

    Args:
        module: a model of transformers.
        call: returns the function that calls the module with the inputs of the given names.
        features: the features of clips; None without a feature extractor, or with one that gives another input.
        location: name of the model in messages.
        extractor: the feature extractor, or None.

    Raises:
        OtherInputsError: the model fails on every input that was tried; a transducer (Parakeet) also takes a token.
    """
    main = sound_input(module)
    if features is None:
        unfit = "" if extractor is None else f"its {type(extractor).__name__} does not give {main}, which it takes"
        return _without_features(module, call, main, location, unfit)
    clips = [noise(features.rate, seconds) for seconds in SECONDS]
    example = {name: torch.from_numpy(value) for name, value in features(clips).items()}
    reasons = []
    for names in dict.fromkeys((features.inputs, (main,))):
        reason = refusal(module, call(names), [example[name] for name in names])
        if reason is None:
            axes = {name: {0: "batch"} | ({features.axes[name]: SEQUENCE} if features.axes else {}) for name in names}
            limits = tuple(_limitations(features, names))
            return SoundInputs(names, {name: example[name] for name in names}, axes, features.only(names), limits)
        reasons.append(reason)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in example.items())
    raise OtherInputsError(
        f"{location} is a {type(module).__name__}, which fails on what its feature extractor returns for two clips, "
        f"{shapes} ({reasons[0]}); check its config and preprocessor_config.json."
    )


def frames_of(module: Any, call: Call, inputs: SoundInputs, answer: int) -> Callable[[Sequence[int]], Array] | None:
    """Return the function that counts the frames of the output for clips of some numbers of samples.

    A convolution with kernel k and stride s makes (n - k) // s + 1 frames of n. Return None if the config names no
    convolutions, or if the output has another number of frames for the example.

    Args:
        module: a model that takes waveforms.
        call: calls the module with its inputs.
        inputs: the inputs of the module.
        answer: position of the output with one row for each frame.
    """
    config, waveform = module.config, inputs.example[inputs.names[0]]
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if waveform.ndim != WAVEFORM or not (isinstance(kernels, Sequence) and isinstance(strides, Sequence)):
        return None
    counts = partial(_frames, tuple(zip(kernels, strides, strict=True)))
    with torch.inference_mode():
        output = call(module, *inputs.example.values())[answer]
    return counts if output.ndim == FRAMEWISE and output.shape[1] == counts([waveform.shape[1]])[0] else None


def _frames(convolutions: Sequence[tuple[int, int]], samples: Sequence[int]) -> Array:
    counts = np.asarray(samples, dtype=np.int64)
    for kernel, stride in convolutions:
        counts = (counts - kernel) // stride + 1
    return counts.clip(min=0)


def _limitations(features: Features, names: tuple[str, ...]) -> Iterator[Limitation]:
    if not features.axes:
        reason = f"all are padded or cut to {features.seconds:.3g} s, as the model takes them"
        yield Limitation("length of the clips", reason)
    elif not any(name.endswith(MASK) for name in names):
        reason = "the model takes no mask, so it also reads the zeros behind a clip that is shorter than its batch"
        yield Limitation("padding of the clips", reason)


def _without_features(
    module: Any, call: Callable[[tuple[str, ...]], Call], main: str, location: str, unfit: str
) -> SoundInputs:
    """Return the inputs of a model without a feature extractor that fits it, by the first shape that it takes.

    A model that fails without a mask of the frames is called with one.

    Raises:
        ModelError: the model fails on every shape that was tried.
    """
    masks = [name for name in inspect.signature(module.forward).parameters if name.endswith(MASK)]
    tried: list[Callable[[], tuple[dict[str, torch.Tensor], int]]] = [
        partial(_shaped, module, call((main,)), main, location)
    ]
    tried += [
        partial(_masked, module, call((main, mask)), main, mask, (axis, kind), location)
        for kind in (torch.int64, torch.bool)
        for mask in masks
        for axis in TIME
    ]
    refusals = []
    for attempt in tried:
        try:
            example, axis = attempt()
        except ModelError as error:
            refusals.append(error)
            continue
        axes = {name: _axes(value, example[main], axis) for name, value in example.items()}
        reason = f"{unfit or 'the model has no feature extractor'}, so the data must be preprocessed arrays"
        if main == SERIES:
            reason = f"the data must be arrays {list(example[main].shape[1:])}, as the model's config has them"
        return SoundInputs(tuple(example), example, axes, None, (Limitation("preprocessing", reason),), unfit)
    raise refusals[-1]


def _shaped(module: Any, call: Call, main: str, location: str) -> tuple[dict[str, torch.Tensor], int]:
    example, axis = find_shape(module, call, main, location)
    return {main: example}, axis


def _masked(
    module: Any, call: Call, main: str, mask: str, frames: tuple[int, torch.dtype], location: str
) -> tuple[dict[str, torch.Tensor], int]:
    """Find the shape of the main input of a model, called with a mask of all frames: their axis, and its type."""
    time, kind = frames

    def with_mask(model: Any, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if values.ndim <= time:
            raise ModelError(f"{location} takes a waveform without frames.")
        return call(model, values, _frames_of(values, time).to(kind))

    example, axis = find_shape(module, with_mask, main, location)
    return {main: example, mask: _frames_of(example, time).to(kind)}, axis


def _frames_of(values: torch.Tensor, time: int) -> torch.Tensor:
    """Return a mask with a 1 for each frame, [rows, frames]."""
    return torch.ones(values.shape[0], values.shape[time], dtype=torch.int64)


def _axes(value: torch.Tensor, values: torch.Tensor, axis: int) -> dict[int, str]:
    """Return the dynamic axes of an input: the batch, and the frames where they may have any number."""
    if not axis:
        return {0: "batch"}
    return {0: "batch", axis if value.ndim == values.ndim else 1: SEQUENCE}
