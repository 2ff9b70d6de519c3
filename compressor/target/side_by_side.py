"""Engines that run side by side over batches, here or on workers, which load little more than torch for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compressor.data.splits import Batch
from compressor.models.base import EvaluatedOutput
from compressor.quality.evaluate import Measured, Part, Runner
from compressor.quality.intervals import Array
from compressor.target.opener import Opener
from runtimes.base.protocols import Engine, RuntimesError


@dataclass(frozen=True)
class SideBySide:
    """Engines that are opened where they run.

    Attributes:
        openers: the engines by name.
        output: the output that is evaluated.
        measured: the evaluation.
    """

    openers: Mapping[str, Opener]
    output: EvaluatedOutput
    measured: Measured


def parts_of(engines: SideBySide, files: Mapping[Path, Path], batches: Iterable[tuple[Batch, int]]) -> Iterator[Part]:
    """Open the engines, from where their files are, and yield the part of each batch."""
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(opener.on(files)()) for name, opener in engines.openers.items()}
        runners = {name: _runner(name, engine, engines.output) for name, engine in opened.items()}
        for batch, place in batches:
            yield engines.measured.part(runners, batch, place)


def _runner(name: str, engine: Engine, output: EvaluatedOutput) -> Runner:
    def answer(feeds: Mapping[str, Array]) -> Array:
        try:
            values: Array = output.of(engine.run(feeds))
        except RuntimesError as error:  # such as inputs of another shape; several engines run side by side
            raise type(error)(f"{name}: {error}") from error
        return values

    return answer
