"""Tests of plans of earlier releases, and of what an export says of a plan that it replays."""

import json
from pathlib import Path

import pytest

from compressor.search.plan_file import of_earlier_rule, of_replay, read_plan
from passes.plan.plan import VERSION, Decision, Plan


@pytest.mark.parametrize(("version", "action", "said"), [
    (VERSION, "merge:25%", False), (2, "merge:25%", True), (2, "drop", False),
])  # fmt: skip
def test_a_plan_that_merged_tokens_by_another_rule_is_a_limitation(
    tmp_path: Path, version: int, action: str, said: bool
) -> None:
    """Such a plan can still be read. Files of the present version, and those without merges, give no limitation."""
    plan = Plan("m", "f", "r", "output", (Decision("a", action, "by hand"),), ("a",))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(plan.to_json()) | {"version": version}))
    assert read_plan(path).changes == {"a": action}
    reasons = [each.reason for each in of_earlier_rule(str(path))]
    assert bool(reasons) == said
    assert not said or "earlier release" in reasons[0]
    assert not list(of_earlier_rule("block:2"))


@pytest.mark.parametrize(("model", "rule", "said"), [
    ("m", "auto, at most 1 % loss", "made by the rule `auto, at most 1 % loss`; no limit on the loss was held"),
    ("other", "block:2", "which was made for other by the rule `block:2`"),
    ("m", "block:2", None),
])  # fmt: skip
def test_a_replayed_plan_of_a_search_or_of_another_model_is_a_limitation(
    tmp_path: Path, model: str, rule: str, said: str | None
) -> None:
    """A plan fits every model of one structure, and it holds no limit on the loss."""
    path = tmp_path / "plan.json"
    path.write_text(Plan(model, "f", rule, "output", (Decision("a", "drop", "by hand"),), ("a",)).to_json())
    reasons = [each.reason for each in of_replay(str(path), "m")]
    assert len(reasons) == (said is not None)
    assert said is None or said in reasons[0]
    assert not list(of_replay("block:2", "m"))
