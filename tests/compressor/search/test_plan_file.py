"""Tests of plans of earlier releases."""

import json
from pathlib import Path

import pytest

from compressor.search.plan_file import of_earlier_rule, read_plan
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
