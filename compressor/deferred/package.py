"""Files of an export whose engine is built on another machine.

The output folder gets everything that `compressor build` needs on the device: the ONNX files of result and baseline,
real inputs with the outputs of torch, and the ``engine`` part of report.json. That part states how to build the engines
and how much they may differ from torch. ONNX Runtime replaces the target on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from compressor.deferred.parser import parsed_by
from compressor.deferred.reference_answers import AT_ONCE, ReferenceOutputs, bytes_of
from compressor.quality.parity import Reference
from compressor.target.stand_in import load_for_quality
from compressor.workspace.output_folder import copy_onnx
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.registry import runtime

if TYPE_CHECKING:
    import torch

    from compressor.lower.traced_model import ModelAndData
    from compressor.measure.engine_builder import EngineBuilder
    from compressor.measure.variant import Variant
    from compressor.quality.intervals import Array
    from compressor.quantize.precision import Source
    from compressor.settings import Settings
    from compressor.workspace.progress import Steps
    from passes.graph.graph import Graph

RunAll: TypeAlias = "Callable[[Graph, Iterable[Mapping[str, torch.Tensor]]], Iterator[tuple[torch.Tensor, ...]]]"

FOLDER = "deferred"
ANSWERS = f"{FOLDER}/answers.npz"
COMMANDS = "trtexec.txt"
ROWS = 64  # largest number of rows that are stored
LIMIT = 32 * 1024**2  # bytes of ANSWERS, unless a single sample with its outputs is larger
TIMED_LIMIT = LIMIT // 4  # bytes of these for the inputs to be timed


def write(
    folder: Path,
    variants: Sequence[Variant],
    builder: EngineBuilder,
    timed: Mapping[str, Array],
    settings: Settings,
    steps: Steps,
) -> dict[str, Any]:
    """Write the files that the device needs into an output folder.

    Args:
        folder: output folder that already contains ``model.onnx``.
        variants: the variants of the report, with their sources.
        builder: builds engines with ONNX Runtime in place of the target.
        timed: the inputs to be timed.
        settings: the options of the export.
        steps: shows progress.

    Returns:
        The ``engine`` part of the report.

    Raises:
        BuildError: the target will refuse one of the files.
    """
    target = runtime(settings.target)
    device = target.devices[0] if settings.device is None else settings.device
    options = replace(builder.options, device=device, portable=settings.portable_engine)
    graphs = {variant.name: variant.graph for variant in variants if variant.name != "original"}
    sources = {variant.name: variant.source for variant in variants}
    with steps.step("write what the device needs"):
        (folder / FOLDER).mkdir()
        for name, source in sources.items():
            if name != "result":
                copy_onnx(source.path, folder / FOLDER / f"{name}.onnx")
        answers = stored_answers(folder, graphs, builder.subject, timed, settings, one_by_one)
        measured = {name: _measured(answers, name, source.path, builder) for name, source in sources.items()}
        answers = answers.with_allowed(_limits(answers, sources, builder))
        answers.save(folder / ANSWERS)
    stand_in = {"target": builder.target.name, "device": "cpu", "rows": len(answers), "measured": measured}
    part = deferred_engine_part(folder, target, options, sources, builder.subject, stand_in, answers)
    with steps.step("hold the files to the target's parser"):
        return part | parsed_by(target.name, {name: source.path for name, source in sources.items()})


def deferred_engine_part(
    folder: Path,
    target: Runtime,
    options: BuildOptions,
    files: Mapping[str, Source],
    subject: ModelAndData,
    stand_in: Mapping[str, Any],
    answers: ReferenceOutputs,
) -> dict[str, Any]:
    """Return the ``engine`` part of a report whose engine is built on another machine.

    Args:
        folder: output folder with the ONNX files.
        target: builds the engine on the device.
        options: options of the engine on the device.
        files: the ONNX file and the precision of each variant.
        subject: model and data.
        stand_in: the runtime that replaced the target here, and its measurements.
        answers: the stored samples with the limits of the channels.

    Raises:
        BuildError: the target will refuse one of the files.
    """
    return {
        "state": "deferred",
        "target": target.name,
        "options": {key: value for key, value in asdict(options).items() if key != "samples"},
        "precisions": {name: source.precision for name, source in files.items()},
        "files": {name: "model.onnx" if name == "result" else f"{FOLDER}/{name}.onnx" for name in files},
        "answer": subject.model.answer,
        "metric": None if subject.no_quality_because is not None else subject.metric,
        "allowed": {name: answers.largest_limit(name) for name in files},
        "stand_in": {**stand_in, "notes": list(answers.notes)},
        "commands": _commands(folder, files, options) if target.name == "tensorrt" else {},
    }


def stored_answers(
    folder: Path,
    graphs: Mapping[str, Graph],
    subject: ModelAndData,
    timed: Mapping[str, Array],
    settings: Settings,
    run_all: RunAll,
    at_once: int = AT_ONCE,
) -> ReferenceOutputs:
    """Write test samples with the outputs of torch, and the inputs to be timed, to ``deferred/answers.npz``.

    At most `ROWS` rows are stored, and as many as `LIMIT` bytes hold, of which the timed inputs get `TIMED_LIMIT`.

    Args:
        folder: output folder that contains ``deferred/``.
        graphs: ``baseline`` and ``result``.
        subject: model and data.
        timed: the inputs to be timed.
        settings: its batch size is that of the timing.
        run_all: returns the outputs of a graph for each batch.
        at_once: largest number of rows in these batches.
    """
    from compressor.quality.torch_reference import channel_axes, with_rounding

    rows_per_sample = subject.data.test.samples.rows_per_sample
    batch = next(subject.data.test.batches(ROWS // rows_per_sample))
    timed_rows = max(1, TIMED_LIMIT * settings.batch // max(1, bytes_of(timed)))
    first_sample = {name: value[:rows_per_sample] for name, value in batch.feeds.items()}
    sample_bytes = bytes_of(first_sample) + sum(_bytes_of_answers(graph, first_sample) for graph in graphs.values())
    rows = rows_per_sample * max(1, min(len(batch.ids), (LIMIT - TIMED_LIMIT) // sample_bytes))
    feeds = {name: value[:rows] for name, value in batch.feeds.items()}
    batches_of_feeds = partial(_parts, feeds, at_once)
    expected = {name: _torch(graph, batches_of_feeds(), subject, run_all) for name, graph in graphs.items()}
    references = {
        name: with_rounding(Reference.of(expected[name], channel_axes(graph)), graph, list(batches_of_feeds()))
        for name, graph in graphs.items()
    }
    labels = batch.labels[:rows] if batch.labels is not None and subject.metric == "accuracy" else None
    answers = ReferenceOutputs(
        feeds,
        expected,
        {name: value[:timed_rows] for name, value in timed.items()},
        labels,
        {name: reference.scale for name, reference in references.items()},
        {name: reference.ties for name, reference in references.items() if reference.ties is not None},
        notes=tuple(dict.fromkeys(note for each in references.values() for note in each.notes)),
    )
    answers.save(folder / ANSWERS)
    return answers


def one_by_one(graph: Graph, batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return the outputs of a graph in memory for each batch."""
    from passes.execute.interpreter import run

    return (run(graph, batch) for batch in batches)


def _bytes_of_answers(graph: Graph, feeds: Mapping[str, Array]) -> int:
    """Return the bytes of all outputs of a graph, from their shapes and types alone."""
    import torch

    from passes.execute.interpreter import Program
    from passes.execute.offloaded_weights import fake_values

    program = Program(graph)
    with fake_values(program, {name: torch.from_numpy(value) for name, value in feeds.items()}) as values:
        for _ in program.walk(values):
            pass
        return sum(value.nbytes for value in program.results(values))


def _parts(feeds: Mapping[str, Array], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the feeds in batches of at most `rows` rows."""
    import torch

    for start in range(0, len(next(iter(feeds.values()))), rows):
        yield {name: torch.from_numpy(value[start : start + rows]) for name, value in feeds.items()}


def _torch(
    graph: Graph, batches: Iterable[Mapping[str, torch.Tensor]], subject: ModelAndData, run_all: RunAll
) -> dict[str, Array]:
    """Return the outputs of torch by name, concatenated over all batches."""
    from compressor.lower.traced_model import index_errors_as_data_errors

    with index_errors_as_data_errors(subject):
        columns = zip(*run_all(graph, batches), strict=True)
        return {
            name: np.concatenate([value.numpy() for value in values])
            for name, values in zip(graph.outputs, columns, strict=True)
        }


def _measured(answers: ReferenceOutputs, name: str, path: Path, builder: EngineBuilder) -> dict[str, Any]:
    """Run a file in the arithmetic of the target; return its difference from torch and its agreement with torch."""
    subject = builder.subject
    with load_for_quality(builder.target, path, builder.options) as engine:
        parity = answers.hold(engine, name, allowed=float("inf"))
        measured: dict[str, Any] = {"parity": parity.difference}
        if subject.no_quality_because is None:
            model, head = subject.model, subject.head
            measured |= answers.judged(
                engine, name, answer=model.answer, head=head, probabilities=model.to_logits is not None
            )
    return measured


def _limits(
    answers: ReferenceOutputs, sources: Mapping[str, Source], builder: EngineBuilder
) -> dict[str, dict[str, Array]]:
    """Return how much each channel may differ on the device, for the variants in a lower precision."""
    limits = {}
    for name, source in sources.items():
        if source.precision != "fp32":
            with builder.target.load(source.path, builder.options) as engine:
                limits[name] = answers.limits(engine, name)
    return limits


def _commands(folder: Path, files: Mapping[str, Source], options: BuildOptions) -> dict[str, str]:
    """Check the files against the rules of TensorRT, and write the trtexec command of this build for each version.

    Raises:
        BuildError: TensorRT will refuse a file.
    """
    from runtimes.tensorrt import qdq_rules as qdq
    from runtimes.tensorrt import target as tensorrt

    for source in files.values():
        qdq.check(source.path)
    lines = tensorrt.command_lines(folder / "model.onnx", options)
    text = [f"# TensorRT {version}, in this folder\n{line}\n" for version, line in lines.items()]
    (folder / COMMANDS).write_text("\n".join(text))
    return lines
