"""Which sites go: from ``--drop`` and ``--metric`` to a plan, by names, ranks, search or an earlier plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.evaluate import tensor_batches
from compressor.search import Effects, Validation, search
from compressor.settings import Settings
from compressor.steps import Steps, Tick
from compressor.subject import Subject
from passes.base import apply
from passes.graph import Site
from passes.plan import Plan, choose, parse
from passes.score import Score, Scores


class ChoiceError(CompressorError):
    """A plan file cannot be read."""


def decide(subject: Subject, settings: Settings, steps: Steps) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what it took to find it (for the report)."""
    if settings.drop == "none":
        return choose(parse("0"), subject.sites, "reverse", model=subject.model.name), {}
    if settings.drop == "auto":
        return _search(subject, settings, steps)
    if settings.drop.endswith(".json"):
        return _replay(Path(settings.drop), subject.sites), {}
    selection = parse(settings.drop)
    metric = None if selection.names else settings.metric
    scores = score(subject, steps) if metric in ("cosine", "influence", "angular") else None
    effects = effects_on_output(subject, settings, steps) if metric == "output" else None
    with steps.step("choose"):
        plan = choose(
            selection,
            subject.sites,
            settings.metric,
            model=subject.model.name,
            scores=scores,
            effect=None if effects is None else effects.of_units,
            seed=settings.seed,
        )
    return plan, {} if effects is None else {"sweeps": effects.sweeps, "samples": len(effects.split)}


def _search(subject: Subject, settings: Settings, steps: Steps) -> tuple[Plan, dict[str, Any]]:
    effects = effects_on_output(subject, settings, steps)
    with steps.step("search") as tick:
        validation = Validation(subject.graph, subject.model, subject.data.validation, subject.metric)
        plan = search(
            subject.graph,
            subject.model,
            subject.sites,
            subject.costs,
            effects,
            validation,
            max_loss=settings.max_loss,
            progress=lambda text: tick(text=text),
        )
    return plan, {
        "samples": len(effects.split),
        "sweeps": round(effects.sweeps, 2),
        "validation_samples": len(subject.data.validation),
        "validation_sweeps": validation.evaluations,
    }


def effects_on_output(subject: Subject, settings: Settings, steps: Steps) -> Effects:
    """Effects on the output, measured on the first calibration samples."""
    with steps.step("run the original"):
        return Effects(subject.graph, subject.model, subject.data.calibration.head(settings.search_samples))


def score(subject: Subject, steps: Steps) -> Scores:
    """Scores of all sites on the calibration data."""
    with steps.step("score the sites") as tick:
        batches = _ticking(tensor_batches(subject.data.calibration), len(subject.data.calibration), tick)
        return apply(Score(), subject.graph, batches)


def _ticking(batches: Iterator[dict[str, Any]], total: int, tick: Tick) -> Iterator[dict[str, Any]]:
    done = 0
    for feeds in batches:
        yield feeds
        done += len(next(iter(feeds.values())))
        tick(min(done, total), total)


def _replay(path: Path, sites: Sequence[Site]) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ChoiceError(f"the plan file {path} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise ChoiceError(f"{path} is not a plan.json that Compressor wrote: it is not text.") from error
    plan = Plan.from_json(text)
    plan.check(sites)
    return plan
