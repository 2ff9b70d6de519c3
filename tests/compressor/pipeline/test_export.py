"""Exports and sweeps of small models: folder, report, and errors, after which no files remain."""

import dataclasses
import gc
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import compressor
from compressor import CompressorError, models
from compressor.cli.main import main
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.measure import engine_builder
from compressor.measure import latency as engine_timing
from compressor.measure.graph_evaluator import GraphEvaluator
from compressor.models import SAMPLE
from compressor.pipeline import export
from compressor.quality.parity import TOLERANCE
from compressor.quality.validation_loss import Loss, ValidationLoss
from compressor.report.card import model_card
from compressor.report.pareto_report import ParetoFront
from compressor.report.report import Report
from compressor.search.planner import Choice
from compressor.settings import Settings
from compressor.workspace.output_folder import copy_onnx, write_manifest
from passes.analysis.counted_cost import Costs
from passes.base import PassError, apply
from passes.execute import mapped_weights
from passes.graph.graph import Graph
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from runtimes.base.timing import Latency, interleave
from tests.samples import DIGITS, five_blocks

pytest.importorskip("onnxruntime", reason="these exports use the target onnxruntime")


class Residual(torch.nn.Module):
    """Three residual branches and a head, on vectors of 8."""

    def __init__(self, branches: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(branches))
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner in self.inner:
            x = x + torch.relu(inner(x))
        return self.head(x)


@pytest.fixture
def vectors(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32))
    return str(tmp_path / "x.npy")


def test_the_weights_of_a_large_model_leave_the_memory_before_its_engines_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a module of the user stay. The report and the files are the same."""
    moved, mapped = [], export.map_weights

    def recorded(modules: Any, folder: Path) -> None:
        moved.append(export.weight_bytes(modules))
        mapped(modules, folder)

    monkeypatch.setattr(export, "map_weights", recorded)
    monkeypatch.setattr(mapped_weights, "LARGE", 1)
    reports = []
    for limit in (2**31, 0):
        monkeypatch.setattr(export, "TOGETHER", limit)
        out = tmp_path / str(limit)
        reports.append(compressor.export(drop="attention:1", rounds=2, output=out).to_dict())
        assert bool(moved) == (limit == 0)
    assert moved[0] >= reports[0]["sizes"]["baseline"]["parameters"] * 4
    for key in ("quality", "sizes", "exact", "parity"):
        assert reports[0][key] == reports[1][key]
    first, second = ((tmp_path / name / "model.onnx").read_bytes() for name in ("2147483648", "0"))
    assert first == second
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32))
    example = torch.zeros(2, 8)
    settings = {"drop": "none", "rounds": 2, "data": tmp_path / "x.npy", "example_inputs": example}
    compressor.export(Residual(), output=tmp_path / "module", **settings)
    assert len(moved) == 1


def test_no_other_tensor_holds_the_memory_of_weights_that_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs only where it is called: what lowering leaves in cycles is on the memory of the weights."""
    left, mapped, places = [], export.map_weights, set[int]()

    def recorded(modules: Any, folder: Path) -> None:
        places.update(storage.data_ptr() for storage, _ in mapped_weights._storages(modules))
        mapped(modules, folder)

    def returned() -> None:
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.device.type == "cpu"]
        left.extend(each.shape for each in tensors if each.untyped_storage().data_ptr() in places)

    monkeypatch.setattr(export, "map_weights", recorded)
    monkeypatch.setattr(export, "return_freed_memory", returned)
    monkeypatch.setattr(mapped_weights, "LARGE", 2**16)
    monkeypatch.setattr(export, "TOGETHER", 0)
    gc.disable()
    try:
        compressor.export(drop="attention:1", rounds=2, output=tmp_path / "out")
    finally:
        gc.enable()
    assert places
    assert not left


def pictures(folder: Path, *, classes: int, each: int, corrupt: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        inside = folder / f"c{label:02}" if classes > 1 else folder
        inside.mkdir(parents=True)
        for number in range(each):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(inside / f"{number}.png")
    for number in range(corrupt):
        # Linux takes any bytes as a name; the report, the page and the card are UTF-8 all the same.
        name = os.fsdecode(b"bad\xff%d.png" % number) if sys.platform == "linux" else f"bad{number}.png"
        (folder / f"c{0:02}" / name).write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    return folder


def refused(output: Path, words: str, **options: Any) -> None:
    """Check that the export fails with a message that contains `words`, and that no files remain."""
    output.parent.mkdir(exist_ok=True)
    with pytest.raises((CompressorError, PassError)) as caught:
        export.export(Settings(output=output, **({"rounds": 1, "drop": "1"} | options)))
    assert words in str(caught.value)
    journal = (
        {f".{output.name}.journal"} if options.get("drop") == "auto" else set()
    )  # a search resumes from its journal
    assert {path.name for path in output.parent.iterdir()} <= journal


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """One export through the Python API: int8, one attention dropped, two corrupt images in the data."""
    folder = tmp_path_factory.mktemp("exported")
    data = pictures(folder / "images", classes=10, each=3, corrupt=2)
    model = five_blocks(folder / "sample", kept=(0, 9))
    report = compressor.export(
        model, data=data, drop="attention:1", int8="dynamic", rounds=1, batch=64, output=folder / "out"
    )
    return folder / "out", report


def test_the_manifest_lists_every_file_with_its_hash(exported: tuple[Path, Report]) -> None:
    folder, _ = exported
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"model.onnx", "plan.json", "report.json", "report.html", "config.json", "README.md"} <= set(files)
    content = json.loads((folder / "report.json").read_text())
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card.card(content, folder)
    assert set(files) | {"manifest.json"} == {path.name for path in folder.iterdir()}
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_corrupt_images_are_counted_and_named_in_the_report(exported: tuple[Path, Report]) -> None:
    _, report = exported
    (left_out,) = (each for each in report.limitations if each.feature == "samples left out")
    assert re.match(r"2 of \d+ cannot be used: c00/bad.*\(the first: ", left_out.reason)
    assert len(report.data["skipped"]) == 2


def test_the_report_contains_everything_needed_to_repeat_the_export(exported: tuple[Path, Report]) -> None:
    folder, report = exported
    content = json.loads((folder / "report.json").read_text())
    assert content == json.loads(report.to_json())
    assert Settings(**content["settings"]).to_dict() == content["settings"]
    assert content["environment"]["packages"]["torch"]
    assert set(content["latency"]) == {"original", "baseline", "result"}
    assert all(sum(map(len, each["samples_ms"])) == each["n"] for each in content["latency"].values())
    assert content["plan"]["dropped"] == json.loads((folder / "plan.json").read_text())["order"]
    assert content["seconds"] > 0
    assert {"load the model", "build for onnxruntime"} <= {step["name"] for step in content["steps"]}


def test_exact_rewrites_are_stated_as_a_share_of_their_own(exported: tuple[Path, Report]) -> None:
    """The sample is read at its class token: the last block needs one token for most of its work."""
    folder, report = exported
    model = models.load(folder.parent / "sample")
    graph = trace(model)
    content = json.loads((folder / "report.json").read_text())
    whole, exact = content["sizes"]["baseline"]["multiply_adds"], content["exact"]["multiply_adds"]
    assert exact == Costs(fold_graph(graph), model.example).total.multiply_adds
    assert content["sizes"]["result"]["multiply_adds"] < exact < whole
    share = f"save {100 * (1 - exact / whole):.1f} % of its multiply-adds; the plan saves a further"
    assert any(share in note for note in report.notes)
    cell = f"{exact / 1e9:.3f} (-{1 - exact / whole:.0%})"
    assert ("  exact rewrites alone", "", "", cell) in list(report._rows())
    assert f"| exact rewrites alone |  |  | {cell} |" in (folder / "README.md").read_text(encoding="utf-8")
    assert cell in (folder / "report.html").read_text(encoding="utf-8")


def test_random_data_has_no_quality(tmp_path: Path) -> None:
    # A large batch, because a burst of a model this small would otherwise hold a hundred thousand samples.
    report = compressor.export(
        Residual(),
        example_inputs=torch.zeros(2, 8),
        data="random",
        drop="1",
        rounds=1,
        batch=8192,
        output=tmp_path / "out",
    )
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["quality"] is None
    assert content["no_quality_because"] == "the data is random"
    assert "No quality stated: the data is random." in report.summary()
    assert not any("agreement" in row[0] for row in report._rows())


def test_labels_beyond_the_models_classes_are_refused(tmp_path: Path) -> None:
    data = pictures(tmp_path / "images", classes=12, each=2)
    refused(tmp_path / "room" / "out", "labels up to 11, but sample has only 10 classes", data=data)


def test_a_model_without_any_site_is_refused(tmp_path: Path, vectors: str) -> None:
    module, inputs = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.zeros(2, 8)
    refused(tmp_path / "room" / "out", "no residual branch", model=module, example_inputs=inputs, data=vectors)


def test_a_model_without_any_site_is_exported_as_it_is(tmp_path: Path, vectors: str) -> None:
    module, inputs = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.zeros(2, 8)
    options = {"model": module, "example_inputs": inputs, "data": vectors, "drop": "none", "rounds": 1}
    report = export.export(Settings(output=tmp_path / "out", **options))
    assert report.to_dict()["model"]["sites"] == []
    written = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [node.op_type for node in written.node] in (["MatMul", "Add"], ["Gemm"])


@pytest.mark.parametrize("drop", ["none", "auto", "1"])
def test_finite_weights_that_overflow_are_refused(tmp_path: Path, vectors: str, drop: str) -> None:
    module = Residual()
    with torch.no_grad():
        for inner in module.inner:
            inner.weight.mul_(1e30)  # type: ignore[operator, union-attr]
    options = {"model": module, "example_inputs": torch.zeros(2, 8), "data": vectors, "drop": drop}
    refused(tmp_path / "room" / "out", "check the weights", **options)


def test_data_that_the_model_refuses_is_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 5000, (12, 6)))
    data = str(tmp_path / "ids.npy")
    refused(tmp_path / "room" / "out", "token ids below the vocabulary's size", model=tmp_path / "bert", data=data)
    lacking = {"model": tmp_path / "bert", "data": data, "task": "text-classification"}
    refused(tmp_path / "room" / "out", "lacks weights that text-classification needs: classifier", **lacking)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "plan"),
        (b"hello", "not a plan.json"),
        (b"\xff\xfe\x00", "not a plan.json"),
        (b"{}", "plan"),
        (None, "cannot be read"),
    ],
)
def test_an_invalid_plan_file_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    model = five_blocks(tmp_path / "sample", kept=(0, 9))
    refused(tmp_path / "room" / "out", words, model=model, data=DIGITS, drop=str(tmp_path / "plan.json"), samples=12)


def test_a_plan_for_another_model_or_with_unknown_sites_is_refused(
    tmp_path: Path, exported: tuple[Path, Report], vectors: str
) -> None:
    plan = str(exported[0] / "plan.json")
    other = {"model": Residual(), "example_inputs": torch.zeros(2, 8), "data": vectors, "drop": plan}
    refused(tmp_path / "room" / "out", "another model (sample)", **other)
    content = json.loads(Path(plan).read_text())
    content["decisions"][0]["site"] = "blocks.77.attn"
    (tmp_path / "unknown.json").write_text(json.dumps(content))
    own = {"model": str(exported[0].parent / "sample"), "data": DIGITS, "drop": str(tmp_path / "unknown.json")}
    refused(tmp_path / "room" / "out", "blocks.77.attn", samples=12, **own)


def test_a_full_disk_is_reported_and_no_files_remain(tmp_path: Path) -> None:
    """A limit on the file size makes the ONNX writer fail in the middle of a file, like a full disk."""
    model = five_blocks(tmp_path / "model", kept=(0, 9))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(
            tmp_path / "room" / "out", "raise the limit (ulimit -f)", model=model, data=DIGITS, samples=12, drop="none"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_inspect_accepts_a_module() -> None:
    inspection = compressor.inspect(Residual(), example_inputs=torch.zeros(2, 8), data="random")
    assert len(inspection.rows()) == 3
    assert (SAMPLE / "digits.npz").is_file()


def test_external_weights_are_copied_with_the_name_and_mode_of_the_model(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "big", ends[:1], ends[1:], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    source = tmp_path / "result.onnx"
    onnx.save_model(model, source, save_as_external_data=True, location="result.onnx.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    shipped = copy_onnx(source, tmp_path / "out" / "model.onnx")
    source.with_name("result.onnx.data").unlink()
    weights = shipped.with_name("model.onnx.data")
    assert weights.stat().st_mode == shipped.stat().st_mode
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(shipped).graph.initializer[0]), 1.0)


# ---------------------------------------------------------------------------------------------------- search and sweep


class Uneven(Residual):
    """Branches of decreasing weight, so that the last one is dropped first."""

    def __init__(self) -> None:
        super().__init__(4)
        with torch.no_grad():
            for number, inner in enumerate(self.inner):
                inner.weight.mul_(2.0 * 0.4**number)  # type: ignore[operator, union-attr]


def uneven() -> tuple[torch.nn.Module, torch.Tensor]:
    """A factory for ``module:factory``."""
    return Uneven(), torch.zeros(2, 8)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a module with data whose labels are its own predictions, so that its accuracy is 100 %."""
    rows = np.random.default_rng(0).standard_normal((240, 8)).astype(np.float32)
    with torch.no_grad():
        labels = Uneven()(torch.from_numpy(rows)).argmax(-1).numpy()
    path = tmp_path_factory.mktemp("labelled") / "rows.npz"
    np.savez(path, x=rows, y=labels)
    return {
        "model": Uneven(),
        "example_inputs": torch.zeros(2, 8),
        "data": str(path),
        "task": "image-classification",
        "rounds": 1,
    }


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing; these tests check the files, not the latencies."""
    monkeypatch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))


def by_operators(openers: Mapping[str, Any], feeds: Any, **_: Any) -> dict[str, Latency]:
    """Return latencies of 1 ms per matrix multiplication in the ONNX file of each engine."""

    def milliseconds(path: Path) -> float:
        nodes = onnx.load(str(path)).graph.node
        return float(sum(node.op_type in ("Gemm", "MatMul") for node in nodes))

    return {name: Latency(((milliseconds(opener.args[0]),) * 4,)) for name, opener in openers.items()}


def never_faster(openers: Mapping[str, Any], feeds: Any, **_: Any) -> dict[str, Latency]:
    """Return a latency of 2 ms for every engine."""
    return {name: Latency(((2.0,) * 4,)) for name in openers}


@pytest.fixture(scope="module")
def swept(labelled: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParetoFront]:
    """A front with enough points to build every efficient one."""
    output = tmp_path_factory.mktemp("swept") / "front"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
        front = compressor.sweep(**labelled, cost="macs", max_loss=60.0, points=12, output=output)
    return output, front


@pytest.mark.slow
def test_the_export_of_every_plan_of_a_front_has_the_measured_quality(
    swept: tuple[Path, ParetoFront], labelled: dict[str, Any], brief: None, tmp_path: Path
) -> None:
    folder, front = swept
    rows = json.loads((folder / "sweep.json").read_text())["points"]
    assert len(rows) == len(front.points) > 2
    assert len(front.built()) == sum(row["efficient"] or row["number"] == 0 for row in rows)
    for row in rows[1:]:
        report = compressor.export(**labelled, drop=str(folder / row["plan"]), output=tmp_path / str(row["number"]))
        assert report.plan.changes == row["changes"]
        if "latency" in row:
            assert report.quality is not None
            assert report.quality.figures["result"].value == row["figure"]["value"]
            assert report.quality.loss["baseline"].value == row["test_loss"]["value"]
            # The fitted weights are the same; the engines differ in float32 rounding.
            free = report.quality.label_free["divergence"].value
            assert free == pytest.approx(row["label_free"]["divergence"]["value"], rel=1e-3, abs=1e-6)


def test_a_front_starts_at_the_original_and_decreases_in_cost(swept: tuple[Path, ParetoFront]) -> None:
    points = swept[1].points
    assert points[0].plan.changes == {}
    assert (points[0].loss, points[0].predicted) == (0.0, 1.0)
    for before, after in itertools.pairwise(points):
        assert after.multiply_adds < before.multiply_adds
        assert list(before.plan.changes.items()) == list(after.plan.changes.items())[: len(before.plan.changes)]


def test_an_interrupted_sweep_resumes_and_keeps_the_old_folder_until_it_ends(
    swept: tuple[Path, ParetoFront],
    labelled: dict[str, Any],
    brief: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "front"
    shutil.copytree(swept[0], output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    options = {**labelled, "cost": "macs", "max_loss": 60.0, "points": 2, "output": output, "force": True}
    checks: list[Graph] = []
    check = ValidationLoss.loss

    def interrupting(self: ValidationLoss, graph: Graph, **limits: Any) -> Loss:
        checks.append(graph)
        if len(checks) == 3:
            raise KeyboardInterrupt
        return check(self, graph, **limits)

    monkeypatch.setattr(ValidationLoss, "loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        compressor.sweep(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".front.journal", "front"]
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    again = compressor.sweep(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front"]
    assert [point.plan for point in again.points] == [point.plan for point in swept[1].points]
    assert [point.loss for point in again.points] == [point.loss for point in swept[1].points]
    assert again.search["recalled"] > swept[1].search["recalled"]
    assert again.search["sweeps"] < swept[1].search["sweeps"]


def test_a_failed_sweep_leaves_only_its_journal(
    labelled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurements of the search are kept if a later step fails."""

    def failing(*_: Any) -> None:
        raise CompressorError("the engine fell asleep")

    monkeypatch.setattr(GraphEvaluator, "measure", failing)
    with pytest.raises(CompressorError, match="fell asleep"):
        compressor.sweep(**labelled, cost="macs", actions="drop", points=2, output=tmp_path / "front")
    assert [path.name for path in tmp_path.iterdir()] == [".front.journal"]


@pytest.mark.parametrize("command", [compressor.export, compressor.sweep])
def test_a_model_is_not_replaced_by_its_own_export(command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    with pytest.raises(CompressorError, match=r"is or holds .*, which this command reads; choose another --output"):
        command(folder, data=DIGITS, output=folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json"]


def test_the_report_describes_the_search(labelled: dict[str, Any], brief: None, tmp_path: Path) -> None:
    report = compressor.export(**labelled, cost="macs", max_loss=30.0, output=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    search = content["search"]
    assert {step["unit"]: step["action"] for step in search["steps"]} == content["plan"]["changes"]
    assert search["steps"]
    assert all(step["loss"] <= 30.0 for step in search["steps"])
    alone = {"run": {"times": 1, "shapes": {"x": [1, 8]}, "timings": {}}}
    prices = {"unit": "multiply-adds", "source": None, "timings": {}, "largest_error": 0.0, "calls": alone}
    assert len(search["prices"].pop("sites")) == 16
    assert search["prices"] == prices
    assert search["predicted_speedup"] > 1.0
    assert set(content["quality"]["label_free"]) == {"agreement", "divergence"}
    assert content["quality"]["label_free"]["divergence"]["value"] > 0.0
    assert content["healed"] is None
    assert report.plan.rule == "auto, at most 30 % loss"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the journal is gone


def test_stored_prices_give_the_same_plan_without_timing(
    labelled: dict[str, Any], brief: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compressor.export(**labelled, actions="drop", max_loss=30.0, output=tmp_path / "first")

    def timing(*_: Any, **__: Any) -> None:
        raise AssertionError("the search timed the target")

    monkeypatch.setattr(GraphEvaluator, "time", timing)
    again = compressor.export(
        **labelled, actions="drop", max_loss=30.0, prices=tmp_path / "first", output=tmp_path / "again"
    )
    assert again.plan == first.plan
    assert again.search["steps"] == first.search["steps"] != []
    own, other = (report.search["prices"] for report in (again, first))
    assert own == other | {"source": str(tmp_path / "first")}
    assert f"The search took its prices from {tmp_path / 'first'}; nothing was timed for them." in again.notes


def test_the_goal_for_speed_is_reached_in_measured_latency(
    labelled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_timing, "interleave", by_operators)
    report = compressor.export(**labelled, actions="drop", speedup=1.6, output=tmp_path / "out")
    assert report.speedup().ratio == 5 / 3  # of five matrix multiplications three are left: four would be 1.25 times
    assert report.search["prices"]["timings"]["as it is"] == 5.0
    assert "1.6x faster" in report.plan.rule
    assert report.missed() == ()
    assert [entry["measured"] for entry in report.search["goal"]["timed"]] == [5 / 3]
    assert any(
        note.startswith("The result is 1.667x faster (1.6x asked for, exceeded by 4%) and loses ")
        for note in report.notes
    )


def test_a_goal_that_no_plan_reaches_ends_with_status_1_and_a_complete_folder(
    labelled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_timing, "interleave", never_faster)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    arguments = ["export", f"{Path(__file__).stem}:uneven", "--data", labelled["data"], "--task", labelled["task"]]
    goal = ["--speedup", "1.5", "--actions", "drop"]
    done = CliRunner().invoke(main, [*arguments, *goal, "--quiet", "--output", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    sentence = "The result is 1x faster, not 1.5x as asked for."
    assert sentence in " ".join(done.stdout.split())
    assert done.stderr == ""
    assert sentence in json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------- actions, healing


@pytest.mark.parametrize(
    ("drop", "action"), [("attention:1", "linear"), pytest.param("attention:1", "fuse", marks=pytest.mark.slow)]
)
def test_the_embedded_sample_is_exported_with_fitted_maps(brief: None, tmp_path: Path, drop: str, action: str) -> None:
    model = five_blocks(tmp_path / "model", kept=(0, 9))
    report = compressor.export(
        model, data=DIGITS, drop=drop, actions=action, samples=60, rounds=1, output=tmp_path / "out"
    )
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(content["plan"]["changes"].values()) == {action}
    assert content["plan"]["dropped"] == []
    assert report.summary().startswith("Changed ")
    assert report.sizes["result"].multiply_adds < report.sizes["baseline"].multiply_adds
    assert report.parity["result"] <= TOLERANCE


@pytest.mark.parametrize("action", ["low-rank:2", pytest.param("tba", marks=pytest.mark.slow)])
def test_a_plan_with_fitted_maps_is_replayed(
    action: str, labelled: dict[str, Any], brief: None, tmp_path: Path
) -> None:
    first = compressor.export(**labelled, drop="2", metric="reverse", actions=action, output=tmp_path / "first")
    again = compressor.export(**labelled, drop=str(tmp_path / "first" / "plan.json"), output=tmp_path / "again")
    # One map replaces both consecutive branches, so the other branch is dropped.
    assert sorted(first.plan.changes.values()) == sorted(["drop", action])
    assert (tmp_path / "again" / "plan.json").read_text() == (tmp_path / "first" / "plan.json").read_text()
    assert first.quality is not None
    assert first.quality == again.quality
    assert first.quality.label_free["divergence"].value > 0.0


def test_the_result_is_compared_with_the_graph_before_folding(
    labelled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison with the folded graph would not detect an error of the folding."""

    def breaking(graph: Graph) -> Graph:
        fork = graph.fork()
        apply(Drop(tuple(find_sites(fork)[:1])), fork)
        return fork

    monkeypatch.setattr(engine_builder, "fold_graph", breaking)
    with pytest.raises(CompressorError, match=r"result\.onnx"):
        compressor.export(**labelled, drop="1", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["closed-form", "distill"])
def test_healing_is_reported_and_does_not_increase_the_loss(
    method: str, labelled: dict[str, Any], brief: None, tmp_path: Path
) -> None:
    pytest.importorskip("compressor.heal.heal", reason="compressor.heal cannot be imported")
    report = compressor.export(
        **labelled, drop="2", metric="reverse", heal=method, heal_budget=10.0, output=tmp_path / "out"
    )
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    healed = content["healed"]
    assert healed["method"] == method
    assert any(healed["note"] in note for note in content["notes"])
    assert healed["after"]["loss"] <= healed["before"]["loss"] + 1e-9
    assert healed["after"]["divergence"] <= healed["before"]["divergence"]
    assert (healed["after"]["divergence"] < healed["before"]["divergence"]) is healed["kept"]
    assert f"heal ({method})" in {step["name"] for step in content["steps"]}
    assert list(report.plan.changes.values()) == ["drop", "drop"]


@dataclasses.dataclass(frozen=True)
class Losing:
    """A choice along a search with planted losses on validation data."""

    losses: tuple[float, ...]
    count: int

    at = lambda self, count: dataclasses.replace(self, count=count)  # noqa: E731
    within = Choice.within
    plan = property(lambda self: SimpleNamespace(changes=dict.fromkeys(range(self.count), "drop")))
    reduced = lambda self: self.count  # noqa: E731

    @property
    def search(self) -> Any:
        return SimpleNamespace(steps=[SimpleNamespace(loss=loss) for loss in self.losses])


@pytest.mark.parametrize(
    ("losses", "count", "after", "shares", "shipped"),
    [
        ((0.2, 0.9), 2, (0.9,), (1.0,), 2),  # within the limit before healing: no second attempt can follow
        ((1.4,), 1, (1.4,), (1.0,), 0),  # above it, but there is no milder plan
        ((0.2, 1.4), 2, (0.8,), (0.5,), 2),
        ((0.2, 1.4), 2, (1.2, 0.1), (0.5, 1.0), 1),  # the second attempt has all that is left
        ((0.2, 1.4, 0.9), 2, (1.2, 0.1), (0.5, 1.0), 1),  # never more changes than the choice
    ],
)
def test_time_for_healing_is_withheld_only_where_a_second_attempt_can_follow(
    losses: tuple[float, ...],
    count: int,
    after: tuple[float, ...],
    shares: tuple[float, ...],
    shipped: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budgets, results = [], iter(after)

    def healing(choice: Any, subject: Any, settings: Any, budget: float, steps: Any) -> tuple[Any, Any]:
        budgets.append(budget)
        return choice.reduced(), SimpleNamespace(after={"loss": next(results)})

    monkeypatch.setattr(export, "_heal", healing)
    settings = Settings(heal="distill", max_loss=1.0)
    choice, graph, _ = export._healed(Losing(losses, count), None, settings, 100.0, None)  # type: ignore[arg-type]
    assert budgets == pytest.approx([100.0 * share for share in shares], abs=1.0)
    assert choice.count == graph == shipped


def test_healing_is_skipped_without_changes(labelled: dict[str, Any], brief: None, tmp_path: Path) -> None:
    report = compressor.export(**labelled, drop="none", heal="closed-form", output=tmp_path / "out")
    assert report.healed is None
