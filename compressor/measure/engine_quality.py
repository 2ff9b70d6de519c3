"""Evaluate engines side by side on a split of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from compressor.data.splits import Split
from compressor.executor.base import Executor, InProcess, UnsharableError
from compressor.lower.traced_model import ModelAndData
from compressor.measure.engine_builder import EngineBuilder
from compressor.quality.evaluate import BATCH, Evaluation, Measured
from compressor.target.opener import Opener
from compressor.target.side_by_side import SideBySide, parts_of
from compressor.workspace.progress import Steps, Tick

HERE = "quality is measured in this process"


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

    Engines of more than `compressor.target.side_by_side.TOGETHER` bytes are open one at a time.

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
    engines = SideBySide(
        {name: opener.with_threads(executor.threads) for name, opener in openers.items()},
        subject.model.evaluated_output,
        measured,
    )
    files = executor.share_files(dict.fromkeys(file for opener in openers.values() for file in opener.files))
    try:
        shared = executor.share(engines)
        placed = executor.divide(measured.batches(split), math.ceil(len(split) / BATCH))
        parts = executor.run(parts_of, ((shared, files, batches) for batches in placed))
        return measured.joined(chain.from_iterable(parts), split, tick)
    except UnsharableError as error:
        executor.say(f"{HERE}, because {str(error).rpartition(';')[0]}.")
        return evaluate_openers(openers, subject, split, reference, tick)
