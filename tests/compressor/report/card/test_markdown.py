"""Tests of the escaping for Markdown, with markdown-it, an independent renderer, as the oracle."""

import json
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compressor.report.card import markdown
from compressor.report.card import model_card as card
from tests.compressor.report.card.test_model_card import report, timm_folder

markdown_it = pytest.importorskip("markdown_it", reason="it renders the Markdown")

HOSTILE = (
    "<script>alert(1)</script> `a` ``b` | c\n---\n# d [e](javascript:f) ![g](h) **i** _j_ \\` &lt; ''' \"\"\" {{ 7*7 }}"
)
texts = st.text(
    st.sampled_from("ab1 `\\<>&|*_[]()!#+=-.~:/\"'\n\t") | st.characters(codec="utf-8", exclude_categories=["Cc"]),
    max_size=40,
)


class Shown(HTMLParser):
    """The text and the tags of a document."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(document)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def rendered(text: str) -> Shown:
    return Shown(markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))


@settings(max_examples=50, deadline=None)
@given(texts)
@example(HOSTILE)
@example("1. one")
@example("- - -")
@example("\\`<b>\\`")
def test_prose_is_shown_as_it_is(text: str) -> None:
    """Without backticks, the text is shown exactly; with them, code spans remain, and nothing else is interpreted."""
    shown = rendered(f"- {markdown.prose(text)}\n")
    assert set(shown.tags) <= {"ul", "li", "code"}
    if "`" not in text:
        assert " ".join(shown.text.split()) == " ".join(text.split())


@settings(max_examples=50, deadline=None)
@given(texts, texts)
@example(HOSTILE, "a|b")
def test_a_code_span_is_shown_as_it_is(text: str, other: str) -> None:
    row = f"| {markdown.code(text, in_table=True)} | {markdown.code(other, in_table=True)} |"
    shown = rendered(f"| a | b |\n|---|---|\n{row}\n")
    assert set(shown.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert "".join(shown.text.split()) == "".join(f"ab{text}{other}".split())
    assert shown.tags.count("td") == 2
    alone = rendered(markdown.code(text))
    assert "".join(alone.text.split()) == "".join(text.split())
    assert set(alone.tags) <= {"p", "code"}


@settings(max_examples=50, deadline=None)
@given(texts)
@example("a\n```\n<script>")
def test_a_block_of_code_is_shown_as_it_is(text: str) -> None:
    shown = rendered(f"{markdown.block(text, 'sh')}\n\nafter\n")
    assert shown.tags == ["pre", "code", "p"]
    assert "".join(shown.text.split()) == "".join(f"{text}after".split())


def test_nothing_from_outside_becomes_markup_of_a_card(tmp_path) -> None:
    """Every text that a user, a model, a data set or a plan can set is hostile."""
    content = report(timm_folder(tmp_path))
    plain = rendered(ModelCard(card.card(content, tmp_path)).text)
    model = content["model"]
    model |= {"name": HOSTILE, "hub_id": f"owner/{HOSTILE}", "inputs": [HOSTILE], "outputs": [HOSTILE], "task": HOSTILE}
    model["id2label"] = {"0": HOSTILE, "1": f"a\n\n{HOSTILE}", HOSTILE: "a"}
    content |= {
        "command": f"compressor export {HOSTILE}\n```\n{HOSTILE}",
        "data": content["data"] | {"source": HOSTILE, "reading": HOSTILE},
        "plan": {"rule": HOSTILE, "changes": {HOSTILE: "drop", "b": HOSTILE}},
        "timed_inputs": {HOSTILE: [1, 4]},
        "notes": [HOSTILE, f"# {HOSTILE}"],
        "limitations": [{"feature": HOSTILE, "reason": HOSTILE}],
        "healed": {"method": "x", "note": HOSTILE},
        "environment": content["environment"]
        | {"processor": HOSTILE, "packages": {HOSTILE: HOSTILE}, "gpus": [HOSTILE]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"license": HOSTILE}}))
    text = card.card(content, tmp_path)
    shown = rendered(ModelCard(text).text)
    assert set(shown.tags) <= set(plain.tags) | {"li", "code"}
    assert shown.tags.count("h1") == plain.tags.count("h1")
    assert shown.tags.count("h2") == plain.tags.count("h2")
    assert shown.tags.count("td") == plain.tags.count("td") + 2  # one more branch
    assert "{{ 7*7 }}" in shown.text  # the template is not evaluated again
    header = ModelCard(text).data
    assert header.license == HOSTILE
    assert header.tags == ["onnx", "onnxruntime", "compressor", "int8", "pruned"]


@pytest.mark.parametrize(
    "config",
    [
        {"inputs": {"x": {"shape": [1], "dtype": "torch.float32(__import__('os'))"}}},
        {"inputs": {"x": {"shape": ["__import__('os')"], "dtype": "torch.float32"}}},
        {"inputs": "x"},
        {"pretrained_cfg": {"input_size": [3, "os", 32], "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": ["os"], "std": [0.5] * 3}},
        {"eos_token_id": "os", "bos_token_id": "os"},
    ],
)
def test_no_text_of_a_config_becomes_code(tmp_path, config) -> None:
    """The card's lines of Python are meant to be copied and run."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert card.preprocessing_recipe.shapes(tmp_path) == {}
    assert card.preprocessing_recipe.picture(tmp_path) is None
    assert card.preprocessing_recipe.ends(tmp_path) == ()
    assert card.preprocessing_recipe.start(tmp_path) == 0
