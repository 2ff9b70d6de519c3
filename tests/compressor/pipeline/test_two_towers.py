"""A model of images and texts from its folder to its files: zero-shot accuracy is that of transformers' pipeline."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from compressor import Settings, bench, export, models
from compressor.commands import InspectSettings
from compressor.errors import CompressorError
from compressor.internals.transformers import quiet
from compressor.lower.traced_model import evaluated_on, load
from compressor.pipeline import inspect as inspection
from compressor.report.card.loader_snippet import make_snippet
from compressor.workspace.progress import Steps
from passes.analysis.redundancy import Score, without_mask
from passes.base import apply
from passes.graph.sites import find_sites
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.two_towers import COLOURS, SIZE, saved, trained, write_captions, write_pictures

DROPPED = ("vision_model.encoder.layers.1.self_attn", "text_model.encoder.layers.1.self_attn")
TEMPLATE = "a photo of the {}."
ONE = BuildOptions(threads=1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_towers")
    write_pictures(folder / "pictures")
    write_captions(folder / "captions", 4)
    return folder


@pytest.fixture(scope="module")
def exported(shared):
    folder = shared / "small"
    report = export(
        str(trained(shared)), data=str(shared / "pictures"), drop=",".join(DROPPED), prompt_template=TEMPLATE,
        output=str(folder), rounds=2,
    )  # fmt: skip
    return folder, report.to_dict()


def zeroed(folder):
    """The trained model whose dropped attentions are zero: the oracle of the export."""
    module = transformers.CLIPModel.from_pretrained(folder).eval()
    for name in DROPPED:
        for parameter in module.get_submodule(name).out_proj.parameters():
            torch.nn.init.zeros_(parameter)
    return module


def test_zero_shot_accuracy_is_that_of_the_pipeline_of_transformers(exported, shared):
    _, report = exported
    with quiet():
        source = trained(shared)
        tokenizer, processor = (
            kind.from_pretrained(source) for kind in (transformers.AutoTokenizer, transformers.AutoImageProcessor)
        )
        classify = transformers.pipeline(
            "zero-shot-image-classification", model=zeroed(source), tokenizer=tokenizer, image_processor=processor
        )
    right = []
    for id in report["data"]["test_ids"]:
        found = classify(
            Image.open(shared / "pictures" / id), candidate_labels=sorted(COLOURS), hypothesis_template=TEMPLATE
        )
        right.append(found[0]["label"] == id.split("/")[0])
    figure = report["quality"]["figures"]["result"]
    assert report["quality"]["metric"] == "accuracy"
    assert figure["value"] == pytest.approx(100 * np.mean(right))
    assert 30 < figure["value"] < 100  # neither chance nor all: the comparison shows something
    assert report["quality"]["figures"]["baseline"]["value"] > 95


def test_report_and_card_state_template_and_class_names(exported):
    folder, report = exported
    assert report["data"]["prompts"] == {
        "template": TEMPLATE, "class_names": sorted(COLOURS), "class_names_from": "the class names of the data",
    }  # fmt: skip
    sentence = (
        "Zero-shot: 4 class names (blue, green, grey, red; from the class names of the data) in the prompt "
        "'a photo of the {}.'."
    )
    assert sentence in report["notes"]
    assert sentence in (folder / "README.md").read_text()
    assert {site["name"].split(".")[0] for site in report["model"]["sites"]} == {"vision_model", "text_model"}
    assert report["timed_inputs"] == {
        "pixel_values": [1, 3, SIZE, SIZE], "input_ids": [1, 8], "attention_mask": [1, 8],
    }  # fmt: skip
    assert {"model.onnx", "vision_model.onnx", "text_model.onnx"} <= {path.name for path in folder.iterdir()}


def test_the_lines_of_the_card_classify_as_the_engine_does(exported, shared):
    folder, report = exported
    loader = make_snippet(report, folder)
    assert loader.packages == ("numpy", "onnxruntime", "pillow", "tokenizers")
    text = loader.text.replace("photo.jpg", str(shared / "pictures" / "red" / "0.png")).replace(
        "answer.argmax(-1)", "answer.tolist()"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=True)
    model = models.load(str(trained(shared)))
    with Image.open(shared / "pictures" / "red" / "0.png") as image:
        feeds = {"pixel_values": model.preprocess.image(image)[None]}
    feeds |= model.preprocess.text([TEMPLATE.format(name) for name in sorted(COLOURS)], None)
    with runtime("onnxruntime").load(folder / "model.onnx", ONE) as engine:
        expected = engine.run(feeds)["logits_per_image"]
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), expected, rtol=0, atol=2e-3)  # the resize of Pillow


def test_pairs_are_compared_by_the_embeddings_of_both_towers(shared, tmp_path):
    report = export(
        str(trained(shared)),
        data=str(shared / "captions"),
        drop=",".join(DROPPED),
        output=str(tmp_path / "out"),
        rounds=2,
    ).to_dict()
    model = models.load(str(trained(shared)))
    lines = (shared / "captions" / "metadata.jsonl").read_text().splitlines()
    texts = {line["file_name"]: line["text"] for line in map(json.loads, lines)}
    ids = report["data"]["test_ids"]
    pixels = torch.stack([torch.from_numpy(model.preprocess.image(Image.open(shared / "captions" / id))) for id in ids])
    tokens = {
        name: torch.from_numpy(value) for name, value in model.preprocess.text([texts[id] for id in ids], None).items()
    }
    with torch.no_grad():
        before, after = (each(pixel_values=pixels, **tokens) for each in (model.module, zeroed(trained(shared))))
    cosines = [torch.cosine_similarity(before[name], after[name], dim=-1) for name in ("image_embeds", "text_embeds")]
    assert report["quality"]["metric"] == "fidelity"
    found = report["quality"]["figures"]["result"]["value"]
    assert found == pytest.approx(100 * float(torch.stack(cosines).mean()), abs=1e-3)
    assert found < 99.5
    again = bench(str(tmp_path / "out"), rounds=1, output=str(tmp_path / "bench.json")).to_dict()
    (engine,) = again["engines"].values()
    assert (again["metric"], engine["figure"]["value"]) == ("fidelity", 100.0)  # the folder is its own reference
    (said,) = [each["reason"] for each in report["limitations"] if each["feature"] == "zero-shot accuracy"]
    assert said.startswith("not measured, because the data has a text for each image instead of class names")


def test_scores_of_a_tower_do_not_depend_on_the_texts_beside_it(shared):
    """Four images of five tokens beside four texts of five tokens, most of which are padding."""
    subject = load(Settings(model=str(saved("clip", shared)), data="random", drop="none"), Steps(None))
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.randint(1, 9, (4, 5)), torch.ones(4, 5, dtype=torch.int64)
    short = mask.clone()
    short[:, 2:] = 0
    full, padded = (
        apply(Score(), subject.graph, [{"pixel_values": pixels, "input_ids": ids, "attention_mask": each}])
        for each in (mask, short)
    )
    names = {site.name: site for site in find_sites(subject.graph)}
    for name, site in names.items():
        of_images = name.startswith("vision_model")
        assert (site.root in without_mask(subject.graph)) == of_images
        assert padded.sites[name].tokens == (20 if of_images else 8)
        if of_images:
            assert padded.cosine(name) == full.cosine(name)


def test_without_class_names_a_model_gives_features(shared):
    model = models.load(str(saved("clip", shared)))
    assert model.classes() is None
    subject = load(Settings(model=str(saved("clip", shared)), data="random", drop="none"), Steps(None))
    assert (subject.model.task, subject.model.stacked) == ("feature-extraction", ("text_embeds",))
    assert evaluated_on(subject.model, subject.data) is subject.model
    per_sample = subject.costs.total.multiply_adds
    assert (
        per_sample
        == 2 * (5 + 16) * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 3 * 64 * 32 + 2 * 32 * 24 + 8 * 24 + _attentions()
    )


def _attentions():
    """Return products of queries with keys, and of probabilities with values, in two layers of each tower."""
    return 2 * (2 * 5 * 5 * 32 + 2 * 16 * 16 * 32)


def test_a_folder_is_measured_again(exported, shared, tmp_path):
    folder, report = exported
    found = bench(str(folder), data=str(shared / "pictures"), rounds=1, output=str(tmp_path / "bench.json")).to_dict()
    (engine,) = found["engines"].values()
    assert found["metric"] == "accuracy"
    assert engine["figure"]["value"] == report["quality"]["figures"]["result"]["value"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "transformers", "drop": "block:1"}, "has a tower of images and one of texts, and --target transf"),
        (
            {"defer_build": True},
            "batches of their own, and --defer-build stores rows of one batch; leave --defer-build",
        ),
        ({"image_size": "dynamic"}, "--image-size dynamic is for models of images alone; .* also takes texts"),
        ({"class_names": "names.txt"}, "found --class-names with random data, which has no classes"),
    ],
)
def test_what_two_towers_do_not_take_is_refused(options, reason, shared, tmp_path):
    arguments = {"data": "random", "drop": "none"} | options
    with pytest.raises(CompressorError, match=reason):
        export(str(saved("clip", shared)), output=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_prompts_are_refused_for_other_models(tmp_path):
    with pytest.raises(CompressorError, match="--prompt-template is for models of images and texts such as CLIP, but"):
        export(drop="none", prompt_template="the {}", output=str(tmp_path / "out"))


def test_patches_of_any_size_are_refused(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        text_config=tower | {"vocab_size": 20, "max_position_embeddings": 16},
        vision_config=tower | {"num_patches": 16, "patch_size": 8},
    )
    with quiet():
        transformers.Siglip2Model(config).save_pretrained(tmp_path / "naflex")
    with pytest.raises(
        CompressorError, match=r"naflex is a Siglip2Model, which does not give logits_per_image, .* for"
    ):
        models.load(str(tmp_path / "naflex"))


def test_a_study_is_refused(shared):
    with pytest.raises(
        CompressorError, match="found --study, which compares the tokens of one sequence, but clip has a"
    ):
        inspection.inspect(
            InspectSettings(model=str(saved("clip", shared)), data="random", study=True, output=str(shared / "looked"))
        )
