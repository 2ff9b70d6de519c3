"""The page of an export: report.html, generated from report.json alone, without torch.

Sections without figures in the report are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from compressor.quality.intervals import format_count
from compressor.quality.metrics import EXPECTED_LOSS, LABEL_FREE, METRICS
from compressor.report import exact_rewrites
from compressor.report.engine_text import describe_measurements
from compressor.report.pages import sections
from compressor.report.pages.formatting import (
    INTERVALS,
    action_done,
    capital,
    cell,
    interval,
    loss_unit,
    speedup_cell,
    value_text,
    with_unit,
)
from compressor.report.pages.html_page import Cell, Page, Points, Prose, Section, Table, Tile
from compressor.report.pages.precision_section import precision
from compressor.report.report import against

Json = dict[str, Any]

PAGE = "report.html"
# Descriptions of the variants below their table.
VARIANTS = {
    "original": "the unchanged model in fp32",
    "baseline": "the unchanged model, with the target and precision of the result",
    "result": "the exported model",
}
OF_A_REPORT = ("original", "baseline", "result")


def html(content: Json, shown: Mapping[str, str] | None = None) -> str:
    """Return the page as one HTML document.

    Args:
        content: the content of report.json.
        shown: previews of the samples whose predicted class changed, by id: images as data: URLs, and texts.
    """
    return page(content, shown or {}).to_html()


def page(content: Json, shown: Mapping[str, str]) -> Page:
    """Return the page as data."""
    candidates = (
        _notes(content),
        _limitations(content),
        _variants(content),
        sections.factorial(content),
        sections.sites(content),
        sections.search(content),
        precision(content),
        sections.scores(content),
        sections.states(content),
        sections.latencies(content),
        sections.examples(content, shown),
    )
    return Page(
        title=f"{content['model']['name']}, compressed",
        lead=list(_lead(content)),
        tiles=list(_tiles(content)),
        sections=[section for section in candidates if section is not None],
        environment=list(_environment(content)),
        command=content["command"],
    )


def previews_in(document: str) -> dict[str, str]:
    """Return the previews of samples on an earlier page of the same export, by id: data: URLs and texts."""
    reader = _PreviewReader()
    reader.feed(document)
    return reader.previews


class _PreviewReader(HTMLParser):
    """A parser that reads previews from a page: the device that builds an engine does not have the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.previews: dict[str, str] = {}
        self.name: str | None = None
        self.quoting = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "article":
            self.name = attributes.get("data-name")
        elif tag == "img" and self.name is not None:
            self.previews[self.name] = attributes.get("src") or ""
        self.quoting = tag == "blockquote"

    def handle_data(self, data: str) -> None:
        if self.quoting and self.name is not None:
            self.previews[self.name] = self.previews.get(self.name, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.quoting = False
        self.name = None if tag == "article" else self.name


# ----------------------------------------------------------------------------------------------------- headline


def _lead(content: Json) -> Iterator[str]:
    settings, plan = content["settings"], content["plan"]
    forms = [action_done(action) for action in plan["changes"].values()]
    kinds = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
    count = len(content["model"]["sites"])
    yield f"{len(forms)} of {count} branches changed{': ' if kinds else ''}{kinds}."
    yield f"{_target(content)}, batch {settings['batch']}, {settings['precision']}. Plan: {plan['rule']}."
    quality = content["quality"]
    if quality is not None:
        samples = quality["figures"]["result"]["n"]
        metric, source = capital(METRICS[quality["metric"]].title), Path(content["data"]["source"]).name
        yield f"{metric}, on {samples} test samples of {source}."


def _target(content: Json) -> str:
    target = content["settings"]["target"]
    return f"onnxruntime (target: {target})" if content["engine"].get("state") == "deferred" else str(target)


def _tiles(content: Json) -> Iterator[Tile]:
    latency, sizes, quality = content["latency"], content["sizes"], content["quality"]
    for name, over in content["speedup"].items():
        same_precision = name == "baseline" and len(content["speedup"]) > 1
        label = f"Speed-up at {content['settings']['precision']}" if same_precision else "Speed-up"
        yield Tile(label, f"{over['ratio']:.2f}×", f"{over['low']:.2f}–{over['high']:.2f}, over the {name}")
    start = next(name for name in OF_A_REPORT if name in sizes)
    if latency:
        yield Tile(
            "Latency", f"{latency['result']['median']:.3g} ms", f"{latency[start]['median']:.3g} ms {start}, medians"
        )
    if quality is not None:
        label, unit = METRICS[quality["metric"]].label, METRICS[quality["metric"]].unit
        figure, loss = quality["figures"]["result"], quality["loss"][start]
        yield Tile(
            capital(label),
            value_text(figure, unit),
            f"{interval(figure)}; {start} {value_text(quality['figures'][start], unit)}",
        )
        yield Tile(
            "Loss",
            f"{loss['value']:+.2f} {loss_unit(content)}".rstrip(),
            f"{interval(loss, signed=True)}, against the {start}",
        )
    for label, key, unit in (
        ("ONNX file", "bytes", "B"),
        ("Parameters", "parameters", ""),
        ("Multiply-adds", "multiply_adds", ""),
    ):
        after, before = sizes["result"][key], sizes[start][key]
        share = f"{after / before:.0%} of {format_count(before, ' ')}{unit}" if before else ""
        yield Tile(label, f"{format_count(after, ' ')}{unit}", share)


def _notes(content: Json) -> Section | None:
    reason = content["no_quality_because"]
    lines = [] if reason is None else [f"No quality stated: {reason}."]
    lines += [*content["notes"], *describe_measurements(content["engine"])]
    return Section("Notes", [Points(lines)]) if lines else None


def _limitations(content: Json) -> Section | None:
    rows: list[list[Cell]] = [[entry["feature"], entry["reason"]] for entry in content.get("limitations", ())]
    return Section("Limitations", [Table(["", "reason and consequence"], rows)]) if rows else None


def _variants(content: Json) -> Section:
    names = [name for name in OF_A_REPORT if name in content["sizes"]]
    prose = " ".join(f"{capital(name)}: {VARIANTS[name]}." for name in names)
    table = Table(["", *names], list(_rows(content, names)), caption=INTERVALS)
    return Section("Results", [table, Prose(prose)])


def _rows(content: Json, names: Sequence[str]) -> Iterator[list[Cell]]:
    latency, sizes, quality = content["latency"], content["sizes"], content["quality"]
    if quality is not None:
        metric = METRICS[quality["metric"]]
        label, unit = metric.label, metric.unit
        yield [with_unit(label, unit), *(cell(quality["figures"][name]) for name in names)]
        for name in (name for name in names if name in quality["loss"]):
            loss = cell(quality["loss"][name], signed=True)
            yield [with_unit(f"loss vs {name}", loss_unit(content)), *against(names, name, loss)]
        if "result" in quality.get("expected", {}):
            expected = cell(quality["expected"]["result"], signed=True)
            yield [EXPECTED_LOSS, *(expected if name == "result" else "" for name in names)]
        for other, by_variant in quality.get("further", {}).items():
            yield [METRICS[other].label, *(cell(by_variant[name]) for name in names)]
        for key, (title, scale) in LABEL_FREE.items():
            if key in quality["label_free"] and not (key == "agreement" and metric.compares):
                figure = cell(quality["label_free"][key], places=2 if scale > 1 else 4)
                yield [title, *(figure if name == "result" else "" for name in names)]
    if latency:
        cells = [
            (f"{timing['median']:.2f}", f"p90 {timing['p90']:.2f}, p99 {timing['p99']:.2f}")
            for timing in map(latency.get, names)
        ]
        yield ["latency, ms", *cells]
        for name in (name for name in names if name in content["speedup"]):
            yield [f"speed-up vs {name}", *against(names, name, speedup_cell(content["speedup"][name]))]
    yield ["parameters, M", *(f"{sizes[name]['parameters'] / 1e6:.2f}" for name in names)]
    yield ["multiply-adds, G", *(f"{sizes[name]['multiply_adds'] / 1e9:.3f}" for name in names)]
    alone = exact_rewrites.cells(content, names)
    if alone is not None:
        yield [exact_rewrites.LABEL, *alone]
    yield ["engine, MB", *(f"{sizes[name]['bytes'] / 1e6:.2f}" for name in names)]
    if any(sizes[name]["cache"] for name in names):
        yield ["cache, bytes per token", *(f"{sizes[name]['cache']}" for name in names)]


def _environment(content: Json) -> Iterator[tuple[str, str]]:
    device = content["engine"].get("environment")
    machines = [("", content["environment"])]
    if device is not None:
        machines.insert(0, ("device: ", device))
    for prefix, facts in machines:
        for name, value in facts.items():
            if isinstance(value, Mapping):
                yield from ((f"{prefix}{key}", str(inner)) for key, inner in value.items())
            elif value:
                yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    yield "seconds taken", f"{content['seconds']:.0f}"
