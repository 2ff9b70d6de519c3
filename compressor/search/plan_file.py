"""Read a plan.json. `passes.plan.plan.Plan` itself is in a package that imports torch, which a device may lack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from compressor.workspace.json_files import read_json

if TYPE_CHECKING:
    from passes.plan.plan import Plan

PLAN = "plan.json"
REMEDY = "this is not a plan.json that Compressor wrote"


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
