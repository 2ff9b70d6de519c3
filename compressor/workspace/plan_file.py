"""Read a plan.json. `passes.plan.plan.Plan` itself is in a package that imports torch, which a device may lack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from compressor.choices import AUTO
from compressor.errors import CompressorError
from compressor.limitations import Limitation
from compressor.workspace.json_files import read_json
from compressor.workspace.special_files import first_special

if TYPE_CHECKING:
    from passes.graph.graph import Site
    from passes.plan.plan import Plan

PLAN = "plan.json"
KEYS_ALONE = 2  # the last version of plans whose tokens were merged by their keys alone
REMEDY = "this is not a plan.json that Compressor wrote"


class PlanFileError(CompressorError):
    """The file of ``--drop`` cannot be read."""


@with_config(ConfigDict(extra="forbid"))
class DecisionFields(TypedDict):
    """The action for one site, and the reason for it."""

    site: str
    action: str
    reason: str


@with_config(ConfigDict(extra="forbid"))
class PlanFields(TypedDict):
    """The content of a plan.json; see `passes.plan.plan.Plan`."""

    model: str
    fingerprint: str
    rule: str
    metric: str
    decisions: list[DecisionFields]
    order: list[str]
    version: int


_SCHEMA = TypeAdapter(PlanFields)


def read_plan_fields(path: Path) -> PlanFields:
    """Return the content of a plan.json.

    Raises:
        FileNotFoundError: there is no such file.
        JsonFileError: it is no plan.json.
    """
    return read_json(path, _SCHEMA, remedy=REMEDY)


def read_plan(path: Path) -> Plan:
    """Return the plan of a plan.json.

    Raises:
        FileNotFoundError: there is no such file.
        JsonFileError, PassError: it is no plan.json, or one of another version.
    """
    from passes.plan.plan import Plan

    return Plan.from_dict(cast("dict[str, Any]", read_plan_fields(path)))


def given_plan(drop: str) -> Plan | None:
    """Return the plan of the file that is the value of ``--drop``; None if it is another value.

    Raises:
        PlanFileError: there is no such file, or it is not a regular file.
        JsonFileError, PassError: it is no plan.json, or one of another version.
    """
    if not drop.endswith(".json"):
        return None
    if (fault := first_special([Path(drop)])) is not None:
        raise PlanFileError(f"the plan file {fault}; expected a plan.json that Compressor wrote.")
    try:
        return read_plan(Path(drop))
    except FileNotFoundError as error:
        raise PlanFileError(f"the plan file {drop} cannot be read ({error.strerror}); check the path.") from error


def check_drop(drop: str, sites: Sequence[Site]) -> None:
    """Check that the value of ``--drop`` fits the sites of a model, before anything is measured.

    Raises:
        PlanFileError, JsonFileError: the plan file cannot be read.
        PassError: the plan was made for other sites, a name is unknown, or more units are to go than there are.
    """
    from passes.plan.selection import choose, parse

    if drop in ("none", AUTO):
        return
    plan = given_plan(drop)
    if plan is None:
        choose(parse(drop), sites, "reverse", model="")
    else:
        plan.check(sites)


def of_earlier_rule(drop: str) -> Iterator[Limitation]:
    """Yield a limitation if the value of ``--drop`` is a plan of a release that merged tokens by another rule."""
    if not drop.endswith(".json"):
        return
    plan = read_plan_fields(Path(drop))
    if plan["version"] <= KEYS_ALONE and any(each["action"].startswith("merge") for each in plan["decisions"]):
        yield Limitation(
            "merged tokens",
            f"{drop} is of an earlier release, which merged tokens by their keys alone; now those that receive little "
            "attention merge first, so the result is not that of the earlier release",
        )


def of_replay(drop: str, model: str) -> Iterator[Limitation]:
    """Yield a limitation if the value of ``--drop`` is a plan that another model or a search decided.

    A plan fits every model of one structure, so also another fine-tune of it. It holds decisions, not the limit on the
    loss that a search kept them to.

    Args:
        drop: the value of ``--drop``.
        model: name of the model of this export.
    """
    if not drop.endswith(".json"):
        return
    plan = read_plan_fields(Path(drop))
    if plan["model"] != model or plan["rule"].startswith(AUTO):
        source = "" if plan["model"] == model else f" for {plan['model']}"
        yield Limitation(
            "plan",
            f"replayed from {drop}, which was made{source} by the rule `{plan['rule']}`; no limit on the loss was held "
            "here, so look at the measured one",
        )
