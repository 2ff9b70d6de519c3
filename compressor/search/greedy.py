"""The search for a plan: which action at which site, one change after the other, until a budget is used up.

Effects of changes do not add up, so each step measures candidates on the graph as it is by then: rewritten forks that
share the weights and all the work before the change. A candidate is a unit (a site, or a whole block where the target
can lose nothing less) and an action; its price is the increase in
output divergence for each unit of cost that it saves. As effects mostly grow with every change, an earlier measurement
is a lower bound in practice, so that only the front runners are measured again (lazy greedy; Minoux 1978). A stand-in
that was never measured starts from the effect of the drop it would soften.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.data.splits import Split
from compressor.quality.output_divergence import Effects
from compressor.quality.validation_loss import ROUNDING, Loss, Validation
from compressor.search.cost_model import Prices
from compressor.search.rewriter import Rewriter
from compressor.workspace.journal import Journal
from passes.analysis.least_squares import Fits
from passes.analysis.token_liveness import read_parts
from passes.base import PassError
from passes.graph.graph import Graph, Site
from passes.plan.plan import PUBLISHED, Decision, Plan, fingerprint, form_and_rank, merged_tokens

FRONT = 6  # candidates measured at a time
PATIENCE = 4  # candidates in a row that may break the budget before the search ends
NOISE = 1e-7  # of divergence in nats: what float32 logits are off by; smaller differences rank nothing
MERGES = ("merge:12%", "merge:25%", "merge:37%")  # shares of the tokens that are tried where merging is allowed
MERGE = "merge:25%"  # measured everywhere at first, as a drop tells nothing about merging the tokens behind it
# What part of a drop's effect a stand-in that was not measured yet is expected to leave; sorts the front, no more.
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

Candidate = tuple[str, str]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """One change that was made: its unit and action, what it added, and where that led.

    `divergence` is the output's distance from the original after it, `loss` what is lost on validation data in percent,
    `cost` the predicted cost of the whole in the prices' unit and `multiply_adds` its multiply-adds, for what
    is timed.
    """

    unit: str
    action: str
    added: float
    divergence: float
    loss: float
    cost: float
    multiply_adds: int


@dataclass
class Search:
    """A search under way: the changes made so far, and what was learnt about the others.

    Args:
        rewriter: carries changes out, on forks of the original.
        effects: measures output divergence on calibration samples.
        validation: measures the loss that `limit` bounds.
        prices: what each action saves.
        actions: what may be done to a unit.
        limit: most loss on validation data, in percent.
        fitting: calibration samples that the maps of candidates are fitted on, where they are only tried.
        given: changes made before the search begins, which it keeps.
        journal: values measured by an earlier run of the same search.
        progress: called with a line of text at every step.
    """

    rewriter: Rewriter
    effects: Effects
    validation: Validation
    prices: Prices
    actions: Sequence[str]
    limit: float
    fitting: Split
    given: Mapping[str, str] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    progress: Progress | None = None
    steps: list[Step] = field(default_factory=list)
    refused: dict[Candidate, str] = field(default_factory=dict)
    broken_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.work = self.prices.count(self.rewriter.original)
        self.whole = self.prices.of(self.work)
        self.graph = self.rewriter.carried_out(self.given)
        self.reduced = self.rewriter.reduced(self.graph, self.given)
        self.cost = self.prices.cost(self.reduced)
        self.front = _Front(self)

    @property
    def changes(self) -> dict[str, str]:
        """The action of each changed site, in order; tokens may have been merged in several steps, the last counts."""
        return {**self.given, **self.rewriter.of_sites({step.unit: step.action for step in self.steps})}

    def with_change(self, unit: str, action: str, fits: Fits | None = None) -> tuple[Graph, Graph]:
        """The graph with one more change, as it is before tokens are merged and after.

        Raises:
            PassError: the action cannot be carried out there.
        """
        merges = merged_tokens(action) is not None
        fits = None if action in PUBLISHED else fits  # those count all tokens, and are fitted for themselves
        graph = self.graph if merges else self.rewriter.changed(self.graph, unit, action, fits)
        return graph, self.rewriter.reduced(graph, self.changes | self.rewriter.of_sites({unit: action}))

    @property
    def speedup(self) -> float:
        """Predicted cost of the original over that of the graph as it is now."""
        return self.whole / self.cost

    def run(self, enough: float = math.inf) -> None:
        """Go on until no candidate is left, `PATIENCE` in a row break the limit, or the speed-up is `enough`."""
        while self.broken_in_a_row < PATIENCE and self.speedup < enough:
            best = self.front.best()
            if best is None:
                return
            self._try(*best)

    def _try(self, unit: str, action: str) -> None:
        added = self.front.added[unit, action]
        self.front.remove((unit, action))
        try:
            # Carried out with a fit on all calibration samples.
            everything = len(self.fitting) == len(self.rewriter.split)
            graph, reduced = self.with_change(unit, action, self.front.fits.get(unit) if everything else None)
        except PassError as error:
            self.refused[unit, action] = f"{action} refused: {error}"
            return
        lost = self._loss(reduced, unit, action)
        bound = "" if lost.samples == len(self.validation.split) else f"at least (after {lost.samples} samples) "
        note = f"adds {added:.4f} divergence; validation loss {bound}{lost.percent:.2f} %"
        if lost.percent <= self.limit + ROUNDING:
            work = self.prices.count(reduced)
            self.graph, self.reduced, self.cost, self.broken_in_a_row = graph, reduced, self.prices.of(work), 0
            divergence = self.front.base + added
            counted = self.prices.multiply_adds(work)
            self.steps.append(Step(unit, action, added, divergence, lost.percent, self.cost, counted))
            self.front.changed(unit, action)
        else:
            self.broken_in_a_row += 1
            self.refused[unit, action] = (
                f"{action} {note} would exceed {self.limit:g} % after {len(self.steps)} changed"
            )
        if self.progress is not None:
            self.progress(f"{len(self.steps)} changed, {unit} {action}: {note}")

    def no_merging(self) -> str | None:
        """Why tokens can be merged behind no attention of the model; None where they can, or were not to be."""
        attentions = {site.name for site in self.rewriter.sites if site.kind == "attention"}
        refusals = {
            unit: reason
            for (unit, action), reason in self.refused.items()
            if action.startswith("merge") and " refused: " in reason
        }
        if "merge" not in self.actions or attentions - refusals.keys():
            return None
        return next(iter(refusals.values()), "no attention was found")

    def _loss(self, graph: Graph, unit: str, action: str) -> Loss:
        def measure() -> list[float]:
            lost = self.validation.loss(graph, limit=self.limit)
            return [lost.percent, lost.samples]

        percent, samples = self.journal.recall(f"loss {self._key(unit, action)}", measure)
        return Loss(percent, int(samples))

    def _key(self, unit: str, action: str) -> str:
        made = ", ".join(f"{name}={done}" for name, done in self.changes.items())
        return f"{unit}={action} after {made}"

    def plan(self, model: str, rule: str, count: int | None = None) -> Plan:
        """The plan of the first `count` changes (all, where not given), with a reason for every site."""
        steps = self.steps if count is None else self.steps[:count]
        taken = {site.name: step for step in steps for site in self.rewriter.units[step.unit]}
        units = {site.name: unit for unit, members in self.rewriter.units.items() for site in members}

        def decide(site: Site) -> Decision:
            if site.name in self.given:
                return Decision(site.name, self.given[site.name], "asked for")
            if site.name in taken:
                step = taken[site.name]
                number = len({other.unit for other in steps[: steps.index(step) + 1]})
                reason = f"adds {step.added:.4f} divergence; validation loss {step.loss:.2f} % with {number} changed"
                return Decision(site.name, step.action, reason)
            refusals = [reason for (name, _), reason in self.refused.items() if name == units[site.name]]
            return Decision(site.name, "keep", "; ".join(refusals) or self.front.untried(units[site.name]))

        sites = self.rewriter.sites
        return Plan(model, fingerprint(sites), rule, "output", tuple(map(decide, sites)), (*self.given, *taken))


@dataclass
class _Front:
    """Candidates with their last known increase in divergence, measured again only where it can matter.

    `alone` is what dropping each unit alone adds to the model as the search begins. `saved` is what each candidate
    takes off the cost. It changes too: with the last attention gone, a model that is read at its
    class token needs the block before for one token only, so that dropping that one's attention saves far more.
    """

    search: Search
    base: float = 0.0
    added: dict[Candidate, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    saved: dict[Candidate, float] = field(default_factory=dict)
    fresh: set[Candidate] = field(default_factory=set)
    fits: dict[str, Fits] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def best(self) -> Candidate | None:
        """The candidate with the least added divergence for what it saves; None where none is left."""
        if not self.added:
            self._begin()
        while self.candidates:
            ranked = sorted(self.candidates, key=self._price)
            if self._price(ranked[0]) == math.inf:
                return None
            if ranked[0] in self.fresh:
                return ranked[0]
            self._measure([candidate for candidate in ranked if candidate not in self.fresh][:FRONT])
        return None

    def remove(self, candidate: Candidate) -> None:
        """Take a candidate out for good."""
        self.candidates.remove(candidate)

    def changed(self, unit: str, action: str) -> None:
        """After a change: the unit is done, unless still more tokens can be merged; every measurement is stale."""
        done = merged_tokens(action)
        further = [
            candidate
            for candidate in self.candidates
            if candidate[0] == unit and done is not None and (merged_tokens(candidate[1]) or 0.0) > done
        ]
        self.candidates = [candidate for candidate in self.candidates if candidate[0] != unit or candidate in further]
        for candidate in further:  # what this change has added and saved already is no longer theirs to add and save
            self.added[candidate] -= self.added[unit, action]
            self.saved[candidate] -= self.saved[unit, action]
        self.fresh.clear()
        self.fits.clear()
        read = set(read_parts(self.search.reduced))
        if not read <= self.read:
            self._price_again()
        self.read = read

    def _price_again(self) -> None:
        """Fewer tokens are read than before: what the drops before them save has changed, and so have stand-ins."""
        for name in dict.fromkeys(name for name, _ in self.candidates):
            if any(step.unit == name for step in self.search.steps):
                continue
            _, graph = self.search.with_change(name, "drop")
            more = self.search.cost - self.search.prices.cost(graph) - self.saved[name, "drop"]
            for candidate in self.saved:
                if candidate[0] == name:
                    self.saved[candidate] += more

    def untried(self, unit: str) -> str:
        """Why a unit that was never tried is kept."""
        measured = [(value, action) for (name, action), value in self.added.items() if name == unit]
        if not measured:
            return "not tried: the budget was met before"
        value, action = min(measured)
        return f"not tried: {action} added {value:.4f} divergence when last measured"

    def _begin(self) -> None:
        """Measure every drop, and one merge behind every attention; the guesses for all others start from there."""
        units = {
            name: members
            for name, members in self.search.rewriter.units.items()
            if not any(site.name in self.search.given for site in members)
        }
        self.read = set(read_parts(self.search.reduced))
        self.candidates = [(name, action) for name, its in units.items() for action in self._actions(its)]
        merges = [candidate for candidate in self.candidates if candidate[1] == MERGE]
        self._measure([*((name, "drop") for name in units), *merges])
        self.alone = {name: value for (name, action), value in self.added.items() if action == "drop"}
        for candidate in self.candidates:
            if candidate not in self.added:
                self.added[candidate], self.saved[candidate] = self._guess(*candidate)

    def _actions(self, unit: Sequence[Site]) -> list[str]:
        offered = [each for action in self.search.actions for each in (MERGES if action == "merge" else (action,))]
        merging = any(site.kind == "attention" for site in unit)
        return [action for action in offered if merging or merged_tokens(action) is None]

    def _guess(self, name: str, action: str) -> tuple[float, float]:
        """What a candidate may add and save, by what was measured at its unit."""
        share, measured = merged_tokens(action), self.added.get((name, MERGE))
        if share is None or measured is None:
            known = (name, "drop")
            return self.added[known] * SOFTENED.get(form_and_rank(action)[0], 1.0), self.saved[known]
        part = share / (merged_tokens(MERGE) or share)
        return measured * min(part, part**2), self.saved[name, MERGE] * part  # the first tokens cost the least

    def _price(self, candidate: Candidate) -> float:
        """Divergence for each unit of cost saved; infinite where nothing is saved.

        A change that brings the output closer comes before all others, the more it saves the sooner; next come those
        whose divergence is rounding, which differs between processors.
        """
        added, saved = self.added[candidate], self.saved[candidate]
        if saved <= 0.0:
            return math.inf
        if abs(added) < NOISE:
            added = -NOISE
        return added * saved if added < 0.0 else added / saved

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        search, journal = self.search, self.search.journal
        keys = {candidate: f"effect {search._key(*candidate)}" for candidate in candidates}
        base = f"base {search._key('', '')}"
        missing = {candidate: key for candidate, key in keys.items() if not journal.knows(key)}
        if missing or not journal.knows(base):
            self._run(missing, base)
        self.base = journal.recall(base, lambda: math.nan)
        for candidate, key in keys.items():
            effect, cost, refused = journal.recall(key, lambda: [math.inf, math.inf, "no value"])
            if refused:
                search.refused[candidate] = refused
                self.remove(candidate)
                continue
            self.added[candidate] = effect - self.base
            self.saved[candidate] = search.cost - cost
            self.fresh.add(candidate)

    def _run(self, keys: Mapping[Candidate, str], base: str) -> None:
        """Measure candidates side by side and note divergence and cost; what cannot be done is noted as refused."""
        search = self.search
        unfitted = ("drop", "merge", *PUBLISHED)
        fitted = sorted({name for name, action in keys if form_and_rank(action)[0] not in unfitted} - set(self.fits))
        if fitted:
            self.fits |= search.rewriter.fits(search.graph, fitted, search.fitting)
        variants: dict[Candidate, Graph] = {}
        for name, action in keys:
            try:
                _, variants[name, action] = search.with_change(name, action, self.fits.get(name))
            except PassError as error:
                search.journal.note(keys[name, action], [math.inf, math.inf, f"{action} refused: {error}"])
        unchanged, found = search.effects.measure(search.reduced, variants)
        search.journal.note(base, unchanged)
        for candidate, divergence in found.items():
            search.journal.note(keys[candidate], [divergence, search.prices.cost(variants[candidate]), ""])
