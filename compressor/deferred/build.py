"""`compressor build`: build and measure, on the device, the engine of a folder exported with --defer-build.

This module and its imports do not need torch, transformers or timm. NumPy, click, rich and the package of the target
are enough; TensorRT also needs onnx, because its files are checked again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressor.choices import MOST_ROUNDS, MOST_THREADS
from compressor.deferred.check_package import Package, read_package
from compressor.deferred.reference_answers import ReferenceOutputs
from compressor.errors import CompressorError, SettingsError
from compressor.limitations import Limitation
from compressor.options import at_home
from compressor.quality.disagreements import Disagreement
from compressor.quality.heads.base import Head
from compressor.quality.heads.registry import head_for
from compressor.quality.intervals import Figure
from compressor.report.collect_limitations import of_engine
from compressor.report.engine_layers import layers_of
from compressor.report.pages.export_page import PAGE, html, previews_in
from compressor.report.precision_notes import precision_notes
from compressor.report.report import REPORT, Quality, Report, Size, latency_to_dict
from compressor.workspace.add_files import add_files, staging_folder
from compressor.workspace.environment import environment
from compressor.workspace.manifest import MANIFEST, digest_of, read_manifest
from compressor.workspace.output_folder import (
    check_writable,
    write_merged_manifest,
)
from compressor.workspace.output_lock import output_lock
from compressor.workspace.plan_file import PlanFields
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.registry import check_available, runtime
from runtimes.base.timing import Latency, interleave

if TYPE_CHECKING:
    from rich.console import Console

    from passes.plan.plan import Plan

Json = dict[str, Any]

CARD = "README.md"
FAULT = (
    "the engine does not compute what the model computes, so nothing was written: check the model with --target "
    "onnxruntime, and report this with the versions of the driver and of the target"
)
NO_PAGE = (
    "report.html still shows the figures of the export; install altair, jinja2 and vl-convert-python to write it anew."
)


class BuildingError(CompressorError):
    """A folder whose engine was built already."""


def build(
    folder: str | Path,
    *,
    threads: int | None = None,
    rounds: int | None = None,
    portable_engine: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Report:
    """Build the engine of a folder, compare it with the stored outputs of torch, time it, and complete report.json.

    Args:
        folder: the output folder of an export with `defer_build`.
        threads: threads of the engine; None takes the option of the export.
        rounds: timed bursts per engine; None takes the option of the export.
        portable_engine: build for other GPUs and versions too. The option of the export also turns this on.
        force: build again if the engine was built already.
        console: console that shows progress; None shows nothing.

    Returns:
        The report with the latencies of the device. Its ``engine`` part keeps the figures of the exporting machine.

    Raises:
        CompressorError, RuntimesError: the engine cannot be built, or its outputs differ from those of torch. The
            folder is unchanged.
    """
    folder, steps = at_home(Path(folder)), Steps(console)
    if rounds is not None and not 1 <= rounds <= MOST_ROUNDS:
        raise SettingsError(f"rounds is {rounds}; expected 1 to {MOST_ROUNDS:,}.")
    read_manifest(folder)  # raises before the lock is written beside a folder that is no export
    with output_lock(folder, steps.say), staging_folder(folder) as staging:
        package = read_package(folder)
        content = package["report"]
        part: Json = content["engine"]
        if part["state"] == "built" and not force:
            processor = part["environment"]["processor"]
            raise BuildingError(f"{folder} was built already (on {processor}); build it again with --force.")
        options = _options(part["options"], threads, portable=portable_engine)
        part = part | {"options": part["options"] | {"portable": options.portable}}
        target = runtime(part["target"])
        check_available(target.name, target.missing(), target.devices, options)
        check_writable(folder)
        head = head_for(content["model"]["task"], content["model"].get("problem_type"))
        returned = bool(content["model"].get("probabilities"))
        device = _DeviceBuild(folder, part, package["answers"], target, options, staging, head, returned)
        engines = device.build_engines(steps)
        measured = device.check_engines(engines, steps)
        layers = layers_of(target, engines["result"], device.options)
        latency = device.time_engines(engines, content["settings"], rounds, steps)
        report = _completed(content, package["plan"], part | {"measured": measured, "layers": layers}, latency, steps)
        return _write(package, report, folder, staging / "result")


def _write(package: Package, report: Report, folder: Path, new: Path) -> Report:
    """Add the engine in the folder `new`, and report, page, card and manifest, to the exported folder.

    Returns:
        The report, with a note if the page could not be written anew.
    """
    digests = package["digests"]
    completed, ours = _json(package["report"], report), _is_ours(folder, digests)
    page = _page(folder, completed, digests)
    if page is None:
        report = replace(report, notes=(*report.notes, NO_PAGE))
        completed["notes"] = list(report.notes)
    written = {REPORT: (json.dumps(completed, indent=2) + "\n").encode()}
    written |= {} if page is None else {PAGE: page}
    for name, text in (written | (_card(completed, folder, new) if ours else {})).items():
        (new / name).write_bytes(text)
    write_merged_manifest(folder, (name for name in digests if ours or name != CARD), new)
    add_files(folder, new, first=MANIFEST, last=REPORT)
    return report


def _is_ours(folder: Path, digests: Mapping[str, str]) -> bool:
    """Return whether the model card is as Compressor wrote it. An edited card is not overwritten."""
    card = folder / CARD
    return CARD in digests and not card.is_symlink() and card.is_file() and digest_of(card) == digests[CARD]


def _card(content: Json, folder: Path, new: Path) -> dict[str, bytes]:
    """Return the model card with the figures of the device, by file name; empty if its packages are not installed.

    The present card then stays. It states that its figures are those of the exporting machine. The folder `new` has
    the engine.
    """
    with contextlib.suppress(ImportError):
        from compressor.report.card import model_card as card

        return {CARD: card.card(content, folder, engine_folder=new).encode()}
    return {}


@dataclass(frozen=True)
class _DeviceBuild:
    """The engines of one exported folder on its target.

    Attributes:
        folder: the exported folder.
        part: the ``engine`` part of its report.json.
        answers: the stored samples with the outputs of torch.
        target: builds the engines.
        options: device, threads and sizes of the engines.
        scratch: a folder in which each variant gets a folder for its engine, such as ``result``.
        head: how the output of the model is evaluated.
        probabilities: the output holds probabilities instead of logits.
    """

    folder: Path
    part: Json
    answers: ReferenceOutputs
    target: Runtime
    options: BuildOptions
    scratch: Path
    head: Head
    probabilities: bool

    def build_engines(self, steps: Steps) -> dict[str, Path]:
        """Build an engine of each variant."""
        engines = {}
        with steps.step(f"build for {self.target.name}") as tick:
            for done, (name, file) in enumerate(self.part["files"].items()):
                tick(done, len(self.part["files"]), name)
                (self.scratch / name).mkdir()
                options = replace(self.options, precision=self.part["precisions"][name])
                engines[name] = self.target.build(self.folder / file, self.scratch / name, options)
        return engines

    def check_engines(self, engines: Mapping[str, Path], steps: Steps) -> dict[str, Json]:
        """Compare each engine with torch on the stored rows; return its difference and its quality by variant.

        Raises:
            ParityError: an engine differs by more than the report allows.
        """
        measured: dict[str, Json] = {}
        with steps.step("check against torch's answers") as tick:
            for done, (name, path) in enumerate(engines.items()):
                tick(done, len(engines), name)
                with self.target.load(path, self.options) as engine:
                    parity = self.answers.hold(engine, name, advice=FAULT)
                    measured[name] = {"parity": parity.difference}
                    if self.part["metric"] is not None:
                        answer = self.part["answer"]
                        measured[name] |= self.answers.judged(
                            engine, name, answer=answer, head=self.head, probabilities=self.probabilities
                        )
        return measured

    def time_engines(
        self, engines: Mapping[str, Path], settings: Mapping[str, Any], rounds: int | None, steps: Steps
    ) -> dict[str, Latency]:
        """Time the engines against each other, with the batch size of the export."""
        with steps.step("measure the latency") as tick:
            return interleave(
                {name: partial(self.target.load, path, self.options) for name, path in engines.items()},
                self.answers.batch(settings["batch"]),
                rounds=settings["rounds"] if rounds is None else rounds,
                progress=lambda name, done, total: tick(done, total, name),
            )


@dataclass(frozen=True)
class _PlanFields:
    """The fields of a plan that a report reads. `Plan` itself is in a package that imports torch."""

    rule: str
    metric: str
    dropped: tuple[str, ...]
    changes: dict[str, str]
    decisions: tuple[Json, ...]


@dataclass(frozen=True)
class _FactorialFields:
    """The field of a factorial that the summary reads."""

    conclusion: tuple[str, ...]


def _options(stored: Mapping[str, Any], threads: int | None, *, portable: bool) -> BuildOptions:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise SettingsError(f"threads is {threads}; expected 1 to {MOST_THREADS:,}.")
    sizes = {name: tuple(stored[name]) for name in ("batches", "lengths")}
    threads = stored["threads"] if threads is None else threads
    portable = portable or stored.get("portable", False)
    return BuildOptions(device=stored["device"], threads=threads, portable=portable, **cast(Any, sizes))


def _completed(content: Json, plan: PlanFields, part: Json, latency: Mapping[str, Latency], steps: Steps) -> Report:
    """Return the report with the latencies and the environment of the device, and notes on latency goals it misses."""
    before = _restored(content, plan)
    stand_in = part["stand_in"]
    if part["state"] == "deferred":
        stand_in = stand_in | {"latency": content["latency"], "speedup": content["speedup"]}
    seconds = {step.name: step.seconds for step in steps.done}
    engine = part | {"state": "built", "stand_in": stand_in, "environment": environment(), "seconds": seconds}
    limitations = (*before.limitations, *(new for new in of_engine(engine) if new not in before.limitations))
    report = replace(before, latency=dict(latency), engine=engine, limitations=limitations)
    of_latency = (*before.missed(), *before.slower(), *precision_notes(before), NO_PAGE)
    kept = tuple(note for note in before.notes if note not in of_latency)
    return replace(report, notes=(*kept, *precision_notes(report), *report.slower(), *report.missed()))


def _json(content: Json, report: Report) -> Json:
    """Return the content of report.json with the figures of the device."""
    speedups = {name: report.speedup(name)._asdict() for name in report.latency if name != "result"}
    return content | {
        "latency": {name: latency_to_dict(latency) for name, latency in report.latency.items()},
        "speedup": speedups,
        "notes": list(report.notes),
        "limitations": [asdict(limitation) for limitation in report.limitations],
        "engine": report.engine,
    }


def _page(folder: Path, content: Json, digests: Mapping[str, str]) -> bytes | None:
    """Return a new report.html with the samples of the present one; None if its packages are not installed."""
    earlier = (folder / PAGE).read_text(encoding="utf-8", errors="replace") if PAGE in digests else ""
    try:
        return html(content, previews_in(earlier)).encode()
    except ImportError:
        return None


def _restored(content: Json, plan: PlanFields) -> Report:
    """Restore the fields of a report that its table and summary read."""
    made = content["plan"]
    decisions: tuple[Any, ...] = tuple(plan["decisions"])
    plan_fields = _PlanFields(made["rule"], made["metric"], tuple(made["dropped"]), made["changes"], decisions)
    latency = {
        name: Latency(tuple(tuple(burst) for burst in part["samples_ms"])) for name, part in content["latency"].items()
    }
    fields: Json = content | {
        "plan": cast("Plan", plan_fields),
        "sizes": {name: Size(**size) for name, size in content["sizes"].items()},
        "quality": _quality(content["quality"]),
        "latency": latency,
        "factorial": None
        if content["factorial"] is None
        else _FactorialFields(tuple(content["factorial"]["conclusion"])),
        "notes": tuple(content["notes"]),
        "limitations": tuple(Limitation(**values) for values in content.get("limitations", ())),
        "steps": (),
        "passes": (),
    }
    return Report(**{name: fields[name] for name in Report.__dataclass_fields__})


def _quality(stored: Json | None) -> Quality | None:
    if stored is None:
        return None
    figures, loss, label_free = (
        {name: Figure(**figure) for name, figure in stored[part].items()} for part in ("figures", "loss", "label_free")
    )
    changed = tuple(Disagreement(**sample) for sample in stored["changed"])
    further = {
        metric: {name: Figure(**figure) for name, figure in by_variant.items()}
        for metric, by_variant in stored.get("further", {}).items()
    }
    of_precision = None if stored.get("precision_loss") is None else Figure(**stored["precision_loss"])
    expected = {name: Figure(**figure) for name, figure in stored.get("expected", {}).items()}
    return Quality(stored["metric"], figures, loss, label_free, changed, further, of_precision, expected)
