"""Export and inspect with --max-memory, compared with the same command without it."""

import dataclasses
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import compressor
from compressor import models
from compressor.cli.main import main
from compressor.cli.param_types import Bytes
from compressor.commands import InspectSettings
from compressor.deferred import build
from compressor.errors import SettingsError
from compressor.measure.memory_budget import GIB, MemoryBudgetError
from compressor.pipeline import export, inspect
from compressor.pipeline.export_offloaded import OffloadedExportError
from compressor.search.planner import ChoiceError
from compressor.settings import Settings
from passes.base import PassError
from runtimes.base.timing import interleave
from tests.decoders import random_tokens, sampled_tokens, saved

ENOUGH = 512 * GIB  # never reached; tests of a limit that is reached run in processes of their own
SAME = 1e-6  # relative tolerance of the same operators on other batches
FILE = 1e-5  # tolerance of logits of size 1 from ONNX files that were folded in another way


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small Llama in float32 and texts, some longer than a window."""
    folder = tmp_path_factory.mktemp("large")
    saved(folder / "llama", "Llama", shard="20KB", num_hidden_layers=2)
    np.save(folder / "tokens.npy", sampled_tokens(folder / "llama", 24, 17))
    return folder


def settings_for(folder, output, **options):
    defaults = {
        "drop": "block:1",
        "target": "transformers",
        "rounds": 1,
        "max_length": 8,
        "stride": 5,
        "max_memory": ENOUGH,
    }
    return Settings(folder / "llama", folder / "tokens.npy", output=output, **defaults | options)


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory):
    """Folders and reports of a checkpoint without one block, exported with and without a limit."""
    root = tmp_path_factory.mktemp("checkpoints")
    exports = {}
    for name, limit in (("streamed", ENOUGH), ("whole", None)):
        settings = settings_for(folder, root / name, max_memory=limit)
        exports[name] = (root / name, export.export(settings))
    assert sorted(path.name for path in root.iterdir()) == ["streamed", "whole"]
    return exports


@pytest.fixture(scope="module")
def onnx_folders(folder, tmp_path_factory):
    """Folders and reports of ONNX files without one attention, exported with and without a limit."""
    root = tmp_path_factory.mktemp("onnx")
    exports = {}
    for name, limit in (("streamed", ENOUGH), ("whole", None)):
        options = {"drop": "attention:1", "target": "onnxruntime", "defer_build": True, "max_memory": limit}
        exports[name] = (root / name, export.export(settings_for(folder, root / name, **options)))
    assert sorted(path.name for path in root.iterdir()) == ["streamed", "whole"]
    return exports


def weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_the_checkpoint_equals_that_of_an_export_in_memory(checkpoints):
    (streamed, report), (whole, expected) = checkpoints["streamed"], checkpoints["whole"]
    ours, right = weights(streamed), weights(whole)
    assert set(ours) == set(right)
    assert all(torch.equal(ours[name], right[name]) for name in right)
    left, other = (json.loads((each / "config.json").read_text()) for each in (streamed, whole))
    assert left == other
    assert left["num_hidden_layers"] == 1
    assert report.plan == expected.plan
    assert report.plan.changes
    assert {path.name for path in whole.iterdir()} == {path.name for path in streamed.iterdir()}
    assert transformers.AutoModelForCausalLM.from_pretrained(streamed).config.num_hidden_layers == 1


def test_a_checkpoint_without_an_attention_is_written_from_disk(folder, tmp_path):
    report = export.export(settings_for(folder, tmp_path / "out", drop="attention:1"))
    written, original = weights(tmp_path / "out"), weights(folder / "llama")
    assert {name for name in original if name not in written} == {
        f"model.layers.1.{name}.weight" for name in ("input_layernorm", *(f"self_attn.{each}_proj" for each in "qkvo"))
    }
    assert all(torch.equal(value, original[name]) for name, value in written.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["DeciLMForCausalLM"]
    assert report.parity["result"] <= FILE
    assert report.engine["serving"]["engines"]["vLLM"] is None


@pytest.mark.parametrize("kind", ["checkpoints", "onnx_folders"])
def test_quality_equals_that_of_an_export_in_memory(kind, request):
    """Both evaluate the same windows, which contain each token once although texts are longer than a window."""
    (_, report), (_, expected) = request.getfixturevalue(kind).values()
    assert report.quality.metric == expected.quality.metric == "perplexity"
    for name in ("baseline", "result"):
        figure, right = (each.quality.figures[name] for each in (report, expected))
        assert figure.value == pytest.approx(right.value, rel=FILE)
        assert (figure.low, figure.high) == pytest.approx((right.low, right.high), rel=FILE)
    for name, right in expected.quality.label_free.items():
        assert report.quality.label_free[name].value == pytest.approx(right.value, rel=1e-3)
    assert report.quality.figures["result"].n == expected.quality.figures["result"].n


def test_sizes_equal_those_of_an_export_in_memory(checkpoints):
    (streamed, report), (_, expected) = checkpoints.values()
    for name in ("baseline", "result"):
        size, right = report.sizes[name], expected.sizes[name]
        assert (size.parameters, size.multiply_adds, size.cache) == (
            right.parameters,
            right.multiply_adds,
            right.cache,
        )
    assert report.sizes["result"].bytes == sum(value.nbytes for value in weights(streamed).values())


def test_the_folder_has_a_report_a_page_and_a_model_card(checkpoints):
    streamed, report = checkpoints["streamed"]
    assert report.latency == {}
    assert report.parity["result"] <= SAME
    assert any(f"under the limit of {ENOUGH / GIB:.2f} GiB" in note for note in report.notes)
    page, card = ((streamed / name).read_text() for name in ("report.html", "README.md"))
    assert "block by block" in page
    assert "library_name: transformers" in card
    content = json.loads((streamed / "report.json").read_text())
    assert content["settings"]["max_memory"] == ENOUGH
    assert content["latency"] == content["speedup"] == {}
    assert set(content["quality"]["figures"]) == {"baseline", "result"}


def session(path):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("file", ["model.onnx", "deferred/baseline.onnx"])
def test_the_onnx_files_compute_the_outputs_of_an_export_in_memory(file, folder, onnx_folders):
    (streamed, _), (whole, _) = onnx_folders.values()
    left, right = session(streamed / file), session(whole / file)
    names = [each.name for each in right.get_inputs()]
    assert [each.name for each in left.get_inputs()] == names
    assert [each.name for each in left.get_outputs()] == [each.name for each in right.get_outputs()]
    complete_feeds = models.load(folder / "llama").preprocess.complete
    ids = random_tokens(3, 11, seed=5).numpy()
    feeds = complete_feeds({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    feeds = {name: feeds[name] for name in names}
    for output, expected in zip(left.run(None, feeds), right.run(None, feeds), strict=True):
        np.testing.assert_allclose(output, expected, atol=FILE * np.abs(expected).max(), rtol=0)


def test_weights_are_stored_once_in_a_file_next_to_the_onnx_file(onnx_folders):
    """An ONNX file that contains its weights would be loaded as a whole; no weight is transposed on loading."""
    import onnx

    (streamed, report), (whole, _) = onnx_folders.values()
    total = report.sizes["result"].parameters * 4
    written = (streamed / "model.onnx.data").stat().st_size
    assert total * 0.9 <= written < total * 1.5  # norms are in the file itself; the others are aligned
    graph, other = (onnx.load(each / "model.onnx", load_external_data=False).graph for each in (streamed, whole))
    assert sum(len(each.raw_data) for each in graph.initializer) < total * 0.1
    nodes, expected = ([node.op_type for node in each.node] for each in (graph, other))
    assert nodes.count("Transpose") == expected.count("Transpose")
    assert nodes.count("MatMul") == expected.count("MatMul")


def test_the_config_of_a_result_without_attention_disables_the_cache(folder, tmp_path):
    options = {"drop": "attention:2", "target": "onnxruntime", "defer_build": True, "samples": 6}
    report = export.export(settings_for(folder, tmp_path / "out", **options))
    assert report.sizes["result"].cache == 0 < report.sizes["baseline"].cache
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is False


def test_build_completes_the_folder(onnx_folders, tmp_path, monkeypatch):
    def brief(openers, feeds, **options):
        return interleave(openers, feeds, **(options | {"rounds": 1, "burst_seconds": 0.01, "warmup_seconds": 0.01}))

    monkeypatch.setattr(build, "interleave", brief)
    streamed, before = onnx_folders["streamed"]
    assert before.engine["state"] == "deferred"
    assert before.latency == {}
    device = shutil.copytree(streamed, tmp_path / "device")
    report = build.build(device, rounds=1)
    assert set(report.latency) == {"baseline", "result"}
    assert all(each["parity"] <= FILE for each in report.engine["measured"].values())
    assert json.loads((device / "report.json").read_text())["engine"]["state"] == "built"
    assert "Quality was measured with torch" in (device / "report.html").read_text()


def test_inspect_gives_the_scores_of_a_run_in_memory(folder, tmp_path):
    settings = InspectSettings(**vars(settings_for(folder, tmp_path / "out", drop="none")))
    streamed, expected = (inspect.inspect(dataclasses.replace(settings, max_memory=limit)) for limit in (ENOUGH, None))
    assert not any(tmp_path.iterdir())
    for left, right in zip(streamed.rows(), expected.rows(), strict=True):
        numbers = ("cosine", "angular", "update")
        assert {key: left[key] for key in left if key not in numbers} == {
            key: right[key] for key in right if key not in numbers
        }
        assert [left[key] for key in numbers] == pytest.approx([right[key] for key in numbers], rel=SAME)
    assert (streamed.at_ends, expected.at_ends) == (True, False)
    tokens = [json.loads(each.to_json())["similarity_over"] for each in (streamed, expected)]
    assert tokens == ["last tokens of texts", "all tokens"]


def test_a_plan_of_an_export_is_replayed(checkpoints, folder, tmp_path):
    streamed, report = checkpoints["streamed"]
    again = export.export(settings_for(folder, tmp_path / "again", drop=str(streamed / "plan.json"), samples=6))
    assert again.plan.changes == report.plan.changes
    replayed, right = weights(tmp_path / "again"), weights(streamed)
    assert all(torch.equal(replayed[name], right[name]) for name in right)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_line_shows_the_peak_memory_and_the_quality(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = f"--drop block:1 --target transformers --max-memory 512GiB --samples 6 --data {folder / 'tokens.npy'} -q"
    done = CliRunner().invoke(main, ["export", str(folder / "llama"), *options.split()], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "under the limit of 512.00 GiB" in " ".join(done.output.split())
    assert "perplexity" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("4096", 4096), ("2TiB", 2**41)),
        *((text, None) for text in ("64k", "0", "-1GiB", "inf", "nan", "GiB", "")),
    ],
)
def test_sizes_are_parsed_with_their_units(text, expected):
    import click

    if expected is not None:
        assert Bytes().convert(text, None, None) == expected
        return
    with pytest.raises(click.BadParameter, match="expected a number with a unit such as 8GiB"):
        Bytes().convert(text, None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": "auto", "target": "onnxruntime"}, "--drop auto"),
        ({"metric": "output"}, "--metric output"),
        ({"target": "onnxruntime", "actions": "linear"}, "--actions linear"),
        ({"heal": "closed-form"}, "--heal closed-form"),
        ({"target": "onnxruntime", "tokens": "8"}, "--tokens 8"),
        ({"generate": "8:8"}, "--generate 8:8"),
        ({"target": "onnxruntime", "factorial": True}, "--factorial"),
        ({"target": "onnxruntime", "precision": "int8"}, "--precision int8"),
        ({"random_weights": True}, "--random-weights"),
    ],
)
def test_options_that_need_the_whole_model_are_refused(options, words, folder, tmp_path):
    with pytest.raises(SettingsError, match=f"found {words} with --max-memory"):
        settings_for(folder, tmp_path / "out", **options)


def test_building_an_engine_is_refused(folder, tmp_path):
    with pytest.raises(OffloadedExportError, match=r"add --defer-build.* or give --target transformers"):
        export.export(settings_for(folder, tmp_path / "out", target="onnxruntime"))
    assert not any(tmp_path.iterdir())


def test_a_study_is_refused(folder, tmp_path):
    with pytest.raises(SettingsError, match="found --study with --max-memory"):
        compressor.inspect(folder / "llama", data=folder / "tokens.npy", study=True, max_memory=ENOUGH)


def test_a_plan_that_does_more_than_drop_is_refused(checkpoints, folder, tmp_path):
    plan = json.loads((checkpoints["streamed"][0] / "plan.json").read_text())
    site = next(each for each in plan["decisions"] if each["action"] == "drop")
    site["action"] = "linear"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = {"drop": str(tmp_path / "plan.json"), "target": "onnxruntime", "defer_build": True}
    with pytest.raises(ChoiceError, match=f"linear at {site['site']}, which is fitted or measured on the whole model"):
        export.export(settings_for(folder, tmp_path / "out", **options))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("command", [pytest.param("inspect", marks=pytest.mark.slow), "export"])
def test_a_limit_that_is_too_small_is_refused_and_no_files_remain(command, folder, tmp_path):
    settings = settings_for(
        folder, tmp_path / "out", max_memory=2**20, drop="none" if command == "inspect" else "block:1"
    )
    if command == "inspect":
        settings = InspectSettings(
            **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        )
    with pytest.raises(MemoryBudgetError, match=r"is too little: .* give at least [\d.]+GiB"):
        getattr(importlib.import_module(f"compressor.pipeline.{command}"), command)(settings)
    assert not any(tmp_path.iterdir())


def test_damaged_weights_are_detected_and_no_files_remain(folder, tmp_path):
    """Weights on disk are not checked on loading, unlike those of a model in memory."""
    damaged = shutil.copytree(folder / "llama", tmp_path / "llama")
    broken = next(
        path for path in damaged.glob("*.safetensors") if "model.layers.1.mlp.down_proj.weight" in load_file(path)
    )
    stored = load_file(broken)
    stored["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(stored, broken, {"format": "pt"})
    with pytest.raises(PassError, match=r"site model.layers.1.mlp computes values that are NaN"):
        export.export(dataclasses.replace(settings_for(folder, tmp_path / "out"), model=damaged))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.slow
def test_random_data_gives_a_ranking_but_no_quality(folder, tmp_path):
    settings = dataclasses.replace(settings_for(folder, tmp_path / "out", max_length=None, stride=None), data="random")
    report = export.export(dataclasses.replace(settings, samples=6))
    assert report.quality is None
    assert report.no_quality_because == "the data is random"
    assert (tmp_path / "out" / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
