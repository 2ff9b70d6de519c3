"""Tests of the sentences on a precision: on the table, in the summary, and only where a limit is exceeded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from compressor.quality.intervals import Figure
from compressor.report.precision_notes import exceeds_limit, precision_notes
from compressor.report.report import Quality, Report
from runtimes.base.timing import Latency
from tests.compressor.report.test_report import report

FAST, SLOW = Latency(((1.0, 1.0),)), Latency(((2.0, 2.0),))


def of(
    loss: float | None = 0.1, test_loss: float = 0.1, precision: str = "int8", state: str = "built", **inner: Any
) -> Report:
    """Return a report whose original takes 2 ms and whose baseline takes 1 ms."""
    made = report("accuracy", limits={"max_precision_loss": 0.5})
    assert made.quality is not None
    quality: Quality = replace(made.quality, precision_loss=Figure(test_loss, test_loss - 1, test_loss + 1, 30))
    facts = {"precision": precision, "loss": loss} | inner
    return replace(
        made,
        settings=made.settings | {"precision": precision},
        quality=quality,
        precision={} if precision == "fp32" else {"baseline": facts | {"loss": 0.0}, "result": facts},
        latency={"original": SLOW, "baseline": FAST, "result": FAST},
        engine={"state": state},
    )


def limit_row(made: Report) -> list[tuple[str, ...]]:
    return [row for row in made._rows() if row[0].startswith("  limit of")]


@pytest.mark.parametrize(
    ("made", "sentences"),
    [
        (of(), []),
        (of(None), []),
        (of(0.5, 0.5), []),
        (of(0.75), ["The expected loss of the result in int8 is 0.75 % by validation data, above the limit of 0.5 %."]),
        (
            of(0.75, nodes=3),
            [
                "The expected loss of the result in int8 is 0.75 % by validation data, above the limit of 0.5 %, even "
                "with layers kept in float."
            ],
        ),
        (
            of(math.inf, precision="fp16"),
            ["The result in fp16 has NaN or infinity on validation data; choose another precision."],
        ),
        (
            of(0.1, 1.25),
            ["int8 alone loses 1.25 % on test data (95 % interval 0.25 to 2.25), above the limit of 0.5 %."],
        ),
        (of(9.0, 9.0, precision="fp32"), []),
    ],
)
def test_an_exceeded_limit_is_a_sentence_and_a_row_of_the_table(made: Report, sentences: list[str]) -> None:
    assert list(precision_notes(made)) == sentences
    assert exceeds_limit(made) == bool(sentences)
    precision = made.settings["precision"]
    row = (f"  limit of {precision}, %", "", "", "0.5, exceeded")
    assert limit_row(made) == ([row] if sentences else [])


@pytest.mark.parametrize(("precision", "target"), [("int8", "onnxruntime"), ("int8-dynamic", "onnxruntime_fused")])
def test_a_language_model_that_loses_much_in_int8_is_told_of_weight_only(precision: str, target: str) -> None:
    def sentences(precision: str, target: str, generation: dict[str, int] | None, loss: float) -> list[str]:
        made = of(loss, loss, precision=precision)
        settings = made.settings | {"target": target, "device": "cpu"}
        found = precision_notes(replace(made, settings=settings, generation=generation))
        return [each for each in found if "--precision int8-weight-only" in each]

    prompt = {"prompt": 8, "new": 8}
    assert len(sentences(precision, target, prompt, 3.0)) == 1
    assert sentences(precision, target, prompt, 0.1) == []
    assert sentences(precision, target, None, 3.0) == []  # no language model
    assert sentences(precision, "executorch", prompt, 3.0) == []  # it has no such precision
    assert sentences("int4", target, prompt, 3.0) == []


def test_a_precision_that_is_not_faster_is_a_sentence() -> None:
    made = of()
    slow = replace(made, latency=made.latency | {"baseline": Latency(((2.5,),))})
    assert list(precision_notes(slow)) == [
        "int8 is not faster than fp32 here: the unchanged model takes 2.5 ms in int8 and 2 ms in fp32."
    ]
    assert not exceeds_limit(slow)
    # A substitute was timed, not the target.
    assert list(precision_notes(replace(slow, engine={"state": "deferred"}))) == []
