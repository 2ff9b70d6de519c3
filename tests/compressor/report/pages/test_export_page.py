"""Tests of report.html of a real export: in a browser, against report.json, and with parts of the report missing."""

import copy
import itertools
import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

import compressor
from compressor.measure import latency as engine_timing
from compressor.report.pages.export_page import html, page, previews_in
from compressor.report.pages.html_page import Chart, Gallery, Table
from compressor.report.pages.sections import _example, _rank_correlation, scores
from runtimes.base.timing import interleave
from tests.browser import browser, opened
from tests.compressor.benchmark.test_bench import small
from tests.compressor.report.pages.test_html_page import EVIL, Reader

pytest.importorskip("onnxruntime", reason="the target of this export")

HEADINGS = {
    "Results": 0,
    "Compression and int8, separately and combined": 2,
    "Changes by block": 1,
    "Loss against speed-up": 1,
    "Score and measured effect": 1,
    "Similarity along the depth": 1,
    "Latency": 1,
    "Changed predictions": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Export three small blocks with all parts of a report: search, merged tokens, factorial and labels."""
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
    """Return the rows of data of a chart, once for each mark that uses them; equal rows are stored once."""
    names = re.findall(r'"data": \{"name": "([^"]+)"\}', json.dumps(spec))
    return [row for name in names for row in spec["datasets"][name]]


# --------------------------------------------------------------------------------------------------- in a browser


def test_a_browser_draws_every_figure_and_loads_nothing(folder, content, tmp_path):
    file = folder / "report.html"
    with browser() as chromium:
        light = opened(chromium, file)
        dark = opened(chromium, file, scheme="dark")
        for page_in_browser in (light, dark):
            assert page_in_browser.complaints == []
            assert page_in_browser.requests == [file.as_uri()]
            assert page_in_browser.page.evaluate("document.documentElement.dataset.drawn") == "yes"
            marks = page_in_browser.marks()
            assert len(marks) == sum(HEADINGS.values())
            assert min(marks) > 0
        assert light.page.locator("h2").all_inner_texts()[-2:] == ["Environment", "Command"]
        assert set(HEADINGS) <= set(light.page.locator("h2").all_inner_texts())
        _check_colours(light.page, dark.page)
        _check_shape(light.page)
        _check_tiles(light.page, content)
        light.page.emulate_media(media="print", color_scheme="dark")  # print ignores dark mode
        assert light.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light.page.pdf(format="A4").startswith(b"%PDF")


def _check_colours(light, dark):
    """Check that page and charts follow the colour scheme: text and marks change colour and stay visible."""
    for place in ("body", "[data-chart] g.role-axis-label text", "[data-chart='2'] g.mark-rect path"):
        read = f"""getComputedStyle(document.querySelector("{place}"))"""
        kind = "color" if place == "body" else "fill"
        colours = [page.evaluate(f"{read}.{kind}") for page in (light, dark)]
        assert colours[0] != colours[1]
        backgrounds = [page.evaluate("getComputedStyle(document.body).backgroundColor") for page in (light, dark)]
        assert all(colour != background for colour, background in zip(colours, backgrounds, strict=True))


def _check_shape(page):
    """Check that nothing overflows horizontally and no image is broken."""
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


# ------------------------------------------------------------------------------------------- against report.json


def test_the_page_of_the_folder_depends_on_its_report_alone(content, document):
    """The device can generate it again, with the previews of the earlier page."""
    assert html(content, previews_in(document)) == document


def test_the_site_map_shows_each_branch_once_with_its_action(content):
    (chart,) = parts(content, "Changes by block", Chart)
    rows = rows_of(chart.spec)
    cells = {row["site"]: row["action"] for row in rows if "site" in row}
    assert list(cells) == [site["name"] for site in content["model"]["sites"]]
    assert {name: action for name, action in cells.items() if action != "keep"} == content["plan"]["changes"]
    assert all(name in chart.alt for name in content["plan"]["changes"])
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    assert len(tokens) == len({site["block"] for site in content["model"]["sites"]})
    assert tokens == sorted(tokens, reverse=True)


def test_the_numbers_of_tokens_follow_the_plan(content):
    """The second attention merges two tokens, so the branches after it get two fewer."""
    left = content["evidence"]["tokens"]
    names = [site["name"] for site in content["model"]["sites"]]
    merging = content["plan"]["changes"]
    for before, after in itertools.pairwise(names):
        assert left[before] - left[after] == (2 if merging.get(before) == "merge:2" else 0)
    assert (left[names[0]], left[names[-1]]) == (17, 15)  # 16 patches and the class token


def test_the_front_ends_with_the_chosen_plan(content):
    search = content["search"]
    assert [point["number"] for point in search["front"]] == list(range(len(search["steps"]) + 1))
    assert [point["loss"] for point in search["front"][1:]] == [step["loss"] for step in search["steps"]]
    assert search["front"][search["chosen"]]["predicted"] == pytest.approx(search["predicted_speedup"], rel=1e-12)
    (chart,) = parts(content, "Loss against speed-up", Chart)
    chosen = {row["number"] for row in rows_of(chart.spec) if row.get("kind") == "chosen plan"}
    assert chosen == {search["chosen"]}


def test_scores_and_effects_are_of_the_same_branches(content):
    rows = content["evidence"]["sites"]
    assert list(rows) == [site["name"] for site in content["model"]["sites"]]
    assert all(-1.0 <= row["cosine"] <= 1.0 for row in rows.values())
    both = {name for name, row in rows.items() if row["effect"] is not None}
    # The search does not try a merge that --tokens sets.
    assert both == {name for name in rows if content["plan"]["changes"].get(name) != "merge:2"}
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
    speeds, losses = parts(content, "Compression and int8, separately and combined", Chart)
    cells = {name: cell for name, cell in content["factorial"]["cells"].items() if cell["speedup"]}
    for chart, key, value in ((speeds, "speedup", "ratio"), (losses, "loss", "value")):
        drawn = {row["name"]: (row["value"], row["low"], row["high"]) for row in rows_of(chart.spec)}
        assert drawn == {name: (cell[key][value], cell[key]["low"], cell[key]["high"]) for name, cell in cells.items()}
    whole = content["factorial"]["interactions"][0]
    product = whole["speedup"]["change"]["ratio"] * whole["speedup"]["int8"]["ratio"]
    assert [row["expected"] for row in rows_of(speeds.spec) if row["name"] == "compressed int8"] == [product]
    (table,) = parts(content, "Compression and int8, separately and combined", Table)
    assert [row[0] for row in table.rows] == list(content["factorial"]["cells"])


def test_the_table_compares_the_result_in_its_own_column(content):
    """Losses, speed-ups and agreement of the result stand below ``result``; the other variant is the reference."""
    (table,) = parts(content, "Results", Table)
    assert list(table.headings) == ["", "original", "baseline", "result"]
    rows = {row[0]: list(row[1:]) for row in table.rows}
    for place, name in enumerate(("original", "baseline")):
        loss, speedup = content["quality"]["loss"][name], content["speedup"][name]
        cells = rows[f"loss vs {name}, %"], rows[f"speed-up vs {name}"]
        assert [row[2][0] for row in cells] == [f"{loss['value']:+.2f}", f"{speedup['ratio']:.2f}×"]
        assert all(row[place] == "reference" and row[1 - place] == "" for row in cells)
    assert rows["same answers, %"][:2] == ["", ""]
    assert rows["same answers, %"][2][0] == f"{content['quality']['label_free']['agreement']['value']:.2f}"


def test_every_run_is_drawn_or_counted(content):
    (chart,) = parts(content, "Latency", Chart)
    match = re.search(r"not drawn: (\d+)", chart.caption)
    beyond = int(match[1]) if match else 0
    total = sum(cell["latency"]["n"] for cell in content["factorial"]["cells"].values())
    assert sum(row.get("n", 0) for row in rows_of(chart.spec)) + beyond == total
    assert f"{total} interleaved runs" in chart.caption
    medians = {row["name"]: row["median"] for row in rows_of(chart.spec) if "median" in row}
    for name, cell in content["factorial"]["cells"].items():
        assert medians[name] == pytest.approx(cell["latency"]["median"], rel=1e-12)


def test_examples_are_samples_whose_prediction_changed(content, document):
    changed = content["quality"]["changed"]
    agreement = content["quality"]["label_free"]["agreement"]
    wrong = round((100.0 - agreement["value"]) / 100.0 * agreement["n"])
    assert len(changed) == min(8, wrong) > 0
    regrets = [sample["regret"] for sample in changed]
    assert regrets == sorted(regrets, reverse=True)
    shown = previews_in(document)
    assert list(shown) == [sample["id"] for sample in changed]
    assert all(picture.startswith("data:image/png;base64,") for picture in shown.values())
    assert all(content["data"]["test_ids"][sample["place"]] == sample["id"] for sample in changed)
    assert "data:image" not in json.dumps(content)  # only the page holds images of the user's data
    (gallery,) = parts(content, "Changed predictions", Gallery)
    for example, sample in zip(gallery.examples, changed, strict=True):
        assert sample["before"][0] != sample["after"][0]
        facts = dict(example.facts)
        assert facts["label"] == str(sample["label"])
        assert facts["original"].startswith(f"{sample['before'][0]} ({sample['before'][1]:.0%})")


# -------------------------------------------------------------------------------------------------- missing parts


@pytest.mark.parametrize(
    ("heading", "change"),
    [
        ("Compression and int8, separately and combined", {"factorial": None}),
        ("Loss against speed-up", {"search": {}}),
        ("Precision", {"precision": {}, "engine": {}}),
        ("Score and measured effect", {"evidence": {}}),
        ("Similarity along the depth", {"evidence": {}}),
        ("Changed predictions", {"quality": None, "no_quality_because": "the data is random"}),
    ],
)
def test_sections_without_data_are_left_out(content, heading, change):
    before, after = sections(content), sections(content | change)
    gone = {heading} | ({"Similarity along the depth", "Score and measured effect"} if "evidence" in change else set())
    assert set(before) - set(after) == gone
    assert all(after.values())


def test_a_minimal_report_has_no_empty_section_and_states_the_reason(content):
    """No quality, no int8 and no search, as in an export on random data with named sites."""
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
    bare_page = page(bare, {})
    assert [section.heading for section in bare_page.sections] == ["Notes", "Results", "Changes by block", "Latency"]
    assert "No quality stated: the data is random." in bare_page.sections[0].parts[0].lines
    assert not any("accuracy" in tile.label or tile.label == "Loss" for tile in bare_page.tiles)
    assert "accuracy" not in bare_page.to_html().replace(content["command"], "").split("<script")[0]


def test_names_from_the_user_are_escaped(content):
    evil = copy.deepcopy(content)
    evil["model"]["name"] = evil["command"] = evil["quality"]["changed"][0]["id"] = "</title></script><script>bad()"
    assert "<script>bad()" not in html(evil, {"</title></script><script>bad()": "<script>bad()"})


def test_names_of_sites_classes_and_files_are_text_everywhere(content):
    """Text from outside stands in every part of the report, and the page has the tags of a page with harmless names."""
    names = {site["name"].split(".")[0] for site in content["model"]["sites"]}
    text = json.dumps(content)
    for name in (*names, "accuracy on", content["data"]["source"]):
        text = text.replace(json.dumps(name)[1:-1], json.dumps(EVIL)[1:-1])
    evil = json.loads(text)
    evil["limitations"] = [{"feature": EVIL, "reason": EVIL}]
    evil["notes"] = [EVIL]
    evil["trials"] = [{"precision": EVIL, "milliseconds": 1.0, "speedup": 1.0, "loss": 0.0, "verdict": EVIL}]
    evil["environment"] = {EVIL: EVIL}
    evil["model"]["id2label"] = {str(number): EVIL for number in range(4)}
    for each in evil["quality"]["changed"]:
        each["id"] = EVIL
    assert all(site["name"].startswith(EVIL) for site in evil["model"]["sites"])
    reader = Reader(html(evil, {EVIL: EVIL}))
    assert reader.open == []
    assert [tag for tag, _ in reader.tags].count("script") == 3  # the charts' data, the library and page.js
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert sum(EVIL in shown for shown in reader.texts) >= 10


def test_texts_are_read_from_a_page_like_images(content):
    changed = copy.deepcopy(content)
    id = changed["quality"]["changed"][0]["id"]
    shown = {id: 'a <b> & "c"\nsecond line'}
    assert previews_in(html(changed, shown)) == shown


def test_the_rank_correlation_compares_ranks_only():
    assert _rank_correlation([1.0, 2.0, 3.0, 4.0], [8.0, 4.0, 2.0, 1.0]) == pytest.approx(-1.0, abs=1e-12)
    assert _rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1e6]) == pytest.approx(1.0, abs=1e-12)
    left, right = [1.0, 1.0, 2.0, 3.0, 3.0, 3.0], [5.0, 4.0, 4.0, 2.0, 2.0, 9.0]
    assert _rank_correlation(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_equal_scores_or_effects_have_no_rank_correlation(content):
    """Branches of zeros, in their order, were said to correlate with their effects by +1.00."""
    assert _rank_correlation([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]) is None
    equal = copy.deepcopy(content)
    for row in equal["evidence"]["sites"].values():
        row["effect"] = 0.0
    (text, _) = scores(equal).parts
    assert text.text.endswith("All scores or all effects are equal, so they have no rank correlation.")


def test_the_file_is_listed_and_small(folder):
    entry = json.loads((folder / "manifest.json").read_text())["files"]["report.html"]
    assert entry["bytes"] == (folder / "report.html").stat().st_size < 2_000_000  # the library is 0.9 MB of it


def test_the_page_needs_no_torch():
    """The device that generates the page again need not have torch."""
    code = "import sys; sys.modules['torch'] = None; from compressor.report.pages import charts, export_page"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_section_on_precision_lists_all_trials(content):
    trial = {"precision": "int8", "milliseconds": 2.0, "speedup": 1.5, "loss": 0.07, "verdict": "chosen"}
    calibration = {"method": "mse", "smoothed": True, "loss": 0.07}
    typical = calibration | {"method": "typical", "smoothed": False}
    result = content["precision"]["result"] | {"calibrations": [calibration, typical]}
    result |= {"tried": [{"by": "nncf", "loss": 0.2, "milliseconds": 2.5}], "calibration": "mse", "smoothed": True}
    changed = content | {"trials": [trial], "precision": {"result": result}}
    trials, description, quantizers, calibrations, *_ = sections(changed)["Precision"]
    assert trials.rows == [["int8", "2.00", "1.50", "0.07", "chosen"]]
    assert f"{result['nodes']} nodes in int8. Activation ranges: mse, after SmoothQuant." in description.text
    assert quantizers.rows == [["nncf", "2.50", "0.20"]]
    assert calibrations.rows == [["mse, after SmoothQuant", "0.07"], ["typical", "0.07"]]


def test_the_section_on_precision_names_an_exceeded_limit_and_float32_layers(content):
    kept = {"node": "n", "module": "blocks.4.mlp.fc2", "reason": "largest value 5.5e+05", "sensitivity": None}
    result = {"precision": "fp16", "by": "compressor", "loss": 0.75, "tried": [], "float32": [kept]}
    changed = content | {"precision": {"result": result}}
    changed["settings"] = content["settings"] | {"max_precision_loss": 0.5}
    description, layers, *_ = sections(changed)["Precision"]
    assert description.text.endswith("loss of 0.75 % on validation data, above the limit of 0.5 %.")
    assert layers.rows == [["blocks.4.mlp.fc2", "largest value 5.5e+05"]]


def test_the_section_on_precision_describes_the_layers_of_the_engine(content):
    layers = content["engine"]["layers"]
    description, kinds = sections(content | {"precision": {}})["Precision"]
    assert description.text.startswith(f"The engine has {layers['count']} layers: ")
    assert kinds.rows[0] == [next(iter(layers["kinds"])), str(max(layers["kinds"].values()))]
    assert sum(int(number) for _, number in kinds.rows) == layers["count"]
    rest = content["precision"]["result"] | {"rest": "fp16"}
    first = sections(content | {"precision": {"result": rest}})["Precision"][0]
    assert f"{rest['nodes']} nodes in int8, the rest in fp16." in first.text


def test_an_example_names_its_classes():
    changed = {"id": "7", "label": 2, "before": [2, 0.9], "after": [0, 0.6]}
    named = _example(changed, "baseline", None, {"2": "shark", "0": "tench"})
    assert named.facts == [("label", "shark"), ("baseline", "shark (90%) ✓"), ("result", "tench (60%)")]
    assert _example(changed, "baseline", None, {}).facts[1] == ("baseline", "2 (90%) ✓")
