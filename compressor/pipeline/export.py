"""The pipeline: `export` from settings to report, `inspect` from settings to scores, each as one straight line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.choices import AUTO
from compressor.data.splits import Data
from compressor.deferred import package
from compressor.heal.heal import Healed, heal
from compressor.limitations import Limitation
from compressor.lower.traced_model import Subject, accepting_data, described, load
from compressor.measure.workload import Call, generate_of, together
from compressor.measure.workshop import Workshop, sized
from compressor.models.base import without_cache
from compressor.pipeline import export_offloaded, factorial_cells
from compressor.quality.parity import Parity
from compressor.quality.validation_loss import ROUNDING, Validation
from compressor.quantize.precision import Converted, Source, Trial
from compressor.report import engine_layers
from compressor.report.card import model_card
from compressor.report.collect_limitations import limitations_of
from compressor.report.pages.export_page import PAGE, html
from compressor.report.pages.sample_previews import shown
from compressor.report.report import REPORT, Quality, Report, Size, brief
from compressor.search.planner import (
    Choice,
    decide,
)
from compressor.search.site_evidence import tokens_left
from compressor.settings import Settings
from compressor.target.availability import usable
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import engine_bytes, output_folder, scratch_folder
from compressor.workspace.progress import Steps
from passes.analysis.counted_cost import Costs
from passes.graph.cache_state import bytes_per_token
from passes.graph.graph import Graph
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True)
class _Rewritten:
    """What was decided and what came of it: the graph before tokens are merged, after, and ready to be lowered."""

    choice: Choice
    adapted: Graph
    graph: Graph
    final: Graph
    healed: Healed | None


def export(settings: Settings, *, console: Console | None = None, command: str = "compressor.export(...)") -> Report:
    """Compress a model: trace, score, choose, rewrite, lower, build, measure; write the output folder.

    Args:
        settings: everything that was asked for.
        console: where progress is shown; None shows nothing.
        command: the command line, for the report.

    Raises:
        CompressorError, PassError, RuntimesError: one sentence that says what was found and what to do. Nothing is
            left behind then.
    """
    target, options = usable(settings)
    steps, output = Steps(console), Path(settings.output)
    if settings.max_memory is not None:
        export_offloaded.check_target(settings)
    with output_folder(output, force=settings.force) as folder, scratch_folder(output) as scratch:
        if settings.max_memory is not None:
            report, subject = export_offloaded.compressed(settings, folder, steps, command)
        else:
            subject = load(settings, steps)
            subject.model.save(folder)
            workshop = Workshop(subject, target, sized(options, subject, settings), scratch)
            report = _compressed(subject, settings, workshop, folder, steps, command)
        _write(report, folder, subject)
        model_card.write(folder)
    return report


def _compressed(
    subject: Subject, settings: Settings, workshop: Workshop, folder: Path, steps: Steps, command: str
) -> Report:
    """Choose, rewrite, lower, build and measure; the result is written into the folder, the report is handed back."""
    done = _rewritten(subject, settings, workshop, steps)
    (folder / "plan.json").write_text(done.choice.plan.to_json())
    if subject.model.task == "text-generation" and not done.final.state:
        without_cache(folder)
    floats, parity = _lowered(subject, done, workshop, steps)
    factorial = settings.factorial and floats["result"] != floats["baseline"]
    if factorial:
        floats |= factorial_cells.unmerged(done.choice.plan, done.adapted, workshop)
    settings, trials = _with_precision(settings, floats["result"], workshop, steps)
    files, converted = workshop.precise(floats, settings, steps)
    files, more = factorial_cells.parted(floats, files, settings.precision) if factorial else (files, {})
    files["result"], engines = _built(files, more, workshop, folder, steps)
    quality = workshop.quality(engines, steps)
    calls = workshop.calls(settings)
    parts = workshop.latencies(engines, settings, steps)
    latency = {name: together(calls, each) for name, each in parts.items()}
    engine = _engine(done, files, engines["result"], workshop, folder, settings, steps)
    report = Report(
        command=command,
        settings=settings.to_dict(),
        model=described(subject),
        data=subject.data.describe(),
        plan=done.choice.plan,
        sizes=_sizes({name: engines[name] for name in files}, subject, done.final),
        quality=None if quality is None else Quality.of(quality, list(files)),
        no_quality_because=subject.no_quality_because,
        latency={name: latency[name] for name in files},
        timed_inputs={name: list(shape) for name, shape in next(iter(calls.values())).shapes.items()},
        generation=_generation(parts, calls, settings, subject),
        parity={name: value.difference for name, value in parity.items()},
        precision={name: facts.to_dict() for name, facts in converted.items()},
        trials=tuple(map(dataclasses.asdict, trials)),
        search=done.choice.facts,
        healed=None if done.healed is None else dataclasses.asdict(done.healed),
        steps=tuple(steps.done),
        passes=tuple(done.final.history),
        environment=environment(),
        engine=engine,
        factorial=factorial_cells.measured(latency, quality, files | more, settings, folder) if factorial else None,
        evidence=_evidence(done, subject),
        limitations=(*limitations_of(subject, settings.precision, converted, trials, engine), *_lost(done, subject)),
    )
    return dataclasses.replace(report, notes=_notes(report, settings, subject, converted, done.healed))


def _rewritten(subject: Subject, settings: Settings, workshop: Workshop, steps: Steps) -> _Rewritten:
    with accepting_data(subject):
        choice, adapted, healed = _healed(decide(subject, settings, workshop, steps), subject, settings, steps)
        graph = choice.rewriter.reduced(adapted, choice.plan.changes)
    return _Rewritten(choice, adapted, graph, workshop.finished(graph), healed)


def _built(
    files: Mapping[str, Source], more: Mapping[str, Source], workshop: Workshop, folder: Path, steps: Steps
) -> tuple[Source, dict[str, Path]]:
    """What the result's engine was built from, and every engine, by variant; the result's lies in the output folder."""
    with steps.step(f"build for {workshop.target.name}"):
        source, shipped = workshop.shipped(files["result"], folder)
        rest = {name: each for name, each in {**files, **more}.items() if name != "result"}
        return source, {name: workshop.build(each) for name, each in rest.items()} | {"result": shipped}


def _engine(
    done: _Rewritten,
    files: Mapping[str, Source],
    shipped: Path,
    workshop: Workshop,
    folder: Path,
    settings: Settings,
    steps: Steps,
) -> dict[str, Any]:
    """The ``engine`` part of the report."""
    if settings.defer_build:
        graphs = {"baseline": done.choice.rewriter.original, "result": done.graph}
        return package.write(folder, files, graphs, workshop, settings, steps)
    final, target = done.final, workshop.target
    named = {"state": "built", "target": target.name, "file": shipped.name}
    ends = {"inputs": list(final.inputs), "outputs": list(final.outputs)}
    return named | ends | {"layers": engine_layers.described(target, shipped, workshop.options)}


def _with_precision(
    settings: Settings, result: Path, workshop: Workshop, steps: Steps
) -> tuple[Settings, tuple[Trial, ...]]:
    """The settings with the precision that ``auto`` comes to, and what was tried for it."""
    if settings.precision != AUTO:
        return settings, ()
    chosen, trials = workshop.choose_precision(result, settings, steps)
    return dataclasses.replace(settings, precision=chosen), trials


def _write(report: Report, folder: Path, subject: Subject) -> None:
    """report.json, and report.html from the same values, with what people see of the samples it names."""
    content = report.to_dict()
    places = [] if report.quality is None else [each.place for each in report.quality.changed]
    (folder / REPORT).write_text(report.to_json())
    (folder / PAGE).write_text(html(content, shown(subject.data.test, places)), encoding="utf-8")


def _lost(done: _Rewritten, subject: Subject) -> Iterator[Limitation]:
    """What was asked for and the plan does not have, and what the plan took from the model."""
    search = done.choice.search
    merging = None if search is None else search.no_merging()
    if merging is not None:
        yield Limitation("token merging", f"behind no attention ({merging.rstrip('.')})")
    if subject.model.state and not done.final.state:
        yield Limitation(
            "KV cache", "none is left, as every attention is gone; Optimum's classes open it with use_cache=False"
        )


def _evidence(done: _Rewritten, subject: Subject) -> dict[str, Any]:
    """What the choice was based on, and the tokens that its plan leaves where it merges some."""
    if not done.choice.plan.merges:
        return done.choice.evidence
    return done.choice.evidence | {"tokens": tokens_left(done.graph, subject.sites, subject.data.test)}


def _lowered(
    subject: Subject, done: _Rewritten, workshop: Workshop, steps: Steps
) -> tuple[dict[str, Path], dict[str, Parity]]:
    """The files of baseline and result that engines are built from, each held against torch."""
    with steps.step("lower, check against torch"):
        dense = workshop.lowered(subject.graph, "baseline")
        parity = {"baseline": workshop.parity(dense, subject.graph)}
        # Where nothing was changed, folded or left out, the result is the baseline: no second export or int8.
        if not done.choice.plan.changes and done.final.signature() == subject.graph.signature():
            return {"baseline": dense, "result": dense}, parity | {"result": parity["baseline"]}
        result = workshop.lowered(done.final, "result")
        # Held against the graph as it was before it was folded.
        return {"baseline": dense, "result": result}, parity | {"result": workshop.parity(result, done.graph)}


def _generation(
    parts: Mapping[str, Mapping[str, Latency]], calls: Mapping[str, Call], settings: Settings, subject: Subject
) -> dict[str, Any] | None:
    """What generation was timed at, and the latency of its calls by variant; None for models without a cache."""
    asked = generate_of(settings, subject.model)
    if asked is None:
        return None
    latencies = {name: {call: brief(each) for call, each in found.items()} for name, found in parts.items()}
    return {**dataclasses.asdict(asked), "behind": asked.behind, "calls": latencies}


def _healed(choice: Choice, subject: Subject, settings: Settings, steps: Steps) -> tuple[Choice, Graph, Healed | None]:
    """The choice, its graph adapted to its changes if that was asked for and helps, and what healing did.

    A search that healing follows may lose more than is allowed. Where healing does not win it back, the search's last
    changes are taken back until the rest keeps the limit by itself, and that is healed.
    """
    if settings.heal == "none" or not choice.plan.changes:
        return choice, choice.graph, None
    budget = settings.heal_budget if choice.search is None else settings.heal_budget / 2
    graph, healed = _heal(choice, subject, settings, budget, steps)
    if choice.search is not None and healed.after["loss"] > settings.loss_limit + ROUNDING:
        choice = choice.within(settings.loss_limit)
        if not choice.plan.changes:
            return choice, choice.graph, None
        graph, healed = _heal(choice, subject, settings, budget, steps)
    return choice, graph, healed


def _heal(choice: Choice, subject: Subject, settings: Settings, budget: float, steps: Steps) -> tuple[Graph, Healed]:
    with steps.step(f"heal ({settings.heal})") as tick:
        validation = None if choice.search is None else choice.search.validation
        if validation is None:
            validation = Validation(subject.graph, subject.model, subject.data.validation, subject.metric)
        return heal(
            settings.heal,
            choice.graph,
            subject.graph,
            subject.model,
            subject.data.calibration,
            validation,
            changed=[site for site in subject.sites if site.name in choice.plan.changes],
            budget=budget,
            seed=settings.seed,
            progress=tick,
        )


def _sizes(engines: Mapping[str, Path], subject: Subject, final: Graph) -> dict[str, Size]:
    result = (final, Costs(final, subject.costs.example))

    def of(path: Path, graph: Graph, costs: Costs) -> Size:
        return Size(costs.total.parameters, costs.total.multiply_adds, engine_bytes(path), bytes_per_token(graph))

    return {
        name: of(path, *(result if name == "result" else (subject.graph, subject.costs)))
        for name, path in engines.items()
    }


def _notes(
    report: Report, settings: Settings, subject: Subject, converted: Mapping[str, Converted], healed: Healed | None
) -> tuple[str, ...]:
    notes = []
    if settings.drop == "auto" and not report.plan.changes:
        limit = f" within {settings.loss_limit:g} % loss on validation data"
        notes.append(f"No site could be changed{limit if math.isfinite(settings.loss_limit) else ''}.")
    if report.quality is not None and settings.drop == "auto":
        lost = report.quality.loss["baseline"].value
        if lost > settings.loss_limit:
            notes.append(
                f"The loss on test data, {lost:.2f} %, exceeds the {settings.loss_limit:g} % that held on "
                f"{len(subject.data.validation)} validation samples; more samples make the choice more reliable."
            )
    if healed is not None:
        notes.append(f"Healing ({healed.method}): {healed.note}.")
    elif settings.heal != "none":
        notes.append(f"Healing ({settings.heal}): not done, as the plan changes nothing.")
    if settings.factorial and report.factorial is None:
        notes.append("No factorial: the plan changes nothing.")
    for name, facts in converted.items():
        if facts.loss is not None and facts.loss > settings.max_precision_loss:
            kept = ", even with layers kept in float" if facts.quantized is not None else ""
            notes.append(
                f"{facts.precision} of the {name} is expected to lose {facts.loss:.2f} %, by validation data{kept}."
            )
    if subject.data.skipped:
        notes.append(f"{len(subject.data.skipped)} unreadable samples were skipped: {_named(subject.data)}.")
    return (*notes, *report.missed())


def _named(data: Data) -> str:
    names = [skipped.id for skipped in data.skipped[:5]]
    return ", ".join(names) + (", ..." if len(data.skipped) > len(names) else "")
