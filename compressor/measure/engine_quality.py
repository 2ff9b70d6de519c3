"""Evaluate engines side by side on a split of the data."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from compressor.data.splits import Batch, Split
from compressor.executor.base import Executor, InProcess, UnsharableError
from compressor.lower.traced_model import ModelAndData
from compressor.measure.engine_builder import EngineBuilder
from compressor.models.base import EvaluatedOutput
from compressor.quality.evaluate import BATCH, Compared, Evaluation, Measured, Part, Runner
from compressor.quality.intervals import Array
from compressor.target.opener import Opener
from compressor.workspace.progress import Steps, Tick
from runtimes.base.protocols import Engine, RuntimesError

HERE = "quality is measured in this process"
TOGETHER = 2**31  # bytes of engines that are open at the same time; larger ones are opened in turn
KEPT = 2**29  # bytes of outputs of the reference that are kept for engines that are opened in turn


def quality_on_test(
    builder: EngineBuilder, engines: Mapping[str, Path], reference: str, steps: Steps
) -> Evaluation | None:
    """Evaluate engines on test data, which neither calibration nor search has seen.

    Args:
        builder: opens the engines.
        engines: paths by name.
        reference: the engine that the others are compared with.
        steps: shows progress.

    Returns:
        The evaluation; None if no quality is stated, see `ModelAndData.no_quality_because`.
    """
    if builder.subject.no_quality_because is not None:
        return None
    with steps.step("measure the quality") as tick:
        return evaluate_engines(builder, engines, builder.subject.data.test, reference, tick)


def evaluate_engines(
    builder: EngineBuilder, engines: Mapping[str, Path], split: Split, reference: str, tick: Tick
) -> Evaluation:
    """Evaluate engines on a split, see `evaluate_openers`."""
    return evaluate_openers(builder.quality_openers(engines), builder.subject, split, reference, tick, builder.executor)


def evaluate_openers(
    openers: Mapping[str, Opener],
    subject: ModelAndData,
    split: Split,
    reference: str,
    tick: Tick,
    executor: Executor | None = None,
) -> Evaluation:
    """Open engines and evaluate them side by side on a split; the others are compared with `reference`.

    Engines of more than `TOGETHER` bytes are open one at a time.

    Args:
        openers: the engines by name.
        subject: the model and its data.
        split: the samples.
        reference: name of an engine.
        tick: shows progress.
        executor: runs the engines over the batches; None is this process. Engines that cannot run on its workers run
            here, and it says so.
    """
    measured = Measured(subject.head, subject.metric, reference)
    executor = InProcess() if executor is None else executor
    if any(opener.options.device != "cpu" for opener in openers.values()):
        executor.say(f"{HERE}, because workers use no GPUs.")
        executor = InProcess()
    engines = _Engines(
        {name: opener.with_threads(executor.threads) for name, opener in openers.items()},
        subject.model.evaluated_output,
        measured,
    )
    try:
        shared = executor.share(engines)
    except UnsharableError as error:
        executor.say(f"{HERE}, because a model is not one that can be sent to workers ({error}).")
        return evaluate_openers(openers, subject, split, reference, tick)
    files = executor.share_files(dict.fromkeys(file for opener in openers.values() for file in opener.files))
    placed = executor.divide(measured.batches(split), math.ceil(len(split) / BATCH))
    parts = executor.run(_parts, ((shared, files, batches) for batches in placed))
    return measured.joined(chain.from_iterable(parts), split, tick)


@dataclass(frozen=True)
class _Engines:
    """Engines that are opened where they run.

    Attributes:
        openers: the engines by name.
        output: the output that is evaluated.
        measured: the evaluation.
    """

    openers: Mapping[str, Opener]
    output: EvaluatedOutput
    measured: Measured


def _parts(engines: _Engines, files: Mapping[Path, Path], batches: Iterable[tuple[Batch, int]]) -> Iterator[Part]:
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


def _in_turn(engines: _Engines, openers: Mapping[str, Opener], batches: Iterator[tuple[Batch, int]]) -> Iterator[Part]:
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
