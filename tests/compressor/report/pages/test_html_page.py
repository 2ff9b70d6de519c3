"""Tests of HTML pages: escaping, no network access, and every kind of part."""

import json
import re
from html.parser import HTMLParser

import altair as alt
import pytest

from compressor.report.pages.html_page import (
    Chart,
    Code,
    Example,
    Gallery,
    Page,
    Points,
    Prose,
    Section,
    Table,
    Tile,
    bundle,
)

EVIL = "</script><script>window.evil = 1</script><img src=x onerror=alert(1)>&\"'"
LOADING = {"src", "href", "srcset", "data", "action", "poster", "background"}
VOID = {"meta", "link", "img"}


class Reader(HTMLParser):
    """A parser that records tags with their attributes and the texts between them, and checks the nesting."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def chart(name: str = "a") -> Chart:
    rows = alt.InlineData(values=[{"x": name, "y": 1}, {"x": "b", "y": 2}])
    return Chart(alt.Chart(rows).mark_bar().encode(x="x:N", y="y:Q"), f"two bars, {name}", f"caption {name}")


def page(text: str, *parts) -> Page:
    return Page(text, [text], [Tile(text, text, text)], [Section(text, parts)], [(text, text)], text)


@pytest.fixture(scope="module")
def evil() -> str:
    gallery = Gallery(
        [Example(EVIL, [(EVIL, EVIL)], text=EVIL), Example("b", [], picture="data:image/png;base64,AA==")]
    )
    table = Table([EVIL, EVIL], [[EVIL, (EVIL, EVIL)]], EVIL, [EVIL])
    return page(EVIL, Prose(EVIL), Points([EVIL]), Code(EVIL), chart(EVIL), table, gallery).to_html()


def test_names_cannot_become_tags_or_end_a_script(evil: str) -> None:
    """A text with tags in it creates no tag, and every part of the page shows it."""
    reader = Reader(evil)
    assert reader.open == []
    assert [tag for tag, _ in reader.tags].count("script") == 3  # the charts' data, the library and page.js
    assert [tag for tag, _ in reader.tags].count("img") == 1
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    shown = [text for text in reader.texts if text.strip() == EVIL]
    # title twice, lead, tile 3, heading, prose, list, code, table heading 2 and cells 3 and caption, example 4,
    # environment 2, command
    assert len(shown) == 2 + 1 + 3 + 1 + 1 + 1 + 1 + 6 + 4 + 2 + 1


def test_the_data_of_a_chart_is_unchanged(evil: str) -> None:
    (data,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', evil, re.S)
    (rows,) = json.loads(data)[0]["datasets"].values()
    assert rows[0]["x"] == EVIL


def test_nothing_is_loaded(evil: str) -> None:
    for tag, attributes in Reader(evil).tags:
        for name in LOADING & attributes.keys():
            assert (attributes[name] or "").startswith("data:"), tag
    policy = next(attributes["content"] for _, attributes in Reader(evil).tags if attributes.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    outside = evil.replace(bundle(), "")  # the library mentions its website in comments and error messages
    assert "http://" not in outside
    assert "https://" not in outside


def test_every_chart_has_an_index_an_alternative_text_and_a_caption() -> None:
    charts = [chart("one"), chart("two")]
    document = Page("t", [], [], [Section("a", charts[:1]), Section("b", charts[1:])]).to_html()
    elements = [attributes for tag, attributes in Reader(document).tags if "data-chart" in attributes]
    assert [attributes["data-chart"] for attributes in elements] == ["0", "1"]
    assert [attributes["aria-label"] for attributes in elements] == ["two bars, one", "two bars, two"]
    assert document.index("caption one") < document.index("caption two")


def test_a_page_without_charts_holds_no_script() -> None:
    document = page("plain", Prose("words")).to_html()
    assert not any(tag == "script" for tag, _ in Reader(document).tags)
    assert len(document) < 20_000  # the library alone is 900 kB


def test_empty_parts_are_left_out() -> None:
    document = Page("t", [], [], []).to_html()
    assert "Environment" not in document
    assert "Command" not in document
    assert not {"section", "dl", "noscript"} & {tag for tag, _ in Reader(document).tags}


def test_only_columns_of_numbers_are_right_aligned() -> None:
    table = Table(["", "n", "w"], [["a", ("1", "0–2"), "x"]], words=["w"])
    document = Page("t", [], [], [Section("s", [table])]).to_html()
    reader = Reader(document)
    cells = [attributes.get("class") for tag, attributes in reader.tags if tag == "td"]
    assert cells == ["number", None]
    assert [attributes.get("scope") for tag, attributes in reader.tags if tag == "th"] == ["col", "col", "col", "row"]
    assert "0–2" in reader.texts
