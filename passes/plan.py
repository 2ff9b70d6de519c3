"""Decisions as data: what happens to each site, by which rule, and why."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from passes.base import PassError

if TYPE_CHECKING:
    from passes.graph import Site
    from passes.score import Scores

VERSION = 2  # version 1 knew no actions but drop and keep; its plans are still read
METRICS = ("cosine", "influence", "angular", "random", "reverse", "output")
KINDS = ("attention", "mlp", "block", "conv", "other")
FORMS = ("constant", "scale", "linear", "low-rank", "fuse", "tba", "replaceme", "replaceme-cosine")
PUBLISHED = ("tba", "replaceme", "replaceme-cosine")  # forms as others have published them, for comparison
ACTIONS = ("drop", *FORMS, "merge")
_COUNTED = re.compile(r"(?:(?P<kind>[a-z]+):)?(?P<number>\d+)(?P<percent>%)?")


def merged_tokens(action: str) -> int | float | None:
    """How many tokens an action merges behind its attention, or (a float) what share of them; None for other actions.

    Raises:
        PassError: no number, or a share of half and more: tokens are merged in pairs.

    >>> merged_tokens("merge:8"), merged_tokens("merge:25%"), merged_tokens("drop")
    (8, 0.25, None)
    """
    form, _, amount = action.partition(":")
    if form != "merge":
        return None
    number = amount.removesuffix("%")
    if not number.isdigit() or (amount.endswith("%") and int(number) >= 50):
        raise PassError(
            f"unknown action {action!r}; expected merge:NUMBER or merge:SHARE% below 50%, such as merge:25%."
        )
    return int(number) / 100.0 if amount.endswith("%") else int(number)


def form_and_rank(action: str) -> tuple[str, int | None]:
    """Split an action such as ``low-rank:48``; the rank is None where the action names none.

    Raises:
        PassError: an unknown action, or a rank where there can be none.

    >>> form_and_rank("low-rank:48"), form_and_rank("drop")
    (('low-rank', 48), ('drop', None))
    """
    if merged_tokens(action) is not None:
        return "merge", None
    form, colon, rank = action.partition(":")
    if form not in ACTIONS or (colon and (form != "low-rank" or not rank.isdigit() or int(rank) < 1)):
        raise PassError(
            f"unknown action {action!r}; expected {', '.join(ACTIONS[:-1])}, low-rank:RANK or merge:TOKENS."
        )
    return form, int(rank) if colon else None


@dataclass(frozen=True)
class Decision:
    """One site and what happens to it: ``keep``, or one of `ACTIONS`; `reason` says why in words."""

    site: str
    action: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What is done to each site of one model, replayable with ``--drop plan.json``.

    `decisions` has one entry per site, in the order of the sites; `order` lists the changed ones as they were chosen:
    a stand-in is fitted on what the changes before it have left. `fingerprint` names the structure of the model the
    plan was made for.
    """

    model: str
    fingerprint: str
    rule: str
    metric: str
    decisions: tuple[Decision, ...]
    order: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the sites whose branch is deleted, with nothing in its place."""
        return tuple(decision.site for decision in self.decisions if decision.action == "drop")

    @property
    def merges(self) -> dict[str, str]:
        """The attentions behind which tokens are merged."""
        return {name: action for name, action in self.changes.items() if merged_tokens(action) is not None}

    @property
    def changes(self) -> dict[str, str]:
        """The action of every site that is not kept, in the order in which they are carried out."""
        actions = {decision.site: decision.action for decision in self.decisions}
        return {name: actions[name] for name in self.order}

    def to_json(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan back.

        Raises:
            PassError: the text is not JSON, or not a plan of this version.
        """
        try:
            fields = json.loads(text)
            version = fields.get("version")
            if version not in (1, VERSION):
                raise PassError(f"the plan has version {version}, expected {VERSION}; make it again with this release.")
            fields["version"] = VERSION
            decisions = tuple(Decision(**decision) for decision in fields.pop("decisions"))
            plan = Plan(decisions=decisions, order=tuple(fields.pop("order")), **fields)
            plan._check_fields()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PassError(f"this is not a plan.json that Compressor wrote ({error}).") from error
        return plan

    def _check_fields(self) -> None:
        """Raise ValueError unless every field has its type and the changes are ordered completely."""
        texts = [self.model, self.fingerprint, self.rule, self.metric, *self.order]
        texts += [text for decision in self.decisions for text in (decision.site, decision.action, decision.reason)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name, action or reason is not text")
        for decision in self.decisions:
            if decision.action != "keep":
                form_and_rank(decision.action)
        if sorted(self.order) != sorted(decision.site for decision in self.decisions if decision.action != "keep"):
            raise ValueError("the order lists other sites than those that are changed")
        if len({decision.site for decision in self.decisions}) < len(self.decisions):
            raise ValueError("a site is decided twice")

    def check(self, sites: Sequence[Site]) -> None:
        """Hold the plan against the sites of a model.

        Raises:
            PassError: it names unknown sites, or was made for a model of another structure.
        """
        known = {site.name for site in sites}
        unknown = [decision.site for decision in self.decisions if decision.site not in known]
        foreign = self.fingerprint != fingerprint(sites)
        if unknown and not (foreign and len(unknown) == len(self.decisions)):
            raise PassError(
                f"the plan names {len(unknown)} sites that the model does not have, the first is {unknown[0]}."
            )
        if foreign:
            raise PassError(
                f"the plan was made for another model ({self.model}): its sites differ from those found here."
            )


def fingerprint(sites: Sequence[Site]) -> str:
    """A short hash of names, kinds and widths of all sites: the structure a plan applies to."""
    listing = [(site.name, site.kind, site.block, site.width) for site in sites]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Selection:
    """A parsed ``--drop``: how many units of a kind, or which names.

    `unit` is ``site`` (any kind), ``block`` or one kind of site; `count` of them, or `percent` of all of them, rounded
    down to whole units (25% of 10 sites are 2).
    """

    text: str
    unit: str = "site"
    count: int | None = None
    percent: float | None = None
    names: tuple[str, ...] = ()


def parse(text: str) -> Selection:
    """Read ``4``, ``25%``, ``attention:4``, ``block:3`` or a comma-separated list of site names.

    Raises:
        PassError: an unknown kind, or a percentage above 100.

    >>> parse("attention:4").unit, parse("attention:4").count, parse("25%").percent
    ('attention', 4, 25.0)
    """
    matched = _COUNTED.fullmatch(text.strip())
    if matched is None:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        if not names:
            raise PassError(
                "--drop is empty; expected none, auto, a number, a percentage, kind:number, site names or a plan."
            )
        return Selection(text, names=names)
    kind = matched["kind"] or "site"
    if kind not in (*KINDS, "site"):
        raise PassError(f"--drop {text}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}.")
    number = int(matched["number"])
    if matched["percent"]:
        if number > 100:
            raise PassError(f"--drop {text}: expected at most 100%.")
        return Selection(text, kind, percent=float(number))
    return Selection(text, kind, count=number)


def choose(
    selection: Selection,
    sites: Sequence[Site],
    metric: str,
    *,
    model: str,
    scores: Scores | None = None,
    effect: Callable[[Sequence[Sequence[Site]]], Sequence[float]] | None = None,
    seed: int = 0,
    action: str = "drop",
) -> Plan:
    """Rank the units by a metric and drop, or otherwise change, the most redundant ones.

    Args:
        selection: what was asked for, from `parse`.
        sites: all sites of the model, in order.
        metric: one of `METRICS`.
        model: name to write into the plan.
        scores: needed by cosine, influence and angular.
        effect: for ``output``: measures, for each unit, how far the model's output moves without it.
        seed: for ``random``.
        action: what happens to the chosen ones, see `acting`.

    Raises:
        PassError: unknown names, more units asked for than there are, or an unknown metric.
    """
    return acting(_choose(selection, sites, metric, model, scores, effect, seed), action)


def acting(plan: Plan, action: str) -> Plan:
    """The same choice with another action than to drop: one stand-in for every run of consecutive chosen sites.

    All sites of a run but the last are dropped first; what is fitted in the place of the last then stands for the run.
    """
    form_and_rank(action)
    if action == "drop":
        return plan
    decisions, order = list(plan.decisions), list[str]()
    for gone, run in groupby(range(len(decisions)), key=lambda place: decisions[place].action == "drop"):
        if gone:
            *inside, last = run
            decisions[last] = replace(decisions[last], action=action)
            order += [decisions[place].site for place in [*inside, last]]
    return replace(plan, decisions=tuple(decisions), order=tuple(order))


def merging(plan: Plan, merges: Mapping[str, str]) -> Plan:
    """The plan with tokens merged behind attentions that it keeps.

    Raises:
        PassError: one of them is changed already.
    """
    taken = sorted(set(merges) & set(plan.changes))
    if taken:
        raise PassError(f"tokens cannot be merged behind {taken[0]}, which the plan changes; merge none there.")
    decisions = tuple(
        replace(decision, action=merges[decision.site], reason="tokens are merged behind it, as asked for")
        if decision.site in merges
        else decision
        for decision in plan.decisions
    )
    return replace(plan, decisions=decisions, order=(*plan.order, *merges))


def _choose(
    selection: Selection,
    sites: Sequence[Site],
    metric: str,
    model: str,
    scores: Scores | None,
    effect: Callable[[Sequence[Sequence[Site]]], Sequence[float]] | None,
    seed: int,
) -> Plan:
    if selection.names:
        return _by_name(selection, sites, model)
    units = _units(selection.unit, sites)
    count = _count(selection, units)
    if metric == "angular" and selection.unit in ("site", "block") and count and scores is not None:
        inside, reasons = _closest_span(units, count, scores)
        return _plan(selection, sites, model, metric, units, inside, reasons)
    values = _values(units, metric, scores, effect, seed)
    # A unit without a value (a block whose input and output differ in shape) goes last.
    ranked = sorted(units, key=lambda name: (math.isnan(values[name]), values[name]))
    places = {name: place for place, name in enumerate(ranked, start=1)}
    reasons = {
        name: f"{metric}: rank {place} of {len(units)} ({_shown(metric, values[name])})"
        for name, place in places.items()
    }
    return _plan(selection, sites, model, metric, units, ranked[:count], reasons)


def _units(unit: str, sites: Sequence[Site]) -> dict[str, list[Site]]:
    if unit == "block":
        return {name: list(members) for name, members in groupby(sites, key=lambda site: site.block)}
    return {site.name: [site] for site in sites if unit in ("site", site.kind)}


def _count(selection: Selection, units: Mapping[str, object]) -> int:
    count = selection.count
    if count is None:
        count = math.floor(len(units) * (selection.percent or 0.0) / 100.0)
    if count > len(units):
        raise PassError(f"--drop {selection.text}: the model has only {len(units)} of the kind {selection.unit}.")
    return count


def _values(
    units: Mapping[str, list[Site]],
    metric: str,
    scores: Scores | None,
    effect: Callable[[Sequence[Sequence[Site]]], Sequence[float]] | None,
    seed: int,
) -> dict[str, float]:
    """A number for each unit; the lowest is dropped first."""
    names = list(units)
    if metric == "random":
        order = random.Random(seed).sample(range(len(names)), len(names))
        return {name: float(rank) for name, rank in zip(names, order, strict=True)}
    if metric == "reverse":
        return {name: float(len(names) - position) for position, name in enumerate(names)}
    if metric not in METRICS:
        raise PassError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}.")
    if metric == "output":
        if effect is None:
            raise PassError("the metric output needs measured effects and got none; pass `effect`.")
        return dict(zip(names, effect(list(units.values())), strict=True))
    if scores is None:
        raise PassError(f"the metric {metric} needs scores and got none; run Score first.")
    if metric == "angular":
        return {name: (scores.sites.get(name) or scores.blocks[name]).mean("angular") for name in names}
    return {name: scores.influence(name) for name in names}


def _shown(metric: str, value: float) -> str:
    """A value under its metric's name: ranks go by 1 - cosine, people read the cosine."""
    return f"{1.0 - value if metric == 'cosine' else value:.4g}"


def _closest_span(units: Mapping[str, list[Site]], count: int, scores: Scores) -> tuple[list[str], dict[str, str]]:
    """The `count` consecutive units whose input and output are closest (Gromov et al. 2024), and a reason for each.

    A span starts and ends at states of the trunk, so it takes both or none of two branches added to the same state.
    """
    names, distances = list(units), scores.angular_matrix()
    states = [scores.states.index(units[name][0].trunk) for name in names] + [len(scores.states) - 1]
    starts = [place for place in range(len(names) + 1) if place == 0 or states[place] != states[place - 1]]
    spans = [
        (float(distances[states[start], states[start + count]]), start) for start in starts if start + count in starts
    ]
    finite = [span for span in spans if not math.isnan(span[0])]
    if not finite:
        raise PassError(f"no {count} consecutive units lead from one state to another of its shape; ask for fewer.")
    distance, best = min(finite)
    inside = names[best : best + count]
    span = f"the closest of {len(finite)} spans of {count} ({distance:.4g})"
    return inside, {name: f"angular: {'in' if name in inside else 'not in'} {span}" for name in names}


def _by_name(selection: Selection, sites: Sequence[Site], model: str) -> Plan:
    known = {site.name: [site] for site in sites} | _units("block", sites)
    unknown = [name for name in selection.names if name not in known]
    if unknown:
        raise PassError(
            f"--drop names {unknown[0]!r}, which is neither a site nor a block of the model; "
            "`compressor inspect` lists them (a plan file must exist and end in .json)."
        )
    return _plan(
        selection, sites, model, "names", known, list(selection.names), dict.fromkeys(known, "named in --drop")
    )


def _plan(
    selection: Selection,
    sites: Sequence[Site],
    model: str,
    metric: str,
    units: Mapping[str, list[Site]],
    chosen: Sequence[str],
    reasons: Mapping[str, str],
) -> Plan:
    gone = {site.name: reasons[unit] for unit in chosen for site in units[unit]}
    stays = {site.name: reasons[unit] for unit in units if unit not in chosen for site in units[unit]}
    if metric == "names":
        stays = dict.fromkeys(stays, "not named in --drop")
    decisions = tuple(
        Decision(site.name, "drop", gone[site.name])
        if site.name in gone
        else Decision(site.name, "keep", stays.get(site.name, f"not of the kind {selection.unit}"))
        for site in sites
    )
    return Plan(model, fingerprint(sites), selection.text, metric, decisions, tuple(gone))
