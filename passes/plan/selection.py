"""Parser of ``--drop``, and the selection of branches by a metric, which returns a `passes.plan.plan.Plan`."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from passes.base import PassError
from passes.plan.plan import Decision, Plan, fingerprint, with_action

if TYPE_CHECKING:
    from passes.analysis.redundancy import Scores
    from passes.graph.graph import Site

METRICS = ("cosine", "influence", "angular", "span", "random", "reverse", "output")
SCORED = ("cosine", "influence", "angular", "span")  # metrics that read the scores of one sweep
KINDS = ("attention", "cross_attention", "mlp", "block", "conv", "other")
_COUNTED = re.compile(r"(?:(?P<kind>[a-z_]+):)?(?P<number>\d+)(?P<percent>%)?")


@dataclass(frozen=True)
class Selection:
    """A parsed ``--drop``: a number or percentage of units, or names.

    `unit` is ``site`` (any kind), ``block`` or one kind of site. `count` is the number of units, `percent` the
    percentage of all units, rounded down to whole units (25% of 10 sites are 2).
    """

    text: str
    unit: str = "site"
    count: int | None = None
    percent: float | None = None
    names: tuple[str, ...] = ()


def parse(text: str) -> Selection:
    """Parse ``4``, ``25%``, ``attention:4``, ``block:3`` or a comma-separated list of site or block names.

    Raises:
        PassError: the text is empty, the kind is unknown, or the percentage is above 100.

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
    fixed: Mapping[str, str] | None = None,
) -> Plan:
    """Rank the units by a metric and return a plan that drops, or otherwise changes, the most redundant ones.

    Args:
        selection: result of `parse`.
        sites: all sites of the model, in order.
        metric: one of `METRICS`.
        model: name of the model to write into the plan.
        scores: redundancy scores; required by the metrics in `SCORED`.
        effect: function that measures the change of the model's output without each unit; required by ``output``.
        seed: seed of ``random``.
        action: action for the chosen units, see `with_action`.
        fixed: sites that are not ranked alone, with the reason. Whole blocks and named sites may contain them.

    Raises:
        PassError: a name or the metric is unknown, the selection exceeds the number of units, no span of this length
            can be chosen (``angular`` and ``span``), or the metric lacks its scores or effects.
    """
    return with_action(_choose(selection, sites, metric, model, scores, effect, seed, fixed or {}), action)


def _choose(
    selection: Selection,
    sites: Sequence[Site],
    metric: str,
    model: str,
    scores: Scores | None,
    effect: Callable[[Sequence[Sequence[Site]]], Sequence[float]] | None,
    seed: int,
    fixed: Mapping[str, str],
) -> Plan:
    if selection.names:
        return _by_name(selection, sites, model)
    units = _units(selection.unit, sites)
    kept = {name: reason for name, reason in fixed.items() if name in units}
    count = _count(selection, units, kept, Counter(site.kind for site in sites))
    units = {name: members for name, members in units.items() if name not in kept}
    if metric in ("angular", "span") and selection.unit in ("site", "block") and count and scores is not None:
        inside, reasons = _closest_span(units, count, scores, metric)
        return _plan(selection, sites, model, metric, units, inside, reasons, kept)
    values = _values(units, metric, scores, effect, seed)
    # NaN, the value of a block whose input and output differ in shape, goes last.
    ranked = sorted(units, key=lambda name: (math.isnan(values[name]), values[name]))
    reasons = {
        name: f"{metric}: rank {rank} of {len(units)} ({_value_text(metric, values[name])})"
        for rank, name in enumerate(ranked, start=1)
    }
    return _plan(selection, sites, model, metric, units, ranked[:count], reasons, kept)


def _units(unit: str, sites: Sequence[Site]) -> dict[str, list[Site]]:
    if unit == "block":
        return {name: list(members) for name, members in groupby(sites, key=lambda site: site.block)}
    return {site.name: [site] for site in sites if unit in ("site", site.kind)}


def _count(selection: Selection, units: Mapping[str, object], kept: Mapping[str, str], kinds: Mapping[str, int]) -> int:
    """Return the number of units to choose; a percentage counts all units, also those in `kept`."""
    count = selection.count
    if count is None:
        count = math.floor(len(units) * (selection.percent or 0.0) / 100.0)
    if count > len(units):
        found = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        raise PassError(
            f"--drop {selection.text}: the model has only {len(units)} of the kind {selection.unit}; its branches are "
            f"{found}."
        )
    if count > len(units) - len(kept):
        name, reason = next(iter(kept.items()))
        raise PassError(
            f"--drop {selection.text}: of {len(units)} of the kind {selection.unit}, {len(units) - len(kept)} can be "
            f"chosen; {name} stays, because {reason}."
        )
    return count


def _values(
    units: Mapping[str, list[Site]],
    metric: str,
    scores: Scores | None,
    effect: Callable[[Sequence[Sequence[Site]]], Sequence[float]] | None,
    seed: int,
) -> dict[str, float]:
    """Return a value for each unit; the unit with the lowest value is dropped first."""
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


def _value_text(metric: str, value: float) -> str:
    """Format the value of a metric; cosine is ranked by 1 - cosine but reported as the cosine."""
    return f"{1.0 - value if metric == 'cosine' else value:.4g}"


def _closest_span(
    units: Mapping[str, list[Site]], count: int, scores: Scores, metric: str
) -> tuple[list[str], dict[str, str]]:
    """Return the `count` consecutive units with the least distance, and a reason for every unit.

    The distance is that between the input and the output of the span: for ``angular`` the angle, at the last token of a
    text (Gromov et al. 2024), for ``span`` 1 - cosine over all tokens (ReplaceMe, Shopkhoev et al. 2025). A span starts
    and ends at states of the trunk, so it contains both or none of two branches that are added to the same state.
    """
    names = list(units)
    distances = scores.angular_matrix() if metric == "angular" else 1.0 - scores.similarity_of_all_tokens()
    states = [scores.states.index(units[name][0].trunk) for name in names] + [len(scores.states) - 1]
    starts = [index for index in range(len(names) + 1) if index == 0 or states[index] != states[index - 1]]
    spans = [
        (float(distances[states[start], states[start + count]]), start) for start in starts if start + count in starts
    ]
    finite = [span for span in spans if not math.isnan(span[0])]
    if not finite:
        raise PassError(
            f"no span of {count} consecutive units leads from one trunk state to another of the same shape; "
            "choose another number."
        )
    distance, best = min(finite)
    inside = names[best : best + count]
    span = f"the closest of {len(finite)} spans of {count} ({distance:.4g})"
    return inside, {name: f"{metric}: {'in' if name in inside else 'not in'} {span}" for name in names}


def _by_name(selection: Selection, sites: Sequence[Site], model: str) -> Plan:
    units = {site.name: [site] for site in sites} | _units("block", sites)
    unknown = [name for name in selection.names if name not in units]
    if unknown:
        raise PassError(
            f"--drop names {unknown[0]!r}, which is neither a site nor a block of the model; "
            "`compressor inspect` lists them (a plan file must exist and end in .json)."
        )
    return _plan(
        selection, sites, model, "names", units, list(selection.names), dict.fromkeys(units, "named in --drop")
    )


def _plan(
    selection: Selection,
    sites: Sequence[Site],
    model: str,
    metric: str,
    units: Mapping[str, list[Site]],
    chosen: Sequence[str],
    reasons: Mapping[str, str],
    fixed: Mapping[str, str] | None = None,
) -> Plan:
    dropped = {site.name: reasons[unit] for unit in chosen for site in units[unit]}
    kept = {site.name: reasons[unit] for unit in units if unit not in chosen for site in units[unit]}
    if metric == "names":
        kept = dict.fromkeys(kept, "not named in --drop")
    kept |= fixed or {}
    decisions = tuple(
        Decision(site.name, "drop", dropped[site.name])
        if site.name in dropped
        else Decision(site.name, "keep", kept.get(site.name, f"not of the kind {selection.unit}"))
        for site in sites
    )
    return Plan(model, fingerprint(sites), selection.text, metric, decisions, tuple(dropped))
