"""Export under ``--max-memory``: a language model ranked, rewritten, judged and written without being in memory whole.

What differs from `compressor.pipeline`: nothing is timed, as no engine holds less than the model, and quality is
measured in torch, which runs original and result block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from compressor import checkpoint, models
from compressor.choice import Choice, spelled_out
from compressor.data import Split
from compressor.environment import environment
from compressor.evaluate import Evaluation, Runner, evaluate, tensor_batches
from compressor.figures import Array
from compressor.lower import lower
from compressor.models.disk import stored_bytes
from compressor.parity import Parity, check_parity
from compressor.report import Quality, Report, Size
from compressor.room import GIB, Bounded, limited
from compressor.settings import Settings
from compressor.steps import Steps, Tick
from compressor.subject import Subject, accepting_data, described, load
from compressor.trace import trace
from passes.cost import Costs
from passes.graph import Graph
from passes.run import Program
from passes.sections import cut, run_in_sections, section_ends
from passes.state import bytes_per_token

AT_ONCE = 2  # graphs that are run side by side, each with its own section in memory
CHECKED = 4  # texts on which the written checkpoint is held against the graph


def compressed(settings: Settings, folder: Path, steps: Steps, command: str) -> tuple[Report, Subject]:
    """Compress a model within the memory that the settings allow, and write all but the report.

    Args:
        settings: with ``max_memory``.
        folder: where the result is written.
        steps: told of the progress.
        command: for the report.

    Raises:
        CompressorError, PassError: one sentence that says what was found and what to do.
    """
    subject = load(settings, steps)
    answer, parts = subject.model.answer, [subject.data.calibration, subject.data.test]
    limit, beside = settings.max_memory, Path(settings.output)
    with accepting_data(subject), limited(subject.graph, parts, limit, beside, [answer], AT_ONCE) as bounds:
        assert bounds is not None
        choice = spelled_out(subject, settings, steps, bounds)
        graphs = {"baseline": subject.graph, "result": choice.graph}
        with steps.step("measure the quality") as tick:
            quality = _judged(subject, graphs, bounds, tick)
        (folder / "plan.json").write_text(choice.plan.to_json())
        with steps.step("write the checkpoint"):
            path = lower(choice.graph, subject.model, folder / checkpoint.CONFIG[1:])
        with steps.step("check it against torch"):
            parity = _parity(path, choice.graph, subject, bounds)
    return _report(settings, subject, choice, quality, parity, path, steps, command), subject


def _judged(subject: Subject, graphs: Mapping[str, Graph], bounds: Bounded, tick: Tick) -> Evaluation | None:
    """Quality of the graphs on test data, all their texts going through one section before the next."""
    if subject.no_quality_because is not None:
        return None
    split = subject.data.test
    runners = {name: _runner(graph, subject.model.answer, split, bounds, name) for name, graph in graphs.items()}
    return evaluate(split, runners, metric=subject.metric, reference="baseline", batch_size=bounds.rows, progress=tick)


def _runner(graph: Graph, answer: str, split: Split, bounds: Bounded, name: str) -> Runner:
    """Hands out the answers to a split's batches, in their order, whatever it is fed."""
    answers = _answers(graph, answer, tensor_batches(split, bounds.rows), bounds, name)

    def following(_: Mapping[str, Array]) -> Array:
        found: Array = next(answers).numpy()
        return found

    return following


def _answers(
    graph: Graph, answer: str, batches: Iterable[Mapping[str, torch.Tensor]], bounds: Bounded, name: str
) -> Iterator[torch.Tensor]:
    """One output of a graph for each batch, computed block by block."""
    folder = bounds.room.folder / name
    folder.mkdir()
    program = Program(graph, outputs=[answer])
    sections = cut(program, section_ends(graph), bounds.room.weights)
    for (found,) in run_in_sections(program, sections, batches, folder):
        yield found


def _parity(path: Path, graph: Graph, subject: Subject, bounds: Bounded) -> Parity:
    """Open the checkpoint that was written, from its files too, and hold it to the rewritten graph on a few texts."""
    model = models.load(path.parent, task=subject.model.task, on_disk=True)
    batch = next(subject.data.calibration.batches(min(CHECKED, bounds.rows))).feeds
    sides = {"graph": (graph, subject.model), "checkpoint": (trace(model), model)}
    found = {}
    for name, (side, of) in sides.items():
        feeds = {key: torch.from_numpy(value) for key, value in batch.items() if key in side.inputs}
        (found[name],) = _answers(side, of.answer, [feeds], bounds, f"check {name}")
    expected = {subject.model.answer: found["graph"].numpy()}
    return check_parity(
        expected, lambda: {subject.model.answer: found["checkpoint"].numpy()}, name=path.name, advice=checkpoint.ADVICE
    )


def _report(
    settings: Settings,
    subject: Subject,
    choice: Choice,
    judged: Evaluation | None,
    parity: Parity,
    path: Path,
    steps: Steps,
    command: str,
) -> Report:
    graphs = {"baseline": subject.graph, "result": choice.graph}
    final = choice.graph
    engine = {"state": "streamed", "target": settings.target, "file": path.name}
    return Report(
        command=command,
        settings=settings.to_dict(),
        model=described(subject),
        data=subject.data.describe(),
        plan=choice.plan,
        sizes={name: _size(graph, subject) for name, graph in graphs.items()},
        quality=None if judged is None else Quality.of(judged, list(graphs)),
        no_quality_because=subject.no_quality_because,
        latency={},
        timed_inputs={},
        parity={"result": parity.difference},
        precision={},
        search=choice.facts,
        healed=None,
        steps=tuple(steps.done),
        passes=tuple(final.history),
        environment=environment(),
        notes=tuple(_notes(settings, steps)),
        engine=engine | {"inputs": list(final.inputs), "outputs": list(final.outputs)},
        evidence=choice.evidence,
    )


def _size(graph: Graph, subject: Subject) -> Size:
    """Parameters and work of a graph, and the bytes that its weights have on disk."""
    cost = Costs(graph, subject.costs.example).total
    return Size(cost.parameters, cost.multiply_adds, stored_bytes(graph), bytes_per_token(graph))


def _notes(settings: Settings, steps: Steps) -> Iterator[str]:
    """How the limit was kept."""
    peaks = [step.peak_memory for step in steps.done if step.peak_memory is not None]
    assert settings.max_memory is not None
    if peaks:
        kept = "under" if max(peaks) <= settings.max_memory else "above"
        yield f"At most {max(peaks) / GIB:.2f} GiB were held, {kept} the {settings.max_memory / GIB:.2f} GiB allowed."
