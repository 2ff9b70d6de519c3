"""An encoder-decoder from its folder to the files of its towers, and what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image

from compressor import bench, export
from compressor.errors import CompressorError, SettingsError
from compressor.internals.transformers import quiet
from compressor.report.card.loader_snippet import make_snippet
from runtimes.base.encoder_decoder import greedy
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.encoder_decoders import DROPPED, SIDE, build, generated, saved, sentences, tokenizer

FILES = {"encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder_decoders")


@pytest.fixture(scope="module")
def sources(shared):
    path = shared / "sources.txt"
    path.write_text("\n".join(sentences(16)))
    return path


@pytest.fixture(scope="module")
def exported(shared, sources):
    folder = shared / "small"
    report = export(
        str(saved("bart", shared)), data=str(sources), drop=",".join(DROPPED["bart"]), output=str(folder), rounds=2,
        merge_decoder=True,
    )  # fmt: skip
    return folder, report.to_dict()


def test_the_folder_holds_the_files_of_both_towers(exported):
    folder, report = exported
    files = {path.name for path in folder.iterdir()}
    assert FILES | {"config.json", "generation_config.json", "tokenizer.json"} <= files
    assert "decoder_model_merged.onnx" in files
    assert "model.onnx" not in files
    assert report["engine"]["file"] == "encoder_model.onnx"
    assert report["sizes"]["result"]["bytes"] == sum((folder / name).stat().st_size for name in FILES)
    assert report["sizes"]["result"]["cache"] * 2 == report["sizes"]["baseline"]["cache"]
    assert report["quality"]["metric"] == "token_agreement"
    assert {key: report["generation"][key] for key in ("prompt", "new", "source")} == {
        "prompt": 64, "new": 32, "source": "tokens",
    }  # fmt: skip
    assert set(report["latency"]) == {"baseline", "result"}
    assert report["parity"]["result"] < 1e-4
    kinds = [site["kind"] for site in report["model"]["sites"]]
    assert kinds.count("cross_attention") == 2
    assert "The caches of cross-attentions take 256 bytes for each token of a source (baseline 512)." in report["notes"]
    assert not [each for each in report["limitations"] if each["feature"] == "ONNX Runtime GenAI"]


def test_the_lines_of_the_card_generate_what_the_engine_does(exported):
    folder, report = exported
    loader = make_snippet(report, folder)
    assert loader.packages == ("numpy", "onnxruntime", "tokenizers")
    assert "`optimum.onnxruntime.ORTModelForSeq2SeqLM` opens this folder too." in loader.remarks
    text = loader.text.replace("This is a sentence.", "the dog runs").replace("tokenizer.decode(answer)", "answer")
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    ids = np.array([tokenizer()("the dog runs")["input_ids"]])
    with runtime("onnxruntime").load(folder / "encoder_model.onnx", BuildOptions(threads=1)) as engine:
        found = greedy(engine, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, np.array([[2]]), 20)
    assert answer == found[0, : len(answer)].tolist()
    assert len(answer) == 21 or answer[-1] == 2


def test_the_tokenizer_neither_cuts_nor_pads_by_its_last_call(exported, tmp_path):
    """transformers writes what the last call set; the lines of the card also read a file that has such a rest."""
    folder, report = exported
    content = json.loads((folder / "tokenizer.json").read_text())
    assert (content["truncation"], content["padding"]) == (None, None)
    again = shutil.copytree(folder, tmp_path / "again")
    rest = tokenizers.Tokenizer.from_file(str(again / "tokenizer.json"))
    rest.enable_truncation(2)
    rest.enable_padding(length=9)
    rest.save(str(again / "tokenizer.json"))
    text = make_snippet(report, again).text.replace("This is a sentence.", "the dog runs") + "\nprint(ids)"
    done = subprocess.run([sys.executable, "-c", text], cwd=again, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == tokenizer()("the dog runs")["input_ids"]


def test_optimum_is_not_promised_for_uneven_caches(exported):
    folder, report = exported
    kept = [name for name in report["engine"]["outputs"] if ".encoder." not in name]
    remarks = make_snippet(report | {"engine": report["engine"] | {"outputs": kept}}, folder).remarks
    assert (
        "does not open this folder: it expects as many caches of self-attentions as of cross-attentions, and the"
        in (remarks[-1])
    )
    assert remarks[-1].endswith("the plan left 1 and 0.")


def test_bench_needs_targets_or_the_original(exported, sources, tmp_path):
    folder, _ = exported
    with pytest.raises(
        CompressorError, match="has no targets, which the original would generate, but a folder does not"
    ):
        bench(str(folder), data=str(sources), output=str(tmp_path / "bench.json"))
    found = bench(str(folder), data="random", rounds=1, output=str(tmp_path / "bench.json"))
    assert any("one call of the encoder and of the decoder" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"target": "onnxruntime_fused"},
            "--target onnxruntime_fused takes one file; give --target onnxruntime or open",
        ),
        ({"target": "transformers"}, "--target transformers takes one file"),
        ({"defer_build": True}, "--defer-build takes one file for each engine; leave --defer-build out"),
        ({"generate": "65:4"}, "--generate 65:4 does not fit bart, which takes sources of 64 and targets of 64 tokens"),
        ({"cache": False}, "--no-cache is for causal language models"),
        ({"target": "openvino", "merge_decoder": True}, "which merges ONNX files of an encoder-decoder, but target"),
    ],
)
def test_what_the_files_do_not_take_is_refused(options, reason, shared, tmp_path):
    with pytest.raises((CompressorError, SettingsError), match=reason):
        export(str(saved("bart", shared)), data="random", drop="none", output=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_the_length_of_speech_is_fixed(shared, tmp_path):
    with pytest.raises(
        SettingsError, match="gives a source of 10, but whisper is timed on 40 frames of its data; give 40:4"
    ):
        export(str(saved("whisper", shared)), data="random", drop="none", generate="10:4", output=str(tmp_path / "out"))


def test_images_with_what_they_say(tmp_path):
    """The perplexity of the texts is transformers' own, and the lines of the card write what transformers does."""
    module, rng, data = build("pictures"), np.random.default_rng(0), tmp_path / "data"
    with quiet():
        for each in (module, tokenizer(), transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})):
            each.save_pretrained(tmp_path / "model")
    data.mkdir()
    texts = sentences(8)
    rows = [{"file_name": f"{row}.png", "text": text} for row, text in enumerate(texts)]
    for row in rows:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(data / row["file_name"])
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = export(
        str(tmp_path / "model"), data=str(data), drop="none", output=str(tmp_path / "out"), rounds=1, samples=8
    ).to_dict()
    assert report["quality"]["metric"] == "perplexity"
    assert report["generation"]["source"] == "pixels"
    text = make_snippet(report, tmp_path / "out").text.replace("tokenizer.decode(answer)", "answer")
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    expected = generated(module, {"pixel_values": np.zeros((1, 3, SIDE, SIDE), np.float32)}, 20)[0].tolist()
    assert answer == expected[: len(answer)]
    assert len(answer) == 21 or answer[-1] == 2


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_every_cell_of_a_factorial_has_its_three_files(target, shared, sources, tmp_path):
    precision = "int8-dynamic" if target == "onnxruntime" else "int8"
    report = export(
        str(saved("bart", shared)), data=str(sources), drop="attention:1", precision=precision, factorial=True,
        output=str(tmp_path / "out"), rounds=1, target=target,
    ).to_dict()  # fmt: skip
    cells = report["factorial"]["cells"]
    assert cells.pop("compressed int8")["file"] == "encoder_model.onnx"
    for name, cell in cells.items():
        encoder = tmp_path / "out" / cell["file"]
        assert cell["file"] == f"factorial/{name.replace(' ', '.')}/encoder_model.onnx"
        assert {path.name for path in encoder.parent.iterdir()} == FILES
    whole, *smaller = (sum(path.stat().st_size for path in (tmp_path / "out" / cell["file"]).parent.iterdir())
                       for cell in (cells["dense float"], cells["compressed float"], cells["dense int8"]))  # fmt: skip
    assert all(size < whole for size in smaller)  # the bytes of int8 files differ between processors


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4"])
def test_lower_precisions(precision, shared, sources, tmp_path):
    report = export(
        str(saved("bart", shared)), data=str(sources), drop="none", precision=precision, output=str(tmp_path / "out"),
        rounds=1,
    ).to_dict()  # fmt: skip
    assert report["engine"]["layers"]["precisions"].get("int8", 0) > 4
    assert report["sizes"]["result"]["bytes"] < report["sizes"]["original"]["bytes"]


@pytest.mark.slow
def test_the_search(shared, sources, tmp_path):
    report = export(
        str(saved("t5", shared)), data=str(sources), drop="auto", max_loss=90.0, output=str(tmp_path / "out"), rounds=1
    ).to_dict()
    assert report["plan"]["changes"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
