"""Greedy search for a plan: one change after the other, until a budget is used up.

A candidate is a unit (a site, or a whole block if the target can only remove blocks) and an action. Its price is the
increase in output divergence per unit of cost that it saves. Effects of changes do not add up, so each step measures
candidates on the current graph: rewritten forks that share the weights and all computation before the change. As
effects mostly grow with every change, an earlier measurement is a lower bound in practice, so only the best candidates
are measured again (lazy greedy; Minoux 1978), first on few samples and, where they stay the best, on all (racing;
Maron and Moore 1994). The first estimate of a fitted map is derived from the measured drop of its unit.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from compressor.data.splits import Split
from compressor.quality.output_divergence import OutputDivergence
from compressor.quality.validation_loss import ROUNDING, Loss, ValidationLoss
from compressor.search.cost_model import CostModel
from compressor.search.rewriter import Rewriter
from compressor.workspace.journal import Journal
from passes.analysis.least_squares import Fits
from passes.analysis.token_liveness import live_parts
from passes.base import PassError
from passes.graph.graph import Graph, Site
from passes.plan.plan import PUBLISHED, Decision, Plan, fingerprint, form_and_rank, merged_tokens

MEASURED_AT_ONCE = 6  # candidates measured at a time
RECORDED_AT_ONCE = 24  # drops measured at a time before the first change; an interrupted search keeps their values
FINALISTS = 2  # candidates measured at a time on all samples, after they were the best on few
REFINEMENTS = 3  # times that the last change is replaced by milder ones
PATIENCE = 4  # sites at which a change of no greater effect exceeded the limit, before a candidate is given up
CAUTION = 0.5  # factor on the loss that an effect predicts, so that only a clear excess gives a candidate up
NOISE = 1e-7  # divergence in nats caused by rounding of float32 logits; smaller differences do not rank candidates
MERGES = ("merge:12%", "merge:25%", "merge:37%")  # shares of tokens to try if merging is allowed
MERGE = "merge:25%"  # measured at every attention first, as the effect of a drop does not predict that of merging
# Expected effect of a fitted map before it is measured, relative to that of the drop. Only the order of measurements
# depends on it.
SOFTENED = {
    "constant": 0.9,
    "scale": 0.8,
    "fuse": 0.6,
    "low-rank": 0.6,
    "linear": 0.5,
    "tba": 0.6,
    "replaceme": 0.6,
    "replaceme-cosine": 0.6,
}

REACHED = "the predicted speed-up is reached"

Candidate = tuple[str, str]
Progress = Callable[[str], None]


def merges(action: str) -> bool:
    """Return whether an action merges tokens."""
    return merged_tokens(action) is not None


@dataclass(frozen=True)
class Step:
    """One accepted change and the state of the graph after it.

    Attributes:
        unit: site or block that was changed.
        action: the action.
        added: increase in output divergence, in nats.
        divergence: output divergence from the original after the change, in nats.
        loss: loss on validation data after the change, in percent.
        cost: predicted cost of the graph, in the unit of the cost model.
        multiply_adds: multiply-adds of the timed calls.
    """

    unit: str
    action: str
    added: float
    divergence: float
    loss: float
    cost: float
    multiply_adds: int


@dataclass(frozen=True)
class Path:
    """The changes of a search so far, to which it can return (`Search.restore`)."""

    steps: tuple[Step, ...]
    graphs: tuple[Graph, ...]
    fronts: tuple[_Candidates, ...]
    front: _Candidates


@dataclass
class Search:
    """State of a greedy search: the accepted changes, and the measurements of all other candidates.

    Args:
        rewriter: applies changes to forks of the original.
        effects: measures output divergence on calibration samples.
        preview: measures it on few of them first; None measures on all at once.
        validation: measures the loss that `limit` bounds.
        cost_model: cost of rewritten graphs.
        actions: actions allowed on a unit.
        limit: largest loss on validation data, in percent.
        fitting: calibration samples on which the maps of candidates are fitted; the map of an accepted candidate is
            fitted on all of them.
        given: fixed changes, applied before the search begins.
        journal: values measured by an earlier run of the same search.
        progress: called with a line of text after every candidate that was validated.

    Attributes:
        validated: candidates whose loss on validation data was measured.
        exceeded: units and whether tokens were merged there, of the candidates that exceeded the limit since the last
            accepted change, with the least increase in divergence that did.
        failures: loss in percent per divergence of the last candidate of each of these that exceeded the limit.
        ended: why the last run ended, as a clause.
        most: the output divergence of a change must be less, in nats.
        fronts: the candidates before each accepted change.
        graphs: graphs before tokens are merged, after no change, the first change, and so on. They share their weights.
    """

    rewriter: Rewriter
    effects: OutputDivergence
    validation: ValidationLoss
    cost_model: CostModel
    actions: Sequence[str]
    limit: float
    fitting: Split
    preview: OutputDivergence | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    progress: Progress | None = None
    steps: list[Step] = field(default_factory=list)
    graphs: list[Graph] = field(default_factory=list)
    validated: list[Candidate] = field(default_factory=list)
    refused: dict[Candidate, str] = field(default_factory=dict)
    exceeded: dict[tuple[str, bool], float] = field(default_factory=dict)
    failures: dict[tuple[str, bool], float] = field(default_factory=dict)
    ended: str = ""
    most: float = math.inf
    fronts: list[_Candidates] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work = self.cost_model.count(self.rewriter.original)
        self.whole = self.cost_model.of(self.work)
        self.graph = self.rewriter.apply_changes(self.given)
        self.graphs.append(self.graph)
        self.reduced = self.rewriter.reduced(self.graph, self.given)
        self.cost = self.cost_model.cost(self.reduced)
        self.front = _Candidates(self)

    @property
    def changes(self) -> dict[str, str]:
        """Return the action of each changed site, in order; of several merges after one site, the last."""
        return {**self.given, **self.rewriter.of_sites({step.unit: step.action for step in self.steps})}

    def with_change(self, unit: str, action: str, fits: Fits | None = None) -> tuple[Graph, Graph]:
        """Return the graph with one more change, before and after tokens are merged.

        Raises:
            PassError: the action cannot be applied to this unit.
        """
        fits = None if action in PUBLISHED else fits  # published methods need a fit of their own, on all tokens
        graph = self.graph if merges(action) else self.rewriter.changed(self.graph, unit, action, fits)
        return graph, self.rewriter.reduced(graph, self.changes | self.rewriter.of_sites({unit: action}))

    def candidate(self, unit: str, action: str, fits: Fits | None = None) -> Graph:
        """Return the graph after one more change, with tokens merged.

        Drops and fitted maps act on each token alone, so they are applied to the graph whose tokens are merged already;
        merging them again takes far longer.

        Raises:
            PassError: the action cannot be applied to this unit.
        """
        fitted = fits is not None and action not in PUBLISHED and not self._reads_merged_tokens(unit)
        if not self.rewriter.whole and (action == "drop" or (fitted and merged_tokens(action) is None)):
            return self.rewriter.changed(self.reduced, unit, action, fits)
        return self.with_change(unit, action, fits)[1]

    def _reads_merged_tokens(self, unit: str) -> bool:
        """Return whether tokens are merged directly before a unit, so that it reads the result, not the trunk."""
        merging = {name for name, action in self.changes.items() if merged_tokens(action)}
        roots = {site.root for site in self.rewriter.sites if site.name in merging}
        return any(site.trunk in roots for site in self.rewriter.units[unit])

    @property
    def sweeps(self) -> float:
        """Return the forward passes of all measurements of divergence, in passes over the samples of `effects`."""
        if self.preview is None:
            return self.effects.sweeps
        return self.effects.sweeps + self.preview.sweeps * len(self.preview.split) / len(self.effects.split)

    @property
    def speedup(self) -> float:
        """Return the predicted cost of the original divided by that of the current graph."""
        return self.whole / self.cost

    def run(self, enough: float = math.inf) -> None:
        """Search until the speed-up reaches `enough`, or no remaining candidate can gain anything within the limit."""
        while self.speedup < enough:
            best = self.front.best()
            if best is None:
                self.ended = self._why_none_is_left()
                return
            self._try(*best)
        self.ended = REACHED

    def path(self) -> Path:
        """Return the changes so far and the candidates that are left."""
        return Path(tuple(self.steps), tuple(self.graphs), tuple(self.fronts), self.front.copy())

    def restore(self, path: Path) -> None:
        """Return to the changes of a path; what was measured and validated since stays recorded."""
        self.steps, self.graphs, self.fronts = list(path.steps), list(path.graphs), list(path.fronts)
        self.graph, self.front = self.graphs[-1], path.front.copy()
        self.reduced = self.rewriter.reduced(self.graph, self.changes)
        self.cost = self.steps[-1].cost if self.steps else self.cost_model.cost(self.reduced)
        self.exceeded.clear()

    def without_merges(self) -> Search:
        """Return a search from the state before the first merge of this one, without candidates that merge tokens.

        Effects, costs and refusals that were measured stay. The searches share weights, measurements and journal.
        """
        kept = next((number for number, step in enumerate(self.steps) if merges(step.action)), len(self.steps))
        again = copy.copy(self)
        again.validated, again.refused = list(self.validated), dict(self.refused)
        for step in self.steps[kept:]:
            if merges(step.action):
                again.refused[step.unit, step.action] = (
                    f"{step.action} left out: samples that the search did not see refused most of the plan with it"
                )
        again.exceeded = {}
        again.failures = {kind: ratio for kind, ratio in self.failures.items() if not kind[1]}
        *before, front = (
            replace(front.copy(), search=again, candidates=[each for each in front.candidates if not merges(each[1])])
            for front in (*self.fronts, self.front)[: kept + 1]
        )
        again.restore(Path(tuple(self.steps[:kept]), tuple(self.graphs[: kept + 1]), tuple(before), front))
        return again

    def milder(self, enough: float) -> None:
        """Undo the changes that the speed-up `enough` does not need, and replace the last one by milder ones.

        The best change by its price can save far more than is missing. So changes of less divergence are searched for
        in its place, at most `REFINEMENTS` times; they are kept if they reach the speed-up and lose no more.
        """
        costs = [step.cost for step in self.steps]
        needed = next((number for number, cost in enumerate(costs, 1) if self.whole / cost >= enough), 0)
        if not needed:
            return
        self._undo_all_but(needed)
        for _ in range(REFINEMENTS):
            path, last = self.path(), self.steps[-1]
            self._undo_all_but(len(self.steps) - 1)
            self.most = last.divergence
            self.run(enough)
            self.most = math.inf
            if self.speedup < enough or self.steps[-1].loss > last.loss + ROUNDING:
                self.restore(path)
                self.ended = REACHED
                return

    def _undo_all_but(self, count: int) -> None:
        if count < len(self.steps):
            front = self.fronts[count]
            self.restore(
                Path(tuple(self.steps[:count]), tuple(self.graphs[: count + 1]), tuple(self.fronts[:count]), front)
            )

    def hopeless(self, unit: str, action: str, added: float) -> bool:
        """Return whether a change is given up, because its effect says that it would exceed the limit.

        So it is after a change of its own unit of no greater effect exceeded the limit on this graph: a larger share of
        merged tokens is not tried after a smaller one. Effects of different units are no exact measure of the loss, so
        `PATIENCE` of them are needed, or a predicted loss beyond the limit by far (`_predicted`). One of them has to be
        of the same kind, a merge or none: at equal divergence, merged tokens cost sentence embeddings several times as
        much of their rank correlation as other changes.

        Args:
            unit: site or block that is changed.
            action: the action.
            added: increase in output divergence, in nats.
        """
        merging = merges(action)
        known = any(merged == merging for _, merged in self.exceeded)
        effects = sorted(self.exceeded.values()) if known else []
        others = effects[PATIENCE - 1] if len(effects) >= PATIENCE else math.inf
        own = self.exceeded.get((unit, merging), math.inf)
        return added >= min(own, others) or self._predicted(action, added) > self.limit

    def _predicted(self, action: str, added: float) -> float:
        """Return the loss after a change that adds `added` divergence, in percent.

        It is the present loss and `CAUTION` times the median loss per divergence of the changes so far, accepted or
        not. It is minus infinity before a change of this kind exceeded the limit, and with fewer than `PATIENCE`
        changes.
        """
        losses, merging = [0.0, *(step.loss for step in self.steps)], merges(action)
        accepted = [
            (step.loss - before) / step.added
            for before, step in zip(losses, self.steps, strict=False)
            if step.added > NOISE
        ]
        ratios = [*accepted, *self.failures.values()]
        if len(ratios) < PATIENCE or not any(merged == merging for _, merged in self.failures):
            return -math.inf
        return losses[-1] + CAUTION * statistics.median(ratios) * added

    def _why_none_is_left(self) -> str:
        left = [candidate for candidate in self.front.candidates if self.front.saves(candidate)]
        if any(self.hopeless(unit, action, self.front.added[unit, action]) for unit, action in left):
            return (
                "every remaining change is expected to exceed the limit, by its effect on the output, measured or "
                "estimated"
            )
        return "no remaining change saves anything or can be made"

    def _try(self, unit: str, action: str) -> None:
        added, before = self.front.added[unit, action], self.front.copy()
        self.front.remove((unit, action))
        try:
            # An accepted map is fitted on all calibration samples; the fit of the measurement may have used fewer.
            complete = len(self.fitting) == len(self.rewriter.split)
            graph, reduced = self.with_change(unit, action, self.front.fits.get(unit) if complete else None)
        except PassError as error:
            self.refused[unit, action] = f"{action} refused: {error}"
            return
        lost = self._loss(reduced, unit, action)
        self.validated.append((unit, action))
        bound = "" if lost.samples == len(self.validation.split) else f"at least (after {lost.samples} samples) "
        note = f"adds {added:.4f} divergence; validation loss {bound}{lost.percent:.2f} %"
        if lost.percent <= self.limit + ROUNDING:
            work = self.cost_model.count(reduced)
            self.graph, self.reduced, self.cost = graph, reduced, self.cost_model.of(work)
            self.exceeded.clear()
            divergence = self.front.base + added
            counted = self.cost_model.multiply_adds(work)
            self.steps.append(Step(unit, action, added, divergence, lost.percent, self.cost, counted))
            self.graphs.append(graph)
            self.fronts.append(before)
            self.front.changed(unit, action)
        else:
            kind = unit, merges(action)
            self.exceeded[kind] = min(added, self.exceeded.get(kind, math.inf))
            if added > NOISE and math.isfinite(lost.percent):
                self.failures[kind] = (lost.percent - (self.steps[-1].loss if self.steps else 0.0)) / added
            self.refused[unit, action] = (
                f"{action} {note} would exceed {self.limit:g} % after {len(self.steps)} changed"
            )
        if self.progress is not None:
            self.progress(f"{len(self.steps)} changed, {unit} {action}: {note}")

    def why_no_merging(self) -> str | None:
        """Return why no attention of the model allows token merging; None if one does, or if merging is not allowed."""
        attentions = {site.name for site in self.rewriter.sites if site.kind == "attention"}
        refusals = {
            unit: reason
            for (unit, action), reason in self.refused.items()
            if action.startswith("merge") and " refused: " in reason
        }
        if "merge" not in self.actions or attentions - refusals.keys():
            return None
        return next(iter(refusals.values()), "the model has no attention")

    def _loss(self, graph: Graph, unit: str, action: str) -> Loss:
        def measure() -> list[float]:
            lost = self.validation.loss(graph, limit=self.limit)
            return [lost.percent, lost.samples]

        percent, samples = self.journal.recall(f"loss {self._key(unit, action)}", measure)
        return Loss(percent, int(samples))

    def _key(self, unit: str, action: str) -> str:
        changes = ", ".join(f"{name}={applied}" for name, applied in self.changes.items())
        return f"{unit}={action} after {changes}"

    def plan(self, model: str, rule: str, count: int | None = None) -> Plan:
        """Return the plan of the first `count` changes (None: all), with a reason for every site."""
        steps = self.steps if count is None else self.steps[:count]
        changed = {site.name: step for step in steps for site in self.rewriter.units[step.unit]}
        undone = {site.name: step for step in self.steps[len(steps) :] for site in self.rewriter.units[step.unit]}
        units = {site.name: unit for unit, members in self.rewriter.units.items() for site in members}

        def decide(site: Site) -> Decision:
            if site.name in self.given:
                return Decision(site.name, self.given[site.name], "set by --tokens")
            if site.name in changed:
                step = changed[site.name]
                number = len({other.unit for other in steps[: steps.index(step) + 1]})
                reason = f"adds {step.added:.4f} divergence; validation loss {step.loss:.2f} % with {number} changed"
                return Decision(site.name, step.action, reason)
            if site.name in undone:
                return Decision(site.name, "keep", f"{undone[site.name].action} undone: the plan ends before it")
            refusals = [reason for (name, _), reason in self.refused.items() if name == units[site.name]]
            return Decision(site.name, "keep", "; ".join(refusals) or self.front.untried(units[site.name]))

        sites = self.rewriter.sites
        return Plan(model, fingerprint(sites), rule, "output", tuple(map(decide, sites)), (*self.given, *changed))


@dataclass
class _Candidates:
    """The remaining candidates with their last measurement, which is repeated only where it can change the choice.

    Attributes:
        search: the search.
        base: output divergence of the current graph.
        added: increase in divergence by candidate: measured, or estimated before the first measurement.
        alone: divergence by unit of dropping it alone, from the graph on which the search begins.
        saved: reduction of the cost by candidate. It changes with the graph: without the last attention, a model that
            is read at its class token needs only one token of the block before, so dropping that block's attention
            saves far more.
        fresh: candidates measured on the current graph.
        previewed: candidates measured on few samples on the current graph.
        fits: regressions by unit on the current graph.
        candidates: units and actions that can still be chosen.
        read: nodes of the current graph of which only some tokens are read.
    """

    search: Search
    base: float = 0.0
    added: dict[Candidate, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    saved: dict[Candidate, float] = field(default_factory=dict)
    fresh: set[Candidate] = field(default_factory=set)
    previewed: set[Candidate] = field(default_factory=set)
    fits: dict[str, Fits] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def best(self) -> Candidate | None:
        """Return the candidate with the least price, measured on the current graph; None if none can gain anything."""
        if not self.added:
            self._begin()
        while ranked := sorted(filter(self._can_gain, self.candidates), key=self._price):
            if ranked[0] in self.fresh:
                return ranked[0]
            stale = [candidate for candidate in ranked if candidate not in self.fresh]
            if self.search.preview is None:
                self._measure(stale[:MEASURED_AT_ONCE])
            elif ranked[0] in self.previewed:
                self._measure([candidate for candidate in stale if candidate in self.previewed][:FINALISTS])
            else:
                self._preview([candidate for candidate in stale if candidate not in self.previewed][:MEASURED_AT_ONCE])
        return None

    def saves(self, candidate: Candidate) -> bool:
        """Return whether a candidate reduces the cost by a change that can be made."""
        return self._price(candidate) < math.inf

    def _can_gain(self, candidate: Candidate) -> bool:
        added = self.added[candidate]
        within = self.base + added < self.search.most or self.search.most == math.inf
        return self.saves(candidate) and within and not self.search.hopeless(*candidate, added)

    def copy(self) -> _Candidates:
        """Return a copy without the regressions, which are large."""
        return replace(
            self,
            added=dict(self.added),
            alone=dict(self.alone),
            saved=dict(self.saved),
            fresh=set(self.fresh),
            previewed=set(self.previewed),
            fits={},
            candidates=list(self.candidates),
            read=set(self.read),
        )

    def remove(self, candidate: Candidate) -> None:
        """Remove a candidate for the rest of the search; drops are measured also where they are no candidates."""
        self.candidates = [each for each in self.candidates if each != candidate]

    def changed(self, unit: str, action: str) -> None:
        """Update the candidates after a change: its unit keeps only larger merges, and all measurements are stale."""
        self.base += self.added[unit, action]
        merged = merged_tokens(action)
        further = [
            candidate
            for candidate in self.candidates
            if candidate[0] == unit and merged is not None and (merged_tokens(candidate[1]) or 0.0) > merged
        ]
        self.candidates = [candidate for candidate in self.candidates if candidate[0] != unit or candidate in further]
        for candidate in further:  # a larger merge adds and saves only its difference to this one
            self.added[candidate] -= self.added[unit, action]
            self.saved[candidate] -= self.saved[unit, action]
        self.fresh.clear()
        self.previewed.clear()
        self.fits.clear()
        read = set(live_parts(self.search.reduced))
        if not read <= self.read:
            self._update_savings()
        self.read = read

    def _update_savings(self) -> None:
        """Compute the savings of all drops again, and shift those of the fitted maps, as fewer tokens are read."""
        for name in dict.fromkeys(name for name, _ in self.candidates):
            if any(step.unit == name for step in self.search.steps) or (name, "drop") not in self.saved:
                continue
            try:
                dropped = self.search.candidate(name, "drop")
            except PassError as error:  # possible before the last change, such as that of the last block but one
                self._refuse((name, "drop"), f"drop refused: {error}")
                del self.saved[name, "drop"]
                continue
            more = self.search.cost - self.search.cost_model.cost(dropped) - self.saved[name, "drop"]
            for candidate in self.saved:
                if candidate[0] == name:
                    self.saved[candidate] += more

    def _refuse(self, candidate: Candidate, reason: str) -> None:
        """Remove a candidate that cannot be applied, and record why."""
        self.search.refused[candidate] = reason
        self.remove(candidate)

    def untried(self, unit: str) -> str:
        """Return why a unit is kept whose candidates were never validated."""
        measured = [(value, action) for (name, action), value in self.added.items() if name == unit]
        if not measured:
            return "not tried: the budget was met before"
        value, action = min(measured)
        return f"not tried: {action} added {value:.4f} divergence when last measured"

    def _begin(self) -> None:
        """Measure every drop, and one merge at every attention; estimate all other candidates from these."""
        units = {
            name: members
            for name, members in self.search.rewriter.units.items()
            if not any(site.name in self.search.given for site in members)
        }
        self.read = set(live_parts(self.search.reduced))
        self.candidates = [(name, action) for name, members in units.items() for action in self._actions(members)]
        merged = [candidate for candidate in self.candidates if candidate[1] == MERGE]
        measure = self._measure if self.search.preview is None else self._preview
        first = [*((name, "drop") for name in units), *merged]
        for start in range(0, len(first), RECORDED_AT_ONCE):
            measure(first[start : start + RECORDED_AT_ONCE])
        refused = [each for each in self.candidates if each not in self.added and (each[0], "drop") not in self.added]
        measure(refused)  # without its drop, nothing is known of a unit to estimate them by
        self.alone = {name: value for (name, action), value in self.added.items() if action == "drop"}
        for candidate in self.candidates:
            if candidate not in self.added:
                self.added[candidate], self.saved[candidate] = self._estimate(*candidate)

    def _actions(self, unit: Sequence[Site]) -> list[str]:
        actions = [
            variant for action in self.search.actions for variant in (MERGES if action == "merge" else (action,))
        ]
        has_attention = any(site.kind == "attention" for site in unit)
        return [action for action in actions if has_attention or merged_tokens(action) is None]

    def _estimate(self, name: str, action: str) -> tuple[float, float]:
        """Estimate the added divergence and the saving of a candidate from the measurements of its unit."""
        share, measured = merged_tokens(action), self.added.get((name, MERGE))
        if share is None or measured is None:
            drop = (name, "drop")
            return self.added[drop] * SOFTENED.get(form_and_rank(action)[0], 1.0), self.saved[drop]
        part = share / (merged_tokens(MERGE) or share)
        return measured * min(part, part**2), self.saved[name, MERGE] * part  # the first merged tokens matter least

    def _price(self, candidate: Candidate) -> float:
        """Return the added divergence per unit of cost saved; infinity for a candidate that saves nothing.

        Candidates that reduce the divergence come first, ordered by reduction times saving. Next come those whose
        divergence is within `NOISE`, which differs between processors, ordered by their saving.
        """
        added, saved = self.added[candidate], self.saved[candidate]
        if saved <= 0.0:
            return math.inf
        if abs(added) < NOISE:
            added = -NOISE
        return added * saved if added < 0.0 else added / saved

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        """Measure candidates on all samples."""
        self.base = self._recall(candidates, self.search.effects, "effect", "base")
        self.fresh.update(candidate for candidate in candidates if candidate in self.added)

    def _preview(self, candidates: Sequence[Candidate]) -> None:
        """Measure candidates on few samples."""
        assert self.search.preview is not None
        self._recall(candidates, self.search.preview, "preview", "base of previews")
        self.previewed.update(candidate for candidate in candidates if candidate in self.added)

    def _recall(self, candidates: Sequence[Candidate], effects: OutputDivergence, kind: str, main: str) -> float:
        """Take the values of candidates from the journal, measured now if it lacks them; return that of the graph.

        A candidate that is refused is removed.
        """
        search, journal = self.search, self.search.journal
        keys = {candidate: f"{kind} {search._key(*candidate)}" for candidate in candidates}
        base = f"{main} {search._key('', '')}"
        missing = {candidate: key for candidate, key in keys.items() if not journal.knows(key)}
        if missing or not journal.knows(base):
            self._run(missing, base, effects)
        divergence: float = journal.recall(base, lambda: math.nan)
        for candidate, key in keys.items():
            effect, cost, refused = journal.recall(key, lambda: [math.inf, math.inf, "no value"])
            if refused:
                self._refuse(candidate, refused)
                continue
            self.added[candidate] = effect - divergence
            self.saved[candidate] = search.cost - cost
        return divergence

    def _run(self, keys: Mapping[Candidate, str], base: str, effects: OutputDivergence) -> None:
        """Measure candidates in one sweep; record divergence and cost, or the reason of a refusal, in the journal."""
        search = self.search
        unfitted = ("drop", "merge", *PUBLISHED)
        fitted = sorted({name for name, action in keys if form_and_rank(action)[0] not in unfitted} - set(self.fits))
        if fitted:
            self.fits |= search.rewriter.fits(search.graph, fitted, search.fitting)
        variants: dict[Candidate, Graph] = {}
        for name, action in keys:
            try:
                variants[name, action] = search.candidate(name, action, self.fits.get(name))
            except PassError as error:
                search.journal.note(keys[name, action], [math.inf, math.inf, f"{action} refused: {error}"])
        unchanged, divergences = effects.measure(search.reduced, variants)
        search.journal.note(base, unchanged)
        for candidate, divergence in divergences.items():
            search.journal.note(keys[candidate], [divergence, search.cost_model.cost(variants[candidate]), ""])
