"""The command inspect: scores of every site, without an export."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.commands import InspectSettings
from compressor.errors import SettingsError
from compressor.executor.base import Executor
from compressor.executor.on_ray import executor_for
from compressor.limitations import Limitation
from compressor.lower.traced_model import (
    SubjectError,
    TracedModel,
    check_original,
    index_errors_as_data_errors,
    load,
    load_data,
    without_sites,
)
from compressor.measure.memory_budget import memory_budget
from compressor.pipeline.last_tokens import of_last_tokens
from compressor.pipeline.unused_options import refuse_unused
from compressor.quality.chance import ChanceError
from compressor.report.collect_limitations import of_weight_types
from compressor.report.inspection import Inspection
from compressor.search.planner import output_divergence, score
from compressor.search.site_evidence import of_zeros, zeros_of
from compressor.study.study import study as studied
from compressor.workspace.output_lock import output_lock
from compressor.workspace.progress import Steps

if TYPE_CHECKING:
    from rich.console import Console


def inspect(settings: InspectSettings, *, console: Console | None = None) -> Inspection:
    """Score every site of a model on its calibration data, without changing or exporting the model.

    Args:
        settings: model, data and metric; the metric ``output`` also measures the effect of each site on the output.
            `study` also measures redundancy by depth, by position and by kind of token, and its stability; it compares
            the ranking with those of `against_data`.
        console: console that shows progress; None shows nothing.

    Raises:
        CompressorError, PassError: the message says what was found and what to do.
    """
    if settings.against_data and not settings.study:
        raise SettingsError("found --against-data without --study, whose rankings it compares; add --study.")
    refuse_unused(settings)
    steps = Steps(console)
    if settings.study and settings.max_memory is not None:
        raise SettingsError(
            "found --study with --max-memory, but a study keeps the states of all layers in memory; leave one out."
        )
    output = Path(settings.output)
    # Only a run within a memory limit has temporary files.
    with (
        contextlib.nullcontext() if settings.max_memory is None else output_lock(output, steps.say),
        executor_for(settings.workers, settings.ray, steps.show, steps.warn) as executor,
    ):
        return _inspection(settings, steps, executor)


def _inspection(settings: InspectSettings, steps: Steps, executor: Executor) -> Inspection:
    subject = load(settings, steps, executor=executor)
    if not subject.sites:
        raise SubjectError(without_sites(subject.graph, subject.model, "an export takes it with --drop none"))
    if settings.study and subject.model.has_parts:
        kind = "an encoder-decoder" if subject.model.is_encoder_decoder else "a vision-language model"
        raise SettingsError(
            f"found --study, which compares the tokens of one sequence, but {subject.model.name} is {kind} with two; "
            "leave --study out."
        )
    if settings.study and subject.model.has_two_towers:
        raise SettingsError(
            f"found --study, which compares the tokens of one sequence, but {subject.model.name} has a tower of images "
            "and one of texts; leave --study out."
        )
    doubts = () if settings.max_memory is not None else _doubts(subject, steps)
    others = []
    for source in settings.against_data:
        with steps.step(f"load {source}") as tick:
            others.append(load_data(dataclasses.replace(settings, data=source), subject.model, tick))
    splits, output = [subject.data.calibration], Path(settings.output)
    with (
        index_errors_as_data_errors(subject),
        memory_budget(subject.graph, splits, settings.max_memory, output, (), executor=executor) as bounds,
    ):
        scores = score(subject, steps, bounds)
        samples = subject.data.calibration.head(settings.search_samples)
        effects = output_divergence(subject, samples, steps) if settings.metric == "output" else None
        measured = None if effects is None else effects.of_units([[site] for site in subject.sites])
        result = studied(subject, steps, seed=settings.seed, against=others) if settings.study else None
    return Inspection(
        subject.model.name,
        subject.sites,
        scores,
        subject.costs.of_sites(subject.sites),
        subject.data.describe(),
        effects=measured,
        study=result,
        at_ends=bounds is not None,
        limitations=(
            *subject.model.limitations,
            *subject.data.limitations,
            *of_weight_types(subject.model, "the scores are those of the float32 weights"),
            *of_last_tokens(subject),
            *of_zeros(zeros_of(scores)),
            *doubts,
        ),
    )


def _doubts(subject: TracedModel, steps: Steps) -> tuple[Limitation, ...]:
    """Return the limitations of an original that is not clearly better than chance.

    It does not stop an inspection: scores use no labels, but they are those of data that the model may not understand.
    """
    try:
        checked = check_original(subject, steps)
    except ChanceError as error:
        reason = f"{str(error).rstrip('.')}. The scores use no labels; an export or a sweep stops here"
        return (Limitation("quality of the original", reason),)
    return checked.data.limitations[len(subject.data.limitations) :]
