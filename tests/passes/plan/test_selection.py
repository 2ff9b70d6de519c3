"""Tests of every form of --drop, and of every metric on planted scores."""

import dataclasses
import json
import math

import pytest
import torch

from passes.analysis.redundancy import Moments
from passes.base import PassError
from passes.plan.plan import Plan
from passes.plan.selection import choose, parse
from tests.plans import BLOCKS, SITES, moments, plan_for, scores_of, site

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
    """The metric `reverse` drops the deepest sites first, so the result of each form is known."""
    plan = plan_for(text)
    assert list(plan.dropped) == dropped
    assert sorted(plan.order) == sorted(dropped)
    assert plan.rule == text
    assert [decision.site for decision in plan.decisions] == [site.name for site in SITES]
    assert all(decision.reason for decision in plan.decisions)
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    plan.check(SITES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("13", "has only 12 of the kind site"),
        ("attention:7", "has only 6 of the kind attention"),
        ("conv:1", "has only 0 of the kind conv; its branches are 6 attention, 6 mlp"),
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
def test_invalid_forms_of_drop(text, message):
    with pytest.raises(PassError, match=message):
        plan_for(text)


def test_fixed_sites_are_not_ranked_alone():
    """A percentage counts them; a block or a name may contain them."""
    reason = {"b.5.attention": "an engine needs it"}

    def dropped(text):
        plan = choose(parse(text), SITES, "reverse", model="m", fixed=reason)
        if "b.5.attention" not in plan.dropped:
            assert {each.site: each.reason for each in plan.decisions}["b.5.attention"] == "an engine needs it"
        return list(plan.dropped)

    assert dropped("2") == ["b.4.mlp", "b.5.mlp"]
    assert dropped("attention:50%") == ["b.2.attention", "b.3.attention", "b.4.attention"]
    assert dropped("block:1") == ["b.5.attention", "b.5.mlp"]
    assert dropped("b.5.attention") == ["b.5.attention"]
    with pytest.raises(PassError, match=r"5 can be chosen; b\.5\.attention stays, because an engine"):
        dropped("attention:6")


def test_names_are_dropped_in_their_order_and_once():
    plan = plan_for("b.4,b.1.mlp,b.4.mlp,b.1.mlp")
    assert plan.order == ("b.4.attention", "b.4.mlp", "b.1.mlp")
    assert plan.metric == "names"
    assert {decision.reason for decision in plan.decisions} == {"named in --drop", "not named in --drop"}


def test_the_reason_of_a_site_of_another_kind_names_the_kind():
    reasons = {decision.site: decision.reason for decision in plan_for("mlp:2").decisions}
    assert reasons["b.0.attention"] == "not of the kind mlp"
    assert reasons["b.5.mlp"].startswith("reverse: rank 1 of 6")


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
    """The cosine of a block whose input and output differ in shape is NaN, which must not disturb the ranking."""
    blocks = {f"b.{block}": moments(0.1 * block) for block in range(BLOCKS)} | {"b.3": Moments()}
    scores = scores_of(SITES, lambda _: 0.5, blocks=blocks)
    order = [name.split(".")[1] for name in plan_for("block:6", "cosine", scores=scores).order[::2]]
    assert order == ["5", "4", "2", "1", "0", "3"]


@pytest.mark.parametrize(("text", "inside"), [("4", range(5, 9)), ("block:2", range(6, 10))])
def test_angular_takes_the_closest_span(text, inside):
    count = len(SITES) + 1
    distances = torch.full((count, count), 0.9, dtype=torch.float64)
    distances[5, 9] = distances[6, 10] = 0.1  # an odd start is inside a block
    distances[2, 5] = 0.01  # closer, but a span of three
    plan = plan_for(text, "angular", scores=scores_of(SITES, lambda _: 0.5, angular=distances))
    if text == "4":
        distances[6, 10] = 0.2
        plan = plan_for(text, "angular", scores=scores_of(SITES, lambda _: 0.5, angular=distances))
    assert plan.order == tuple(SITES[position].name for position in inside)
    assert {decision.reason.split(" the ")[0] for decision in plan.decisions} == {"angular: in", "angular: not in"}
    assert "(0.1)" in plan.decisions[0].reason


@pytest.mark.parametrize(("text", "inside"), [("4", range(5, 9)), ("block:2", range(6, 10))])
def test_span_takes_the_span_that_turns_all_tokens_least(text, inside):
    """The angles at the last tokens are least elsewhere, as on paragraphs that all end in a full stop."""
    count = len(SITES) + 1
    similarity, distances = torch.full((2, count, count), 0.1, dtype=torch.float64)
    similarity[inside[0], inside[-1] + 1] = 0.9
    distances[0, 4] = 0.01
    scores = scores_of(SITES, lambda _: 0.5, angular=distances, similarity=similarity)
    plan = plan_for(text, "span", scores=scores)
    assert plan.order == tuple(SITES[position].name for position in inside)
    reasons = {decision.reason for decision in plan.decisions if decision.action != "keep"}
    assert [reason.startswith("span: in the closest of") and "(0.1)" in reason for reason in reasons] == [True]
    assert plan_for(text, "angular", scores=scores).order == tuple(site.name for site in SITES[:4])


def test_span_needs_a_comparison_at_all_tokens():
    scores = scores_of(SITES, lambda _: 0.5)
    few = dataclasses.replace(scores, tokens=scores.tokens / 5)
    with pytest.raises(PassError, match=r"compared at 2 of 10 tokens.*choose the metric angular"):
        plan_for("4", "span", scores=few)


def test_angular_ranks_one_kind_by_its_own_distances():
    scores = scores_of(SITES, lambda site: 0.5 + 0.01 * site.order)
    assert plan_for("mlp:2", "angular", scores=scores).order == ("b.5.mlp", "b.4.mlp")


def parallel(blocks=3):
    """Return sites whose two branches of each block are added to the same trunk."""
    return tuple(
        site(f"b.{block}.{kind}", kind, f"b.{block}", 2 * block + index, f"state_{block}", f"state_{block + 1}")
        for block in range(blocks)
        for index, kind in enumerate(("attention", "mlp"))
    )


def test_a_span_takes_both_or_none_of_two_parallel_branches():
    """The distance of a trunk state to itself is 0, which must not count as a span of one branch."""
    sites = parallel()
    distances = torch.full((4, 4), 0.9, dtype=torch.float64).fill_diagonal_(0.0)
    distances[1, 2] = 0.2
    scores = scores_of(sites, lambda _: 0.5, angular=distances)
    plan = choose(parse("2"), sites, "angular", model="m", scores=scores)
    assert plan.order == ("b.1.attention", "b.1.mlp")
    with pytest.raises(PassError, match="no span of 1 consecutive units leads from one trunk state to another"):
        choose(parse("1"), sites, "angular", model="m", scores=scores)


def test_angular_skips_spans_between_states_of_different_shape():
    distances = torch.full((13, 13), math.nan, dtype=torch.float64)
    with pytest.raises(PassError, match="no span of 4 consecutive units"):
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


def test_output_measures_the_effect_of_each_unit():
    measured = []

    def effect(units):
        measured.extend(tuple(site.name for site in unit) for unit in units)
        return [0.5, 0.1, 0.3, 0.9, 0.2, math.inf]

    assert plan_for("block:2", "output", effect=effect).order == (
        "b.1.attention",
        "b.1.mlp",
        "b.4.attention",
        "b.4.mlp",
    )
    assert measured == [(f"b.{block}.attention", f"b.{block}.mlp") for block in range(BLOCKS)]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("output", "needs measured effects"),
        ("cosine", "needs scores"),
        ("angular", "needs scores"),
        ("span", "needs scores"),
        ("taste", "unknown metric"),
    ],
)
def test_metrics_without_their_scores_or_effects(metric, message):
    with pytest.raises(PassError, match=message):
        plan_for("2", metric)
