"""Tests of plans of earlier releases, and of what an export says of a plan that it replays."""

import json
from pathlib import Path

import pytest
import torch

import compressor
from compressor.errors import CompressorError
from compressor.lower import traced_model
from compressor.pipeline import export
from compressor.workspace.plan_file import of_earlier_rule, of_replay, read_plan
from passes.base import PassError
from passes.plan.plan import VERSION, Decision, Plan
from tests.samples import Residual


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


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), (b"{}", "not a plan.json")])
def test_a_plan_file_that_cannot_be_read_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    """Loading a large model takes minutes."""
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    monkeypatch.setattr(traced_model, "_load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(CompressorError, match=words):
        compressor.export(
            Residual(), example_inputs=torch.zeros(2, 32), data="random",
            drop=str(tmp_path / "plan.json"), output=str(tmp_path / "out"),
        )  # fmt: skip


@pytest.mark.parametrize(("drop", "words"), [
    ("blocks.9", "blocks.9"), ("7", "7"), ("attention:1", "attention"), ("plan", "another model"),
])  # fmt: skip
def test_a_drop_that_does_not_fit_the_sites_is_refused_before_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: str, words: str
) -> None:
    if drop == "plan":
        drop = str(tmp_path / "plan.json")
        Path(drop).write_text(Plan("m", "f", "r", "output", (Decision("a", "drop", "by hand"),), ("a",)).to_json())
    monkeypatch.setattr(traced_model, "_check_itself", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(PassError, match=words):
        compressor.export(
            Residual(), example_inputs=torch.zeros(2, 32), data="random", drop=drop, output=str(tmp_path / "out")
        )


def test_tokens_that_do_not_fit_the_attentions_are_refused_before_the_original_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "check_original", lambda *_: pytest.fail("the original was checked"))
    with pytest.raises(CompressorError, match="--tokens has 2 numbers; expected one for each attention"):
        compressor.export(drop="none", tokens="3,4", output=str(tmp_path / "out"))
