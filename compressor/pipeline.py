"""The pipeline: `export` from settings to report, `inspect` from settings to scores, each as one straight line."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.choice import decide, effects_on_output, score
from compressor.data import Data
from compressor.environment import environment
from compressor.folder import onnx_bytes, output_folder, scratch_folder
from compressor.inspection import Inspection
from compressor.lower import lower
from compressor.quantize import Quantized
from compressor.report import Quality, Report, Size
from compressor.settings import Settings
from compressor.steps import Steps
from compressor.subject import Subject, accepting_data, load
from compressor.workshop import Workshop, sized, timing_feeds, usable
from passes.base import apply
from passes.drop import Drop
from passes.plan import Plan

if TYPE_CHECKING:
    from rich.console import Console


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
    steps = Steps(console)
    output = Path(settings.output)
    with output_folder(output, force=settings.force) as folder, scratch_folder(output) as scratch:
        subject = load(settings, steps)
        subject.model.save(folder)
        workshop = Workshop(subject, target, sized(options, subject, settings), scratch)
        with accepting_data(subject):
            plan, search_facts = decide(subject, settings, steps)
        (folder / "plan.json").write_text(plan.to_json())
        with steps.step("rewrite"):
            rewritten = subject.graph.fork()
            apply(Drop(plan.dropped), rewritten)
        with steps.step("lower to ONNX, check against torch"):
            dense = lower(subject.graph, subject.model, scratch / "baseline.onnx")
            result = lower(rewritten, subject.model, scratch / "result.onnx") if plan.dropped else dense
            parity = {"baseline": workshop.parity(dense, subject.graph)}
            parity["result"] = workshop.parity(result, rewritten) if plan.dropped else parity["baseline"]
        files, int8 = {"baseline": dense, "result": result}, dict[str, Quantized]()
        if settings.int8 is not None:
            files, int8 = workshop.quantized(files, settings, steps)
        files["result"] = _ship(files["result"], folder / "model.onnx")
        with steps.step(f"build for {target.name}"):
            engines = {name: workshop.build(path, folder if name == "result" else None) for name, path in files.items()}
        quality = workshop.quality(engines, steps)
        timed = timing_feeds(subject.data.test, settings.batch)
        latency = workshop.latency(engines, timed, settings.rounds, steps)
        report = Report(
            command=command,
            settings=settings.to_dict(),
            model=_describe(subject),
            data=subject.data.describe(),
            plan=plan,
            sizes={name: _size(name, files[name], subject, plan) for name in files},
            quality=quality,
            no_quality_because=subject.no_quality_because,
            latency=latency,
            timed_inputs={name: list(value.shape) for name, value in timed.items()},
            parity={name: value.difference for name, value in parity.items()},
            int8={name: dataclasses.asdict(value) for name, value in int8.items()},
            search=search_facts,
            steps=tuple(steps.done),
            passes=tuple(rewritten.history),
            environment=environment(),
            notes=_notes(plan, quality, settings, subject, int8),
        )
        (folder / "report.json").write_text(report.to_json())
    return report


def inspect(settings: Settings, *, console: Console | None = None) -> Inspection:
    """Score every site of a model on its calibration data; changes and exports nothing.

    Args:
        settings: model, data and metric; with the metric ``output`` each site's effect on the output is measured too.
        console: where progress is shown; None shows nothing.

    Raises:
        CompressorError, PassError: one sentence that says what was found and what to do.
    """
    steps = Steps(console)
    subject = load(settings, steps)
    with accepting_data(subject):
        scores = score(subject, steps)
        effects = effects_on_output(subject, settings, steps) if settings.metric == "output" else None
        measured = None if effects is None else effects.of_units([[site] for site in subject.sites])
    return Inspection(subject.model.name, subject.sites, scores, subject.costs, subject.data.describe(), measured)


def _ship(source: Path, destination: Path) -> Path:
    """Copy an ONNX file under its final name, with its external data, whose name is written inside it."""
    external = source.with_name(source.name + ".data")
    if not external.exists():
        shutil.copyfile(source, destination)
        return destination
    import onnx

    model = onnx.load(str(source))
    onnx.save_model(model, str(destination), save_as_external_data=True, location=destination.name + ".data")
    # onnx makes the weights readable by their owner alone; whoever may read the model must be able to read them too.
    shutil.copymode(destination, destination.with_name(destination.name + ".data"))
    return destination


def _describe(subject: Subject) -> dict[str, Any]:
    model = subject.model
    return {
        "name": model.name,
        "source": model.source,
        "task": model.task,
        "revision": model.revision,
        "random_weights": model.random_weights,
        "inputs": list(model.inputs),
        "outputs": list(model.outputs),
        "sites": [dataclasses.asdict(site) for site in subject.sites],
    }


def _size(name: str, path: Path, subject: Subject, plan: Plan) -> Size:
    gone = [site for site in subject.sites if site.name in plan.dropped] if name == "result" else []
    cost = subject.costs.under(gone)
    return Size(cost.parameters, cost.multiply_adds, onnx_bytes(path))


def _notes(
    plan: Plan, quality: Quality | None, settings: Settings, subject: Subject, int8: Mapping[str, Quantized]
) -> tuple[str, ...]:
    notes = []
    if settings.drop == "auto" and not plan.dropped:
        notes.append(f"No site could be dropped within {settings.max_loss:g} % loss on validation data.")
    if quality is not None and settings.drop == "auto" and quality.loss["baseline"].value > settings.max_loss:
        lost = quality.loss["baseline"].value
        notes.append(
            f"The loss on test data, {lost:.2f} %, exceeds the {settings.max_loss:g} % that held on "
            f"{len(subject.data.validation)} validation samples; more samples make the choice more reliable."
        )
    for name, facts in int8.items():
        if facts.loss is not None and facts.loss > settings.max_int8_loss:
            notes.append(
                f"int8 of the {name} lost {facts.loss:.2f} % on validation data even with layers kept in float."
            )
    if subject.data.skipped:
        notes.append(f"{len(subject.data.skipped)} unreadable samples were skipped: {_named(subject.data)}.")
    return tuple(notes)


def _named(data: Data) -> str:
    names = [skipped.id for skipped in data.skipped[:5]]
    return ", ".join(names) + (", ..." if len(data.skipped) > len(names) else "")
