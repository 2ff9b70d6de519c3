"""Tests of the Pareto front: efficient points, points to build, and JSON, table and chart."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from compressor.quality.evaluate import Evaluation
from compressor.quality.metrics import METRICS
from compressor.report.pareto_report import ParetoFront, plan_name, points_to_build, with_measurements
from compressor.search.pareto import Point, efficient
from passes.plan.plan import Decision, Plan
from runtimes.base.timing import Latency

SITES = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
ACTIONS = ("drop", "linear", "low-rank:8", "drop")
LOSSES, COSTS, DIVERGENCES = (0.0, 0.5, 0.4, 3.25, 3.25), (8.0, 6.4, 5.0, 4.0, 4.5), (0.0, 0.01, 0.02, 0.3, 0.4)


def plan(count: int) -> Plan:
    """Return the plan of the first `count` changes."""
    decisions = tuple(
        Decision(site, action if index < count else "keep", "r")
        for index, (site, action) in enumerate(zip(SITES, ACTIONS, strict=True))
    )
    return Plan("sample", "0", f"sweep, point {count}", "output", decisions, SITES[:count])


def quality() -> Evaluation:
    """Return an evaluation of ten samples: the original is right on nine, the plan of three changes on seven."""
    right = np.array([1.0] * 9 + [0.0])
    fewer = np.array([1.0] * 7 + [0.0] * 3)
    divergence = np.linspace(0.1, 1.0, 10)
    whole = {"accuracy": right, "agreement": np.ones(10), "divergence": np.zeros(10)}
    return Evaluation("accuracy", {"0": whole, "3": {"accuracy": fewer, "agreement": fewer, "divergence": divergence}})


def front(evaluation: Evaluation | None) -> ParetoFront:
    optimal = efficient(COSTS, LOSSES)
    points = [
        Point(
            number,
            plan(number),
            LOSSES[number],
            DIVERGENCES[number],
            8.0 / cost,
            int(cost * 1000),
            optimal[number],
            next(reversed(plan(number).changes.items()), None),
        )
        for number, cost in enumerate(COSTS)
    ]
    timed = {0: Latency(((9.0, 9.0), (9.0, 9.0))), 3: Latency(((6.0, 6.0), (6.0, 6.0)))}
    return ParetoFront(
        command="compressor sweep",
        settings={"target": "onnxruntime", "batch": 1},
        model="sample",
        metric=None if evaluation is None else "accuracy",
        data={"source": "digits"},
        points=tuple(with_measurements(point, timed.get(point.number), evaluation) for point in points),
        search={"sweeps": 3.0},
        environment={},
        seconds=1.0,
    )


def printed(pareto: ParetoFront, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(pareto.table())
    return stream.getvalue().splitlines()


# -------------------------------------------------------------------------------------------------------------- points

few = st.integers(0, 4).map(float)  # few values, so that ties are common


@given(st.lists(st.tuples(few, few), min_size=1, max_size=12))
def test_a_point_is_efficient_unless_another_is_no_worse_in_both_and_better_in_one(pairs: list[Any]) -> None:
    optimal = efficient([cost for cost, _ in pairs], [loss for _, loss in pairs])
    for mine, is_optimal in zip(pairs, optimal, strict=True):
        dominated = False
        for other in pairs:
            no_worse = other[0] <= mine[0] and other[1] <= mine[1]
            better = other[0] < mine[0] or other[1] < mine[1]
            dominated = dominated or (no_worse and better)
        assert is_optimal is not dominated
    assert any(optimal)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(2, 12))
def test_points_to_build_are_evenly_spaced_efficient_points_with_both_ends(worth: list[bool], wanted: int) -> None:
    candidates = [index for index, good in enumerate(worth) if good or index == 0]
    chosen = points_to_build(len(worth), wanted, worth)
    assert len(chosen) == min(wanted, len(candidates))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(candidates)
    assert {chosen[0], chosen[-1]} == {0, candidates[-1]}
    gaps = np.diff([candidates.index(index) for index in chosen])
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1  # as even as integers allow


# ------------------------------------------------------------------------------------------------------ measurements


def test_a_point_that_was_not_built_is_unchanged() -> None:
    point = Point(1, plan(1), 0.5, 0.01, 1.25, 6400, True)
    assert with_measurements(point, None, quality()) is point


def test_a_built_point_is_compared_with_the_unchanged_model() -> None:
    pareto = front(quality())
    assert [point.number for point in pareto.built()] == [0, 3]
    start, built = pareto.built()
    assert start.figure is not None
    assert start.test_loss is not None
    assert (start.figure.value, start.test_loss.value) == pytest.approx((90.0, 0.0), abs=1e-9)
    assert built.figure is not None
    assert built.test_loss is not None
    assert built.label_free is not None
    # Shares of ten samples in float64.
    assert (built.figure.value, built.test_loss.value) == pytest.approx((70.0, 20.0), abs=1e-9)
    assert built.label_free["agreement"].value == pytest.approx(70.0, abs=1e-9)
    assert built.label_free["divergence"].value == pytest.approx(0.55, abs=1e-9)
    assert pareto.speedup(built).ratio == 1.5


def test_without_quality_a_point_has_only_a_latency() -> None:
    built = front(None).built()[1]
    assert (built.figure, built.test_loss, built.label_free) == (None, None, None)
    assert built.latency is not None


# ----------------------------------------------------------------------------------------------- JSON, table, chart


@pytest.mark.parametrize("judged", [True, False])
def test_the_json_holds_every_point(judged: bool) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(front(quality() if judged else None).to_json(), parse_constant=refuse)
    rows = content["points"]
    assert content["version"] == 1
    assert content["metric"] == ("accuracy" if judged else None)
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["plan"] for row in rows] == [f"plans/{number}.json" for number in range(5)]
    assert [row["efficient"] for row in rows] == [True, False, True, True, False]
    assert rows[2]["changes"] == {"blocks.0.attn": "drop", "blocks.0.mlp": "linear"}
    assert [(row["loss"], row["divergence"]) for row in rows] == list(zip(LOSSES, DIVERGENCES, strict=True))
    assert ["latency" in row for row in rows] == [True, False, False, True, False]
    assert rows[3]["latency"]["samples_ms"] == [[6.0, 6.0], [6.0, 6.0]]
    assert rows[3]["speedup"]["ratio"] == 1.5
    assert set(rows[3]["label_free"]) == ({"agreement", "divergence"} if judged else set())
    assert (rows[3]["test_loss"] is not None) is judged
    assert rows[1]["figure"] is None


def test_the_table_shows_predictions_and_measurements() -> None:
    lines = [" ".join(line.split()) for line in printed(front(quality()), 100)]
    assert lines[0] == "sample on onnxruntime, batch 1"
    rows = [
        "0* unchanged +0.00 1.00x 1.00x 90.00 +0.00",
        "+0.00 to +0.00",
        "1 blocks.0.attn +0.50 1.25x",
        "2* blocks.0.mlp (linear) +0.40 1.60x",
        "3* blocks.1.attn (low-rank:8) +3.25 2.00x 1.50x 70.00 +20.00",
    ]
    assert lines[4:9] == rows
    assert lines[9] == "+0.00 to +50.00"
    assert lines[10] == "4 blocks.1.mlp +3.25 1.78x"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    lines = printed(front(quality()), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert sum("+0.00 to +0.00" in line for line in lines) == 1  # an interval stays on one line


def test_the_table_without_quality_states_none() -> None:
    text = "\n".join(printed(front(None), 100))
    assert "accuracy" not in text
    assert "3* blocks.1.attn (low-rank:8) +3.25 2.00x 1.50x" in " ".join(text.split())
    assert "Quality" not in front(None).summary()


def test_points_whose_precision_loses_too_much_are_named() -> None:
    made = replace(front(quality()), notes=("A sentence.",))
    assert "A sentence." in made.summary().splitlines()
    assert json.loads(made.to_json())["notes"] == ["A sentence."]


def test_the_summary_names_the_metric_and_how_to_export_a_point() -> None:
    lines = front(quality()).summary().splitlines()
    assert lines[0] == f"Quality: {METRICS['accuracy'].title}; losses in %, ranges are 95 % intervals."
    assert lines[-1] == "Export a point with --drop FOLDER/plans/NUMBER.json."
    assert plan_name(front(None).points[2]) == "plans/2.json"


@pytest.mark.parametrize("judged", [True, False])
def test_the_chart_is_a_png(judged: bool) -> None:
    with Image.open(io.BytesIO(front(quality() if judged else None).picture())) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # axes, lines and text, not an empty image


def test_a_name_is_neither_markup_nor_a_formula() -> None:
    """The table shows brackets, and the picture dollar signs that Matplotlib would read as an invalid formula."""
    named = replace(front(quality()), model=r"[red]x[/red] [/] $\nothing{$")
    assert r"[red]x[/red] [/] $\nothing{$" in "\n".join(printed(named, 120))
    assert named.picture().startswith(b"\x89PNG")
