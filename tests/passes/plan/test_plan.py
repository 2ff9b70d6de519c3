"""Tests of plans: JSON round trip, validation, actions and token merging."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.base import PassError
from passes.plan.plan import (
    ACTIONS,
    Decision,
    Plan,
    fingerprint,
    form_and_rank,
    merged_tokens,
    with_action,
    with_token_merging,
)
from passes.plan.selection import METRICS
from tests.plans import BLOCKS, SITES, chain, plan_for

# ---------------------------------------------------------------------------------------------------------------- JSON

texts = st.text(max_size=20)
COMPLETE_ACTIONS = [action for action in ACTIONS if action != "merge"]  # merge needs an amount
counts = st.integers(1, 10**6)
actions = (
    st.sampled_from(["keep", *COMPLETE_ACTIONS]) | counts.map("low-rank:{}".format) | counts.map("merge:{}".format)
)
entries = st.lists(st.tuples(st.text(min_size=1, max_size=12), actions, texts), unique_by=lambda entry: entry[0])


@st.composite
def plans(draw):
    decisions = tuple(Decision(*entry) for entry in draw(entries))
    order = draw(st.permutations([decision.site for decision in decisions if decision.action != "keep"]))
    return Plan(draw(texts), draw(texts), draw(texts), draw(st.sampled_from(METRICS)), decisions, tuple(order))


@settings(deadline=None)
@given(plans())
def test_json_round_trip(plan):
    again = Plan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert list(again.changes.items()) == list(
        plan.changes.items()
    )  # the order decides which graph a replacement is fitted on


def test_changes_are_in_the_order_chosen():
    decisions = (Decision("a", "low-rank:3", ""), Decision("b", "keep", ""), Decision("c", "drop", ""))
    plan = Plan("m", "f", "r", "output", decisions, ("c", "a"))
    assert list(plan.changes.items()) == [("c", "drop"), ("a", "low-rank:3")]
    assert plan.dropped == ("c",)


@pytest.mark.parametrize("version", [1, 2])
def test_plans_of_earlier_versions_can_be_read(version):
    """They are written with the current version."""
    plan = plan_for("2")
    old = Plan.from_dict(json.loads(edited(version=version)))
    assert old == plan
    assert json.loads(old.to_json())["version"] == 3
    assert old.changes == {"b.5.mlp": "drop", "b.5.attention": "drop"}


few = st.text(max_size=5)
values = st.none() | st.booleans() | st.integers() | few


@settings(max_examples=30, deadline=None)
@given(st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(few, inner, max_size=3)))
def test_json_that_is_no_plan(content):
    with pytest.raises(PassError):
        Plan.from_dict(content)


def edited(**changes):
    content = json.loads(plan_for("2").to_json())
    content.update(changes)
    return json.dumps({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(version=4), "has version 4, expected 3"),
        (edited(version=None), "has version None, expected 3"),
        (edited(decisions=None), "not a plan.json"),
        (edited(decisions=[{"site": "a"}]), "not a plan.json"),
        (edited(decisions=[{"site": 3, "action": "keep", "reason": ""}], order=[]), "is not text"),
        (edited(decisions=[{"site": "a", "action": "melt", "reason": ""}], order=[]), "unknown action 'melt'"),
        (edited(decisions=[{"site": "a", "action": "drop:4", "reason": ""}], order=["a"]), "unknown action 'drop:4'"),
        (edited(decisions=[{"site": "a", "action": "linear", "reason": ""}], order=[]), "order does not list exactly"),
        (edited(decisions=[{"site": "a", "action": "keep", "reason": ""}], order=["a"]), "order does not list exactly"),
        (edited(decisions=[{"site": "a", "action": "keep", "reason": ""}] * 2, order=[]), "more than one decision"),
        (edited(order=[]), "order does not list exactly"),
        (edited(surprise=1), "not a plan.json"),
    ],
)
def test_malformed_plans(text, message):
    with pytest.raises(PassError, match=message):
        Plan.from_dict(json.loads(text))


def test_a_plan_must_fit_the_sites_of_the_model():
    plan = plan_for("2")
    plan.check(SITES)
    with pytest.raises(PassError, match="made for another model"):
        plan.check(chain(BLOCKS + 1))
    with pytest.raises(PassError, match=r"names sites that the model does not have: b\.5\.attention \(2 in all\)"):
        plan.check(SITES[:-2])
    unknown = Plan("m", fingerprint(SITES), "r", "names", (Decision("nowhere", "drop", ""),), ("nowhere",))
    with pytest.raises(PassError, match="does not have: nowhere"):
        unknown.check(SITES)


@pytest.mark.parametrize(
    "change",
    [("name", "other"), ("kind", "other"), ("block", "b.9"), ("width", 9)],
)
def test_fingerprints_depend_on_the_structure_but_not_on_node_names(change):
    first = SITES[0]
    assert fingerprint([dataclasses.replace(first, **dict([change]))]) != fingerprint([first])
    assert fingerprint([dataclasses.replace(first, add="add_99", trunk="x")]) == fingerprint([first])


# ------------------------------------------------------------------------------------------------------------- actions


@given(st.integers(1, 10**9))
def test_ranks_are_parsed(rank):
    assert form_and_rank(f"low-rank:{rank}") == ("low-rank", rank)


def test_every_action_has_a_form():
    assert [form_and_rank(action) for action in COMPLETE_ACTIONS] == [(action, None) for action in COMPLETE_ACTIONS]
    assert form_and_rank("merge:8") == form_and_rank("merge:25%") == ("merge", None)


@pytest.mark.parametrize(
    "action",
    ["", "keep", "melt", "low-rank:", "low-rank:0", "low-rank:-3", "low-rank:x", "low-rank:1:2", "linear:4", "drop:"],
)
def test_the_error_for_an_unknown_action_lists_the_valid_ones(action):
    with pytest.raises(PassError, match=f"unknown action {action!r}; expected drop, constant, .*, low-rank:RANK"):
        form_and_rank(action)


@pytest.mark.parametrize("action", ["merge", "merge:", "merge:50%", "merge:%", "merge:-1", "merge:x", "merge:1.5"])
def test_merge_takes_a_number_or_a_share_below_half(action):
    for parser in (form_and_rank, merged_tokens):
        with pytest.raises(PassError, match="expected merge:NUMBER or merge:SHARE% below 50%"):
            parser(action)


def test_merges_are_added_to_a_plan():
    plan = with_token_merging(plan_for("b.5"), {"b.1.attention": "merge:25%", "b.3.attention": "merge:4"})
    assert plan.order == ("b.5.attention", "b.5.mlp", "b.1.attention", "b.3.attention")
    assert plan.merges == {"b.1.attention": "merge:25%", "b.3.attention": "merge:4"}
    assert [merged_tokens(action) for action in plan.merges.values()] == [0.25, 4]
    assert merged_tokens("drop") is None
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    with pytest.raises(PassError, match=r"cannot be merged after b\.5\.attention, which the plan changes"):
        with_token_merging(plan, {"b.5.attention": "merge:2"})


def test_one_replacement_for_a_run_of_sites():
    """Blocks 1 and 2 are a run of four sites, b.4.mlp is a run of one; all but the last of a run are dropped first."""
    plan = plan_for("b.4.mlp,b.2,b.1")
    assert plan.order == ("b.4.mlp", "b.2.attention", "b.2.mlp", "b.1.attention", "b.1.mlp")
    changed = with_action(plan, "low-rank:3")
    assert list(changed.changes.items()) == [
        ("b.1.attention", "drop"),
        ("b.1.mlp", "drop"),
        ("b.2.attention", "drop"),
        ("b.2.mlp", "low-rank:3"),
        ("b.4.mlp", "low-rank:3"),
    ]
    assert [decision.reason for decision in changed.decisions] == [decision.reason for decision in plan.decisions]
    assert Plan.from_dict(json.loads(changed.to_json())) == changed
    changed.check(SITES)


@settings(deadline=None)
@given(st.sets(st.integers(0, len(SITES) - 1), min_size=1), st.sampled_from(COMPLETE_ACTIONS))
def test_acting_changes_the_same_sites(positions, action):
    plan = plan_for(",".join(SITES[position].name for position in sorted(positions)))
    changed = with_action(plan, action)
    assert set(changed.changes) == set(plan.changes)
    ends = {SITES[position].name for position in positions if position + 1 not in positions}
    assert {name for name, change in changed.changes.items() if change == action} == (
        set(plan.changes) if action == "drop" else ends
    )
    assert [[site.name for site in SITES].index(name) for name in changed.order] == sorted(positions)


def test_choose_applies_the_action():
    assert plan_for("b.3", action="linear").changes == {"b.3.attention": "drop", "b.3.mlp": "linear"}
    with pytest.raises(PassError, match="unknown action 'melt'"):
        plan_for("0", action="melt")
