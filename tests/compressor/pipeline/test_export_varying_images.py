"""Models whose images vary in size from their folder to the files of their parts, and the lines of their cards."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from compressor import bench, export
from compressor.report.card.loader_snippet import make_snippet
from tests import varying_images, vision_language_models
from tests.encoder_decoders import sentences
from tests.varying_images import SIZES, picture
from tests.vision_language_models import write_captions

GENERATED = 20  # tokens at most, by the lines of a card
KINDS = {
    **dict.fromkeys(varying_images.KINDS, varying_images),
    **dict.fromkeys(("gemma3", "blip_2"), vision_language_models),
}
FIRST, *REST = KINDS
ALL = [FIRST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in REST)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("varying")


@pytest.fixture(scope="module")
def captions(shared):
    """Images of two sizes; their texts hold no placeholder, so that each image stands before its text."""
    images = [picture(number, SIZES[number % 2]) for number in range(12)]
    return write_captions(shared / "captions", images, sentences(12))


def exported(kind, shared, captions, folder, **options):
    path = KINDS[kind].saved(kind, shared)
    return export(str(path), data=str(captions), output=str(folder), rounds=1, **options).to_dict()


@pytest.mark.parametrize("kind", ALL)
def test_the_lines_of_the_card_generate_what_transformers_does(kind, shared, captions, tmp_path, monkeypatch, capsys):
    own = KINDS[kind]
    report = exported(kind, shared, captions, tmp_path / "out", drop=",".join(own.DROPPED[kind]))
    assert report["parity"]["result"] < 1e-4
    assert report["quality"]["metric"] == "perplexity"
    shared = kind == "gemma4"  # another layer still reads the keys and values of the attention
    assert report["sizes"]["result"]["cache"] * (1 if shared else 2) == report["sizes"]["baseline"]["cache"]
    varying = [each for each in report["limitations"] if each["feature"] == "size of the timed image"]
    assert len(varying) == (own is varying_images)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("num_hidden_layers") == (2 if kind == "qwen2_vl" else None)  # for transformers.js
    loader = make_snippet(report, tmp_path / "out")
    remarks = " ".join(loader.remarks)
    assert ("transformers.js expects these files" in remarks) == (kind in ("qwen2_vl", "qwen2_5_vl"))
    assert ("transformers.js 4.3 has no class for `blip-2`" in remarks) == (kind == "blip_2")
    monkeypatch.chdir(tmp_path / "out")
    exec(loader.text.replace("What is this?", " the dog runs").replace("processor.decode(answer)", "answer"), {})
    answer = json.loads(capsys.readouterr().out)
    lead = {"gemma3": vision_language_models.GEMMA["boi_token"], "blip_2": ""} | varying_images.LEAD
    image = Image.new("RGB", (640, 480))
    # As transformers loads it from the folder: for HyperCLOVA X always as byte pairs, whatever was saved.
    processor = AutoProcessor.from_pretrained(own.saved(kind, shared)) if kind == "hyperclovax" else own.processor(kind)
    found = processor(
        images=[[image]] if kind == "gemma3" else [image], text=[f"{lead[kind]} the dog runs"], return_tensors="np"
    )
    module = vision_language_models.without(own.build(kind), own.DROPPED[kind])
    expected = own.generated(module, dict(found), GENERATED)[0, found["input_ids"].shape[1] :].tolist()
    assert answer == expected[: len(answer)]
    assert len(answer) == GENERATED or answer[-1] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", varying_images.KINDS)
def test_without_a_processor_the_lines_take_arrays_and_random_data_is_timed(
    kind, shared, captions, tmp_path, monkeypatch, capsys
):
    bare = tmp_path / "bare"
    with vision_language_models.quiet():
        varying_images.build(kind).save_pretrained(bare)
    report = export(str(bare), data="random", drop="none", output=str(tmp_path / "out"), rounds=1).to_dict()
    monkeypatch.chdir(tmp_path / "out")
    exec(make_snippet(report, tmp_path / "out").text, {})
    assert np.isfinite(json.loads(capsys.readouterr().out)).all()
    assert bench(str(tmp_path / "out"), data="random", rounds=1, output=str(tmp_path / "bench.json")).notes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"drop": "none", "precision": "int8"},
        {"drop": "none", "target": "openvino"},
        {"drop": "auto", "max_loss": 90.0},
        {"drop": "none", "image_tokens": "50%@1"},
    ],
    ids=["int8", "openvino", "auto", "image tokens"],
)
def test_precision_target_search_and_image_tokens(kind, options, shared, captions, tmp_path):
    report = exported(kind, shared, captions, tmp_path / "out", **options)
    assert report["parity"]["result"] < 1e-4
    if "precision" in options:
        assert report["engine"]["layers"]["precisions"].get("int8", 0) > 4
    if "max_loss" in options:
        assert report["plan"]["changes"]
    if "image_tokens" in options:
        assert report["image_tokens"] is not None
