"""The precision section of an export's page: the precisions tried, the one chosen, and the layers left in float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compressor.report import engine_layers
from compressor.report.pages.html_page import Part, Prose, Section, Table

Json = dict[str, Any]


def precision(content: Json) -> Section | None:
    """Return the section on the precision of the result and the layers of its engine; None without such data."""
    parts = [*_parts(content), *_layers(content["engine"])]
    return Section("Precision", parts) if parts else None


def _parts(content: Json) -> Iterator[Part]:
    trials, facts = content.get("trials") or [], content["precision"].get("result")
    if trials:
        rows = [
            [
                trial["precision"],
                *map(_figure, (trial["milliseconds"], trial["speedup"], trial["loss"])),
                trial["verdict"],
            ]
            for trial in trials
        ]
        yield Table(
            ["", "latency, ms", "speed-up, ×", "expected loss, %", ""],
            rows,
            caption="Each precision that was tried: latency of its fastest burst, speed-up over fp32, and expected "
            "loss on validation data.",
        )
    if facts is None:
        return
    yield Prose(_description(facts, content["settings"].get("max_precision_loss")))
    if facts.get("float32"):
        rows = [[kept["module"] or kept["node"], kept["reason"]] for kept in facts["float32"]]
        caption = "Layers that stay in float32, because their values do not fit fp16."
        yield Table(["layer", "on calibration data"], rows, caption=caption)
    if facts["tried"]:
        rows = [[trial["by"], _figure(trial["milliseconds"]), _figure(trial["loss"])] for trial in facts["tried"]]
        yield Table(["quantizer", "latency, ms", "expected loss, %"], rows)
    if len(facts.get("calibrations", ())) > 1:
        order = "In the order in which they were tried; not measured where the output differs far more than by another."
        rows = [[_method(calibration), _figure(calibration["loss"])] for calibration in facts["calibrations"]]
        yield Table(["activation ranges", "expected loss, %"], rows, caption=order)


def _layers(engine: Json) -> Iterator[Part]:
    """Yield the layers of the engine, as the runtime reports them."""
    yield from (Prose(line) for line in engine_layers.describe_layers(engine))
    layers = engine.get("layers") or {}
    if "kinds" in layers:
        caption = "As the runtime reports them. The precision of a layer is the narrowest type that it reads."
        yield Table(["kind of layer", "number"], engine_layers.kinds(layers), caption=caption)


def _description(facts: Json, limit: float | None) -> str:
    """Describe the precision of the result in a few sentences."""
    loss = "" if facts["loss"] is None else f", with an expected loss of {facts['loss']:.2f} % on validation data"
    if facts["loss"] is not None and limit is not None and not facts["loss"] <= limit:
        loss += f", above the limit of {limit:g} %"
    first = f"{facts['precision']} by {facts['by']}{loss}."
    if "nodes" not in facts:
        return first
    names = [kept["module"] or kept["node"] for kept in facts["kept"] if kept["sensitivity"] is not None]
    in_float = f" In float for accuracy: {', '.join(names)}." if names else ""
    ranges = f" Activation ranges: {_method(facts | {'method': facts['calibration']})}." if facts["calibration"] else ""
    rest = f", the rest in {facts['rest']}" if facts.get("rest", "fp32") != "fp32" else ""
    return f"{first} {facts['nodes']} nodes in {facts['precision'].removesuffix('-dynamic')}{rest}.{ranges}{in_float}"


def _method(calibration: Json) -> str:
    name = calibration["method"] or "at run time"
    return f"{name}, after SmoothQuant" if calibration["smoothed"] else str(name)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
