"""The page of an export: report.html from what report.json holds, without torch and without running anything.

Sections whose figures a report lacks are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from compressor.quality.intervals import METRICS, scaled
from compressor.report.engine_text import told
from compressor.report.pages import sections
from compressor.report.pages.formatting import (
    INTERVALS,
    capital,
    cell,
    done,
    interval,
    loss_unit,
    times,
    value_text,
    with_unit,
)
from compressor.report.pages.html_page import Cell, Page, Points, Prose, Section, Table, Tile
from compressor.report.pages.precision_section import precision
from compressor.report.report import LABELS

Json = dict[str, Any]

PAGE = "report.html"
# What the variants are, where a table lists them.
VARIANTS = {
    "original": "the model as it is, in float",
    "baseline": "the model as it is, built like the result",
    "result": "what this export made",
}
OF_A_REPORT = ("original", "baseline", "result")


def html(content: Json, shown: Mapping[str, str] | None = None) -> str:
    """The page as one HTML document.

    Args:
        content: what report.json holds.
        shown: pictures (as data: addresses) and texts of the samples that are answered differently, by their id.
    """
    return page(content, shown or {}).to_html()


def page(content: Json, shown: Mapping[str, str]) -> Page:
    """Everything on the page, as data."""
    found = (
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
        sections=[section for section in found if section is not None],
        environment=list(_environment(content)),
        command=content["command"],
    )


def shown_in(document: str) -> dict[str, str]:
    """The pictures and texts that an earlier page of the same export shows, by the samples' id."""
    reader = _Shown()
    reader.feed(document)
    return reader.found


class _Shown(HTMLParser):
    """Reads examples back: the data set is not at hand where an engine is built."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.name: str | None = None
        self.quoting = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "article":
            self.name = given.get("data-name")
        elif tag == "img" and self.name is not None:
            self.found[self.name] = given.get("src") or ""
        self.quoting = tag == "blockquote"

    def handle_data(self, data: str) -> None:
        if self.quoting and self.name is not None:
            self.found[self.name] = self.found.get(self.name, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.quoting = False
        self.name = None if tag == "article" else self.name


# ----------------------------------------------------------------------------------------------------- headline


def _lead(content: Json) -> Iterator[str]:
    settings, plan = content["settings"], content["plan"]
    forms = [done(action) for action in plan["changes"].values()]
    kinds = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
    count = len(content["model"]["sites"])
    yield f"{len(forms)} of {count} branches changed{': ' if kinds else ''}{kinds}."
    yield f"{_target(content)}, batch {settings['batch']}, {settings['precision']}. Plan: {plan['rule']}."
    quality = content["quality"]
    if quality is not None:
        judged = quality["figures"]["result"]["n"]
        metric, source = capital(METRICS[quality["metric"]]), Path(content["data"]["source"]).name
        yield f"{metric}, on {judged} test samples of {source}."


def _target(content: Json) -> str:
    target = content["settings"]["target"]
    return f"onnxruntime, for {target}" if content["engine"].get("state") == "deferred" else str(target)


def _tiles(content: Json) -> Iterator[Tile]:
    latency, sizes, quality = content["latency"], content["sizes"], content["quality"]
    for name, over in content["speedup"].items():
        beside = name == "baseline" and len(content["speedup"]) > 1
        label = f"Speed-up at {content['settings']['precision']}" if beside else "Speed-up"
        yield Tile(label, f"{over['ratio']:.2f}×", f"{over['low']:.2f}–{over['high']:.2f}, over the {name}")
    start = next(name for name in OF_A_REPORT if name in sizes)
    if latency:
        yield Tile(
            "Latency", f"{latency['result']['median']:.3g} ms", f"{latency[start]['median']:.3g} ms {start}, medians"
        )
    if quality is not None:
        label, unit = LABELS[quality["metric"]]
        figure, lost = quality["figures"]["result"], quality["loss"][start]
        yield Tile(
            capital(label),
            value_text(figure, unit),
            f"{interval(figure)}; {start} {value_text(quality['figures'][start], unit)}",
        )
        yield Tile(
            "Loss",
            f"{lost['value']:+.2f} {loss_unit(content)}".rstrip(),
            f"{interval(lost, signed=True)}, against the {start}",
        )
    for label, key, unit in (
        ("ONNX file", "bytes", "B"),
        ("Parameters", "parameters", ""),
        ("Multiply-adds", "multiply_adds", ""),
    ):
        after, before = sizes["result"][key], sizes[start][key]
        share = f"{after / before:.0%} of {scaled(before, ' ')}{unit}" if before else ""
        yield Tile(label, f"{scaled(after, ' ')}{unit}", share)


def _notes(content: Json) -> Section | None:
    because = content["no_quality_because"]
    lines = [] if because is None else [f"No quality stated: {because}."]
    lines += [*content["notes"], *told(content["engine"])]
    return Section("To know first", [Points(lines)]) if lines else None


def _limitations(content: Json) -> Section | None:
    rows: list[list[Cell]] = [[each["feature"], each["reason"]] for each in content.get("limitations", ())]
    return Section("Limitations", [Table(["", "what was found, and what follows"], rows)]) if rows else None


def _variants(content: Json) -> Section:
    names = [name for name in OF_A_REPORT if name in content["sizes"]]
    prose = " ".join(f"{capital(name)}: {VARIANTS[name]}." for name in names)
    table = Table(["", *names], list(_rows(content, names)), caption=INTERVALS)
    return Section("Gained and lost", [table, Prose(prose)])


def _rows(content: Json, names: Sequence[str]) -> Iterator[list[Cell]]:
    latency, sizes, quality = content["latency"], content["sizes"], content["quality"]
    if quality is not None:
        label, unit = LABELS[quality["metric"]]
        yield [with_unit(label, unit), *(cell(quality["figures"][name]) for name in names)]
        lost = [quality["loss"].get(name) for name in names]
        yield [
            with_unit("loss of the result", loss_unit(content)),
            *(cell(each, signed=True) if each else "" for each in lost),
        ]
        for key, label in (("agreement", "same answers, %"), ("divergence", "divergence")):
            if key in quality["label_free"] and key != quality["metric"]:
                found = quality["label_free"][key]
                places = 2 if key == "agreement" else 4
                yield [label, *([""] * (len(names) - 1)), cell(found, places=places)]
    if latency:
        tails = [
            (f"{each['median']:.2f}", f"p90 {each['p90']:.2f}, p99 {each['p99']:.2f}")
            for each in map(latency.get, names)
        ]
        yield ["latency, ms", *tails]
        yield ["speed-up of the result", *(times(content["speedup"].get(name)) for name in names)]
    yield ["parameters, M", *(f"{sizes[name]['parameters'] / 1e6:.2f}" for name in names)]
    yield ["multiply-adds, G", *(f"{sizes[name]['multiply_adds'] / 1e9:.3f}" for name in names)]
    yield ["engine, MB", *(f"{sizes[name]['bytes'] / 1e6:.2f}" for name in names)]
    if any(sizes[name]["cache"] for name in names):
        yield ["cache, bytes a token", *(f"{sizes[name]['cache']}" for name in names)]


def _environment(content: Json) -> Iterator[tuple[str, str]]:
    device = content["engine"].get("environment")
    places = [("", content["environment"])] if device is None else [("device: ", device), ("", content["environment"])]
    for prefix, found in places:
        for name, value in found.items():
            if isinstance(value, Mapping):
                yield from ((f"{prefix}{key}", str(inner)) for key, inner in value.items())
            elif value:
                yield f"{prefix}{name}", ", ".join(value) if isinstance(value, list) else str(value)
    yield "seconds taken", f"{content['seconds']:.0f}"
