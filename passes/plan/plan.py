"""Decisions as data: what happens to each site, by which rule, and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from passes.base import PassError

if TYPE_CHECKING:
    from passes.graph.graph import Site

VERSION = 2  # version 1 knew no actions but drop and keep; its plans are still read
FORMS = ("constant", "scale", "linear", "low-rank", "fuse", "tba", "replaceme", "replaceme-cosine")
PUBLISHED = ("tba", "replaceme", "replaceme-cosine")  # forms as others have published them, for comparison
ACTIONS = ("drop", *FORMS, "merge")


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
