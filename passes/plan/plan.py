"""Plans: the action for each site of a model, its reason, and the rule that chose it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from passes.base import PassError

if TYPE_CHECKING:
    from passes.graph.graph import Site

VERSION = 3  # version 1 had the actions drop and keep only, version 2 merged tokens by their keys alone
READABLE = (1, 2, VERSION)
FORMS = ("constant", "scale", "linear", "low-rank", "fuse", "tba", "replaceme", "replaceme-cosine")
PUBLISHED = ("tba", "replaceme", "replaceme-cosine")  # published methods, for comparison
ACTIONS = ("drop", *FORMS, "merge")


def merged_tokens(action: str) -> int | float | None:
    """Return the number (int) or share (float) of tokens that an action merges after its attention.

    Actions other than ``merge`` return None.

    Raises:
        PassError: the amount is no number, or a share of 50% or more; tokens are merged in pairs.

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
    """Split an action such as ``low-rank:48`` into form and rank; the rank is None for an action without one.

    Raises:
        PassError: the action is unknown, or has a rank that its form does not take.

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
    """Action for one site, ``keep`` or one of `ACTIONS`, and the `reason` for it as a text."""

    site: str
    action: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Actions for the sites of one model, which ``--drop plan.json`` applies again.

    `decisions` has one entry per site, in the order of the sites. `order` lists the changed sites in the order in which
    they are applied, because a replacement is fitted on the graph that the changes before it leave. `fingerprint`
    identifies the structure of the model (see `fingerprint`).
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
        """The names of the sites whose branch is removed without a replacement."""
        return tuple(decision.site for decision in self.decisions if decision.action == "drop")

    @property
    def merges(self) -> dict[str, str]:
        """The actions of the attention sites after which tokens are merged, by name."""
        return {name: action for name, action in self.changes.items() if merged_tokens(action) is not None}

    @property
    def changes(self) -> dict[str, str]:
        """The action of every changed site by name, in the order in which the changes are applied."""
        actions = {decision.site: decision.action for decision in self.decisions}
        return {name: actions[name] for name in self.order}

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Plan:
        """Return the plan with the fields of a JSON object that `to_json` wrote.

        Raises:
            PassError: the object is not a plan of this version.
        """
        try:
            fields = dict(content)
            version = fields.get("version")
            if version not in READABLE:
                raise PassError(
                    f"the plan has version {version}, expected {VERSION}; create it again with this release."
                )
            fields["version"] = VERSION
            decisions = tuple(Decision(**decision) for decision in fields.pop("decisions"))
            plan = Plan(decisions=decisions, order=tuple(fields.pop("order")), **fields)
            plan._check_fields()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PassError(f"this is not a plan.json that Compressor wrote ({error}).") from error
        return plan

    def _check_fields(self) -> None:
        """Raise ValueError unless texts are strings, actions are valid and `order` lists exactly the changed sites."""
        texts = [self.model, self.fingerprint, self.rule, self.metric, *self.order]
        texts += [text for decision in self.decisions for text in (decision.site, decision.action, decision.reason)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a name, action or reason is not text")
        for decision in self.decisions:
            if decision.action != "keep":
                form_and_rank(decision.action)
        if sorted(self.order) != sorted(decision.site for decision in self.decisions if decision.action != "keep"):
            raise ValueError("the field order does not list exactly the changed sites")
        if len({decision.site for decision in self.decisions}) < len(self.decisions):
            raise ValueError("a site has more than one decision")

    def check(self, sites: Sequence[Site]) -> None:
        """Check that the plan fits the sites of a model.

        Raises:
            PassError: the plan names unknown sites, or was made for a model of another structure.
        """
        names = {site.name for site in sites}
        unknown = [decision.site for decision in self.decisions if decision.site not in names]
        foreign = self.fingerprint != fingerprint(sites)
        if unknown and not (foreign and len(unknown) == len(self.decisions)):
            raise PassError(f"the plan names sites that the model does not have: {unknown[0]} ({len(unknown)} in all).")
        if foreign:
            raise PassError(
                f"the plan was made for another model ({self.model}): its sites differ from those of this model."
            )


def fingerprint(sites: Sequence[Site]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the names, kinds, blocks and widths of all sites."""
    listing = [(site.name, site.kind, site.block, site.width) for site in sites]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def with_action(plan: Plan, action: str) -> Plan:
    """Return a plan with another action in place of drop, with one replacement for each run of consecutive sites.

    All sites of a run but the last are dropped first. The replacement is fitted at the last site and covers the run.
    """
    form_and_rank(action)
    if action == "drop":
        return plan
    decisions, order = list(plan.decisions), list[str]()
    for dropped, run in groupby(range(len(decisions)), key=lambda index: decisions[index].action == "drop"):
        if dropped:
            *others, last = run
            decisions[last] = replace(decisions[last], action=action)
            order += [decisions[index].site for index in [*others, last]]
    return replace(plan, decisions=tuple(decisions), order=tuple(order))


def with_token_merging(plan: Plan, merges: Mapping[str, str]) -> Plan:
    """Return a plan with tokens merged after attention sites that it keeps.

    Raises:
        PassError: the plan changes one of these sites already.
    """
    changed = sorted(set(merges) & set(plan.changes))
    if changed:
        raise PassError(
            f"tokens cannot be merged after {changed[0]}, which the plan changes; merge after kept sites only, with 0 "
            "at the others."
        )
    decisions = tuple(
        replace(decision, action=merges[decision.site], reason="tokens are merged behind it, as asked for")
        if decision.site in merges
        else decision
        for decision in plan.decisions
    )
    return replace(plan, decisions=decisions, order=(*plan.order, *merges))
