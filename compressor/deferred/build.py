"""`compressor build`: on the device, the engine of a folder that was exported with --defer-build, and its figures.

Nothing here, nor what it imports, needs torch, transformers or timm: NumPy, click, rich and the target's own package
are enough (and onnx for TensorRT, whose files are checked by its rules once more).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressor.deferred.package import ANSWERS, FOLDER
from compressor.deferred.reference_answers import Answers
from compressor.errors import CompressorError, SettingsError
from compressor.limitations import Limitation
from compressor.quality.disagreements import Changed
from compressor.quality.intervals import Figure
from compressor.report.collect_limitations import of_engine
from compressor.report.engine_layers import described
from compressor.report.pages.export_page import PAGE, html, shown_in
from compressor.report.report import REPORT, Quality, Report, Size, brief
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import (
    FolderError,
    check_files,
    check_writable,
    listed,
    scratch_folder,
    write_files,
    write_manifest,
)
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.registry import need, runtime
from runtimes.base.timing import Latency, interleave

if TYPE_CHECKING:
    from rich.console import Console

    from passes.plan.plan import Plan

Json = dict[str, Any]

PLAN = "plan.json"
CARD = "README.md"
FAULT = (
    "the engine computes something else than the model, so nothing was written: check it with --target onnxruntime, "
    "and report it with the versions of the driver and of the target"
)


NO_PAGE = (
    "report.html is the export's, with the figures measured there: altair, jinja2 and vl-convert-python make it anew, "
    "where they are installed."
)


class BuildingError(CompressorError):
    """The folder holds nothing to be built, or was built already."""


def build(
    folder: str | Path,
    *,
    threads: int | None = None,
    rounds: int | None = None,
    portable_engine: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Report:
    """Build the engine of a folder, hold it against torch's answers, time it, and complete report.json.

    Args:
        folder: what an export with `defer_build` wrote.
        threads: threads of the engine; None takes what the export was asked for.
        rounds: timed bursts per engine; None takes what the export was asked for.
        portable_engine: build for other GPUs and versions too; so it is done anyway where the export was asked for it.
        force: build again what was built already.
        console: where progress is shown; None shows nothing.

    Returns:
        The report with the device's latencies; what the stand-in measured is kept in its ``engine`` part.

    Raises:
        CompressorError, RuntimesError: one sentence that says what was found and what to do. The folder is as it was.
    """
    place = Path(folder)
    content = _content(place)
    part: Json = content["engine"]
    if part["state"] == "built" and not force:
        where = part["environment"]["processor"]
        raise BuildingError(f"{place} was built already (on {where}); build it again with --force.")
    options = _options(part["options"], threads, portable=portable_engine)
    part = part | {"options": part["options"] | {"portable": options.portable}}
    target = runtime(part["target"])
    need(target.name, target.missing(), target.devices, options)
    check_writable(place)
    check_files(place, (*part["files"].values(), ANSWERS, PLAN))
    steps = Steps(console)
    with scratch_folder(place / FOLDER) as scratch:
        device = Device(place, part, Answers.load(place / ANSWERS), target, options, scratch)
        engines = device.built(steps)
        measured = device.measured(engines, steps)
        found = described(target, engines["result"], device.options)
        latency = device.timed(engines, content["settings"], rounds, steps)
        report = _completed(content, place, part | {"measured": measured, "layers": found}, latency, steps)
        made = [path.replace(place / path.name) for path in (scratch / "result").iterdir()]
    completed, ours = _json(content, report), _is_ours(place / CARD)
    page = _page(place, completed)
    if page is None:
        report = replace(report, notes=(*report.notes, NO_PAGE))
        completed["notes"] = list(report.notes)
    written = {REPORT: (json.dumps(completed, indent=2) + "\n").encode()}
    written |= {} if page is None else {PAGE: page}
    write_files(place, written | (_card(completed, place) if ours else {}))
    kept = (name for name in listed(place) if ours or name != CARD)
    write_manifest(place, (*kept, *(path.name for path in made)))
    return report


def _is_ours(card: Path) -> bool:
    """Whether the model card is as Compressor wrote it; one that someone has edited is theirs."""
    try:
        check_files(card.parent, (card.name,))
    except FolderError:
        return False
    return True


def _card(content: Json, place: Path) -> dict[str, bytes]:
    """The model card with the device's figures, by its name; none where what makes it is not installed.

    The card that is there then says by itself that its figures are the stand-in's.
    """
    with contextlib.suppress(ImportError):
        from compressor.report.card import model_card as card

        return {CARD: card.card(content, place).encode()}
    return {}


@dataclass(frozen=True)
class Device:
    """One exported folder at work with its real target; engines are made in `scratch`, the result's in ``result``."""

    place: Path
    part: Json
    answers: Answers
    target: Runtime
    options: BuildOptions
    scratch: Path

    def built(self, steps: Steps) -> dict[str, Path]:
        """An engine of each variant."""
        engines = {}
        with steps.step(f"build for {self.target.name}") as tick:
            for done, (name, file) in enumerate(self.part["files"].items()):
                tick(done, len(self.part["files"]), name)
                (self.scratch / name).mkdir()
                options = replace(self.options, precision=self.part["precisions"][name])
                engines[name] = self.target.build(self.place / file, self.scratch / name, options)
        return engines

    def measured(self, engines: Mapping[str, Path], steps: Steps) -> dict[str, Json]:
        """Each engine's difference from torch on the stored rows, held to what is allowed, and its answers judged."""
        found: dict[str, Json] = {}
        with steps.step("check against torch's answers") as tick:
            for done, (name, path) in enumerate(engines.items()):
                tick(done, len(engines), name)
                with self.target.load(path, self.options) as engine:
                    allowed = self.part["allowed"][name]
                    parity = self.answers.hold(engine, name, allowed=allowed, advice=FAULT)
                    found[name] = {"parity": parity.difference}
                    if self.part["metric"] is not None:
                        answer, metric = self.part["answer"], self.part["metric"]
                        found[name] |= self.answers.judged(engine, name, answer=answer, metric=metric)
        return found

    def timed(
        self, engines: Mapping[str, Path], settings: Mapping[str, Any], rounds: int | None, steps: Steps
    ) -> dict[str, Latency]:
        """The engines timed against each other at the batch that the export was asked for."""
        with steps.step("measure the latency") as tick:
            return interleave(
                {name: partial(self.target.load, path, self.options) for name, path in engines.items()},
                self.answers.batch(settings["batch"]),
                rounds=settings["rounds"] if rounds is None else rounds,
                progress=lambda name, done, total: tick(done, total, name),
            )


@dataclass(frozen=True)
class Decided:
    """What a report reads of a plan; the plan itself belongs to a package that imports torch."""

    rule: str
    metric: str
    dropped: tuple[str, ...]
    changes: dict[str, str]
    decisions: tuple[Json, ...]


def _content(folder: Path) -> Json:
    """report.json of a folder that was exported with --defer-build."""
    try:
        content: Json = json.loads((folder / REPORT).read_bytes())
        part = content["engine"]
        ours = {"state", "options", "files", "allowed"} <= set(part)
    except FileNotFoundError as error:
        raise BuildingError(f"{folder} holds no {REPORT}; give a folder that `compressor export` wrote.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildingError(
            f"{folder / REPORT} is no report of this release ({type(error).__name__}); export the model again."
        ) from error
    if not ours:
        raise BuildingError(f"{folder} was exported with its engine; only one from --defer-build is built later.")
    return content


def _options(stored: Mapping[str, Any], threads: int | None, *, portable: bool) -> BuildOptions:
    if threads is not None and threads < 1:
        raise SettingsError(f"threads is {threads}; expected at least 1.")
    sizes = {name: tuple(stored[name]) for name in ("batches", "lengths")}
    threads = stored["threads"] if threads is None else threads
    portable = portable or stored.get("portable", False)
    return BuildOptions(device=stored["device"], threads=threads, portable=portable, **cast(Any, sizes))


def _completed(content: Json, place: Path, part: Json, latency: Mapping[str, Latency], steps: Steps) -> Report:
    """The report with the device's latencies and environment; wishes for speed are judged by these."""
    before = _restored(content, place)
    stand_in = part["stand_in"]
    if part["state"] == "deferred":
        stand_in = stand_in | {"latency": content["latency"], "speedup": content["speedup"]}
    seconds = {step.name: step.seconds for step in steps.done}
    engine = part | {"state": "built", "stand_in": stand_in, "environment": environment(), "seconds": seconds}
    limitations = (*before.limitations, *(each for each in of_engine(engine) if each not in before.limitations))
    report = replace(before, latency=dict(latency), engine=engine, limitations=limitations)
    kept = tuple(note for note in before.notes if note not in (*before.missed(), NO_PAGE))
    return replace(report, notes=(*kept, *report.missed()))


def _json(content: Json, report: Report) -> Json:
    """report.json with what was measured on the device in the place of the stand-in's."""
    speedups = {name: report.speedup(name)._asdict() for name in report.latency if name != "result"}
    return content | {
        "latency": {name: brief(latency) for name, latency in report.latency.items()},
        "speedup": speedups,
        "notes": list(report.notes),
        "limitations": [asdict(limitation) for limitation in report.limitations],
        "engine": report.engine,
    }


def _page(place: Path, content: Json) -> bytes | None:
    """report.html anew, with the samples that the export's shows; None where what draws it is not installed."""
    earlier = place / PAGE
    try:
        return html(content, shown_in(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}).encode()
    except ImportError:
        return None


def _restored(content: Json, place: Path) -> Report:
    """A report from its JSON, as far as its table and summary read it."""
    decisions = json.loads((place / PLAN).read_bytes())["decisions"]
    plan = content["plan"]
    decided = Decided(plan["rule"], plan["metric"], tuple(plan["dropped"]), plan["changes"], tuple(decisions))
    latency = {
        name: Latency(tuple(tuple(burst) for burst in each["samples_ms"])) for name, each in content["latency"].items()
    }
    fields: Json = content | {
        "plan": cast("Plan", decided),
        "sizes": {name: Size(**size) for name, size in content["sizes"].items()},
        "quality": _quality(content["quality"]),
        "latency": latency,
        "notes": tuple(content["notes"]),
        "limitations": tuple(Limitation(**each) for each in content.get("limitations", ())),
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
    return Quality(stored["metric"], figures, loss, label_free, tuple(Changed(**each) for each in stored["changed"]))
