"""Evaluate engines side by side on a split of the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from compressor.data.splits import Split
from compressor.lower.traced_model import ModelAndData
from compressor.measure.engine_builder import EngineBuilder
from compressor.models import Model
from compressor.quality.evaluate import Evaluation, Runner, evaluate
from compressor.quality.intervals import Array
from compressor.workspace.progress import Steps, Tick
from runtimes.base.protocols import Engine, RuntimesError


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
    """Open all engines at the same time and evaluate them on a split."""
    return evaluate_openers(builder.quality_openers(engines), builder.subject, split, reference, tick)


def evaluate_openers(
    openers: Mapping[str, Callable[[], Engine]], subject: ModelAndData, split: Split, reference: str, tick: Tick
) -> Evaluation:
    """Open engines and evaluate them side by side on a split; the others are compared with `reference`."""
    with contextlib.ExitStack() as opened:
        engines = {name: opened.enter_context(opener()) for name, opener in openers.items()}
        runners = {name: _runner(name, engine, subject.model) for name, engine in engines.items()}
        return evaluate(split, runners, head=subject.head, metric=subject.metric, reference=reference, progress=tick)


def _runner(name: str, engine: Engine, model: Model) -> Runner:
    def answer(feeds: Mapping[str, Array]) -> Array:
        try:
            return model.evaluated(engine.run(feeds))
        except RuntimesError as error:  # such as inputs of another shape; several engines run side by side
            raise type(error)(f"{name}: {error}") from error

    return answer
