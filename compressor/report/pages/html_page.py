"""A page of figures, charts and tables as one self-contained HTML file: what `report.html` and others are made of.

A page is data (`Page`, its sections and their parts) and becomes text by `Page.to_html`. It opens without a network:
the charts are Altair's, and the JavaScript that draws them is written into the page. Colours are CSS variables, in the
charts too, so that dark mode and print need nothing drawn anew.
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
WIDTH = 860  # px of the text column; a chart of this width with its axes fills it
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Variables of page.css. A chart takes them by name: `alt.value(GOOD)`, or as the range of a scale.
INK, MUTED, LINE, SURFACE = "var(--ink)", "var(--muted)", "var(--line)", "var(--surface)"
ACCENT, GOOD, BAD, QUIET = "var(--accent)", "var(--good)", "var(--bad)", "var(--quiet)"
# Told apart in both schemes and by people who do not see red and green: blue, orange, teal, purple, olive, rose.
CATEGORIES = tuple(f"var(--c{number})" for number in range(1, 7))

Cell = str | tuple[str, str]  # the text, and what stands back below it, such as an interval


@dataclass(frozen=True)
class Tile:
    """A headline figure: what it is, its value, and an interval or comparison below."""

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
    """Text to copy, such as a command."""

    text: str


@dataclass(frozen=True)
class Chart:
    """An Altair chart, told in words by `alt` for those who do not see it, with a caption below."""

    chart: altair.TopLevelMixin
    alt: str
    caption: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """The chart as Vega-Lite, in the style of the page."""
        found: dict[str, Any] = self.chart.to_dict(validate=False)
        found.pop("$schema", None)  # the address of a schema: nothing here may name the network
        if not {"vconcat", "hconcat", "facet"} & set(found):  # those do without: their parts have widths
            found.setdefault("width", WIDTH)
            if found["width"] == WIDTH:
                found["autosize"] = {"type": "fit-x", "contains": "padding"}
        return found | {"config": found.get("config", {}) | style()}


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell names its row, the columns named in `words` hold words, the rest numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Example:
    """One input: a picture as a data: address or a text, and facts about it as name and value."""

    name: str
    facts: Sequence[tuple[str, str]]
    picture: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Examples side by side."""

    examples: Sequence[Example]


Part = Prose | Points | Code | Chart | Table | Gallery


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it, in order."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A title with lines below it, headline figures, sections, the environment and the command that made it all."""

    title: str
    lead: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    environment: Sequence[tuple[str, str]] = ()
    command: str = ""

    def to_html(self) -> str:
        """The page as one HTML document; whatever text it holds is escaped."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        # The template's own texts are ours; every value is escaped, and tojson escapes what could end a script.
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
            place=lambda part: next(at for at, chart in enumerate(charts) if chart is part),
            specs=[chart.spec for chart in charts],
            library=bundle() if charts else "",
            style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
            script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        )


def style() -> dict[str, Any]:
    """Vega-Lite's configuration: no background, thin lines, the page's font and colours."""
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
    """Vega, Vega-Lite (the version that Altair writes for) and vegaEmbed as one script: about 0.9 MB, made in 2 s."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    library: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    # Inside <script> only these three can end it or change how it is read; in strings and patterns \x3c means the same.
    for tag in ("</script", "<script", "<!--"):
        library = library.replace(tag, f"\\x3c{tag[1:]}")
    return library
