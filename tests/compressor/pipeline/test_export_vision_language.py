"""A vision-language model from its folder to the files of its parts, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from compressor import bench, export
from compressor.errors import CompressorError, SettingsError
from compressor.report.card.loader_snippet import make_snippet
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from runtimes.base.vision_language import greedy
from tests.encoder_decoders import sentences
from tests.vision_language_models import DROPPED, IMAGE, picture, processor, saved, write_captions

FILES = {"vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("vision_language")


@pytest.fixture(scope="module")
def captions(shared):
    images = [picture(number) for number in range(12)]
    return write_captions(shared / "captions", images, [f"{IMAGE} {text}" for text in sentences(12)])


@pytest.fixture(scope="module")
def exported(shared, captions):
    folder = shared / "small"
    report = export(
        str(saved("llava", shared)), data=str(captions), drop=",".join(DROPPED["llava"]), output=str(folder), rounds=1,
        generate="12:4",
    )  # fmt: skip
    return folder, report.to_dict()


def test_the_folder_holds_the_files_of_the_parts(exported):
    folder, report = exported
    files = {path.name for path in folder.iterdir()}
    assert FILES | {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json"} <= files
    assert "model.onnx" not in files
    assert report["engine"]["file"] == "vision_encoder.onnx"
    assert report["sizes"]["result"]["bytes"] == sum((folder / name).stat().st_size for name in FILES)
    assert report["sizes"]["result"]["cache"] * 2 == report["sizes"]["baseline"]["cache"]
    assert report["quality"]["metric"] == "perplexity"
    assert report["parity"]["result"] < 1e-4
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert FILES | {"vision_language.json"} <= set(manifest)


def test_the_time_of_each_part_is_reported(exported):
    _, report = exported
    generation = report["generation"]
    assert {key: generation[key] for key in ("prompt", "new", "images")} == {"prompt": 12, "new": 4, "images": 4}
    assert all(set(calls) == {"image", "prompt", "token"} for calls in generation["calls"].values())
    calls = generation["calls"]["result"]
    total = calls["image"]["median"] + calls["prompt"]["median"] + 4 * calls["token"]["median"]
    (note,) = [each for each in report["notes"] if each.startswith("Shares of the latency")]
    assert f"the vision encoder {100 * calls['image']['median'] / total:.0f} % (" in note
    assert report["timed_inputs"]["pixel_values"] == [1, 3, 8, 8]


def test_the_lines_of_the_card_generate_what_the_engine_does(exported, monkeypatch, capsys):
    folder, report = exported
    loader = make_snippet(report, folder)
    assert loader.packages == ("numpy", "onnxruntime", "pillow", "transformers")
    text = loader.text.replace("What is this?", " the dog runs").replace("processor.decode(answer)", "answer")
    monkeypatch.chdir(folder)
    exec(text, {})
    answer = json.loads(capsys.readouterr().out)
    prompt = processor("llava")(
        images=[Image.new("RGB", (640, 480))], text=[f"{IMAGE} the dog runs"], return_tensors="np"
    )
    feeds = {name: np.asarray(prompt[name]) for name in ("pixel_values", "input_ids", "attention_mask")}
    with runtime("onnxruntime").load(folder / "vision_encoder.onnx", BuildOptions(threads=1)) as engine:
        found = greedy(engine, feeds, 20)[0, feeds["input_ids"].shape[1] :]
    assert answer == found[: len(answer)].tolist()
    assert len(answer) == 20 or answer[-1] == 2


def test_the_lines_of_the_card_choose_no_token_that_the_generation_config_rules_out(
    exported, tmp_path, monkeypatch, capsys
):
    folder, report = exported
    changed = shutil.copytree(folder, tmp_path / "changed")
    size = {"return_tensors": "np", "images": [Image.new("RGB", (640, 480))], "text": [f"{IMAGE} the dog runs"]}
    prompt = {name: np.asarray(value) for name, value in processor("llava")(**size).items()}
    with runtime("onnxruntime").load(folder / "vision_encoder.onnx", BuildOptions(threads=1)) as engine:
        (often,) = forced(engine, prompt, [], [], 1)
        (first,) = forced(engine, prompt, [often], [], 1)
        wanted = forced(engine, prompt, [often], [first], 20)
    stated = json.loads((changed / "generation_config.json").read_text())
    rules = {"suppress_tokens": [often], "begin_suppress_tokens": [first]}
    (changed / "generation_config.json").write_text(json.dumps(stated | rules))
    monkeypatch.chdir(changed)
    text = make_snippet(report, changed).text.replace("What is this?", " the dog runs")
    exec(text.replace("processor.decode(answer)", "answer"), {})
    answer = json.loads(capsys.readouterr().out)
    assert answer == wanted[: len(answer)]
    assert len(answer) == 20 or answer[-1] == 2
    assert len(answer) > 1


def forced(engine, prompt, never, not_first, count):
    """Return the tokens that are the most probable ones without some, by the logits of the whole text each time."""
    ids, answer = prompt["input_ids"], []
    shapes = {name: engine.input_shapes[name] for name in engine.inputs if name.startswith("past")}
    past = {name: np.zeros((1, *(size or 0 for size in shape[1:])), np.float32) for name, shape in shapes.items()}
    for number in range(count):
        mask = np.ones_like(ids)
        feeds = prompt | past | {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
        found = engine.run(feeds)["logits"][0, -1].copy()
        found[[*never, *(() if number else not_first)]] = -np.inf
        answer.append(int(found.argmax()))
        ids = np.concatenate([ids, [[answer[-1]]]], 1)
    return answer


def test_bench_of_the_folder(exported, captions, tmp_path):
    folder, _ = exported
    found = bench(str(folder), data="random", rounds=1, output=str(tmp_path / "bench.json"))
    assert any("one call of all parts on an image and its text" in note for note in found.notes)
    with pytest.raises(SettingsError, match="llava is a vision-language model, timed on one call of all parts here"):
        bench(str(folder), data="random", context=(8,), output=str(tmp_path / "bench.json"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"target": "onnxruntime_fused"},
            "llava is a vision-language model, whose .* takes one file; give",
        ),
        ({"target": "transformers"}, "--target transformers takes one file"),
        ({"defer_build": True}, "--defer-build takes one file for each engine; leave --defer-build out"),
        (
            {"generate": "4:4"},
            "--generate 4:4 gives a prompt of 4 tokens, but an image of llava has 4 alone",
        ),
        ({"generate": "90:9"}, "--generate 90:9 does not fit llava, which has 96 positions"),
        ({"data": "nowhere"}, "there is no file or folder 'nowhere'"),
    ],
)
def test_what_the_files_do_not_take_is_refused(options, reason, shared, tmp_path):
    given = {"data": "random", "drop": "none", "output": str(tmp_path / "out")} | options
    with pytest.raises((CompressorError, SettingsError), match=reason):
        export(str(saved("llava", shared)), **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idefics3", "paligemma"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_other_models(kind, target, shared, captions, tmp_path):
    report = export(
        str(saved(kind, shared)), data=str(captions), drop="attention:1", target=target, output=str(tmp_path / "out"),
        rounds=1,
    ).to_dict()  # fmt: skip
    assert report["parity"]["result"] < 1e-4
    assert report["quality"]["metric"] == ("token_agreement" if kind == "paligemma" else "perplexity")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4"])
def test_lower_precisions(precision, shared, captions, tmp_path):
    report = export(
        str(saved("llava", shared)), data=str(captions), drop="none", precision=precision, rounds=1,
        output=str(tmp_path / "out"),
    ).to_dict()  # fmt: skip
    assert report["engine"]["layers"]["precisions"].get("int8", 0) > 4
    assert report["sizes"]["result"]["bytes"] < report["sizes"]["original"]["bytes"]


@pytest.mark.slow
def test_the_search(shared, captions, tmp_path):
    report = export(
        str(saved("llava", shared)), data=str(captions), drop="auto", max_loss=90.0, output=str(tmp_path / "out"),
        rounds=1,
    ).to_dict()  # fmt: skip
    assert report["plan"]["changes"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
