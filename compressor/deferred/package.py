"""Engines that are built on another machine: what stands in for the target here, and what is left for the device.

The folder gets everything that `compressor build` needs there: the ONNX files of result and baseline, real inputs with
torch's answers, and the ``engine`` part of report.json, which says what to build and how far it may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from compressor.deferred.reference_answers import AT_ONCE, Answers, allowed_for, bytes_of
from compressor.workspace.output_folder import copy_onnx
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.registry import runtime

if TYPE_CHECKING:
    import torch

    from compressor.lower.traced_model import Loaded
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
ROWS = 64  # most samples that are stored
LIMIT = 32 * 1024**2  # bytes of ANSWERS; more only where a single sample with its answers is larger
TIMED_LIMIT = LIMIT // 4  # of these, for the inputs to be timed


def write(
    folder: Path,
    variants: Sequence[Variant],
    builder: EngineBuilder,
    timed: Mapping[str, Array],
    settings: Settings,
    steps: Steps,
) -> dict[str, Any]:
    """Write what the device needs into an output folder.

    Args:
        folder: holds ``model.onnx`` already.
        variants: those of the report, with their sources.
        builder: with the stand-in for the target.
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
    graphs = {each.name: each.graph for each in variants if each.name != "original"}
    sources = {each.name: each.source for each in variants}
    with steps.step("write what the device needs"):
        (folder / FOLDER).mkdir()
        for name, source in sources.items():
            if name != "result":
                copy_onnx(source.path, folder / FOLDER / f"{name}.onnx")
        answers = stored_answers(folder, graphs, builder.subject, timed, settings, one_by_one)
        measured = {name: _measured(answers, name, source.path, builder) for name, source in sources.items()}
    stand_in = {"target": builder.target.name, "device": "cpu", "rows": len(answers), "measured": measured}
    return left_to_device(folder, target, options, sources, builder.subject, stand_in)


def left_to_device(
    folder: Path,
    target: Runtime,
    options: BuildOptions,
    files: Mapping[str, Source],
    subject: Loaded,
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """The ``engine`` part of a report whose engine is built elsewhere.

    Args:
        folder: holds the ONNX files.
        target: what builds it.
        options: with the device it runs on.
        files: the ONNX file of each variant, in its precision.
        subject: model and data.
        found: what stood in for the target here, and what it measured.

    Raises:
        BuildError: the target will refuse one of the files.
    """
    measured = found["measured"]
    reduced = [name for name, source in files.items() if source.precision != "fp32"]
    return {
        "state": "deferred",
        "target": target.name,
        "options": {key: value for key, value in asdict(options).items() if key != "samples"},
        "precisions": {name: source.precision for name, source in files.items()},
        "files": {name: "model.onnx" if name == "result" else f"{FOLDER}/{name}.onnx" for name in files},
        "answer": subject.model.answer,
        "metric": None if subject.no_quality_because is not None else subject.metric,
        "allowed": {name: allowed_for(measured[name]["parity"] if name in reduced else None) for name in files},
        "stand_in": dict(found),
        "commands": _commands(folder, files, options) if target.name == "tensorrt" else {},
    }


def stored_answers(
    folder: Path,
    graphs: Mapping[str, Graph],
    subject: Loaded,
    timed: Mapping[str, Array],
    settings: Settings,
    run_all: RunAll,
    at_once: int = AT_ONCE,
) -> Answers:
    """Write test samples with torch's answers to them, as many as fit, and the inputs to be timed, within their share.

    Args:
        folder: where ``deferred/`` is.
        graphs: ``baseline`` and ``result``.
        subject: model and data.
        timed: the inputs to be timed.
        settings: the batch that is timed.
        run_all: gives the outputs of a graph for each of several batches.
        at_once: most rows of these batches.
    """
    per = subject.data.test.samples.rows_per_sample
    batch = next(subject.data.test.batches(ROWS // per))
    fitting = max(1, TIMED_LIMIT * settings.batch // max(1, bytes_of(timed)))
    first = {name: value[:per] for name, value in batch.feeds.items()}
    sample = bytes_of(first) + sum(_bytes_of_answers(graph, first) for graph in graphs.values())
    rows = per * max(1, min(len(batch.ids), (LIMIT - TIMED_LIMIT) // sample))
    feeds = {name: value[:rows] for name, value in batch.feeds.items()}
    parts = partial(_parts, feeds, at_once)
    expected = {name: _torch(graph, parts(), subject, run_all) for name, graph in graphs.items()}
    labels = batch.labels[:rows] if batch.labels is not None and subject.metric == "accuracy" else None
    answers = Answers(feeds, expected, {name: value[:fitting] for name, value in timed.items()}, labels)
    answers.save(folder / ANSWERS)
    return answers


def one_by_one(graph: Graph, batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The outputs of a graph that is in memory for each of several batches."""
    from passes.execute.interpreter import run

    return (run(graph, batch) for batch in batches)


def _bytes_of_answers(graph: Graph, feeds: Mapping[str, Array]) -> int:
    """Bytes of all outputs of a graph, which are not computed for it."""
    import torch

    from passes.execute.interpreter import Program
    from passes.execute.offloaded_weights import shapes_alone

    program = Program(graph)
    with shapes_alone(program, {name: torch.from_numpy(value) for name, value in feeds.items()}) as values:
        for _ in program.walk(values):
            pass
        return sum(value.nbytes for value in program.results(values))


def _parts(feeds: Mapping[str, Array], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """The feeds a few rows at a time."""
    import torch

    for start in range(0, len(next(iter(feeds.values()))), rows):
        yield {name: torch.from_numpy(value[start : start + rows]) for name, value in feeds.items()}


def _torch(
    graph: Graph, batches: Iterable[Mapping[str, torch.Tensor]], subject: Loaded, run_all: RunAll
) -> dict[str, Array]:
    """Torch's outputs by name, those of all batches one behind the other."""
    from compressor.lower.traced_model import accepting_data

    with accepting_data(subject):
        columns = zip(*run_all(graph, batches), strict=True)
        return {
            name: np.concatenate([value.numpy() for value in values])
            for name, values in zip(graph.outputs, columns, strict=True)
        }


def _measured(answers: Answers, name: str, path: Path, builder: EngineBuilder) -> dict[str, Any]:
    """Measure a file with the stand-in: its difference from torch, and how often it gives the same answer."""
    subject = builder.subject
    with builder.target.load(path, builder.options) as engine:
        parity = answers.hold(engine, name, allowed=float("inf"))
        measured: dict[str, Any] = {"parity": parity.difference}
        if subject.no_quality_because is None:
            measured |= answers.judged(engine, name, answer=subject.model.answer, metric=subject.metric)
    return measured


def _commands(folder: Path, files: Mapping[str, Source], options: BuildOptions) -> dict[str, str]:
    """Check the files by TensorRT's rules, and write the same build as a line of its own tool, for each version."""
    from runtimes.tensorrt import qdq_rules as qdq
    from runtimes.tensorrt import target as tensorrt

    for source in files.values():
        qdq.check(source.path)
    lines = tensorrt.command_lines(folder / "model.onnx", options)
    text = [f"# TensorRT {version}, in this folder\n{line}\n" for version, line in lines.items()]
    (folder / COMMANDS).write_text("\n".join(text))
    return lines
