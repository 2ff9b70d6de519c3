"""Exports with a deferred build, and `compressor build` without torch and other packages that a device may lack."""

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

import compressor
from compressor.deferred import build as complete
from compressor.deferred import package as deferred
from compressor.deferred.reference_answers import (
    INT8_MOST,
    INT8_SLACK,
    AnswersError,
    ReferenceOutputs,
    limit_of,
)
from compressor.errors import CompressorError, FolderError, SettingsError
from compressor.measure import latency as engine_timing
from compressor.quality.heads.registry import head_for
from compressor.quality.parity import TOLERANCE, ParityError, Reference
from compressor.quantize.precision import Source
from compressor.report.engine_text import describe_measurements
from compressor.report.pages.export_page import html, previews_in
from compressor.settings import Settings
from compressor.target.saturation import int8_saturates
from compressor.workspace import environment
from compressor.workspace.output_folder import write_manifest
from compressor.workspace.output_lock import output_lock
from compressor.workspace.plan_file import read_plan_fields
from passes.execute.interpreter import run
from passes.graph.graph import Graph
from runtimes import openvino
from runtimes.base import registry
from runtimes.base.protocols import BuildError, BuildOptions, RuntimeUnavailable
from runtimes.base.timing import interleave
from runtimes.tensorrt import target as tensorrt
from runtimes.tensorrt_rtx import target as tensorrt_rtx
from tests.processors import need_exact_int8
from tests.runtimes.tensorrt.test_target import fake  # noqa: F401  (a fixture)
from tests.samples import Residual, labelled_rows

ort = pytest.importorskip("onnxruntime", reason="it replaces every target in a deferred export")

FLOAT32 = 1e-5  # a few float32 products of width 32, in another order
# Packages that a device may lack: every dependency except NumPy, click, rich and the package of the target.
ABSENT = [
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "scipy",
    "PIL",
    "matplotlib",
    "sklearn",
    "datasets",
    "altair",
    "vl_convert",
    "jinja2",
]
DEVICE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from compressor.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def brief():
    """Real timing in very short bursts; these tests check the written files."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine_timing, complete):
            patch.setattr(module, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
        yield


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A module, and data labelled with its own predictions."""
    path = labelled_rows(tmp_path_factory.mktemp("data") / "rows.npz", Residual(), 160)
    common = {"model": Residual(), "example_inputs": torch.zeros(2, 32), "data": str(path), "batch": 5, "rounds": 1}
    return common | {"task": "image-classification", "defer_build": True, "drop": "1"}


@pytest.fixture(scope="module")
def originals(subject, brief, tmp_path_factory):
    """Deferred exports, one for each target; OpenVINO's is in int8, on a machine without OpenVINO."""
    parent = tmp_path_factory.mktemp("deferred")
    options = {
        "onnxruntime": {},
        "openvino": {"int8": "static", "max_precision_loss": 100.0},
        "tensorrt": {"int8": "static", "max_precision_loss": 100.0, "actions": "linear"},
    }
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino, "missing", lambda: "openvino is not installed")
        for target, own in options.items():
            folders[target] = parent / target
            compressor.export(**subject, **own, target=target, output=folders[target])
    return folders


@pytest.fixture
def folder(originals, tmp_path, request):
    """A copy of one export, by default the one for ONNX Runtime."""
    return Path(shutil.copytree(originals[getattr(request, "param", "onnxruntime")], tmp_path / "folder"))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def on_device(*arguments):
    command = [sys.executable, "-c", DEVICE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------------------------- the exported folder


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_folder_lacks_only_the_engine(originals, target):
    folder = originals[target]
    expected = {"model.onnx", "plan.json", "report.json", "config.json", "manifest.json", "README.md", "report.html"}
    expected |= {"deferred/answers.npz", "deferred/baseline.onnx"}
    if target != "onnxruntime":
        expected.add("deferred/original.onnx")
    if target == "tensorrt":
        expected.add("trtexec.txt")
    assert set(files_of(folder)) == expected
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == expected - {"manifest.json"}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_report_states_that_onnxruntime_replaced_the_target(originals, target):
    content = report_of(originals[target])
    engine = content["engine"]
    assert (engine["state"], engine["target"]) == ("deferred", target)
    assert engine["options"]["device"] == ("cuda" if target == "tensorrt" else "cpu")
    assert engine["options"]["batches"][1] == 5
    assert (engine["stand_in"]["target"], engine["stand_in"]["device"]) == ("onnxruntime", "cpu")
    assert "environment" not in engine
    assert Settings(**content["settings"]).to_dict() == content["settings"]
    measured = engine["stand_in"]["measured"]
    assert set(engine["files"]) == set(content["latency"]) == set(measured) == set(engine["allowed"])
    for name in engine["files"]:
        int8 = content["settings"]["precision"] == "int8" and name != "original"
        parity = measured[name]["parity"]
        assert engine["allowed"][name] == pytest.approx(
            min(INT8_SLACK * parity, INT8_MOST) + TOLERANCE if int8 else TOLERANCE,
            rel=0.02,  # the parity is also that of a row alone, whose products are summed in another order
        )
        assert (parity > 1e-3) is int8  # seven or eight bits against 24


def test_the_summary_states_that_the_build_is_deferred(originals):
    report = complete._restored(report_of(originals["openvino"]), read_plan_fields(originals["openvino"] / "plan.json"))
    assert report.table().title == "Residual on ONNX Runtime (target: openvino), batch 5"
    assert "Run `compressor build` with this folder on the device" in report.summary()
    assert "with ONNX Runtime on the CPU of this machine, not with openvino on the device" in report.summary()


def test_the_stored_outputs_are_those_of_torch(originals):
    answers = ReferenceOutputs.load(originals["onnxruntime"] / deferred.ANSWERS)
    assert len(answers) == 64  # of 80 test samples
    assert answers.labels is not None
    with torch.no_grad():
        eager = Residual()(torch.from_numpy(answers.feeds["x"])).numpy()
    np.testing.assert_allclose(answers.expected["baseline"]["output"], eager, atol=FLOAT32)
    np.testing.assert_array_equal(answers.labels, eager.argmax(-1))
    session = ort.InferenceSession(originals["onnxruntime"] / "model.onnx", providers=["CPUExecutionProvider"])
    shipped = session.run(None, {"x": answers.feeds["x"]})[0]
    np.testing.assert_allclose(answers.expected["result"]["output"], shipped, atol=FLOAT32)
    assert np.abs(shipped - eager).max() > 0.01  # a branch was dropped


def test_tensorrts_files_follow_its_rules_and_its_int8_style(originals):
    from runtimes.tensorrt import qdq_rules as qdq

    for name in ("model.onnx", "deferred/baseline.onnx"):
        assert qdq.violations(originals["tensorrt"] / name) == []
    assert len(qdq.violations(originals["openvino"] / "model.onnx")) > 0  # uint8, the style of openvino


def test_a_file_that_tensorrt_would_refuse_is_refused_by_the_export(tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    inner = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="ranges")]
    inner.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
    save(helper.make_model(helper.make_graph(inner, "g", ends[:1], ends[1:])), tmp_path / "model.onnx")
    with pytest.raises(BuildError, match="node 'ranges' is DynamicQuantizeLinear"):
        deferred._commands(tmp_path, {"result": Source(tmp_path / "model.onnx")}, BuildOptions())


def test_the_trtexec_commands(originals):
    lines = (originals["tensorrt"] / "trtexec.txt").read_text().split("\n\n")
    build = (
        "trtexec --onnx=model.onnx --saveEngine=model.engine --timingCacheFile=tensorrt.timing --noTF32 "
        "--minShapes=x:1x32 --optShapes=x:5x32 --maxShapes=x:32x32 --profilingVerbosity=detailed"
    )
    assert lines == [
        f"# TensorRT 10, in this folder\n{build} --stronglyTyped --useSpinWait --noDataTransfers\n".rstrip(),
        f"# TensorRT 11, in this folder\n{build} --noCudaGraph\n",
    ]
    assert set(report_of(originals["tensorrt"])["engine"]["commands"]) == {"10", "11"}


@pytest.mark.parametrize("fake", ["11.4.0.106"], indirect=True)
@pytest.mark.parametrize("folder", ["tensorrt"], indirect=True)
@pytest.mark.usefixtures("brief")
def test_a_portable_engine_can_be_built_on_the_device(folder, fake):  # noqa: F811
    assert report_of(folder)["engine"]["options"]["portable"] is False
    compressor.build(folder, portable_engine=True)
    assert report_of(folder)["engine"]["options"]["portable"] is True
    assert (folder / "model.engine").read_bytes().startswith(b"PLAN+CODE")
    assert "engine_host_code_allowed = True" in (folder / "README.md").read_text()


def test_the_trtexec_commands_have_lengths_but_no_fixed_shapes(tmp_path):
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("fixed", TensorProto.INT64, [1, 3]),
    ]
    output = [helper.make_tensor_value_info("y", TensorProto.INT64, None)]
    node = helper.make_node("Add", ["ids", "fixed"], ["y"])
    save(helper.make_model(helper.make_graph([node], "g", inputs, output)), tmp_path / "m.onnx")
    options = BuildOptions(batches=(1, 2, 4), lengths=(1, 8, 16))
    for line in tensorrt.command_lines(tmp_path / "m.onnx", options).values():
        shapes = [word for word in line.split() if "Shapes" in word]
        assert shapes == ["--minShapes=ids:1x1", "--optShapes=ids:2x8", "--maxShapes=ids:4x16"]


@pytest.mark.parametrize(("limit", "rows", "timed"), [(10**9, 64, 40), (5760, 30, 11), (1, 1, 1)])
def test_the_stored_samples_stay_within_the_limit(monkeypatch, tmp_path, limit, rows, timed):
    """A sample has 32 inputs and 4 outputs of 4 bytes; a quarter of the limit is for the 40 timed rows."""
    monkeypatch.setattr(deferred, "LIMIT", limit)
    monkeypatch.setattr(deferred, "TIMED_LIMIT", limit // 4)
    linear = torch.nn.Linear(32, 4)
    shapes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(linear, (torch.zeros(2, 32),), dynamic_shapes=shapes, strict=False)
    graph = Graph(exported.module(check_guards=False), ("x",), ("y",), "")
    batch_sizes = []

    def run_all(graph, batches):
        for feeds in batches:
            batch_sizes.append(len(feeds["x"]))
            yield run(graph, feeds)

    batch = SimpleNamespace(feeds={"x": np.zeros((64, 32), np.float32)}, labels=None, ids=tuple("s" * 64))
    test = SimpleNamespace(samples=SimpleNamespace(rows_per_sample=1), batches=lambda size: iter([batch]))
    subject = SimpleNamespace(data=SimpleNamespace(test=test), metric="fidelity")
    timed_inputs = {"x": np.zeros((40, 32), np.float32)}
    (tmp_path / deferred.FOLDER).mkdir()
    answers = deferred.stored_answers(
        tmp_path, {"result": graph}, subject, timed_inputs, SimpleNamespace(batch=40), run_all, at_once=7
    )
    assert (sum(batch_sizes), max(batch_sizes)) == (rows, min(7, rows))
    assert answers.expected["result"]["y"].shape == (rows, 4)
    assert len(ReferenceOutputs.load(tmp_path / deferred.ANSWERS)) == rows
    assert (len(answers), len(answers.timed["x"])) == (rows, timed)
    assert answers.batch(40)["x"].shape == (40, 32)


# ------------------------------------------------------------------------------------------------- refused options


@pytest.mark.parametrize("command", [compressor.export, compressor.sweep])
def test_the_error_for_an_absent_target_advises_to_install_it_or_to_defer_the_build(command, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "missing", lambda: "tensorrt is not installed; pip install tensorrt")
    monkeypatch.setattr(tensorrt_rtx, "missing_builder", lambda: None)
    with pytest.raises(RuntimeUnavailable) as caught:
        command(target="tensorrt", output=tmp_path / "out")
    assert str(caught.value) == (
        "Target tensorrt cannot be used here: tensorrt is not installed; pip install tensorrt, or export with "
        "--defer-build here and run `compressor build` on the device, or give --target tensorrt_rtx, which builds "
        "engines here without a GPU."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_deferred_export_needs_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setattr(
        registry.runtime("onnxruntime"), "missing", lambda: "it is not installed; pip install onnxruntime"
    )
    with pytest.raises(RuntimeUnavailable, match=r"Target onnxruntime .*: it is not installed; pip install \w+\.$"):
        compressor.export(target="tensorrt", defer_build=True, output=tmp_path / "out")


def test_latency_goals_devices_and_precisions_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="with --defer-build, which does not time the target; give --speedup"):
        Settings(latency=5.0, defer_build=True)
    with pytest.raises(RuntimeUnavailable, match="tensorrt runs on cuda; found device 'cpu'"):
        compressor.export(target="tensorrt", device="cpu", defer_build=True, output=tmp_path / "out")
    with pytest.raises(CompressorError, match="no int8-dynamic on cuda"):
        compressor.export(target="tensorrt", int8="dynamic", defer_build=True, output=tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- the device


@pytest.mark.parametrize("folder", ["onnxruntime", "openvino"], indirect=True)
def test_the_build_runs_without_torch_and_the_other_absent_packages(folder):
    if (reason := registry.runtime(report_of(folder)["engine"]["target"]).missing()) is not None:
        pytest.skip(reason)
    before, target = report_of(folder), report_of(folder)["engine"]["target"]
    if target == "openvino":  # saturates elsewhere than ONNX Runtime, by more than the tolerance
        need_exact_int8(before["settings"]["precision"])
    card = (folder / "README.md").read_bytes()
    page = (folder / "report.html").read_bytes()
    (folder / "mine.txt").write_text("a file of the user")
    done = on_device("build", folder, "--rounds", "1", "--threads", "1", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Residual on {target}, batch 5" in done.stdout
    assert "speed-up vs baseline" in done.stdout
    assert "Dropped 1 of 3 sites" in done.stdout
    assert "of 64 stored rows." in " ".join(done.stdout.split())
    _check_completed(before, folder)
    assert (folder / "README.md").read_bytes() == card  # unchanged without jinja2; states whose figures it has
    assert b"writes the device's figures to `report.json`" in card
    assert (folder / "report.html").read_bytes() == page  # unchanged without its packages, as a note states
    assert complete.NO_PAGE in report_of(folder)["notes"]
    built = {"openvino_model.xml", "openvino_model.bin"} if target == "openvino" else set()
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == set(files_of(folder)) - {"manifest.json", "mine.txt"}
    assert {name for name in files if name.startswith("openvino")} == built
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == files[name]["sha256"] for name in files)


def _check_completed(before, folder):
    """Check that report.json has the figures and environment of the device and of the exporting machine."""
    after = report_of(folder)
    engine, measured = after["engine"], after["engine"]["measured"]
    assert engine["state"] == "built"
    assert engine["environment"]["packages"]["numpy"] == np.__version__
    assert after["environment"] == before["environment"]
    assert after["quality"] == before["quality"]
    assert {key: engine["stand_in"][key] for key in ("latency", "speedup")} == {
        key: before[key] for key in ("latency", "speedup")
    }
    assert set(after["latency"]) == set(before["latency"]) == set(measured) == set(engine["files"])
    assert after["latency"]["result"]["samples_ms"] != before["latency"]["result"]["samples_ms"]
    assert all(len(latency["samples_ms"]) == 1 for latency in after["latency"].values())
    for name, figures in measured.items():
        assert figures["parity"] <= engine["allowed"][name]
        assert figures["agreement"]["n"] == figures["accuracy"]["n"] == 64
        # int8 may change a close prediction, and changes more of them if sums of products saturate at 16 bits
        assert figures["agreement"]["value"] >= (75.0 if int8_saturates() else 90.0)
    unchanged = set(before) - {"engine", "latency", "speedup", "notes", "limitations"}
    assert {key: after[key] for key in unchanged} == {key: before[key] for key in unchanged}


def test_the_card_is_rewritten_unless_someone_has_edited_it(folder, brief):
    before = (folder / "README.md").read_text()
    assert "ONNX Runtime instead of ONNX Runtime" in before
    compressor.build(folder, rounds=1)
    after = (folder / "README.md").read_text()
    assert "Latency was measured with onnxruntime on this device" in after
    assert "ONNX Runtime instead of" not in after
    (folder / "README.md").write_text("Mine.")
    for _ in range(2):  # the first build does not list the card in the manifest either
        compressor.build(folder, rounds=1, force=True)
        assert (folder / "README.md").read_text() == "Mine."


@pytest.mark.usefixtures("brief")
def test_the_page_is_rewritten_with_the_figures_of_the_device(folder):
    """The note that its packages were absent is removed."""
    content = report_of(folder)
    content["notes"] = ["A note.", complete.NO_PAGE]
    (folder / "report.json").write_text(json.dumps(content))
    write_manifest(folder)
    before = (folder / "report.html").read_text(encoding="utf-8")
    report = compressor.build(folder, rounds=1)
    after, content = (folder / "report.html").read_text(encoding="utf-8"), report_of(folder)
    assert report.notes[0] == "A note."
    assert complete.NO_PAGE not in report.notes
    assert after == html(content, previews_in(before))
    assert f'<td class="number">{content["latency"]["result"]["median"]:.2f}<span' in after
    assert "No engine was built" in before
    assert "No engine was built" not in after
    assert "Latency was measured with onnxruntime on this device" in after


def test_errors_on_the_device_are_one_sentence(tmp_path):
    done = on_device("build", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Error: {tmp_path} is not a folder that Compressor wrote: it has no valid manifest.json; give the folder of "
        "an export.\n"
    )
    assert done.stderr.count("\n") == 1
    missing = on_device("build", tmp_path / "none")
    assert missing.stderr == f"Error: there is no folder {tmp_path / 'none'}; check the path.\n"


KILLED = """
import os, signal, sys
from compressor.deferred import build

def hook(event, arguments):
    if event == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

def add_files(*arguments, add=build.add_files, **options):
    sys.addaudithook(hook)
    add(*arguments, **options)

build.add_files = add_files
build.build(sys.argv[1], rounds=1)
"""


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(("event", "state"), [("shutil.copytree", "deferred"), ("shutil.rmtree", "built")])
def test_a_killed_build_leaves_the_folder_as_it_was_or_complete(folder, event, state):
    """The build is killed before it copies the folder, and when it removes the old one; see also test_add_files."""
    before = files_of(folder)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), event], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.parent.iterdir())) > 1
    assert report_of(folder)["engine"]["state"] == state
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == set(files_of(folder)) - {"manifest.json"}
    assert (files_of(folder) == before) is (state == "deferred")
    compressor.build(folder, rounds=1, force=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_second_build_at_the_same_time_is_refused(folder):
    with (
        output_lock(folder),
        pytest.raises(FolderError, match=r"another run \(process \d+\) is writing .*; wait until it ends"),
    ):
        compressor.build(folder)


def test_a_second_build_needs_force(folder, brief):
    first = compressor.build(folder, rounds=1)
    files = files_of(folder)
    with pytest.raises(CompressorError, match=r"was built already \(on .*\); build it again with --force\.$"):
        compressor.build(folder)
    assert files_of(folder) == files
    stand_in = report_of(folder)["engine"]["stand_in"]
    again = compressor.build(folder, rounds=2, force=True)
    assert len(again.latency["result"].samples_ms) == 2
    assert report_of(folder)["engine"]["stand_in"] == stand_in  # not the first build's latencies
    assert again.summary() == first.summary()
    assert again.quality == first.quality
    assert again.table().title == "Residual on onnxruntime, batch 5"


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", ["model.onnx", "deferred/baseline.onnx", "deferred/answers.npz"])
def test_a_damaged_or_incomplete_copy_is_refused(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FolderError, match=rf"{name} in .* is not the file that was exported; copy the whole folder"):
        compressor.build(folder)
    (folder / name).unlink()
    with pytest.raises(FolderError, match=f"lacks {name}; copy the whole folder again"):
        compressor.build(folder)
    assert report_of(folder)["engine"]["state"] == "deferred"


@pytest.mark.usefixtures("brief")
def test_an_engine_that_differs_from_torch_is_not_kept(folder):
    """The stored outputs are shifted by 1 % of the largest, which is equivalent to an error of the engine."""
    path = folder / deferred.ANSWERS
    answers = ReferenceOutputs.load(path)
    moved = answers.expected["result"]["output"]
    moved += 0.01 * np.abs(moved).max()
    answers.save(path)
    write_manifest(folder)
    files = files_of(folder)
    with pytest.raises(ParityError, match=r"result: output output differs from torch in .*, so nothing was written"):
        compressor.build(folder)
    assert files_of(folder) == files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", r"settings: field required\); it is no report that `compressor export` of this release wrote"),
        ("[", "Invalid JSON"),
        ('{"engine": {"state": "built", "target": "openvino"}}', "was exported with its engine"),
    ],
)
def test_a_folder_without_a_deferred_engine_is_refused(tmp_path, content, words):
    (tmp_path / "report.json").write_text(content)
    for name in ("plan.json", "deferred/answers.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_manifest(tmp_path)
    with pytest.raises(CompressorError, match=words):
        compressor.build(tmp_path)


def test_threads_must_be_one_at_least(folder):
    with pytest.raises(SettingsError, match="threads is 0"):
        compressor.build(folder, threads=0)


@pytest.mark.usefixtures("brief")
def test_a_speedup_goal_is_checked_on_the_device(folder):
    content = report_of(folder)
    content["settings"]["speedup"] = 1000.0
    for name, latency in content["latency"].items():
        latency["samples_ms"] = [[9.0 if name == "baseline" else 1.0]]
    content["notes"] = ["A note.", "The result is 9x faster, not 1000x as asked for."]
    (folder / "report.json").write_text(json.dumps(content))
    write_manifest(folder)
    report = compressor.build(folder)
    (missed,) = report.missed()
    assert report.notes[0] == "A note."
    assert missed in report.notes  # a busy machine adds a note on its timings
    assert not any("is 9x faster" in note for note in report.notes)


@pytest.mark.parametrize("fake", ["10.16.1.11", "11.4.0.106"], indirect=True)
@pytest.mark.parametrize("folder", ["tensorrt"], indirect=True)
@pytest.mark.usefixtures("brief")
def test_the_tensorrt_engine_is_built_from_the_folder(folder, fake):  # noqa: F811
    report = compressor.build(folder)
    assert set(report.latency) == {"original", "baseline", "result"}
    files = set(json.loads((folder / "manifest.json").read_text())["files"])
    assert {"model.engine", "tensorrt.timing"} <= files
    assert [path.name for path in folder.rglob("*.engine")] == ["model.engine"]
    assert {tuple(sizes[index][0] for index in (0, 1, 2)) for p in fake.profiles for sizes in p.values()} == {
        (1, 5, 32)
    }
    engine = report_of(folder)["engine"]
    assert engine["measured"]["original"]["parity"] < TOLERANCE
    assert engine["layers"]["precisions"] == {"fp32": 1}


# ----------------------------------------------------------------------------------------------- reference outputs


class FakeEngine:
    """An engine that returns a function of its input `x`, and records the batch sizes."""

    def __init__(self, function):
        self.function, self.rows = function, []

    def run(self, feeds):
        self.rows.append(len(feeds["x"]))
        return {"y": self.function(feeds["x"])}


def identity(rows, labels=None, **feeds):
    """Return the reference outputs of a model that returns its input."""
    expected = {"baseline": {"y": rows}, "result": {"y": rows}}
    scale = dict.fromkeys(expected, Reference.of({"y": rows}).scale)
    return ReferenceOutputs({"x": rows} | feeds, expected, {"x": rows[:2]}, labels, scale)


def test_top_classes_are_counted_against_torch_and_labels():
    rows = np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    labels = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 0])
    engine = FakeEngine(lambda x: np.where(x[:, :1] > 0, np.float32([0, 1, 0, 0, 0]), x))  # predicts 1 for 0
    figures = identity(rows, labels).judged(engine, "original", answer="y", head=head_for("image-classification"))
    assert {name: figure["value"] for name, figure in figures.items()} == {
        "agreement": 80.0,
        "accuracy": 70.0,
        "torch_accuracy": 90.0,
    }
    assert figures["agreement"]["low"] < 80.0 < figures["agreement"]["high"]
    assert engine.rows == [8, 2]


def test_features_are_compared_by_cosine_without_padding():
    rows = np.tile(np.float32([1.0, 0.0]), (2, 2, 1))
    mask = np.array([[1, 1], [1, 0]])

    def turned(x):
        output = x.copy()
        output[:, 1] = [0.0, 1.0]  # the second token is orthogonal; in the second row it is padding
        return output

    figures = identity(rows, attention_mask=mask).judged(
        FakeEngine(turned), "result", answer="y", head=head_for("feature-extraction")
    )
    assert figures["similarity"]["value"] == pytest.approx(75.0)
    tokens = identity(rows, attention_mask=mask).judged(
        FakeEngine(turned), "result", answer="y", head=head_for("text-generation")
    )
    assert tokens["agreement"]["value"] == pytest.approx(75.0)


def test_an_engine_is_compared_in_batches_and_on_a_single_row():
    rows = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    engine = FakeEngine(lambda x: x + 0.001 * np.abs(rows).max())
    parity = identity(rows).hold(engine, "result", allowed=np.inf)
    assert engine.rows == [1, 8, 2]
    assert parity.difference >= 0.001
    with pytest.raises(ParityError, match="result: output y differs from torch"):
        identity(rows).hold(engine, "result", allowed=TOLERANCE)
    alone = FakeEngine(lambda x: x if len(x) > 1 else 2 * x)  # as with a fixed batch size
    with pytest.raises(ParityError, match="differs from torch"):
        identity(rows).hold(alone, "result", allowed=TOLERANCE)


def test_saved_answers_can_be_loaded_and_damaged_files_are_refused(tmp_path):
    stored = identity(np.ones((3, 2), np.float32), np.arange(3), file=np.zeros(3))
    stored = dataclasses.replace(stored, ties={"result": np.ones(3)}).with_allowed({"result": {"y": np.ones((1, 2))}})
    stored.save(tmp_path / "a.npz")
    loaded = ReferenceOutputs.load(tmp_path / "a.npz")
    np.testing.assert_equal(vars(loaded), vars(stored))
    dataclasses.replace(stored, scale={}).save(tmp_path / "old.npz")
    with pytest.raises(AnswersError, match=r"old.npz has no scales of the channels; export the model again"):
        ReferenceOutputs.load(tmp_path / "old.npz")
    (tmp_path / "a.npz").write_bytes(b"PK rubbish")
    for name in ("a.npz", "none.npz"):
        with pytest.raises(AnswersError, match=f"{name} cannot be read .* copy the whole folder again"):
            ReferenceOutputs.load(tmp_path / name)


def test_int8_may_differ_by_twice_the_measured_difference_of_its_channel():
    measured = np.array([[0.01] * 5 + [0.02] * 4 + [0.7]])
    np.testing.assert_allclose(limit_of(measured), [[0.04 + TOLERANCE] * 9 + [INT8_MOST + TOLERANCE]])


def test_a_channel_that_int8_spoils_does_not_excuse_the_others():
    rows = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    spoiled = np.float32([1.001, 0.5])
    answers = identity(rows)
    limited = answers.with_allowed({"result": answers.limits(FakeEngine(lambda x: x * spoiled), "result")})
    assert limited.largest_limit("result") > 0.5
    limited.hold(FakeEngine(lambda x: x * spoiled), "result")
    with pytest.raises(ParityError, match="channel 0: found"):
        limited.hold(FakeEngine(lambda x: x * spoiled[::-1]), "result")


def test_the_environment_names_gpus(tmp_path):
    for number, name in enumerate(("NVIDIA A", "NVIDIA B")):
        (tmp_path / f"000{number}").mkdir()
        (tmp_path / f"000{number}" / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 7\n")
    assert environment._gpus(tmp_path) == ["NVIDIA A", "NVIDIA B"]
    assert environment._gpus(tmp_path / "none") == []
    assert isinstance(environment.environment()["gpus"], list)


def test_the_quality_of_features_is_stated_as_cosine_similarity():
    similar = {"value": 99.5, "low": 99.0, "high": 99.9, "n": 12}
    part = {"state": "built", "target": "openvino", "environment": {}, "measured": {"result": {"similarity": similar}}}
    assert list(describe_measurements(part))[1:] == [
        "The cosine similarity of the result to torch is 99.50 % on 12 stored rows."
    ]
    assert list(describe_measurements({"state": "built", "target": "openvino"})) == []
