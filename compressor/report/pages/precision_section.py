"""The section of an export's page on its precision: what was tried, what was taken, and what stayed in float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compressor.report import engine_layers
from compressor.report.pages.html_page import Part, Prose, Section, Table

Json = dict[str, Any]


def precision(content: Json) -> Section | None:
    """How the result got its precision, and what the engine made of it; None where there is nothing to tell."""
    parts = [*_parts(content), *_layers(content["engine"])]
    return Section("Precision", parts) if parts else None


def _parts(content: Json) -> Iterator[Part]:
    trials, facts = content.get("trials") or [], content["precision"].get("result")
    if trials:
        rows = [
            [each["precision"], *map(_figure, (each["milliseconds"], each["speedup"], each["loss"])), each["verdict"]]
            for each in trials
        ]
        yield Table(
            ["", "latency, ms", "speed-up, ×", "expected loss, %", ""],
            rows,
            caption="Each precision of the target on the result: its quietest burst, its loss on validation data.",
        )
    if facts is None:
        return
    yield Prose(_told(facts))
    if facts["tried"]:
        rows = [[each["by"], _figure(each["milliseconds"]), _figure(each["loss"])] for each in facts["tried"]]
        yield Table(["quantizer", "latency, ms", "expected loss, %"], rows)
    if len(facts.get("calibrations", ())) > 1:
        rows = [[_method(each), _figure(each["loss"])] for each in facts["calibrations"]]
        yield Table(
            ["ranges of activations", "expected loss, %"], rows, caption="In the order in which they were tried."
        )


def _layers(engine: Json) -> Iterator[Part]:
    """What the runtime says it runs."""
    yield from (Prose(line) for line in engine_layers.told(engine))
    found = engine.get("layers") or {}
    if "kinds" in found:
        caption = "By the runtime's own account. A layer counts by the narrowest type that it reads."
        yield Table(["kind of layer", "number"], engine_layers.kinds(found), caption=caption)


def _told(facts: Json) -> str:
    """One or two sentences on the result's precision."""
    lost = "" if facts["loss"] is None else f", with a loss to expect of {facts['loss']:.2f} % on validation data"
    made = f"{facts['precision']} by {facts['by']}{lost}."
    if "nodes" not in facts:
        return made
    back = [kept["module"] or kept["node"] for kept in facts["kept"] if kept["sensitivity"] is not None]
    stayed = f" In float for accuracy: {', '.join(back)}." if back else ""
    ranges = f" Ranges: {_method(facts | {'method': facts['calibration']})}." if facts["calibration"] else ""
    rest = f", the rest in {facts['rest']}" if facts.get("rest", "fp32") != "fp32" else ""
    return f"{made} {facts['nodes']} products in int8{rest}.{ranges}{stayed}"


def _method(found: Json) -> str:
    name = found["method"] or "at run time"
    return f"{name}, after SmoothQuant" if found["smoothed"] else str(name)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
