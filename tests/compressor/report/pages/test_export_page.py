"""report.html of a real export: in a browser, against report.json, and without what a report lacks."""

import copy
import itertools
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor.measure import latency as engine_timing
from compressor.report.pages.export_page import html, page, shown_in
from compressor.report.pages.html_page import Chart, Gallery, Table
from compressor.report.pages.sections import _rank_correlation
from runtimes.base.timing import interleave
from tests.browser import browser, opened
from tests.compressor.benchmark.test_bench import small

pytest.importorskip("onnxruntime", reason="the target of this export")

HEADINGS = {
    "Gained and lost": 0,
    "Compression and int8, alone and together": 2,
    "What was done where": 1,
    "What speed costs": 1,
    "Score and measured effect": 1,
    "Similarity along the depth": 1,
    "Latency": 1,
    "Where answers differ": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three small blocks with everything a report can hold: a search, merged tokens, the factorial, labels."""
    room = tmp_path_factory.mktemp("page")
    module, example = small()
    pictures = np.random.default_rng(0).standard_normal((96, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(pictures)).argmax(-1).numpy()
    np.savez(room / "rows.npz", x=pictures, y=labels)
    with pytest.MonkeyPatch.context() as patch:  # real timing, but brief
        patch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
        compressor.export(
            module,
            example_inputs=example,
            task="image-classification",
            data=room / "rows.npz",
            drop="auto",
            actions="drop",
            tokens="0,2,0",
            cost="macs",
            max_loss=60.0,
            factorial=True,
            rounds=2,
            output=room / "out",
        )
    return room / "out"


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def document(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def sections(content, shown=None):
    return {section.heading: list(section.parts) for section in page(content, shown or {}).sections}


def parts(content, heading, kind):
    return [part for part in sections(content)[heading] if isinstance(part, kind)]


def rows_of(spec):
    """All rows of data of a chart, once for each mark that shows them: equal rows are stored once."""
    shown = re.findall(r'"data": \{"name": "([^"]+)"\}', json.dumps(spec))
    return [row for name in shown for row in spec["datasets"][name]]


# --------------------------------------------------------------------------------------------------- in a browser


def test_a_browser_draws_every_figure_and_loads_nothing(folder, content, tmp_path):
    file = folder / "report.html"
    with browser() as chromium:
        light = opened(chromium, file)
        dark = opened(chromium, file, scheme="dark")
        for found in (light, dark):
            assert found.complaints == []
            assert found.requests == [file.as_uri()]
            assert found.page.evaluate("document.documentElement.dataset.drawn") == "yes"
            marks = found.marks()
            assert len(marks) == sum(HEADINGS.values())
            assert min(marks) > 0
        assert light.page.locator("h2").all_inner_texts()[-2:] == ["Environment", "Made by"]
        assert set(HEADINGS) <= set(light.page.locator("h2").all_inner_texts())
        _check_colours(light.page, dark.page)
        _check_shape(light.page)
        _check_tiles(light.page, content)
        light.page.emulate_media(media="print", color_scheme="dark")  # paper is white, whatever the screen prefers
        assert light.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light.page.pdf(format="A4").startswith(b"%PDF")


def _check_colours(light, dark):
    """Page and charts follow the scheme: words and marks have other colours in the dark, and neither is invisible."""
    for place in ("body", "[data-chart] g.role-axis-label text", "[data-chart='2'] g.mark-rect path"):
        read = f"""getComputedStyle(document.querySelector("{place}"))"""
        kind = "color" if place == "body" else "fill"
        colours = [each.evaluate(f"{read}.{kind}") for each in (light, dark)]
        assert colours[0] != colours[1]
        backgrounds = [each.evaluate("getComputedStyle(document.body).backgroundColor") for each in (light, dark)]
        assert all(colour != background for colour, background in zip(colours, backgrounds, strict=True))


def _check_shape(page):
    """Nothing sticks out to the side, and no picture is broken."""
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") > 0
    edge = page.evaluate("document.querySelector('main').getBoundingClientRect().right")
    ends = page.eval_on_selector_all("svg", "all => all.map(one => one.getBoundingClientRect().right)")
    assert max(ends) <= edge


def _check_tiles(page, content):
    tiles = dict(zip(*(page.locator(f".tile {part}").all_inner_texts() for part in ("dt", ".value")), strict=True))
    assert tiles["Speed-up"] == f"{content['speedup']['original']['ratio']:.2f}×"
    assert tiles["Speed-up at int8"] == f"{content['speedup']['baseline']['ratio']:.2f}×"
    assert tiles["Top-1 accuracy"] == f"{content['quality']['figures']['result']['value']:.2f} %"
    assert tiles["Loss"] == f"{content['quality']['loss']['original']['value']:+.2f} %"
    assert tiles["ONNX file"] == f"{content['sizes']['result']['bytes'] / 1e3:.3g} kB"


# ------------------------------------------------------------------------------------- the figures of report.json


def test_the_page_of_the_folder_is_made_of_its_report_alone(content, document):
    """So that it can be made anew; the samples' pictures come from the page before."""
    assert html(content, shown_in(document)) == document


def test_the_site_map_shows_each_branch_once_with_its_action(content):
    (chart,) = parts(content, "What was done where", Chart)
    rows = rows_of(chart.spec)
    cells = {row["site"]: row["action"] for row in rows if "site" in row}
    assert list(cells) == [site["name"] for site in content["model"]["sites"]]
    assert {name: action for name, action in cells.items() if action != "keep"} == content["plan"]["changes"]
    assert all(name in chart.alt for name in content["plan"]["changes"])
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    assert len(tokens) == len({site["block"] for site in content["model"]["sites"]})
    assert tokens == sorted(tokens, reverse=True)


def test_tokens_left_are_those_that_the_plan_leaves(content):
    """Two tokens merged behind the second attention: the branches behind it get two less."""
    left = content["evidence"]["tokens"]
    names = [site["name"] for site in content["model"]["sites"]]
    merging = content["plan"]["changes"]
    for before, after in itertools.pairwise(names):
        assert left[before] - left[after] == (2 if merging.get(before) == "merge:2" else 0)
    assert (left[names[0]], left[names[-1]]) == (17, 15)  # 16 patches and the class token


def test_the_front_ends_with_the_chosen_plan(content):
    found = content["search"]
    assert [point["number"] for point in found["front"]] == list(range(len(found["steps"]) + 1))
    assert [point["loss"] for point in found["front"][1:]] == [step["loss"] for step in found["steps"]]
    assert found["front"][found["chosen"]]["predicted"] == pytest.approx(found["predicted_speedup"], rel=1e-12)
    (chart,) = parts(content, "What speed costs", Chart)
    chosen = {row["number"] for row in rows_of(chart.spec) if row.get("kind") == "the chosen plan"}
    assert chosen == {found["chosen"]}


def test_scores_and_effects_are_of_the_same_branches(content):
    rows = content["evidence"]["sites"]
    assert list(rows) == [site["name"] for site in content["model"]["sites"]]
    assert all(-1.0 <= row["cosine"] <= 1.0 for row in rows.values())
    both = {name for name, row in rows.items() if row["effect"] is not None}
    assert both == {name for name in rows if content["plan"]["changes"].get(name) != "merge:2"}  # asked for, not tried
    (chart,) = parts(content, "Score and measured effect", Chart)
    drawn = {row["site"]: row["effect"] for row in rows_of(chart.spec)}
    assert drawn == {name: rows[name]["effect"] for name in both}


def test_the_heat_map_is_the_matrix(content):
    evidence = content["evidence"]
    (chart,) = parts(content, "Similarity along the depth", Chart)
    rows = rows_of(chart.spec)
    assert len(rows) == len(evidence["states"]) ** 2
    for row in rows:
        assert row["v"] == pytest.approx(evidence["similarity"][row["a"]][row["b"]], abs=5e-5)  # rounded to 4 places
        assert row["a"] != row["b"] or row["v"] == pytest.approx(1.0, abs=1e-4)


def test_tables_and_bars_hold_the_factorials_figures(content):
    speeds, losses = parts(content, "Compression and int8, alone and together", Chart)
    cells = {name: cell for name, cell in content["factorial"]["cells"].items() if cell["speedup"]}
    for chart, key, value in ((speeds, "speedup", "ratio"), (losses, "loss", "value")):
        drawn = {row["name"]: (row["value"], row["low"], row["high"]) for row in rows_of(chart.spec)}
        assert drawn == {name: (cell[key][value], cell[key]["low"], cell[key]["high"]) for name, cell in cells.items()}
    whole = content["factorial"]["interactions"][0]
    product = whole["speedup"]["change"]["ratio"] * whole["speedup"]["int8"]["ratio"]
    assert [row["expected"] for row in rows_of(speeds.spec) if row["name"] == "compressed int8"] == [product]
    (table,) = parts(content, "Compression and int8, alone and together", Table)
    assert [row[0] for row in table.rows] == list(content["factorial"]["cells"])


def test_every_run_is_drawn_or_counted(content):
    (chart,) = parts(content, "Latency", Chart)
    found = re.search(r"not drawn: (\d+)", chart.caption)
    beyond = int(found[1]) if found else 0  # a quiet machine has none
    total = sum(cell["latency"]["n"] for cell in content["factorial"]["cells"].values())
    assert sum(row.get("n", 0) for row in rows_of(chart.spec)) + beyond == total
    assert f"{total} runs" in chart.caption
    medians = {row["name"]: row["median"] for row in rows_of(chart.spec) if "median" in row}
    for name, cell in content["factorial"]["cells"].items():
        assert medians[name] == pytest.approx(cell["latency"]["median"], rel=1e-12)


def test_examples_are_samples_that_really_changed(content, document):
    changed = content["quality"]["changed"]
    agreement = content["quality"]["label_free"]["agreement"]
    wrong = round((100.0 - agreement["value"]) / 100.0 * agreement["n"])
    assert len(changed) == min(8, wrong) > 0
    assert [each["regret"] for each in changed] == sorted((each["regret"] for each in changed), reverse=True)
    shown = shown_in(document)
    assert list(shown) == [each["id"] for each in changed]
    assert all(picture.startswith("data:image/png;base64,") for picture in shown.values())
    assert all(content["data"]["test_ids"][each["place"]] == each["id"] for each in changed)
    assert "data:image" not in json.dumps(content)  # pictures of the user's data are in the page alone
    (gallery,) = parts(content, "Where answers differ", Gallery)
    for example, each in zip(gallery.examples, changed, strict=True):
        assert each["before"][0] != each["after"][0]
        facts = dict(example.facts)
        assert facts["label"] == str(each["label"])
        assert facts["original"].startswith(f"{each['before'][0]} ({each['before'][1]:.0%})")


# ------------------------------------------------------------------------------------------------- what is absent


@pytest.mark.parametrize(
    ("heading", "change"),
    [
        ("Compression and int8, alone and together", {"factorial": None}),
        ("What speed costs", {"search": {}}),
        ("Precision", {"precision": {}, "engine": {}}),
        ("Score and measured effect", {"evidence": {}}),
        ("Similarity along the depth", {"evidence": {}}),
        ("Where answers differ", {"quality": None, "no_quality_because": "the data is random"}),
    ],
)
def test_sections_without_data_are_left_out(content, heading, change):
    before, after = sections(content), sections(content | change)
    gone = {heading} | ({"Similarity along the depth", "Score and measured effect"} if "evidence" in change else set())
    assert set(before) - set(after) == gone
    assert all(after.values())


def test_a_bare_report_has_no_empty_section_and_says_why(content):
    """No quality, no int8, no search: what an export on random data by names leaves."""
    bare = copy.deepcopy(content)
    bare |= {
        "quality": None,
        "no_quality_because": "the data is random",
        "factorial": None,
        "search": {},
        "evidence": {},
        "precision": {},
        "limitations": [],
    }
    bare["engine"].pop("layers")
    for part in ("latency", "sizes", "speedup"):
        bare[part].pop("original")
    found = page(bare, {})
    assert [section.heading for section in found.sections] == [
        "To know first",
        "Gained and lost",
        "What was done where",
        "Latency",
    ]
    assert "No quality stated: the data is random." in found.sections[0].parts[0].lines
    assert not any("accuracy" in tile.label or tile.label == "Loss" for tile in found.tiles)
    assert "accuracy" not in found.to_html().replace(content["command"], "").split("<script")[0]


def test_names_from_outside_are_escaped(content):
    evil = copy.deepcopy(content)
    evil["model"]["name"] = evil["command"] = evil["quality"]["changed"][0]["id"] = "</title></script><script>bad()"
    assert "<script>bad()" not in html(evil, {"</title></script><script>bad()": "<script>bad()"})


def test_texts_are_read_back_like_pictures(content):
    changed = copy.deepcopy(content)
    id = changed["quality"]["changed"][0]["id"]
    shown = {id: 'a <b> & "c"\nsecond line'}
    assert shown_in(html(changed, shown)) == shown


def test_ranks_are_compared_not_values():
    assert _rank_correlation([1.0, 2.0, 3.0, 4.0], [8.0, 4.0, 2.0, 1.0]) == pytest.approx(-1.0, abs=1e-12)
    assert _rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1e6]) == pytest.approx(1.0, abs=1e-12)


def test_the_file_is_listed_and_small(folder):
    entry = json.loads((folder / "manifest.json").read_text())["files"]["report.html"]
    assert entry["bytes"] == (folder / "report.html").stat().st_size < 2_000_000  # the library is 0.9 MB of it


def test_nothing_here_needs_torch():
    """The page is made anew on the device."""
    source = Path(compressor.__file__).parent / "report" / "pages"
    for name in ("page.py", "report.py", "report_sections.py", "report_charts.py", "report_text.py"):
        assert "torch" not in re.sub(r'"""[\s\S]*?"""|#.*', "", (source / name).read_text())


def test_the_precision_is_told_with_all_that_was_tried_for_it(content):
    trial = {"precision": "int8", "milliseconds": 2.0, "speedup": 1.5, "loss": 0.07, "verdict": "chosen"}
    way = {"method": "mse", "smoothed": True, "loss": 0.07}
    result = content["precision"]["result"] | {"calibrations": [way, way | {"method": "typical", "smoothed": False}]}
    result |= {"tried": [{"by": "nncf", "loss": 0.2, "milliseconds": 2.5}], "calibration": "mse", "smoothed": True}
    changed = content | {"trials": [trial], "precision": {"result": result}}
    trials, told, quantizers, ways, *_ = sections(changed)["Precision"]
    assert trials.rows == [["int8", "2.00", "1.50", "0.07", "chosen"]]
    assert f"{result['nodes']} products in int8. Ranges: mse, after SmoothQuant." in told.text
    assert quantizers.rows == [["nncf", "2.50", "0.20"]]
    assert ways.rows == [["mse, after SmoothQuant", "0.07"], ["typical", "0.07"]]


def test_the_layers_of_the_engine_are_told_with_its_precision(content):
    found = content["engine"]["layers"]
    told, kinds = sections(content | {"precision": {}})["Precision"]
    assert told.text.startswith(f"The engine has {found['count']} layers: ")
    assert kinds.rows[0] == [next(iter(found["kinds"])), str(max(found["kinds"].values()))]
    assert sum(int(number) for _, number in kinds.rows) == found["count"]
    rest = content["precision"]["result"] | {"rest": "fp16"}
    first = sections(content | {"precision": {"result": rest}})["Precision"][0]
    assert f"{rest['nodes']} products in int8, the rest in fp16." in first.text
