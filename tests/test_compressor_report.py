"""The terminal table of a report: readable at 80 columns, units stated, nothing said about quality that is unknown."""

import io

import pytest
from rich.console import Console

from compressor.evaluate import METRICS, Figure
from compressor.report import LABELS, Quality, Report, Size
from passes.plan import Decision, Plan
from runtimes.timing import Latency

WORST = Figure(100.0, 100.0, 100.0, 30)


def report(metric: str | None) -> Report:
    names = ("original", "baseline", "result")
    quality = None
    if metric is not None:
        loss = Figure(23.33, -10.0, 36.67, 30)
        quality = Quality(metric, dict.fromkeys(names, WORST), {"original": loss, "baseline": loss})
    return Report(
        command="compressor export",
        settings={"target": "onnxruntime", "batch": 1},
        model={"name": "sample"},
        data={},
        plan=Plan("sample", "0", "1", "names", (Decision("a", "drop", "r"), Decision("b", "keep", "r")), ("a",)),
        sizes=dict.fromkeys(names, Size(86_000_000, 17_500_000_000, 346_000_000)),
        quality=quality,
        no_quality_because=None if quality else "the data is random",
        latency=dict.fromkeys(names, Latency(((181.25, 181.5), (181.75, 182.0)))),
        parity={},
        int8={},
        search={},
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
    assert any(line.strip().startswith(LABELS[metric][0]) for line in lines)
    assert sum("-10.00 to +36.67" in line or "-10.00–" in line for line in lines) == 1


def test_units_are_stated() -> None:
    text = "\n".join(printed(report("accuracy"), 80))
    for label in ("top-1 accuracy, %", "loss, %", "latency, ms", "parameters, M", "multiply-adds, G", "file, MB"):
        assert label in text


def test_without_quality_no_row_speaks_of_it() -> None:
    text = "\n".join(printed(report(None), 80))
    assert "accuracy" not in text
    assert "loss" not in text
    assert "No quality stated: the data is random." in report(None).summary()


def test_the_summary_says_what_was_dropped_and_how_it_was_judged() -> None:
    lines = report("accuracy").summary().splitlines()
    assert lines[0] == "Dropped 1 of 2 sites: a."
    assert lines[1].startswith("Quality: top-1 accuracy in %, on 30 test samples")
    assert lines[-1] == "A note."


def test_every_metric_has_a_label() -> None:
    assert set(LABELS) == set(METRICS)
