"""Sentences on what a precision costs: a loss above its limit, and no gain in speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compressor.target.registry import target_named

if TYPE_CHECKING:
    from compressor.report.report import Report

Json = Mapping[str, Any]
INT8_DYNAMIC, WEIGHT_ONLY = "int8-dynamic", "int8-weight-only"


def precision_notes(report: Report) -> Iterator[str]:
    """Yield a sentence for each limit or hope that the precision of a report does not meet, with both numbers.

    The expected loss of each conversion is from validation data, the loss of the precision alone from test data. Speed
    is compared only where the engines of the target itself were timed.
    """
    settings = report.settings
    precision = settings["precision"]
    if precision == "fp32":
        return
    limit = settings["max_precision_loss"]
    yield from (
        sentence
        for name, facts in report.precision.items()
        if (sentence := expected_excess(f"the {name}", facts, limit)) is not None
    )
    loss = None if report.quality is None else report.quality.lost_by_precision
    if loss is not None and not loss.value <= limit:
        yield (
            f"{precision} alone loses {loss.value:.2f} % on test data (95 % interval {loss.low:.2f} to "
            f"{loss.high:.2f}), above the limit of {limit:g} %."
        )
    if exceeds_limit(report):
        yield from _weight_only(report, precision)
    yield from _no_faster(report, precision)


def expected_excess(name: str, facts: Json, limit: float) -> str | None:
    """Return a sentence if the expected loss of a conversion exceeds the limit, else None.

    Args:
        name: what was converted, such as ``the result``.
        facts: the conversion, as `Converted.to_dict` returns it.
        limit: largest allowed loss in percent.

    >>> facts = {"precision": "int8", "loss": 0.75, "nodes": 12}
    >>> print(expected_excess("the result", facts, 0.5))
    The expected loss of the result in int8 is 0.75 % by validation data, above the limit of 0.5 %, even with layers kept in float.
    """  # noqa: E501
    loss, precision = facts["loss"], facts["precision"]
    if loss is None or loss <= limit:
        return None
    kept = ", even with layers kept in float" if "nodes" in facts else ""
    if not math.isfinite(loss):
        return (
            f"{name[:1].upper()}{name[1:]} in {precision} has NaN or infinity on validation data{kept}; choose another "
            "precision."
        )
    return (
        f"The expected loss of {name} in {precision} is {loss:.2f} % by validation data, above the limit of "
        f"{limit:g} %{kept}."
    )


def exceeds_limit(report: Report) -> bool:
    """Return whether the result loses more by its precision than allowed, as expected or as measured on test data."""
    limit, facts = report.settings.get("max_precision_loss"), report.precision.get("result")
    if limit is None or facts is None:
        return False
    measured = None if report.quality is None else report.quality.lost_by_precision
    losses = (facts["loss"], None if measured is None else measured.value)
    return any(loss is not None and not loss <= limit for loss in losses)


def _weight_only(report: Report, precision: str) -> Iterator[str]:
    """Yield the remedy for a language model whose activations have no common scale in int8."""
    if report.generation is None or precision not in ("int8", INT8_DYNAMIC):
        return
    if WEIGHT_ONLY in target_named(report.settings["target"]).precisions.get(report.settings["device"], ()):
        yield (
            f"A few activations of language models are thousands of times larger than the others, which {precision} "
            f"rounds to nothing; --precision {WEIGHT_ONLY} gives each block of 32 a scale of its own."
        )


def _no_faster(report: Report, precision: str) -> Iterator[str]:
    if report.engine.get("state") != "built" or not {"original", "baseline"} <= set(report.latency):
        return
    exact, reduced = report.latency["original"].median, report.latency["baseline"].median
    if reduced >= exact:
        yield (
            f"{precision} is not faster than fp32 here: the unchanged model takes {reduced:.4g} ms in {precision} and "
            f"{exact:.4g} ms in fp32."
        )
