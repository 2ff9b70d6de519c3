"""The export with ``--max-memory``: rank, rewrite, evaluate and write a language model block by block.

Unlike `compressor.pipeline.export`, it measures no latency, because an engine needs the whole model in memory. Quality
is measured in torch, which runs the original and the result block by block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from compressor import models
from compressor.choices import TRANSFORMERS
from compressor.deferred import package
from compressor.deferred.reference_answers import AT_ONCE
from compressor.errors import CompressorError
from compressor.executor.base import Executor
from compressor.lower import checkpoint
from compressor.lower.fold_graph import fold_graph
from compressor.lower.nemotron_nas.engine_rules import serving
from compressor.lower.trace import trace
from compressor.lower.traced_model import TracedModel, index_errors_as_data_errors, load, model_facts
from compressor.lower.write_onnx import lower
from compressor.measure.engine_builder import with_input_sizes
from compressor.measure.memory_budget import GIB, MemoryBudget, memory_budget
from compressor.measure.workload import timing_feeds
from compressor.models.base import disable_use_cache
from compressor.models.weights.lazy_weights import stored_bytes
from compressor.quality import chance
from compressor.quality.evaluate import Evaluation, Measured
from compressor.quality.intervals import Array
from compressor.quality.parity import Parity, Reference, check_parity
from compressor.quality.torch_reference import channel_axes
from compressor.quantize.precision import Source
from compressor.report.collect_limitations import limitations_of
from compressor.report.report import Quality, Report, Size
from compressor.search.planner import Choice, apply_fixed_plan
from compressor.search.site_evidence import of_zeros
from compressor.settings import Settings
from compressor.target.sectioned import Sectioned, parts_of, run
from compressor.workspace.environment import environment
from compressor.workspace.plan_file import of_replay
from compressor.workspace.progress import Steps, Tick
from passes.analysis.counted_cost import Costs
from passes.execute.interpreter import Program
from passes.execute.sections import section_ends
from passes.graph.cache_state import bytes_per_token
from passes.graph.graph import Graph
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime

SIDE_BY_SIDE = 2  # graphs evaluated together, each with its own section in memory
CHECKED = 4  # texts on which the written checkpoint is compared with the graph


class OffloadedExportError(CompressorError):
    """The target needs the whole model in memory."""


def check_target(settings: Settings) -> None:
    """Check that the settings do not build an engine on this machine.

    Raises:
        OffloadedExportError: the target builds an engine, and ``--defer-build`` is not set.
    """
    if settings.target != TRANSFORMERS and not settings.defer_build:
        raise OffloadedExportError(
            f"found --target {settings.target} with --max-memory, but building its engine needs the whole model in "
            f"memory; add --defer-build to build it on another machine, or give --target {TRANSFORMERS}."
        )


def compressed(
    settings: Settings, folder: Path, steps: Steps, command: str, executor: Executor
) -> tuple[Report, TracedModel]:
    """Compress a model within the memory limit of the settings, and write all files except the report.

    Args:
        settings: with ``max_memory``.
        folder: folder to write the result to.
        steps: records and shows the steps.
        command: the command line, for the report.
        executor: runs the model over the data, in processes that each keep to the limit.

    Raises:
        CompressorError, PassError: the message says what was found and what to do.
    """
    subject = load(settings, steps, executor=executor)
    answer, parts = subject.model.answer, [subject.data.calibration, subject.data.test]
    limit, beside = settings.max_memory, Path(settings.output)
    with (
        index_errors_as_data_errors(subject),
        memory_budget(subject.graph, parts, limit, beside, [answer], SIDE_BY_SIDE, executor) as bounds,
    ):
        assert bounds is not None
        choice = apply_fixed_plan(subject, settings, steps, bounds)
        graphs = {"baseline": subject.graph, "result": choice.graph}
        with steps.step("measure the quality") as tick:
            quality = _evaluated(subject, graphs, bounds, tick)
        subject = _checked(subject, quality)
        (folder / "plan.json").write_text(choice.plan.to_json())
        if settings.target == TRANSFORMERS:
            engine, parity = _checkpoint(graphs, subject, folder, bounds, steps)
        else:
            engine, parity = _deferred(graphs, subject, folder, settings, bounds, steps), {}
    return _report(settings, subject, choice, quality, engine, parity, steps, command), subject


def _evaluated(
    subject: TracedModel, graphs: Mapping[str, Graph], bounds: MemoryBudget, tick: Tick
) -> Evaluation | None:
    """Evaluate the graphs on test data, or return None for random data or weights.

    Each graph runs all texts through one section before it loads the next.
    """
    if subject.no_quality_because is not None:
        return None
    split, answer, executor = subject.data.test, subject.model.answer, subject.executor
    programs = {name: (Program(graph, outputs=[answer]), section_ends(graph)) for name, graph in graphs.items()}
    measured = Measured(subject.head, subject.metric, "baseline")
    shared = executor.share(Sectioned(programs, bounds.room, measured))
    calls = ((shared, batches) for batches in executor.divide(measured.batches(split, bounds.rows)))
    return measured.joined(chain.from_iterable(executor.run(parts_of, calls)), split, tick)


def _checked(subject: TracedModel, quality: Evaluation | None) -> TracedModel:
    """Return the model and data with a limitation if the original is not certain to be better than chance.

    Its perplexity was measured already, so it need not run through the whole model once more.

    Raises:
        CompressorError: the original gives one answer for all samples, or is no better than chance.
    """
    if quality is None:
        return subject
    model, data = subject.model, subject.data
    config: Any = model.module.config
    vocabulary = config.get_text_config().vocab_size
    columns = quality.columns["baseline"]
    if quality.variation is not None:
        chance.check_varies(quality.variation, model.name, data.source)
    found = chance.check_measured(quality.metric, columns, vocabulary, model.name, data.source)
    return dataclasses.replace(subject, data=dataclasses.replace(data, limitations=(*data.limitations, *found)))


def _checkpoint(
    graphs: Mapping[str, Graph], subject: TracedModel, folder: Path, bounds: MemoryBudget, steps: Steps
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the result as a checkpoint and compare it with the graph; return the ``engine`` part and the parity."""
    graph = graphs["result"]
    with steps.step("write the checkpoint"):
        path = lower(graph, subject.model, folder / checkpoint.CONFIG[1:])
    with steps.step("check it against torch"):
        parity = _parity(path, graph, subject, bounds)
    engine = {"state": "built", "streamed": True, "target": TRANSFORMERS, "file": path.name}
    ends = {"inputs": list(graph.inputs), "outputs": list(graph.outputs)}
    return engine | ends | serving(folder), {"result": parity.difference}


def _deferred(
    graphs: Mapping[str, Graph],
    subject: TracedModel,
    folder: Path,
    settings: Settings,
    bounds: MemoryBudget,
    steps: Steps,
) -> dict[str, Any]:
    """Write the ONNX files and the inputs and outputs for the device; return the ``engine`` part of the report."""
    final = {"baseline": subject.graph, "result": fold_graph(graphs["result"])}
    paths = {"baseline": folder / package.FOLDER / "baseline.onnx", "result": folder / "model.onnx"}
    subject.model.save(folder)
    if not final["result"].state:
        disable_use_cache(folder)
    (folder / package.FOLDER).mkdir()
    with steps.step("write the ONNX files") as tick:
        for number, (name, path) in enumerate(paths.items()):
            tick(number, len(paths), name)
            lower(final[name], subject.model, path)
    target = runtime(settings.target)
    device = target.devices[0] if settings.device is None else settings.device
    options = BuildOptions(device=device, threads=settings.threads, portable=settings.portable_engine)
    with steps.step("write what the device needs"):
        timed = timing_feeds(subject.data.test, settings.batch)
        run_all = partial(_outputs, bounds=bounds)
        at_once = min(AT_ONCE, bounds.rows)
        answers = package.stored_answers(folder, graphs, subject, timed, settings, run_all, at_once)
    stand_in = {"target": "torch", "device": "cpu", "rows": len(answers), "measured": {}}
    files = {name: Source(path) for name, path in paths.items()}
    options = with_input_sizes(options, subject, settings)
    engine = package.deferred_engine_part(folder, target, options, files, subject, stand_in, answers)
    return engine | {"streamed": True, "timed_inputs": {name: list(value.shape) for name, value in timed.items()}}


def _outputs(
    graph: Graph,
    batches: Iterable[Mapping[str, torch.Tensor]],
    bounds: MemoryBudget,
    names: Collection[str] | None = None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the named outputs of a graph (None: all) for each batch, computed block by block."""
    return run(Program(graph, outputs=names), section_ends(graph), batches, bounds.room)


def _parity(path: Path, graph: Graph, subject: TracedModel, bounds: MemoryBudget) -> Parity:
    """Load the written checkpoint with its weights on disk and compare it with the rewritten graph on a few texts.

    All outputs are compared, such as the KV cache. The checkpoint numbers its layers anew, so the outputs of both have
    the same order, but not always the same names.
    """
    model = models.load(path.parent, task=subject.model.task, on_disk=True, cache=bool(subject.model.state))
    batch = next(subject.data.calibration.batches(min(CHECKED, bounds.rows))).feeds
    written = trace(model)
    expected, outputs = (
        dict(zip(graph.outputs, (value.numpy() for value in values), strict=True))
        for values in (_outputs_of_texts(side, batch, bounds) for side in (graph, written))
    )
    reference = Reference.of(expected, channel_axes(graph))
    return check_parity(reference, lambda: outputs, name=path.name, advice=checkpoint.ADVICE)


def _outputs_of_texts(graph: Graph, batch: Mapping[str, Array], bounds: MemoryBudget) -> tuple[torch.Tensor, ...]:
    feeds = {key: torch.from_numpy(value) for key, value in batch.items() if key in graph.inputs}
    (outputs,) = _outputs(graph, [feeds], bounds)
    return outputs


def _report(
    settings: Settings,
    subject: TracedModel,
    choice: Choice,
    evaluation: Evaluation | None,
    engine: dict[str, Any],
    parity: dict[str, float],
    steps: Steps,
    command: str,
) -> Report:
    graphs = {"baseline": subject.graph, "result": choice.graph}
    return Report(
        command=command,
        settings=settings.to_dict(),
        model=model_facts(subject),
        data=subject.data.describe(),
        plan=choice.plan,
        sizes={name: _size(graph, subject) for name, graph in graphs.items()},
        quality=None if evaluation is None else Quality.of(evaluation, list(graphs)),
        no_quality_because=subject.no_quality_because,
        latency={},
        timed_inputs=engine.pop("timed_inputs", {}),
        parity=parity,
        precision={},
        search=choice.facts,
        healed=None,
        steps=tuple(steps.done),
        passes=tuple(choice.graph.history),
        environment=environment(),
        notes=(*_notes(settings, steps, subject.executor.peak), *subject.executor.said),
        engine=engine,
        evidence=choice.evidence,
        limitations=(
            *limitations_of(subject, settings.precision, {}, (), engine),
            *of_replay(settings.drop, subject.model.name),
            *of_zeros(choice.evidence.get("zeros", {})),
        ),
    )


def _size(graph: Graph, subject: TracedModel) -> Size:
    """Return parameters, multiply-adds and KV cache of a graph, and the size of its weights on disk in bytes."""
    cost = Costs(graph, subject.costs.example).total
    return Size(cost.parameters, cost.multiply_adds, stored_bytes(graph), bytes_per_token(graph))


def _notes(settings: Settings, steps: Steps, of_workers: int | None) -> Iterator[str]:
    """Yield notes on the peak memory of this process and of the workers."""
    peaks = [step.peak_memory for step in steps.done if step.peak_memory is not None]
    assert settings.max_memory is not None
    found = {"Peak memory": max(peaks, default=None), "Peak memory of a worker": of_workers}
    for name, peak in found.items():
        if peak is not None:
            relation = "under" if peak <= settings.max_memory else "above"
            yield f"{name} was {peak / GIB:.2f} GiB, {relation} the limit of {settings.max_memory / GIB:.2f} GiB."
