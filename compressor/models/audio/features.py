"""The features of clips, by the feature extractor that belongs to a model of transformers.

How an extractor prepares clips is found out by calling it on noise: which inputs it returns, whether their length
follows that of the clip, and after how many seconds it cuts a clip off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

USUAL = 30.0  # seconds to which clips are cut, if the features take clips of any length
LONGEST = 64.0  # seconds of noise in which the end of features of one length is searched
PRECISION = 0.01  # seconds, of that search
MASK = "mask"  # end of the names of masks: attention_mask, padding_mask, input_features_mask


@dataclass(frozen=True)
class Features:
    """A feature extractor of transformers, and how it prepares clips.

    Attributes:
        extractor: the feature extractor.
        rate: samples per second of the clips that it takes.
        inputs: names of the arrays that it returns.
        padded: options of a call with clips of several lengths.
        axes: the axis of each input whose size follows the length of the clips; empty for features of one length.
        seconds: length to which longer clips are cut.
    """

    extractor: Any
    rate: int
    inputs: tuple[str, ...]
    padded: Mapping[str, Any]
    axes: Mapping[str, int]
    seconds: float

    def __call__(self, clips: Sequence[Array]) -> dict[str, Array]:
        """Return the inputs of a batch of clips, each float32 [samples]; shorter clips are padded as the model's are.

        Args:
            clips: mono clips at `rate` samples per second, with values in -1 to 1.
        """
        cut = [clip[: round(self.seconds * self.rate)] for clip in clips] if self.axes else list(clips)
        values = _extracted(self.extractor, cut, self.rate, self.padded)
        return {name: _of_model(name, values[name]) for name in self.inputs}

    def only(self, inputs: Sequence[str]) -> Features:
        """Return the features without the inputs that the model does not take."""
        axes = {name: axis for name, axis in self.axes.items() if name in inputs}
        return Features(self.extractor, self.rate, tuple(inputs), self.padded, axes, self.seconds)


def find_features(extractor: Any, main: str) -> Features | None:
    """Find out how a feature extractor prepares clips; None if it does not return the main input of the model.

    Args:
        extractor: a feature extractor of transformers, called with clips and their rate.
        main: name of the main input of the model.
    """
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int) or rate < 1:
        return None
    long, short = noise(rate, 1.0), noise(rate, 0.5)
    try:
        alone = [_extracted(extractor, [clip], rate, {}) for clip in (long, short)]
        if main not in alone[0]:
            return None
        if np.shape(alone[0][main]) == np.shape(alone[1][main]):
            names = _arrays(alone[0], main)
            return Features(extractor, rate, names, {}, {}, _cut_after(extractor, rate, main))
        padded = {"padding": True}
        together = _extracted(extractor, [long, short], rate, padded)
    except (KeyError, RuntimeError, TypeError, ValueError):  # an extractor of something else than clips
        return None
    names = _arrays(together, main)
    axes = {name: _varying(alone[0][name], alone[1][name]) for name in names if name in alone[0]}
    return Features(extractor, rate, names, padded, axes, USUAL)


def noise(rate: int, seconds: float) -> Array:
    """Return a clip of noise, float32 [samples]; of two lengths, the shorter one is the start of the longer one."""
    values = np.random.default_rng(0).standard_normal(round(rate * LONGEST), dtype=np.float32)
    return 0.1 * values[: round(rate * seconds)]


def _extracted(extractor: Any, clips: Sequence[Array], rate: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an extractor returns for clips, as arrays; OmniASR's and a few others return tensors only."""
    values: Mapping[str, Any]
    try:
        values = extractor(list(clips), sampling_rate=rate, return_tensors="np", **options)
    except ValueError as error:
        if "return_tensors" not in str(error):
            raise
        values = extractor(list(clips), sampling_rate=rate, return_tensors="pt", **options)
    return {name: np.asarray(value) for name, value in values.items()}


def _of_model(name: str, values: Any) -> Array:
    """Return an array with the type that models take: int64 masks, float32 features."""
    return np.asarray(values, dtype=np.int64 if name.endswith(MASK) else np.float32)


def _arrays(values: Mapping[str, Any], main: str) -> tuple[str, ...]:
    return (main, *(name for name in values if name.endswith(MASK)))


def _varying(long: Any, short: Any) -> int:
    """Return the axis on which two arrays differ in size."""
    sizes = zip(np.shape(long), np.shape(short), strict=True)
    return next(axis for axis, (one, other) in enumerate(sizes) if one != other)


def _cut_after(extractor: Any, rate: int, main: str) -> float:
    """Return the seconds after which an extractor with features of one length ignores a clip, to `PRECISION`."""

    def features(seconds: float) -> Array:
        return np.asarray(_extracted(extractor, [noise(rate, seconds)], rate, {})[main])

    whole, low, high = features(LONGEST), 0.0, LONGEST
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if np.array_equal(features(middle), whole) else (middle, high)
    return high
