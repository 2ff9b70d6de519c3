"""Self-contained HTML pages of figures, charts and tables, such as `report.html` and `study.html`.

A `Page` is data: sections and their parts. `Page.to_html` renders it. A page opens without a network: its charts are
Altair charts, and the page contains the JavaScript that draws them. All colours, those of the charts included, are CSS
variables, so dark mode and print need no redrawing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair

TEMPLATES = Path(__file__).parent / "templates"
WIDTH = 860  # px, width of the text column and of a full-width chart with its axes
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Variables of page.css. Charts use them as values, `alt.value(GOOD)`, or as the range of a scale.
INK, MUTED, LINE, SURFACE = "var(--ink)", "var(--muted)", "var(--line)", "var(--surface)"
ACCENT, GOOD, BAD, QUIET = "var(--accent)", "var(--good)", "var(--bad)", "var(--quiet)"
# Distinct in both colour schemes and for red-green colour blindness: blue, orange, teal, purple, olive, rose.
CATEGORIES = tuple(f"var(--c{number})" for number in range(1, 7))

Cell = str | tuple[str, str]  # a text, or a text with a dimmed second line, such as an interval


@dataclass(frozen=True)
class Tile:
    """A headline figure: label, value, and a note such as an interval or a comparison."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of short lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A block of code, such as a command."""

    text: str


@dataclass(frozen=True)
class Chart:
    """An Altair chart with an alternative text `alt` for screen readers and a caption below."""

    chart: altair.TopLevelMixin
    alt: str
    caption: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """The chart as a Vega-Lite specification, in the style of the page."""
        spec: dict[str, Any] = self.chart.to_dict(validate=False)
        spec.pop("$schema", None)  # a URL; the page must not refer to the network
        if not {"vconcat", "hconcat", "facet"} & set(spec):  # the parts of these have widths of their own
            spec.setdefault("width", WIDTH)
            if spec["width"] == WIDTH:
                spec["autosize"] = {"type": "fit-x", "contains": "padding"}
        return spec | {"config": spec.get("config", {}) | style()}


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row is its heading; the columns named in `words` hold text, all others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Example:
    """One input: an image as a data: URL or a text, and facts about it as pairs of name and value."""

    name: str
    facts: Sequence[tuple[str, str]]
    picture: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Gallery:
    """A row of examples."""

    examples: Sequence[Example]


Part = Prose | Points | Code | Chart | Table | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it, in order."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A page: title, lead, headline figures, sections, the environment, and the command that was run."""

    title: str
    lead: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    environment: Sequence[tuple[str, str]] = ()
    command: str = ""

    def to_html(self) -> str:
        """Render the page as one HTML document; all text is escaped."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        # autoescape covers every value; tojson also escapes sequences that could end a script element.
        jinja = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        charts = [part for section in self.sections for part in section.parts if isinstance(part, Chart)]
        return jinja.get_template("page.html").render(
            page=self,
            kind=lambda part: type(part).__name__.lower(),
            place=lambda part: next(index for index, chart in enumerate(charts) if chart is part),
            specs=[chart.spec for chart in charts],
            library=bundle() if charts else "",
            style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
            script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        )


def style() -> dict[str, Any]:
    """Return Vega-Lite's configuration: no background, thin lines, the page's font and colours."""
    text = {"labelColor": MUTED, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500}
    axis = {"domainColor": LINE, "tickColor": LINE, "gridColor": LINE, "titlePadding": 10, "labelLimit": 260}
    return {
        "background": None,
        "font": FONT,
        "view": {"stroke": None},
        "axis": text | axis,
        "legend": text | {"symbolStrokeWidth": 0, "labelLimit": 260},
        "header": text,
        "title": {"color": INK, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
        "text": {"color": INK, "fontSize": 12},
        "range": {"category": list(CATEGORIES)},
    }


@functools.cache
def bundle() -> str:
    """Return Vega, Vega-Lite and vegaEmbed as one script of about 0.9 MB; bundling takes about 2 s.

    The version of Vega-Lite is that of Altair's schema.
    """
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    library: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    # Only these three can end a script element or change its parsing; \x3c is equivalent in strings and regular
    # expressions.
    for tag in ("</script", "<script", "<!--"):
        library = library.replace(tag, f"\\x3c{tag[1:]}")
    return library
