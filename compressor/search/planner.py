"""What happens to which site: from the settings to a plan, by names, ranks, search or an earlier plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compressor import __version__
from compressor.choices import TRANSFORMERS
from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.lower import checkpoint
from compressor.lower.traced_model import Subject
from compressor.measure.graph_evaluator import GraphEvaluator
from compressor.measure.memory_budget import Bounded
from compressor.quality.evaluate import BATCH, tensor_batches
from compressor.quality.output_divergence import Effects
from compressor.quality.validation_loss import ROUNDING, Validation
from compressor.search import cost_model
from compressor.search.cost_model import Prices
from compressor.search.greedy import Search
from compressor.search.pareto import Point, efficient
from compressor.search.rewriter import Rewriter
from compressor.search.site_evidence import evidence, few_scores
from compressor.settings import Settings
from compressor.workspace.journal import Journal
from compressor.workspace.progress import Steps, Tick
from passes.analysis.redundancy import Score, Scores
from passes.base import PassError, apply
from passes.graph.graph import Graph, Site
from passes.plan.plan import Plan, acting, merging
from passes.plan.selection import choose, parse

HEADROOM = 1.5  # times the allowed loss that a search may lose where healing follows, which must win it back
CORRECTIONS = 3  # times that a search goes on because the engine was slower than predicted


class ChoiceError(CompressorError):
    """A plan file cannot be read, or not be carried out under a memory limit."""


@dataclass(frozen=True)
class Choice:
    """The plan, the graph it leads to before tokens are merged, and what it took to find it (for the report).

    `search` is what found it; None where there was no search. `evidence` is what it was based on, see evidence.py.
    """

    plan: Plan
    graph: Graph
    rewriter: Rewriter
    facts: dict[str, Any]
    search: Search | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def within(self, limit: float) -> Choice:
        """The longest beginning of a search's changes that loses no more than `limit` on validation data."""
        assert self.search is not None
        losses = [0.0, *(step.loss for step in self.search.steps)]
        count = max(number for number, lost in enumerate(losses) if lost <= limit + ROUNDING)
        plan = self.search.plan(self.plan.model, self.plan.rule, count)
        graph = self.rewriter.carried_out(plan.changes)
        return replace(self, plan=plan, graph=graph, facts=self.facts | {"chosen": count})


def decide(subject: Subject, settings: Settings, evaluator: GraphEvaluator, steps: Steps) -> Choice:
    """Make the plan and carry it out on a fork of the subject's graph."""
    if settings.drop == "auto":
        return _searched(subject, settings, rewriter_of(subject, settings), evaluator, steps)
    return spelled_out(subject, settings, steps)


def spelled_out(subject: Subject, settings: Settings, steps: Steps, bounds: Bounded | None = None) -> Choice:
    """Carry out the plan that the settings spell out, without a search; ranked under a memory limit with `bounds`."""
    rewriter = rewriter_of(subject, settings)
    plan, facts, known = _named(subject, settings, steps, bounds)
    plan = merging(plan, schedule(settings.tokens, subject.sites))
    if bounds is not None:
        _check_dropping(plan)
    if rewriter.whole:
        checkpoint.check_plan(plan, subject.sites, subject.model)
    with steps.step("rewrite") as tick:
        graph = rewriter.carried_out(plan.changes, tick)
    return Choice(plan, graph, rewriter, facts, evidence=known)


def rewriter_of(subject: Subject, settings: Settings) -> Rewriter:
    """What carries changes out; where the target can only lack whole blocks, those are its units.

    Raises:
        CheckpointError: the target can lack none of this model's blocks.
    """
    whole = settings.target == TRANSFORMERS
    if whole and settings.drop == "auto":
        checkpoint.check_blocks(subject.sites, subject.model)
    return Rewriter(subject.graph, subject.sites, subject.data.calibration, whole=whole)


def _named(
    subject: Subject, settings: Settings, steps: Steps, bounds: Bounded | None
) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """The plan that the settings spell out (nothing, a file, names, or the best of a ranking), facts and evidence."""
    if settings.drop == "none":
        return choose(parse("0"), subject.sites, "reverse", model=subject.model.name), {}, {}
    if settings.drop.endswith(".json"):
        return _replay(Path(settings.drop), subject.sites), {}, {}
    selection = parse(settings.drop)
    metric = None if selection.names else settings.metric
    scores = score(subject, steps, bounds) if metric in ("cosine", "influence", "angular") else None
    samples = subject.data.calibration.head(settings.search_samples)
    effects = effects_on_output(subject, samples, steps) if metric == "output" else None
    alone: dict[str, float] = {}

    def effect(units: Sequence[Sequence[Site]]) -> Sequence[float]:
        assert effects is not None
        found = effects.of_units(units)
        alone.update({unit[0].name: value for unit, value in zip(units, found, strict=True) if len(unit) == 1})
        return found

    with steps.step("choose"):
        plan = choose(
            selection,
            subject.sites,
            settings.metric,
            model=subject.model.name,
            scores=scores,
            effect=None if effects is None else effect,
            seed=settings.seed,
        )
    facts = {} if effects is None else {"sweeps": effects.sweeps, "samples": len(effects.split)}
    return acting(plan, settings.chosen_actions[0]), facts, evidence(subject.sites, scores, alone)


def _searched(
    subject: Subject, settings: Settings, rewriter: Rewriter, evaluator: GraphEvaluator, steps: Steps
) -> Choice:
    search = begin(subject, settings, rewriter, evaluator, steps)
    wished = _wish(settings, search.prices)
    enough = wished
    for _ in range(CORRECTIONS):
        go_on(search, steps, enough)
        if wished == math.inf or search.speedup < enough:
            break
        fold = evaluator.builder.fold
        designs = {"as it is": fold(subject.graph), "result": fold(search.reduced)}
        before, after = map(evaluator.timer.total, evaluator.time(designs, steps).values())
        reached = before / after
        if reached >= wished:
            break
        enough = search.speedup * wished / reached * 1.01
    search.journal.forget()
    with steps.step("score the sites"):
        scores = few_scores(subject.graph, search.effects.split)
    known = evidence(subject.sites, scores, search.front.alone)
    facts = facts_of(search) | {"front": front_of(search), "chosen": len(search.steps)}
    return Choice(search.plan(subject.model.name, rule(settings)), search.graph, rewriter, facts, search, known)


def go_on(search: Search, steps: Steps, enough: float = math.inf) -> None:
    """Run a search until it ends, or the speed-up is `enough`, and show how it goes."""
    with steps.step("search") as tick:
        search.progress = lambda text: tick(text=text)
        search.run(enough)


def begin(
    subject: Subject,
    settings: Settings,
    rewriter: Rewriter,
    evaluator: GraphEvaluator,
    steps: Steps,
    journal: Journal | None = None,
) -> Search:
    """A search that is ready to run; without a journal of its own it keeps one beside the output folder."""
    measured, fitted = _shared_out(subject.data.calibration, settings)
    effects = effects_on_output(subject, measured, steps)
    with steps.step("validate the original"):
        validation = Validation(subject.graph, subject.model, subject.data.validation, subject.metric)
    if journal is None:  # only now: a model that fails on its data leaves nothing behind
        journal = journal_of(subject, settings)
    return Search(
        rewriter,
        effects,
        validation,
        _prices(subject, settings, rewriter, evaluator, journal, steps),
        settings.chosen_actions,
        settings.loss_limit * (1.0 if settings.heal == "none" else HEADROOM),
        fitting=fitted,
        given=schedule(settings.tokens, subject.sites),
        journal=journal,
    )


def _shared_out(calibration: Split, settings: Settings) -> tuple[Split, Split]:
    """The samples that candidates are measured on, and those their maps are fitted on: a map looks best on its own."""
    count = settings.search_samples
    if set(settings.chosen_actions) <= {"drop", "merge"} or len(calibration) < 2:
        return calibration.head(count), calibration.head(count)
    measured = calibration.head(min(count, len(calibration) // 2))
    return measured, calibration.beside(measured, count)


def schedule(tokens: str, sites: Sequence[Site]) -> dict[str, str]:
    """The merges that ``--tokens`` spells out, by attention site; none for ``auto`` and ``none``.

    A number is merged behind every attention, several behind one each. A percentage of the tokens is gone half-way: in
    two equal steps, after a quarter and a half of the attentions.

    Raises:
        ChoiceError: another count of numbers than of attentions, or there is no attention.
    """
    names = [site.name for site in sites if site.kind == "attention"]
    if tokens in ("auto", "none"):
        return {}
    if not names:
        raise ChoiceError(f"--tokens {tokens}: no attention was found to merge tokens behind; leave --tokens out.")
    if tokens.endswith("%"):
        share = round(100.0 * (1.0 - math.sqrt(1.0 - int(tokens[:-1]) / 100.0)))
        return dict.fromkeys((names[len(names) // 4], names[len(names) // 2]), f"merge:{share}%")
    numbers = [int(number) for number in tokens.split(",")]
    numbers = numbers * len(names) if len(numbers) == 1 else numbers
    if len(numbers) != len(names):
        raise ChoiceError(
            f"--tokens has {len(numbers)} numbers, but the model has {len(names)} attentions; give as many."
        )
    return {name: f"merge:{number}" for name, number in zip(names, numbers, strict=True) if number}


def _prices(
    subject: Subject, settings: Settings, rewriter: Rewriter, evaluator: GraphEvaluator, journal: Journal, steps: Steps
) -> Prices:
    """What rewritten graphs cost: timed on the target once, unless the user wants multiply-adds."""
    calls = evaluator.timer.calls
    if settings.cost == "macs":
        return cost_model.counted(subject.graph, calls)
    designs = _designs(subject, settings, rewriter)
    return cost_model.timed(
        subject.graph,
        calls,
        {name: evaluator.builder.fold(design) for name, design in designs.items()},
        lambda graphs: journal.recall("timings of calls", lambda: evaluator.time(graphs, steps)),
    )


def _designs(subject: Subject, settings: Settings, rewriter: Rewriter) -> dict[str, Graph]:
    """The graphs that are timed for prices."""
    if rewriter.whole:
        return cost_model.designs_by_block(rewriter)
    merged = _merged(rewriter) if "merge" in settings.chosen_actions else {}
    return cost_model.designs_by_kind(subject.graph, subject.sites) | merged


def _merged(rewriter: Rewriter) -> dict[str, Graph]:
    """A design with fewer tokens, where they can be merged: two steps, after a quarter and a half of the attentions."""
    try:
        return {"merged": rewriter.rewritten(schedule("50%", rewriter.sites))}
    except (PassError, ChoiceError):  # why is said at each site that the search was refused
        return {}


def _wish(settings: Settings, found: Prices) -> float:
    """The speed-up that was asked for; infinite where the loss alone ends the search."""
    if settings.latency is not None:
        return found.timings["as it is"] / settings.latency
    return math.inf if settings.speedup is None else settings.speedup


def rule(settings: Settings) -> str:
    """The rule of a search, in words."""
    parts = [f"at most {settings.loss_limit:g} % loss"] if math.isfinite(settings.loss_limit) else []
    parts += [f"{settings.speedup:g}x faster"] if settings.speedup is not None else []
    parts += [f"{settings.latency:g} ms"] if settings.latency is not None else []
    return ", ".join(["auto", *parts])


def facts_of(search: Search) -> dict[str, Any]:
    """What a search took and found, as plain JSON values."""
    found = search.prices
    return {
        "actions": list(search.actions),
        "samples": len(search.effects.split),
        "sweeps": round(search.effects.sweeps, 2),
        "fit_sweeps": round(search.rewriter.sweeps, 2),
        "validation_samples": len(search.validation.split),
        "validation_sweeps": search.validation.evaluations,
        "recalled": search.journal.found,
        "predicted_speedup": search.speedup,
        "prices": {
            "unit": found.unit,
            "timings": found.timings,
            "largest_error": found.error,
            "calls": {
                name: {"times": price.times, "timings": dict(price.timings)} for name, price in found.calls.items()
            },
        },
        "steps": [asdict(step) for step in search.steps],
    }


def front_of(search: Search) -> list[dict[str, Any]]:
    """Every plan on the way of a search, as plain JSON values: predicted speed-up, loss on validation data in %."""
    return [
        {
            "number": point.number,
            "change": None if point.change is None else list(point.change),
            "loss": point.loss,
            "predicted": point.predicted,
            "multiply_adds": point.multiply_adds,
            "efficient": point.efficient,
        }
        for point in points_of(search, "")
    ]


def points_of(search: Search, model: str) -> list[Point]:
    """One point for each change that the search made, after the model as it is."""
    costs = [search.whole, *(step.cost for step in search.steps)]
    losses = [0.0, *(step.loss for step in search.steps)]
    divergences = [0.0, *(step.divergence for step in search.steps)]
    work = [search.prices.multiply_adds(search.work), *(step.multiply_adds for step in search.steps)]
    kept = efficient(costs, losses)
    return [
        Point(
            number=number,
            plan=search.plan(model, f"sweep, point {number}", number),
            change=(search.steps[number - 1].unit, search.steps[number - 1].action) if number else None,
            loss=losses[number],
            divergence=divergences[number],
            predicted=search.whole / cost,
            multiply_adds=work[number],
            efficient=kept[number],
        )
        for number, cost in enumerate(costs)
    ]


def journal_of(subject: Subject, settings: Settings) -> Journal:
    """The journal beside the output folder; another search's values are not taken over."""
    # What only says how the result is built, measured or adapted later changes nothing that a search measures.
    later = {"output", "force", "rounds", "heal_budget", "speedup", "latency"}
    later |= {"max_precision_loss", "calibration", "factorial"}
    asked = {key: value for key, value in settings.to_dict().items() if key not in later}
    data = subject.data.describe()
    told = [__version__, asked, settings.loss_limit, subject.model.source, subject.model.revision, data["test_ids"]]
    told.append([(site.name, site.kind, site.width) for site in subject.sites])
    output = Path(settings.output).resolve()
    digest = hashlib.sha256(repr(told).encode()).hexdigest()
    return Journal(digest, output.with_name(f".{output.name}.journal"))


def effects_on_output(subject: Subject, samples: Split, steps: Steps) -> Effects:
    """Effects on the output, measured on these samples."""
    with steps.step("run the original"):
        return Effects(subject.graph, subject.model, samples)


def score(subject: Subject, steps: Steps, bounds: Bounded | None = None) -> Scores:
    """Scores of all sites on the calibration data; under a memory limit (`bounds`) block by block."""
    with steps.step("score the sites") as tick:
        rows, room = (BATCH, None) if bounds is None else (bounds.rows, bounds.room)
        batches = ticking(tensor_batches(subject.data.calibration, rows), len(subject.data.calibration), tick)
        return apply(Score(room), subject.graph, batches)


def ticking(batches: Iterator[dict[str, Any]], total: int, tick: Tick) -> Iterator[dict[str, Any]]:
    """The batches, with progress told after each.

    Args:
        batches: feeds by input name.
        total: rows of all of them.
        tick: takes rows done and all rows.
    """
    done = 0
    for feeds in batches:
        yield feeds
        done += len(next(iter(feeds.values())))
        tick(min(done, total), total)


def _check_dropping(plan: Plan) -> None:
    """Refuse a plan that does more than drop, which is all that a model read block by block can have done to it."""
    for name, action in plan.changes.items():
        if action != "drop":
            raise ChoiceError(
                f"the plan has {action} at {name}, which is fitted or measured on the whole model; --max-memory is for "
                "plans that only drop: give such a plan, or leave --max-memory out."
            )


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
