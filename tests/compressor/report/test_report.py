"""Tests of a report's terminal table and summary: columns, width, units, and reports without quality."""

import io
import itertools
import json
from dataclasses import replace

import pytest
from rich.console import Console

from compressor.quality.intervals import Figure
from compressor.quality.metrics import METRICS
from compressor.report.report import Quality, Report, Size
from passes.plan.plan import Decision, Plan
from runtimes.base.timing import Latency

WORST = Figure(100.0, 100.0, 100.0, 30)
SLOW = Latency(((181.25, 181.5), (181.75, 182.0)))  # median 181.625 ms
QUICK = Latency(((145.25, 145.25), (145.35, 145.35)))  # median 145.3 ms, 1.25 times faster
LIMITS = ("speedup", "latency", "max_loss")


def plan_of(*actions: str) -> Plan:
    """Return a plan of the sites a, b, ... with these actions, in this order."""
    decisions = tuple(Decision(name, action, "r") for name, action in zip("abcdef", actions, strict=False))
    changed = tuple(decision.site for decision in decisions if decision.action != "keep")
    return Plan("sample", "0", "1", "names", decisions, changed)


PLAN = plan_of("drop", "keep")


def report(
    metric: str | None,
    *,
    plan: Plan = PLAN,
    limits: dict[str, float] | None = None,
    label_free: dict[str, Figure] | None = None,
) -> Report:
    names = ("original", "baseline", "result")
    quality = None
    if metric is not None:
        loss = Figure(23.33, -10.0, 36.67, 30)
        quality = Quality(metric, dict.fromkeys(names, WORST), {"original": loss, "baseline": loss}, label_free or {})
    return Report(
        command="compressor export",
        settings={"target": "onnxruntime", "batch": 1} | dict.fromkeys(LIMITS) | (limits or {}),
        model={"name": "sample"},
        data={},
        plan=plan,
        sizes=dict.fromkeys(names, Size(86_000_000, 17_500_000_000, 346_000_000)),
        quality=quality,
        no_quality_because=None if quality else "the data is random",
        latency=dict.fromkeys(names, SLOW) | {"result": QUICK},
        parity={},
        precision={},
        search={},
        healed=None,
        steps=(),
        passes=(),
        timed_inputs={"pixel_values": [1, 3, 224, 224]},
        environment={},
        notes=("A note.",),
    )


def printed(of: Report, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(of.table())
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_no_cell_is_cut_or_wrapped(metric: str, width: int) -> None:
    lines = printed(report(metric), width)
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= width
    assert any(line.strip().startswith(METRICS[metric].label) for line in lines)
    assert sum("-10.00 to +36.67" in line for line in lines) == 2


def test_each_number_stands_under_the_column_of_its_variant() -> None:
    """A loss, speed-up or agreement of the result stands in its column, and the reference is marked as such."""
    made = report("accuracy", label_free={"agreement": Figure(96.5, 95.0, 98.0, 30)})
    assert [column.header for column in made.table().columns] == ["", "original", "baseline", "result"]
    rows = list(made._rows())
    cells = {row[0].strip(): row[1:] for row in rows}
    assert cells["top-1 accuracy, %"] == ("100.00", "100.00", "100.00")
    assert cells["loss vs original, %"] == ("reference", "", "+23.33")
    assert cells["loss vs baseline, %"] == ("", "reference", "+23.33")
    assert cells["same answers, %"] == ("", "", "96.5")
    assert cells["speed-up vs original"] == ("reference", "", "1.25x")
    assert cells["speed-up vs baseline"] == ("", "reference", "1.25x")
    intervals = [below[1:] for row, below in itertools.pairwise(rows) if " vs " in row[0]]
    assert len(intervals) == 4
    assert all(interval[:2] == ("", "") and interval[2] for interval in intervals)


def test_without_labels_the_expected_loss_is_shown_and_held_to_the_limits() -> None:
    """Changed answers are no loss of accuracy: 8.8 points of them are expected to cost 0.84, int8 alone 0.1."""
    made = report("agreement", label_free={"agreement": Figure(91.2, 87.2, 94.4, 250)}, limits={"speedup": 1.2})
    assert made.quality is not None
    changed, expected = Figure(8.8, 5.6, 12.8, 250), Figure(0.84, 0.4, 1.4, 250)
    alone = Figure(0.1, 0.0, 0.2, 250)
    known = {"result": expected, "baseline": alone}
    quality = replace(
        made.quality, loss=dict.fromkeys(made.quality.loss, changed), precision_loss=changed, expected=known
    )
    assert (quality.lost, quality.lost_by_precision) == (expected, alone)
    assert quality.bounded_loss("accuracy") == 0.84
    assert quality.bounded_loss("agreement") == pytest.approx(8.8)
    far = replace(quality, label_free={"divergence": Figure(0.057, 0.05, 0.07, 250)})
    assert far.bounded_loss("divergence") == pytest.approx(5.7)
    assert replace(quality, expected={}).bounded_loss("accuracy") == 8.8
    cells = {row[0].strip(): row[1:] for row in replace(made, quality=quality)._rows()}
    assert cells["expected loss, %"] == ("", "", "+0.84")
    assert "expected loss, %" not in {row[0].strip() for row in made._rows()}
    (sentence,) = replace(made, quality=quality).exceeded()
    assert "loses 0.84 % on test data (0.40 to 1.40)" in sentence


def test_a_report_of_two_variants_compares_them_once() -> None:
    made = report("accuracy")
    two = replace(
        made,
        sizes={name: made.sizes[name] for name in ("baseline", "result")},
        latency={name: made.latency[name] for name in ("baseline", "result")},
        quality=Quality("accuracy", made.quality.figures, {"baseline": made.quality.loss["baseline"]}, {}),
    )
    assert [row for row in two._rows() if " vs " in row[0]] == [
        ("  loss vs baseline, %", "reference", "+23.33"),
        ("  speed-up vs baseline", "reference", "1.25x"),
    ]


def test_units_are_stated() -> None:
    text = "\n".join(printed(report("accuracy"), 80))
    for label in (
        "top-1 accuracy, %",
        "loss vs baseline, %",
        "latency, ms",
        "parameters, M",
        "multiply-adds, G",
        "engine, MB",
    ):
        assert label in text


def test_a_report_without_quality_has_no_row_of_quality() -> None:
    text = "\n".join(printed(report(None), 80))
    assert "accuracy" not in text
    assert "loss" not in text
    assert "No quality stated: the data is random." in report(None).summary()


def test_the_summary_states_the_changes_and_the_metric() -> None:
    lines = report("accuracy").summary().splitlines()
    assert lines[0] == "Dropped 1 of 2 sites: a."
    assert lines[1].startswith("Quality: top-1 accuracy in %, on 30 test samples")
    assert lines[-1] == "A note."


def test_changes_other_than_drops_are_named() -> None:
    changed = report("accuracy", plan=plan_of("linear", "keep", "drop", "low-rank:8"))
    assert changed.summary().splitlines()[0] == "Changed 3 of 4 sites: a (linear), c, d (low-rank:8)."
    content = changed.to_dict()["plan"]
    assert content["changes"] == {"a": "linear", "c": "drop", "d": "low-rank:8"}
    assert content["dropped"] == ["c"]
    kept = report("accuracy", plan=plan_of("keep", "keep"))
    assert kept.summary().splitlines()[0] == "Dropped 0 of 2 sites: none."


@pytest.mark.parametrize("width", [80, 120])
def test_figures_without_labels_stand_below_the_metric_once(width: int) -> None:
    free = {"agreement": Figure(96.5, 95.0, 98.0, 30), "divergence": Figure(0.012345, 0.01, 0.02, 30)}
    lines = [" ".join(line.split()) for line in printed(report("accuracy", label_free=free), width)]
    assert "same answers, % 96.5" in lines
    assert "divergence 0.01235" in lines
    text = "\n".join(printed(report("agreement", label_free=free), width))
    assert "same answers" not in text  # the metric is the agreement already
    assert "divergence" in text
    content = json.loads(report("accuracy", label_free=free).to_json())
    assert content["quality"]["label_free"]["divergence"] == {"value": 0.012345, "low": 0.01, "high": 0.02, "n": 30}
    assert content["healed"] is None


def test_a_result_that_is_slower_than_another_variant_is_said() -> None:
    assert report("accuracy").slower() == ()
    latency = {"original": QUICK, "baseline": SLOW, "result": SLOW}
    assert replace(report("accuracy"), latency=latency).slower() == (
        "The result is slower here: 0.8x the speed of the original (0.799 to 0.801).",
    )
    even = {"original": SLOW, "baseline": SLOW, "result": SLOW}
    assert replace(report("accuracy"), latency=even).slower() == ()


@pytest.mark.parametrize(
    ("limits", "sentences"),
    [
        ({}, ()),
        ({"speedup": 1.25}, ()),
        ({"speedup": 1.5}, ("The result is 1.25x faster, not 1.5x as asked for.",)),
        (
            {"speedup": 1.5, "max_loss": 2.0},
            ("The result is 1.25x faster, not 1.5x as asked for; allow a larger --max-loss.",),
        ),
        ({"speedup": 1.2501}, ("The result is 1.25x faster, not 1.2501x as asked for.",)),
        ({"latency": 145.3}, ()),
        ({"latency": 100.0}, ("The result takes 145.3 ms, not 100 ms as asked for.",)),
        (
            {"latency": 100.0, "max_loss": 0.0},
            ("The result takes 145.3 ms, not 100 ms as asked for; allow a larger --max-loss.",),
        ),
    ],
)
def test_a_missed_speedup_or_latency_is_reported(limits: dict[str, float], sentences: tuple[str, ...]) -> None:
    assert report("accuracy", limits=limits).missed() == sentences
