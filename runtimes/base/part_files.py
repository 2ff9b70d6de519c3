"""The files of models that are exported as several, which are opened as one engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtimes.base import encoder_decoder, vision_language
from runtimes.base.encoder_decoder import EncoderDecoderEngine
from runtimes.base.protocols import Engine
from runtimes.base.vision_language import VisionLanguageEngine

STEMS = (*encoder_decoder.STEMS, *vision_language.STEMS)


def part_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a model, given the first of them; only `path` for a model of one file."""
    return encoder_decoder.parts_of(path) or vision_language.parts_of(path) or (path,)


def open_parts(path: Path, load: Callable[[Path], Engine]) -> EncoderDecoderEngine | VisionLanguageEngine | None:
    """Open the files of a model of several; None for a model of one file.

    Raises:
        RuntimesError: as in `load`, or a file is missing.
    """
    if (towers := encoder_decoder.parts_of(path)) is not None:
        return encoder_decoder.opened(towers, load)
    if (parts := vision_language.parts_of(path)) is not None:
        return vision_language.opened(parts, load)
    return None
