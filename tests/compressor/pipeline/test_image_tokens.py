"""Image tokens dropped from prompts by `export --image-tokens`: files, generation, report, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from compressor import bench, export
from compressor.errors import CompressorError
from compressor.internals.transformers import quiet
from compressor.report.card.loader_snippet import make_snippet
from passes.base import PassError
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from runtimes.base.vision_language import greedy
from tests.image_tokens import Pyramid
from tests.vision_language_models import IMAGE, TOKEN, inputs, processor, saved

STAGES = ((1, 0.5),)
OPTIONS = {"data": "random", "samples": 8, "drop": "none", "rounds": 1, "generate": "20:6"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved("llava", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "llava"
    report = export(str(model), **OPTIONS, image_tokens="50%@1", output=str(folder))
    return folder, report.to_dict()


def generated(folder, feeds, new):
    """Greedy tokens of PyramidDrop as a loop over the layers, behind the prompt."""
    with quiet():
        module = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids, attended = (torch.from_numpy(feeds[name]) for name in ("input_ids", "attention_mask"))
    loop, embedding = Pyramid(module, STAGES), module.get_input_embeddings()
    image = (ids == TOKEN).long()
    with torch.no_grad():
        features = module.get_image_features(torch.from_numpy(feeds["pixel_values"]), return_dict=True).pooler_output
        features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        embeds = embedding(ids).masked_scatter(image[..., None].bool(), features)
        for _ in range(new):
            ids = torch.cat([ids, loop(embeds, image, attended)[:, -1:].argmax(-1)], 1)
            attended = torch.cat([attended, torch.ones_like(attended[:, :1])], 1)
            embeds, image = embedding(ids[:, -1:]), torch.zeros_like(ids[:, -1:])
    return ids.numpy()


def test_the_files_generate_what_a_loop_over_the_layers_does(model, exported):
    folder, report = exported
    feeds = inputs("llava", 5)
    with runtime("onnxruntime").load(folder / report["engine"]["file"], BuildOptions(threads=1)) as engine:
        found = greedy(engine, feeds, 6)
        outputs = engine.run(
            feeds | {"position_ids": np.arange(feeds["input_ids"].shape[1])[None].repeat(2, 0)} | empty(engine)
        )
    assert np.array_equal(found, generated(model, feeds, 6))
    images, tokens = (feeds["input_ids"] == TOKEN).sum(1)[0], feeds["input_ids"].shape[1]
    assert outputs["present.0.key"].shape[2] == tokens
    assert outputs["present.1.key"].shape[2] == tokens - images // 2
    assert outputs["present.1.tokens"].shape == (2, tokens - images // 2)


def empty(engine):
    shapes = {name: engine.input_shapes[name] for name in engine.inputs if name.startswith("past_")}
    return {
        name: np.zeros((2, *(size or 0 for size in shapes[name][1:])), engine.input_dtypes[name]) for name in shapes
    }


def test_the_report_says_stages_and_cache(exported):
    _, report = exported
    cache = report["image_tokens"].pop("cache")
    assert report["image_tokens"] == {
        "method": "attention", "tokens": 4, "stages": [{"block": 1, "share": 0.5, "tokens": 2}],
    }  # fmt: skip
    by_token = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes: of one layer
    assert cache == {"prompt": 20, "baseline": 20 * 2 * by_token, "result": 20 * by_token + 18 * (by_token + 8)}
    assert any(note.startswith("Image tokens kept by attention: 4 up to block 1, then 2.") for note in report["notes"])
    assert any(applied["name"] == "DropImageTokens" for applied in report["passes"])
    assert report["parity"]["result"] < 1e-4


def test_the_lines_of_the_card_generate_what_a_loop_over_the_layers_does(model, exported, monkeypatch, capsys):
    folder, report = exported
    loader = make_snippet(report, folder)
    assert any(remark.startswith("The decoder drops image tokens from its prompt.") for remark in loader.remarks)
    monkeypatch.chdir(folder)
    exec(loader.text.replace("What is this?", " the dog runs").replace("processor.decode(answer)", "answer"), {})
    answer = json.loads(capsys.readouterr().out)
    pictures, texts = [Image.new("RGB", (640, 480))], [f"{IMAGE} the dog runs"]
    prompt = processor("llava")(images=pictures, text=texts, return_tensors="np")
    feeds = {name: np.asarray(prompt[name]) for name in ("pixel_values", "input_ids", "attention_mask")}
    found = generated(model, feeds, len(answer))[0, feeds["input_ids"].shape[1] :]
    assert answer == found.tolist()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("50%", "expected the share of image tokens that is kept and the block"),
        ("best:50%@1", r"another method \(norm or random\)"),
        ("50%@0", "expected blocks that rise, from 1 on"),
        ("25%@1,50%@2", "expected shares that fall"),
    ],
)
def test_wrong_stages_are_refused(model, value, message):
    with pytest.raises(CompressorError, match=message):
        export(str(model), **OPTIONS, image_tokens=value)


def test_a_block_that_the_model_lacks_is_refused_before_the_search(model, tmp_path):
    with pytest.raises(PassError, match="depth 7, but the attentions are in the blocks 0 to 1"):
        export(str(model), **OPTIONS, image_tokens="50%@7", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_attention_that_is_not_fused_ranks_by_other_methods_alone(model, tmp_path):
    """As the refusal says, before anything is measured; `auto` ranks by attention."""
    config = json.loads((model / "config.json").read_text()) | {"attn_implementation": "eager"}
    eager = shutil.copytree(model, tmp_path / "eager")
    (eager / "config.json").write_text(json.dumps(config))
    report = export(str(eager), **OPTIONS, image_tokens="norm:50%@1", output=str(tmp_path / "norm")).to_dict()
    assert report["image_tokens"]["method"] == "norm"
    for refused in ("50%@1", "auto"):
        with pytest.raises(PassError, match="choose the method norm or random"):
            export(str(eager), **OPTIONS, image_tokens=refused, output=str(tmp_path / "out"))


def test_models_without_images_and_texts_are_refused(tmp_path):
    with pytest.raises(CompressorError, match=r"of a vision-language model, but .* does image-classification"):
        export(image_tokens="50%@1", drop="none", output=str(tmp_path / "out"))


def test_bench_times_the_folder(exported, tmp_path):
    folder, _ = exported
    found = bench(str(folder), data="random", samples=6, rounds=1, output=str(tmp_path / "bench.json")).to_dict()
    assert list(found["engines"]) == ["llava"]


def test_settings_are_in_the_report(exported):
    folder, _ = exported
    assert json.loads((folder / "report.json").read_text())["settings"]["image_tokens"] == "50%@1"
