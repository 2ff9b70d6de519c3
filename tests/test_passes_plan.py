"""Plans: what is written is what is read, every form of --drop, every metric against planted scores."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.base import PassError
from passes.graph import Site
from passes.plan import (
    ACTIONS,
    METRICS,
    Decision,
    Plan,
    acting,
    choose,
    fingerprint,
    form_and_rank,
    merged_tokens,
    merging,
    parse,
)
from passes.score import Moments, Scores

BLOCKS = 6


def site(name, kind, block, order, trunk, root=None):
    root = f"add_{order}" if root is None else root
    return Site(name, kind, block, order, 8, 2, root, f"branch_{order}", trunk, root)


def chain(blocks=BLOCKS):
    """Attention and MLP of each block in a row, the sum before each being its trunk."""
    kinds = ("attention", "mlp")
    return tuple(
        site(f"b.{block}.{kind}", kind, f"b.{block}", order, f"add_{order - 1}" if order else "stem")
        for order, (block, kind) in enumerate((block, kind) for block in range(blocks) for kind in kinds)
    )


SITES = chain()


def moments(cosine, angular=0.5):
    return Moments(10, 10, 10 * cosine, 10 * angular, 1.0)


def scores_of(sites, cosine, *, angular=None, blocks=None):
    """Scores with a planted cosine per site, distances per site, and distances [states, states]."""
    states = tuple(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
    count = len(states)
    matrix = torch.full((count, count), 0.9, dtype=torch.float64) if angular is None else angular
    ones = torch.ones(count, count, dtype=torch.float64)
    names = dict.fromkeys(site.block for site in sites)
    planted = {name: moments(0.5) for name in names} if blocks is None else blocks
    return Scores(
        1,
        {site.name: moments(cosine(site), 1 - cosine(site)) for site in sites},
        planted,
        states,
        ones,
        ones,
        matrix,
        ones,
    )


def plan_for(text, metric="reverse", **options):
    return choose(parse(text), SITES, metric, model="m", **options)


# ---------------------------------------------------------------------------------------------------------------- JSON

texts = st.text(max_size=20)
DONE = [action for action in ACTIONS if action != "merge"]  # merging needs to know how much
counts = st.integers(1, 10**6)
actions = st.sampled_from(["keep", *DONE]) | counts.map("low-rank:{}".format) | counts.map("merge:{}".format)
named = st.lists(st.tuples(st.text(min_size=1, max_size=12), actions, texts), unique_by=lambda entry: entry[0])


@st.composite
def plans(draw):
    decisions = tuple(Decision(*entry) for entry in draw(named))
    order = draw(st.permutations([decision.site for decision in decisions if decision.action != "keep"]))
    return Plan(draw(texts), draw(texts), draw(texts), draw(st.sampled_from(METRICS)), decisions, tuple(order))


@settings(deadline=None)
@given(plans())
def test_json_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.changes.items()) == list(plan.changes.items())  # in order: it decides what is fitted on what


def test_changes_are_in_the_order_chosen():
    decisions = (Decision("a", "low-rank:3", ""), Decision("b", "keep", ""), Decision("c", "drop", ""))
    plan = Plan("m", "f", "r", "output", decisions, ("c", "a"))
    assert list(plan.changes.items()) == [("c", "drop"), ("a", "low-rank:3")]
    assert plan.dropped == ("c",)


def test_plans_of_version_one_are_still_read():
    """They drop and keep only; what is written from then on has the version of today."""
    plan = plan_for("2")
    old = Plan.from_json(edited(version=1))
    assert old == plan
    assert json.loads(old.to_json())["version"] == 2
    assert old.changes == {"b.5.mlp": "drop", "b.5.attention": "drop"}


few = st.text(max_size=5)
values = st.none() | st.booleans() | st.integers() | few


@settings(max_examples=30, deadline=None)
@given(st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(few, inner, max_size=3)))
def test_json_that_is_no_plan(content):
    with pytest.raises(PassError):
        Plan.from_json(json.dumps(content))


def edited(**changes):
    content = json.loads(plan_for("2").to_json())
    content.update(changes)
    return json.dumps({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan.json"),
        ("{", "not a plan.json"),
        (edited(version=3), "has version 3, expected 2"),
        (edited(version=None), "has version None, expected 2"),
        (edited(decisions=None), "not a plan.json"),
        (edited(decisions=[{"site": "a"}]), "not a plan.json"),
        (edited(decisions=[{"site": 3, "action": "keep", "reason": ""}], order=[]), "is not text"),
        (edited(decisions=[{"site": "a", "action": "melt", "reason": ""}], order=[]), "unknown action 'melt'"),
        (edited(decisions=[{"site": "a", "action": "drop:4", "reason": ""}], order=["a"]), "unknown action 'drop:4'"),
        (edited(decisions=[{"site": "a", "action": "linear", "reason": ""}], order=[]), "the order lists other sites"),
        (edited(decisions=[{"site": "a", "action": "keep", "reason": ""}], order=["a"]), "the order lists other sites"),
        (edited(decisions=[{"site": "a", "action": "keep", "reason": ""}] * 2, order=[]), "decided twice"),
        (edited(order=[]), "the order lists other sites"),
        (edited(surprise=1), "not a plan.json"),
    ],
)
def test_malformed_plans(text, message):
    with pytest.raises(PassError, match=message):
        Plan.from_json(text)


def test_plans_are_held_against_the_model():
    plan = plan_for("2")
    plan.check(SITES)
    with pytest.raises(PassError, match="made for another model"):
        plan.check(chain(BLOCKS + 1))
    with pytest.raises(PassError, match=r"names 2 sites that the model does not have, the first is b\.5\.attention"):
        plan.check(SITES[:-2])
    strange = Plan("m", fingerprint(SITES), "r", "names", (Decision("nowhere", "drop", ""),), ("nowhere",))
    with pytest.raises(PassError, match="the first is nowhere"):
        strange.check(SITES)


@pytest.mark.parametrize(
    "change",
    [("name", "other"), ("kind", "other"), ("block", "b.9"), ("width", 9)],
)
def test_fingerprints_tell_structures_apart_and_ignore_node_names(change):
    first = SITES[0]
    assert fingerprint([dataclasses.replace(first, **dict([change]))]) != fingerprint([first])
    assert fingerprint([dataclasses.replace(first, add="add_99", trunk="x")]) == fingerprint([first])


# --------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("0", []),
        ("2", ["b.5.attention", "b.5.mlp"]),
        ("site:1", ["b.5.mlp"]),
        ("25%", ["b.4.mlp", "b.5.attention", "b.5.mlp"]),
        ("24%", ["b.5.attention", "b.5.mlp"]),  # 2.88 sites: rounded down
        ("100%", [site.name for site in SITES]),
        ("attention:2", ["b.4.attention", "b.5.attention"]),
        ("attention:50%", ["b.3.attention", "b.4.attention", "b.5.attention"]),
        ("mlp:1", ["b.5.mlp"]),
        ("block:2", ["b.4.attention", "b.4.mlp", "b.5.attention", "b.5.mlp"]),
        ("block:34%", ["b.4.attention", "b.4.mlp", "b.5.attention", "b.5.mlp"]),
        ("conv:0", []),
        ("b.0.mlp", ["b.0.mlp"]),
        (" b.3 , b.0.mlp ", ["b.0.mlp", "b.3.attention", "b.3.mlp"]),
    ],
)
def test_every_form_of_drop(text, dropped):
    """`reverse` takes the deepest, so the outcome of each form is plain."""
    plan = plan_for(text)
    assert list(plan.dropped) == dropped
    assert sorted(plan.order) == sorted(dropped)
    assert plan.rule == text
    assert [decision.site for decision in plan.decisions] == [site.name for site in SITES]
    assert all(decision.reason for decision in plan.decisions)
    assert Plan.from_json(plan.to_json()) == plan
    plan.check(SITES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13", "has only 12 of the kind site"),
        ("attention:7", "has only 6 of the kind attention"),
        ("conv:1", "has only 0 of the kind conv"),
        ("block:7", "has only 6 of the kind block"),
        ("head:2", "unknown kind 'head'"),
        ("101%", "at most 100%"),
        ("", "--drop is empty"),
        (" , ", "--drop is empty"),
        ("b.0.mlp,b.9.mlp", "'b.9.mlp', which is neither a site nor a block"),
        ("-1", "neither a site nor a block"),
        ("2.5%", "neither a site nor a block"),
    ],
)
def test_what_cannot_be_dropped(text, message):
    with pytest.raises(PassError, match=message):
        plan_for(text)


def test_names_are_dropped_in_the_order_given_and_once():
    plan = plan_for("b.4,b.1.mlp,b.4.mlp,b.1.mlp")
    assert plan.order == ("b.4.attention", "b.4.mlp", "b.1.mlp")
    assert plan.metric == "names"
    assert {decision.reason for decision in plan.decisions} == {"named in --drop", "not named in --drop"}


def test_kinds_that_were_not_asked_for_say_so():
    reasons = {decision.site: decision.reason for decision in plan_for("mlp:2").decisions}
    assert reasons["b.0.attention"] == "not of the kind mlp"
    assert reasons["b.5.mlp"].startswith("reverse: rank 1 of 6")


# ------------------------------------------------------------------------------------------------------------- actions


@given(st.integers(1, 10**9))
def test_ranks_are_read_back(rank):
    assert form_and_rank(f"low-rank:{rank}") == ("low-rank", rank)


def test_every_action_has_a_form():
    assert [form_and_rank(action) for action in DONE] == [(action, None) for action in DONE]
    assert form_and_rank("merge:8") == form_and_rank("merge:25%") == ("merge", None)


@pytest.mark.parametrize(
    "action",
    ["", "keep", "melt", "low-rank:", "low-rank:0", "low-rank:-3", "low-rank:x", "low-rank:1:2", "linear:4", "drop:"],
)
def test_unknown_actions_name_the_known_ones(action):
    with pytest.raises(PassError, match=f"unknown action {action!r}; expected drop, constant, .*, low-rank:RANK"):
        form_and_rank(action)


@pytest.mark.parametrize("action", ["merge", "merge:", "merge:50%", "merge:%", "merge:-1", "merge:x", "merge:1.5"])
def test_tokens_are_merged_by_number_or_by_less_than_half(action):
    for read in (form_and_rank, merged_tokens):
        with pytest.raises(PassError, match="expected merge:NUMBER or merge:SHARE% below 50%"):
            read(action)


def test_merges_join_a_plan():
    plan = merging(plan_for("b.5"), {"b.1.attention": "merge:25%", "b.3.attention": "merge:4"})
    assert plan.order == ("b.5.attention", "b.5.mlp", "b.1.attention", "b.3.attention")
    assert plan.merges == {"b.1.attention": "merge:25%", "b.3.attention": "merge:4"}
    assert [merged_tokens(action) for action in plan.merges.values()] == [0.25, 4]
    assert merged_tokens("drop") is None
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PassError, match=r"cannot be merged behind b\.5\.attention, which the plan changes"):
        merging(plan, {"b.5.attention": "merge:2"})


def test_one_stand_in_for_a_run_of_sites():
    """Blocks 1 and 2 are four sites in a row, b.4.mlp is a run of one; the others of a run are dropped first."""
    plan = plan_for("b.4.mlp,b.2,b.1")
    assert plan.order == ("b.4.mlp", "b.2.attention", "b.2.mlp", "b.1.attention", "b.1.mlp")
    changed = acting(plan, "low-rank:3")
    assert list(changed.changes.items()) == [
        ("b.1.attention", "drop"),
        ("b.1.mlp", "drop"),
        ("b.2.attention", "drop"),
        ("b.2.mlp", "low-rank:3"),
        ("b.4.mlp", "low-rank:3"),
    ]
    assert [decision.reason for decision in changed.decisions] == [decision.reason for decision in plan.decisions]
    assert Plan.from_json(changed.to_json()) == changed
    changed.check(SITES)


@settings(deadline=None)
@given(st.sets(st.integers(0, len(SITES) - 1), min_size=1), st.sampled_from(DONE))
def test_acting_changes_the_same_sites(places, action):
    plan = plan_for(",".join(SITES[place].name for place in sorted(places)))
    changed = acting(plan, action)
    assert set(changed.changes) == set(plan.changes)
    ends = {SITES[place].name for place in places if place + 1 not in places}
    assert {name for name, done in changed.changes.items() if done == action} == (
        set(plan.changes) if action == "drop" else ends
    )
    places_in_order = [[site.name for site in SITES].index(name) for name in changed.order]
    assert places_in_order == sorted(places)


def test_choose_passes_the_action_on():
    assert plan_for("b.3", action="linear").changes == {"b.3.attention": "drop", "b.3.mlp": "linear"}
    with pytest.raises(PassError, match="unknown action 'melt'"):
        plan_for("0", action="melt")


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("metric", ["cosine", "influence"])
def test_the_most_similar_go_first(metric):
    planted = dict(
        zip([site.name for site in SITES], [0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.5, 0.15, 0.25, 0.35], strict=True)
    )
    scores = scores_of(SITES, lambda site: planted[site.name])
    assert plan_for("3", metric, scores=scores).order == ("b.0.mlp", "b.1.mlp", "b.2.mlp")
    assert plan_for("attention:2", metric, scores=scores).order == ("b.4.attention", "b.3.attention")
    blocks = {f"b.{block}": moments(0.5 + 0.1 * (block == 2)) for block in range(BLOCKS)}
    chosen = plan_for("block:1", metric, scores=scores_of(SITES, lambda _: 0.5, blocks=blocks))
    assert chosen.order == ("b.2.attention", "b.2.mlp")
    reason = next(decision.reason for decision in chosen.decisions if decision.site == "b.2.mlp")
    assert reason == f"{metric}: rank 1 of 6 ({'0.6' if metric == 'cosine' else '0.4'})"  # influence = 1 - cosine


def test_equal_scores_keep_the_order_of_the_model():
    assert plan_for("2", "cosine", scores=scores_of(SITES, lambda _: 0.5)).order == ("b.0.attention", "b.0.mlp")


def test_a_block_without_a_score_goes_last():
    """Where a block's input and output differ in shape there is no cosine; NaN must not disturb the ranking."""
    blocks = {f"b.{block}": moments(0.1 * block) for block in range(BLOCKS)} | {"b.3": Moments()}
    scores = scores_of(SITES, lambda _: 0.5, blocks=blocks)
    order = [name.split(".")[1] for name in plan_for("block:6", "cosine", scores=scores).order[::2]]
    assert order == ["5", "4", "2", "1", "0", "3"]


@pytest.mark.parametrize(("text", "inside"), [("4", range(5, 9)), ("block:2", range(6, 10))])
def test_angular_takes_the_closest_span(text, inside):
    count = len(SITES) + 1
    distances = torch.full((count, count), 0.9, dtype=torch.float64)
    distances[5, 9] = distances[6, 10] = 0.1  # an odd start is no start of a block
    distances[2, 5] = 0.01  # closer, but a span of three
    plan = plan_for(text, "angular", scores=scores_of(SITES, lambda _: 0.5, angular=distances))
    if text == "4":
        distances[6, 10] = 0.2
        plan = plan_for(text, "angular", scores=scores_of(SITES, lambda _: 0.5, angular=distances))
    assert plan.order == tuple(SITES[place].name for place in inside)
    assert {decision.reason.split(" the ")[0] for decision in plan.decisions} == {"angular: in", "angular: not in"}
    assert "(0.1)" in plan.decisions[0].reason


def test_angular_ranks_one_kind_by_its_own_distances():
    scores = scores_of(SITES, lambda site: 0.5 + 0.01 * site.order)
    assert plan_for("mlp:2", "angular", scores=scores).order == ("b.5.mlp", "b.4.mlp")


def parallel(blocks=3):
    """Both branches of each block added to the same trunk."""
    return tuple(
        site(f"b.{block}.{kind}", kind, f"b.{block}", 2 * block + place, f"state_{block}", f"state_{block + 1}")
        for block in range(blocks)
        for place, kind in enumerate(("attention", "mlp"))
    )


def test_a_span_takes_both_or_none_of_two_parallel_branches():
    """From a trunk to itself the distance is 0, which must not pass for a span of one branch."""
    sites = parallel()
    distances = torch.full((4, 4), 0.9, dtype=torch.float64).fill_diagonal_(0.0)
    distances[1, 2] = 0.2
    scores = scores_of(sites, lambda _: 0.5, angular=distances)
    plan = choose(parse("2"), sites, "angular", model="m", scores=scores)
    assert plan.order == ("b.1.attention", "b.1.mlp")
    with pytest.raises(PassError, match="no 1 consecutive units lead from one state to another"):
        choose(parse("1"), sites, "angular", model="m", scores=scores)


def test_angular_skips_spans_between_states_of_different_shape():
    distances = torch.full((13, 13), math.nan, dtype=torch.float64)
    with pytest.raises(PassError, match="no 4 consecutive units"):
        plan_for("4", "angular", scores=scores_of(SITES, lambda _: 0.5, angular=distances))
    distances[8, 12] = 0.95
    plan = plan_for("4", "angular", scores=scores_of(SITES, lambda _: 0.5, angular=distances))
    assert plan.order == tuple(site.name for site in SITES[8:])


def test_random_depends_on_the_seed_only():
    drawn = [plan_for("6", "random", seed=seed).order for seed in range(8)]
    assert drawn == [plan_for("6", "random", seed=seed).order for seed in range(8)]
    assert len(set(drawn)) > 1
    state = torch.random.get_rng_state()
    plan_for("6", "random", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_reverse_drops_the_deepest_first():
    assert plan_for("3").order == ("b.5.mlp", "b.5.attention", "b.4.mlp")


def test_output_asks_for_the_effect_of_each_unit():
    asked = []

    def effect(units):
        asked.extend(tuple(site.name for site in unit) for unit in units)
        return [0.5, 0.1, 0.3, 0.9, 0.2, math.inf]

    assert plan_for("block:2", "output", effect=effect).order == (
        "b.1.attention",
        "b.1.mlp",
        "b.4.attention",
        "b.4.mlp",
    )
    assert asked == [(f"b.{block}.attention", f"b.{block}.mlp") for block in range(BLOCKS)]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("output", "needs measured effects"),
        ("cosine", "needs scores"),
        ("angular", "needs scores"),
        ("taste", "unknown metric"),
    ],
)
def test_metrics_without_what_they_need(metric, message):
    with pytest.raises(PassError, match=message):
        plan_for("2", metric)
