"""Decoding of sound files: one channel, at the rate that the model takes."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.limitations import Limitation

WAV = ".wav"
# Formats that need the package soundfile.
OTHERS = (".aiff", ".flac", ".mp3", ".ogg")
SHORTEST = 0.1  # seconds; convolutions of speech models need 25 ms, and a clip of padding alone has no frame

Wave = npt.NDArray[np.float32]


class BrokenClipError(Exception):
    """A sound file that cannot be used; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True)
class Clip:
    """A decoded clip.

    Attributes:
        samples: float32 [samples], values in -1 to 1.
        rate: samples per second in the file.
        channels: number of channels in the file, which are averaged.
    """

    samples: Wave
    rate: int
    channels: int


def has_soundfile() -> bool:
    """Return whether the package soundfile is installed."""
    return util.find_spec("soundfile") is not None


def decode(path: Path, rate: int) -> Clip:
    """Decode a file, average its channels, and resample it to `rate` samples per second.

    Resampling is polyphase filtering with a Kaiser window, as scipy.signal.resample_poly does it by default.

    Raises:
        BrokenClipError: the file cannot be decoded, is shorter than `SHORTEST`, or holds values that are not finite.
    """
    try:
        own, values = _read(path)
    except Exception as error:  # scipy and soundfile raise errors of many kinds for damaged files
        raise BrokenClipError(_reason(error)) from error
    channels = values.shape[1]
    if len(values) < SHORTEST * own:
        raise BrokenClipError(f"it lasts {len(values) / own:.3g} s; expected at least {SHORTEST} s")
    mono = values.mean(1, dtype=np.float64)
    if not np.isfinite(mono).all():
        raise BrokenClipError("it holds NaN or infinite values")
    if own != rate:
        from scipy.signal import resample_poly  # takes a second

        divisor = math.gcd(own, rate)
        mono = resample_poly(mono, rate // divisor, own // divisor)
    return Clip(mono.astype(np.float32), own, channels)


def limitations_of(clips: Sequence[tuple[int, int]], rate: int) -> Iterator[Limitation]:
    """Yield what was converted, from the rate and the channels of each decoded file."""
    others = Counter(own for own, _ in clips if own != rate)
    if others:
        rates = ", ".join(f"{own:,}" for own, _ in others.most_common(3))
        yield Limitation(
            "rate of the clips",
            f"{sum(others.values())} of {len(clips)} have other rates ({rates} samples a second) and are resampled to "
            f"{rate:,}",
        )
    several = sum(channels > 1 for _, channels in clips)
    if several:
        yield Limitation(
            "channels of the clips", f"{several} of {len(clips)} have several channels, which are averaged"
        )


def _read(path: Path) -> tuple[int, npt.NDArray[Any]]:
    """Return the rate and the values [samples, channels], in -1 to 1."""
    if path.suffix.lower() != WAV or has_soundfile():
        import soundfile

        values, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
        return rate, values
    from scipy.io import wavfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of text, such as a title
        rate, values = wavfile.read(path)
    if rate < 1:
        raise ValueError(f"its rate is {rate}")
    return rate, _fractions(values).reshape(len(values), -1)


def _fractions(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return stored integers as values in -1 to 1; those of 8 bits are unsigned, and 24 bits are in the upper ones."""
    if values.dtype.kind == "f":
        return values
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    return values / float(-np.iinfo(values.dtype).min)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().rstrip(".") or type(error).__name__
    return f"not a sound file that can be read: {text}"
