"""Engines that run over the same batches, here or on workers, which load little more than torch for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.data.splits import Batch
from compressor.models.base import EvaluatedOutput
from compressor.quality.evaluate import Compared, Measured, Part, Runner
from compressor.quality.intervals import Array
from compressor.target.opener import Opener
from runtimes.base.protocols import Engine, RuntimesError

TOGETHER = 2**31  # bytes of engines that are open at the same time; larger ones are opened in turn
KEPT = 2**29  # bytes of outputs of the reference that are kept for engines that are opened in turn


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
    openers = {name: opener.on(files) for name, opener in engines.openers.items()}
    size = sum(file.stat().st_size for opener in openers.values() for file in opener.files)
    if size > TOGETHER and len(openers) > 1:
        yield from _in_turn(engines, openers, iter(batches))
        return
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(opener()) for name, opener in openers.items()}
        runners = {name: _runner(name, engine, engines.output) for name, engine in opened.items()}
        for batch, place in batches:
            yield engines.measured.part(runners, batch, place)


def _in_turn(
    engines: SideBySide, openers: Mapping[str, Opener], batches: Iterator[tuple[Batch, int]]
) -> Iterator[Part]:
    """Yield the part of each batch with one engine open at a time, so that one copy of the weights is in memory.

    Each engine is opened for as many batches as the outputs of the reference take `KEPT` bytes, or one.
    """
    measured, reference = engines.measured, engines.measured.reference
    for first in batches:
        group, originals = [first], list[Array]()
        for answer in _answers(reference, openers, engines.output, group):
            originals.append(answer)
            if sum(each.nbytes for each in originals) < KEPT:
                group += itertools.islice(batches, 1)
        found: list[dict[str, Compared]] = [{} for _ in group]
        for name in openers:
            answers = originals if name == reference else _answers(name, openers, engines.output, group)
            for compared, answer, original, each in zip(found, answers, originals, group, strict=True):
                compared[name] = measured.compared(name, answer, original, *each)
        for compared, original, (batch, _) in zip(found, originals, group, strict=True):
            yield measured.part_of(compared, original, batch)


def _answers(
    name: str, openers: Mapping[str, Opener], output: EvaluatedOutput, group: Sequence[tuple[Batch, int]]
) -> Iterator[Array]:
    """Open one engine and yield its output for each batch of a group, which may grow."""
    with openers[name]() as engine:
        run = _runner(name, engine, output)
        for batch, _ in group:
            yield run(batch.feeds)


def _runner(name: str, engine: Engine, output: EvaluatedOutput) -> Runner:
    def answer(feeds: Mapping[str, Array]) -> Array:
        try:
            values: Array = output.of(engine.run(feeds))
        except RuntimesError as error:  # such as inputs of another shape; several engines run side by side
            raise type(error)(f"{name}: {error}") from error
        return values

    return answer
