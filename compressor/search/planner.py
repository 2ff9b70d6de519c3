"""Choose the plan of an export by the settings: from site names, a ranking, a search or a plan file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.choices import GGUF, NO_STAGES, TRANSFORMERS
from compressor.data.sample_cache import DIGEST, digest
from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.executor.base import Batches
from compressor.lower import checkpoint
from compressor.lower.gguf import rules
from compressor.lower.traced_model import TracedModel
from compressor.measure.graph_evaluator import GraphEvaluator
from compressor.measure.memory_budget import MemoryBudget
from compressor.quality.evaluate import BATCH, tensor_batches
from compressor.quality.output_divergence import OutputDivergence
from compressor.quality.validation_loss import ROUNDING, Loss, ValidationLoss
from compressor.search import cost_model
from compressor.search.cost_model import Clock, CostModel
from compressor.search.greedy import Search
from compressor.search.pareto import Point, efficient
from compressor.search.rewriter import Rewriter
from compressor.search.site_evidence import evidence, scores_for_report
from compressor.search.stored_prices import stored_timings
from compressor.settings import Settings, text
from compressor.workspace.journal import Journal
from compressor.workspace.output_lock import JOURNAL, hidden_path
from compressor.workspace.plan_file import given_plan
from compressor.workspace.progress import Steps, Tick
from passes.analysis.redundancy import Score, Scores
from passes.analysis.symbolic_cost import check_known_sizes
from passes.base import PassError, apply
from passes.graph.graph import Graph, Site, attribute
from passes.image_tokens.image_tokens import around_stages
from passes.plan.plan import Plan, fingerprint, with_action, with_token_merging
from passes.plan.selection import SCORED, choose, parse

# Tokens of texts that sites are scored on. On SmolLM2-135M and WikiText-2, the rankings by 6,000 and 12,000 tokens have
# a rank correlation of 0.9992 and 0.9995 with that by 61,636 tokens.
SCORED_TOKENS = 8192
SCORED_TEXTS = 16  # minimum number of texts, if they are long
PREVIEWED = 16  # samples on which candidates are measured first
HEADROOM = 1.5  # factor on the allowed loss of a search that healing follows, as healing recovers some of the loss
CORRECTIONS = 4  # plans that are timed for a wished speed-up, as engines are faster or slower than predicted
EXCESS = 1.05  # share of a wish that a plan may exceed it by without a search for a milder one
MARGIN = 1.01  # factor on the prediction after an engine that was too slow


class ChoiceError(CompressorError):
    """A plan file cannot be read, ``--tokens`` does not fit the model, or a plan needs more than the memory limit."""


@dataclass(frozen=True)
class Choice:
    """A plan with its graph, and the facts about the choice that the report shows.

    Attributes:
        plan: the plan.
        graph: the rewritten graph before tokens are merged.
        rewriter: applied the plan.
        facts: the ``search`` part of the report.
        search: the search that made the plan; None for a plan made without a search.
        evidence: scores and effects of the sites; see `compressor.search.site_evidence.evidence`.
    """

    plan: Plan
    graph: Graph
    rewriter: Rewriter
    facts: dict[str, Any]
    search: Search | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """Number of changes that the search made."""
        return 0 if self.search is None else len(self.search.steps)

    @property
    def count(self) -> int:
        """Number of changes of the search in the plan, from its first."""
        return int(self.facts.get("chosen", 0))

    def at(self, count: int) -> Choice:
        """Return the choice with the first `count` changes of the search."""
        assert self.search is not None
        plan = self.search.plan(self.plan.model, self.plan.rule, count)
        cost = self.search.steps[count - 1].cost if count else self.search.whole
        facts = {name: fact for name, fact in self.facts.items() if name != "refitted"}
        facts |= {"chosen": count, "predicted_speedup": self.search.whole / cost}
        return replace(self, plan=plan, graph=self.search.graphs[count], facts=facts)

    def within(self, limit: float) -> Choice:
        """Return the choice with the most of these changes whose loss on validation data is at most `limit`."""
        assert self.search is not None
        losses = [0.0, *(step.loss for step in self.search.steps[: self.count])]
        return self.at(max(number for number, lost in enumerate(losses) if lost <= limit + ROUNDING))

    def validation_loss(self) -> Loss:
        """Return the loss of the plan on the validation samples of its search."""
        assert self.search is not None
        losses = (0.0, *(step.loss for step in self.search.steps))
        return Loss(losses[self.count], len(self.search.validation.split))

    def reduced(self) -> Graph:
        """Return the graph with the tokens merged."""
        return self.rewriter.reduced(self.graph, self.plan.changes)


def choose_plan(subject: TracedModel, settings: Settings, evaluator: GraphEvaluator, steps: Steps) -> Choice:
    """Make the plan and apply it to a fork of the traced graph."""
    if settings.drop == "auto":
        return _searched(subject, settings, make_rewriter(subject, settings), evaluator, steps)
    return apply_fixed_plan(subject, settings, steps)


def apply_fixed_plan(
    subject: TracedModel, settings: Settings, steps: Steps, bounds: MemoryBudget | None = None
) -> Choice:
    """Make and apply a plan without a search; with `bounds`, rank the sites within a memory limit."""
    rewriter = make_rewriter(subject, settings)
    plan, facts, measurements = _fixed_plan(subject, settings, steps, bounds)
    plan = with_token_merging(plan, merge_schedule(settings.tokens, subject.sites, plan.changes))
    if bounds is not None:
        _check_dropping(plan)
    if settings.target == TRANSFORMERS:
        checkpoint.check_plan(plan, subject.sites, subject.model)
    if rewriter.nested:
        rules.check_changes(plan.changes, subject.sites)
    with steps.step("rewrite") as tick:
        graph = rewriter.apply_changes(plan.changes, tick)
    return Choice(plan, graph, rewriter, facts, evidence=measurements)


def make_rewriter(subject: TracedModel, settings: Settings) -> Rewriter:
    """Return the rewriter of a model; its units are what the target can remove, such as whole blocks.

    A search does not change what the target has to keep.

    Raises:
        CheckpointError: the target cannot remove a block of this model.
    """
    whole = settings.target == TRANSFORMERS and checkpoint.drops_blocks(subject.model)
    if whole and settings.drop == "auto":
        checkpoint.check_blocks(subject.sites, subject.model)
    fixed = _kept(subject, settings) if settings.drop == "auto" else {}
    nested = settings.target == GGUF
    calibration, runs = subject.data.calibration, subject.executor
    return Rewriter(subject.graph, subject.sites, calibration, whole=whole, nested=nested, fixed=fixed, executor=runs)


def _kept(subject: TracedModel, settings: Settings) -> dict[str, str]:
    """Return the sites that the target or stages of image tokens have to keep, with the reason."""
    if settings.image_tokens != NO_STAGES:
        return around_stages(subject.graph)
    if settings.target == GGUF:
        return rules.kept_sites(subject.sites)
    return checkpoint.kept_sites(subject.sites, subject.model) if settings.target == TRANSFORMERS else {}


def _fixed_plan(
    subject: TracedModel, settings: Settings, steps: Steps, bounds: MemoryBudget | None
) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """Return the plan of ``--drop none``, a file, names or a ranking, with its facts and evidence."""
    if settings.drop == "none":
        return choose(parse("0"), subject.sites, "reverse", model=subject.model.name), {}, {}
    if (given := given_plan(settings.drop)) is not None:
        given.check(subject.sites)
        return replace(given, model=subject.model.name), {}, {}
    selection = parse(settings.drop)
    metric = None if selection.names else settings.metric
    scores = score(subject, steps, bounds) if metric in SCORED else None
    samples = subject.data.calibration.head(settings.search_samples)
    effects = output_divergence(subject, samples, steps) if metric == "output" else None
    alone: dict[str, float] = {}

    def effect(units: Sequence[Sequence[Site]]) -> Sequence[float]:
        assert effects is not None
        values = effects.of_units(units)
        alone.update({unit[0].name: value for unit, value in zip(units, values, strict=True) if len(unit) == 1})
        return values

    with steps.step("choose"):
        plan = choose(
            selection,
            subject.sites,
            settings.metric,
            model=subject.model.name,
            scores=scores,
            effect=None if effects is None else effect,
            seed=settings.seed,
            fixed=_kept(subject, settings),
        )
    facts = {} if effects is None else {"sweeps": effects.sweeps, "samples": len(effects.split)}
    return with_action(plan, settings.chosen_actions[0]), facts, evidence(subject.sites, scores, alone)


def _searched(
    subject: TracedModel, settings: Settings, rewriter: Rewriter, evaluator: GraphEvaluator, steps: Steps
) -> Choice:
    search = prepare_search(subject, settings, rewriter, evaluator, steps)
    goal = _goal(settings, search.cost_model)
    timed: list[dict[str, Any]] = []
    if goal == math.inf:
        run_search(search, steps)
    else:
        timed = reach(search, goal, lambda: _measured(search, subject, settings, evaluator, steps), steps)
    with steps.step("score the sites"):
        scores = scores_for_report(subject.graph, search.effects.split)
    measurements = evidence(subject.sites, scores, search.front.alone)
    choice = choice_of(search, subject.model.name, rule(settings), measurements)
    return replace(choice, facts=choice.facts | {"goal": {"speedup": goal, "timed": timed}}) if timed else choice


def choice_of(search: Search, model: str, rule: str, measurements: dict[str, Any]) -> Choice:
    """Return all changes of a search as a choice."""
    facts = facts_of(search) | {"front": front_of(search), "chosen": len(search.steps)}
    return Choice(search.plan(model, rule), search.graph, search.rewriter, facts, search, measurements)


def reach(search: Search, goal: float, measure: Callable[[], float], steps: Steps) -> list[dict[str, Any]]:
    """Search for the mildest plan whose measured speed-up is at least `goal`.

    Prediction and measurement differ, so the prediction that a plan has to reach is corrected in both directions:
    upwards after an engine that is too slow, and downwards after one that is more than `EXCESS` times as fast as
    wished. Where plans above and below the goal are known, the next prediction lies between them. At most
    `CORRECTIONS` plans are timed. The search is left at the plan of the least divergence that met the goal, or at the
    last one if none did.

    Args:
        search: the search; it is continued.
        goal: speed-up to reach.
        measure: returns the measured speed-up of the present plan of the search.
        steps: shows progress.

    Returns:
        Each plan timed: number of ``changes``, ``predicted`` and ``measured`` speed-up, ``loss`` on validation data.
    """
    enough, low, best, least = goal, 1.0, None, math.inf
    high, timed, seen = math.inf, list[dict[str, Any]](), set[tuple[tuple[str, str], ...]]()
    for _ in range(CORRECTIONS):
        run_search(search, steps, enough)
        search.milder(enough)
        plan = tuple(search.changes.items())
        if search.speedup < enough or plan in seen:
            break
        seen.add(plan)
        reached = measure()
        loss, divergence = (search.steps[-1].loss, search.steps[-1].divergence) if search.steps else (0.0, 0.0)
        timed.append({"changes": len(search.steps), "predicted": search.speedup, "measured": reached, "loss": loss})
        if reached < goal:
            low = max(low, search.speedup)
        else:
            high = min(high, search.speedup)
            if best is None or divergence < least:
                best, least = search.path(), divergence
            if reached <= EXCESS * goal:
                break
        enough = _corrected(search.speedup * goal / reached * (MARGIN if reached < goal else 1.0), low, high)
    if best is not None:
        search.restore(best)
    return timed


def _corrected(enough: float, low: float, high: float) -> float:
    """Return a prediction to reach above `low`, which was too slow, and below `high`, which was fast enough."""
    if low < enough < high:
        return enough
    return low * MARGIN if high == math.inf else math.sqrt(low * high)


def _measured(
    search: Search, subject: TracedModel, settings: Settings, evaluator: GraphEvaluator, steps: Steps
) -> float:
    """Return the measured speed-up of the present plan of a search, in the terms of its goal (see `_goal`).

    For ``--speedup`` it is that of the report: over the baseline, which has no exact rewrites.
    """
    designs = {"as it is": subject.graph, "result": evaluator.builder.fold(search.reduced)}
    before, after = map(evaluator.timer.total, evaluator.time(designs, steps).values())
    return before / after if settings.latency is None else search.cost_model.timings["as it is"] / after


def run_search(search: Search, steps: Steps, enough: float = math.inf) -> None:
    """Run a search until it ends or the predicted speed-up reaches `enough`, and show its progress."""
    with steps.step("search") as tick:

        def measuring(done: int, total: int, count: int) -> None:
            tick(done, total, f"{len(search.steps)} changed, measuring the effects of {count} changes")

        search.progress = lambda text: tick(text=text)
        for effects in filter(None, (search.effects, search.preview)):
            effects.progress = measuring
        search.run(enough)


def prepare_search(
    subject: TracedModel,
    settings: Settings,
    rewriter: Rewriter,
    evaluator: GraphEvaluator,
    steps: Steps,
    journal: Journal | None = None,
) -> Search:
    """Prepare a search; `journal` is the file next to the output folder by default.

    Raises:
        BudgetError: a confidence is asked for, and the loss or the data have no bound for it.
        PassError: the model has sizes that depend on the contents of a tensor, so that the cost of its graphs is not
            known.
    """
    check_known_sizes(subject.graph, {name: tuple(value.shape) for name, value in subject.model.example.items()})
    measured, fitted = _split_calibration(subject.data.calibration, settings)
    effects = output_divergence(subject, measured, steps)
    preview = preview_of(subject, measured, steps)
    with steps.step("validate the original"):
        validation = ValidationLoss(
            subject.graph, subject.model, subject.data.validation, subject.metric, settings.budget, subject.executor
        )
    if settings.confidence is not None:
        validation.check_certifiable(subject.data.decision)
    if journal is None:  # created after the first runs, so that a model that fails on its data leaves no file
        journal = journal_of(subject, settings)
        if (message := journal.message()) is not None:
            steps.say(message)
    return Search(
        rewriter,
        effects,
        validation,
        _fitted_cost_model(subject, settings, rewriter, evaluator, journal, steps),
        settings.chosen_actions,
        settings.loss_limit * (1.0 if settings.heal == "none" else HEADROOM),
        fitting=fitted,
        preview=preview,
        given=merge_schedule(settings.tokens, subject.sites),
        journal=journal,
    )


def preview_of(subject: TracedModel, measured: Split, steps: Steps) -> OutputDivergence | None:
    """Return the measurement on few samples that precedes that on all; None if it would need half of them or more."""
    few = measured.head(PREVIEWED)
    return output_divergence(subject, few, steps) if 2 * len(few) <= len(measured) else None


def _split_calibration(calibration: Split, settings: Settings) -> tuple[Split, Split]:
    """Return the samples on which candidates are measured, and those on which their maps are fitted.

    The two sets are disjoint if maps are fitted, as the effect of a map on its own samples is too small.
    """
    count = settings.search_samples
    if set(settings.chosen_actions) <= {"drop", "merge"} or len(calibration) < 2:
        return calibration.head(count), calibration.head(count)
    measured = calibration.head(min(count, len(calibration) // 2))
    return measured, calibration.beside(measured, count)


def merge_schedule(tokens: str, sites: Sequence[Site], changed: Collection[str] = ()) -> dict[str, str]:
    """Return the merge action of each attention site for ``--tokens``; empty for ``auto`` and ``none``.

    A single number is merged after every attention that a plan keeps; several numbers are merged after one attention
    each, whether the plan keeps it or not. A percentage of the tokens is merged in two steps of equal share, after a
    quarter and a half of the kept attentions, or in one if the plan keeps only one.

    Args:
        tokens: the value of ``--tokens``.
        sites: all sites of the model.
        changed: names of the sites that the plan changes.

    Raises:
        ChoiceError: the number of values differs from the number of attentions, the model has no attention, the plan
            keeps none, or it keeps one and half of the tokens or more are to be merged.
    """
    names = [site.name for site in sites if site.kind == "attention"]
    kept = [name for name in names if name not in changed]
    if tokens in ("auto", "none"):
        return {}
    if not kept:
        lack = "the plan keeps no attention" if names else "the model has none"
        raise ChoiceError(f"--tokens {tokens} merges tokens after attentions, but {lack}; leave out --tokens.")
    if tokens.endswith("%"):
        return _share_schedule(int(tokens[:-1]), kept)
    numbers = [int(number) for number in tokens.split(",")]
    if len(numbers) == 1:
        return {name: f"merge:{numbers[0]}" for name in kept if numbers[0]}
    if len(numbers) != len(names):
        raise ChoiceError(
            f"--tokens has {len(numbers)} numbers; expected one for each attention of the model, {len(names)} in all."
        )
    return {name: f"merge:{number}" for name, number in zip(names, numbers, strict=True) if number}


def _share_schedule(percent: int, kept: Sequence[str]) -> dict[str, str]:
    """Return the merges of a percentage of the tokens after some attentions of those that a plan keeps."""
    if len(kept) > 1:
        share = round(100.0 * (1.0 - math.sqrt(1.0 - percent / 100.0)))
        return dict.fromkeys((kept[len(kept) // 4], kept[len(kept) // 2]), f"merge:{share}%")
    if percent >= 50:
        raise ChoiceError(
            f"--tokens {percent}% is merged after two attentions, but the only one that the plan keeps is {kept[0]}, "
            "after which less than half of the tokens can be merged; give less than 50%."
        )
    return {kept[0]: f"merge:{percent}%"}


def _fitted_cost_model(
    subject: TracedModel,
    settings: Settings,
    rewriter: Rewriter,
    evaluator: GraphEvaluator,
    journal: Journal,
    steps: Steps,
) -> CostModel:
    """Return the cost model: multiply-adds with ``--cost macs``, else fitted to timings on the target.

    With ``--prices``, the timings are those of an earlier search.
    """
    calls = evaluator.timer.calls
    if settings.cost == "macs":
        return cost_model.multiply_add_cost_model(subject.graph, calls)
    designs = {name: evaluator.builder.fold(design) for name, design in _designs(subject, settings, rewriter).items()}
    clock: Clock
    if settings.prices is None:
        clock = partial(_recalled, journal, evaluator, steps)
    else:
        sites = fingerprint(subject.sites)
        clock = partial(stored_timings, Path(settings.prices), subject.model.name, sites, settings, calls)
    return cost_model.fit_latency_cost_model(subject.graph, calls, designs, clock, text(settings.prices))


def _recalled(
    journal: Journal, evaluator: GraphEvaluator, steps: Steps, graphs: Mapping[str, Graph]
) -> Mapping[str, Mapping[str, float]]:
    """Return the timings of an interrupted search, or time the graphs."""
    timings: dict[str, dict[str, float]] = journal.recall("timings of calls", lambda: evaluator.time(graphs, steps))
    return timings


def _designs(subject: TracedModel, settings: Settings, rewriter: Rewriter) -> dict[str, Graph]:
    """Return the graphs to time for the cost model."""
    if rewriter.whole:
        return cost_model.designs_by_block(rewriter)
    if rewriter.nested:
        return cost_model.designs_by_attention(rewriter)
    merged = _merged(rewriter) if "merge" in settings.chosen_actions else {}
    linear = settings.target != TRANSFORMERS
    return cost_model.designs_by_kind(subject.graph, subject.sites, linear=linear) | merged


def _merged(rewriter: Rewriter) -> dict[str, Graph]:
    """Return a design with half of the tokens merged, or none if the model does not allow it."""
    try:
        return {"merged": rewriter.rewritten(merge_schedule("50%", rewriter.sites))}
    except (PassError, ChoiceError):  # the search records the reason at each site
        return {}


def _goal(settings: Settings, costs: CostModel) -> float:
    """Return the speed-up that ``--speedup`` or ``--latency`` requires; infinity without either."""
    if settings.latency is not None:
        return costs.timings["as it is"] / settings.latency
    return math.inf if settings.speedup is None else settings.speedup


def rule(settings: Settings) -> str:
    """Return the rule of a search for the plan, such as ``auto, at most 1 % loss``."""
    parts = [f"at most {settings.loss_limit:g} % loss"] if math.isfinite(settings.loss_limit) else []
    parts += [f"{settings.speedup:g}x faster"] if settings.speedup is not None else []
    parts += [f"{settings.latency:g} ms"] if settings.latency is not None else []
    return ", ".join(["auto", *parts])


def facts_of(search: Search) -> dict[str, Any]:
    """Return effort, cost model and steps of a search as plain JSON values."""
    fitted = search.cost_model
    return {
        "actions": list(search.actions),
        "samples": len(search.effects.split),
        "preview_samples": None if search.preview is None else len(search.preview.split),
        "sweeps": round(search.sweeps, 2),
        "fit_sweeps": round(search.rewriter.sweeps, 2),
        "validation_samples": len(search.validation.split),
        "validation_sweeps": search.validation.evaluations,
        "validated": len(search.validated),
        "validated_sites": len({unit for unit, _ in search.validated}),
        "ended": search.ended,
        "recalled": search.journal.found,
        "predicted_speedup": search.speedup,
        "prices": {
            "unit": fitted.unit,
            "sites": fingerprint(search.rewriter.sites),
            "source": fitted.source,
            "timings": fitted.timings,
            "largest_error": fitted.error,
            "calls": {
                name: {
                    "times": call.times,
                    "shapes": {key: list(shape) for key, shape in call.shapes.items()},
                    "timings": dict(call.timings),
                }
                for name, call in fitted.calls.items()
            },
        },
        "steps": [asdict(step) for step in search.steps],
    }


def front_of(search: Search) -> list[dict[str, Any]]:
    """Return every point of a search as plain JSON values: predicted speed-up, loss on validation data in %."""
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
    """Return the points of a search: the original, and one point per accepted change."""
    costs = [search.whole, *(step.cost for step in search.steps)]
    losses = [0.0, *(step.loss for step in search.steps)]
    divergences = [0.0, *(step.divergence for step in search.steps)]
    work = [search.cost_model.multiply_adds(search.work), *(step.multiply_adds for step in search.steps)]
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


def journal_of(subject: TracedModel, settings: Settings) -> Journal:
    """Open the journal next to the output folder; values of a search with other settings are discarded.

    So are those of other weights or samples under the same name, such as a model that was trained further.

    The file is deleted when the output folder is complete, see `compressor.workspace.output_folder`.
    """
    # These settings only affect steps after the search, so a journal stays valid if they change.
    later = {"output", "force", "rounds", "heal_budget", "speedup", "latency", "confidence"}
    later |= {"max_precision_loss", "calibration", "factorial", "points"}
    later |= {"workers", "ray"}  # every executor gives the same values
    options = {key: value for key, value in settings.to_dict().items() if key not in later}
    data = subject.data.describe()
    identity = [
        __version__,
        options,
        settings.loss_limit,
        subject.model.source,
        subject.model.revision,
        data["test_ids"],
    ]
    identity.append([(site.name, site.kind, site.width) for site in subject.sites])
    identity += [_digest_of_weights(subject.graph), *(part.digest() for part in subject.data.parts[:2])]
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()
    return Journal(digest, hidden_path(Path(settings.output), JOURNAL))


def _digest_of_weights(graph: Graph) -> bytes:
    """Return a hash of all tensors that a graph reads, with their names."""
    found = hashlib.blake2b(digest_size=DIGEST)
    read = {str(node.target): node for node in graph.nodes() if node.op == "get_attr"}
    for name, node in read.items():
        value = attribute(graph, node)
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + digest(content.numpy()))
    return found.digest()


def output_divergence(subject: TracedModel, samples: Split, steps: Steps) -> OutputDivergence:
    """Run the original on the samples, for measurements of the output divergence of rewritten graphs."""
    with steps.step("run the original"):
        return OutputDivergence(subject.graph, subject.model, samples, subject.executor)


def score(subject: TracedModel, steps: Steps, bounds: MemoryBudget | None = None) -> Scores:
    """Score all sites on the calibration data, of texts on about `SCORED_TOKENS` tokens.

    With `bounds` the model is run block by block within a memory limit.
    """
    split = subject.data.calibration.sparse(SCORED_TOKENS, SCORED_TEXTS)
    with steps.step("score the sites") as tick:
        rows, room = (BATCH, None) if bounds is None else (bounds.rows, bounds.room)
        batches = Batches(subject.executor, lambda: with_progress(tensor_batches(split, rows), len(split), tick))
        return apply(Score(room), subject.graph, batches)


def with_progress(batches: Iterator[dict[str, Any]], total: int, tick: Tick) -> Iterator[dict[str, Any]]:
    """Yield the batches and report progress after each.

    Args:
        batches: feeds by input name.
        total: number of rows in all batches.
        tick: called with the number of finished rows and `total`.
    """
    done = 0
    for feeds in batches:
        yield feeds
        done += len(next(iter(feeds.values())))
        tick(min(done, total), total)


def _check_dropping(plan: Plan) -> None:
    """Refuse a plan with actions other than drop, which ``--max-memory`` does not support."""
    for name, action in plan.changes.items():
        if action != "drop":
            raise ChoiceError(
                f"the plan has {action} at {name}, which is fitted or measured on the whole model; give a plan that "
                "only drops, or leave out --max-memory."
            )
