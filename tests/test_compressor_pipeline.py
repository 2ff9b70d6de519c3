"""The whole chain on small models: what the folder and the report hold, and that bad input leaves nothing behind."""

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import compressor
from compressor import CompressorError, pipeline
from compressor.models import SAMPLE
from compressor.report import Report
from compressor.settings import Settings
from passes.base import PassError

pytest.importorskip("onnxruntime", reason="the target of these exports")


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


def pictures(folder: Path, *, classes: int, each: int, corrupt: int = 0) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        inside = folder / f"c{label:02}" if classes > 1 else folder
        inside.mkdir(parents=True)
        for number in range(each):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(inside / f"{number}.png")
    for number in range(corrupt):
        (folder / f"c{0:02}" / f"bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    return folder


def refused(output: Path, words: str, **options: Any) -> None:
    """The export fails with a sentence that holds `words`, and leaves nothing."""
    output.parent.mkdir(exist_ok=True)
    with pytest.raises((CompressorError, PassError)) as caught:
        pipeline.export(Settings(output=output, **({"rounds": 1, "drop": "1"} | options)))
    assert words in str(caught.value)
    assert list(output.parent.iterdir()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """One export through the Python API: two corrupt images among good ones, int8, a name to drop."""
    folder = tmp_path_factory.mktemp("exported")
    data = pictures(folder / "images", classes=10, each=3, corrupt=2)
    report = compressor.export(data=data, drop="attention:1", int8="dynamic", rounds=1, batch=64, output=folder / "out")
    return folder / "out", report


def test_the_manifest_lists_every_file_with_its_true_hash(exported: tuple[Path, Report]) -> None:
    folder, _ = exported
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"model.onnx", "plan.json", "report.json", "config.json"} <= set(files)
    assert set(files) | {"manifest.json"} == {path.name for path in folder.iterdir()}
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_corrupt_images_are_counted_and_named_in_the_report(exported: tuple[Path, Report]) -> None:
    _, report = exported
    assert any(note.startswith("2 unreadable samples were skipped: c00/bad") for note in report.notes)
    assert len(report.data["skipped"]) == 2


def test_the_report_holds_what_is_needed_to_repeat_the_export(exported: tuple[Path, Report]) -> None:
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


def test_random_data_states_no_quality(tmp_path: Path) -> None:
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
    refused(tmp_path / "room" / "out", "labels up to 11, but sample knows only 10 classes", data=data)


def test_a_model_without_any_site_is_refused(tmp_path: Path, vectors: str) -> None:
    module, inputs = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.zeros(2, 8)
    refused(tmp_path / "room" / "out", "no residual branch", model=module, example_inputs=inputs, data=vectors)


@pytest.mark.parametrize("drop", ["none", "auto", "1"])
def test_finite_weights_that_overflow_are_refused(tmp_path: Path, vectors: str, drop: str) -> None:
    module = Residual()
    with torch.no_grad():
        for inner in module.inner:
            inner.weight.mul_(1e30)  # type: ignore[operator, union-attr]
    options = {"model": module, "example_inputs": torch.zeros(2, 8), "data": vectors, "drop": drop}
    refused(tmp_path / "room" / "out", "check the weights" if drop != "auto" else "check its weights", **options)


def test_data_that_the_model_refuses_is_named(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=1, intermediate_size=8, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 5000, (12, 6)))
    data = str(tmp_path / "ids.npy")
    refused(tmp_path / "room" / "out", "token ids below the vocabulary's size", model=tmp_path / "bert", data=data)
    lacking = {"model": tmp_path / "bert", "data": data, "task": "text-classification"}
    refused(tmp_path / "room" / "out", "lacks 2 weights that text-classification needs", **lacking)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "plan"),
        (b"hello", "not a plan.json"),
        (b"\xff\xfe\x00", "is not text"),
        (b"{}", "plan"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    refused(tmp_path / "room" / "out", words, drop=str(tmp_path / "plan.json"), samples=12)


def test_a_plan_for_another_model_or_with_unknown_sites_is_refused(
    tmp_path: Path, exported: tuple[Path, Report], vectors: str
) -> None:
    plan = str(exported[0] / "plan.json")
    other = {"model": Residual(), "example_inputs": torch.zeros(2, 8), "data": vectors, "drop": plan}
    refused(tmp_path / "room" / "out", "another model (sample)", **other)
    content = json.loads(Path(plan).read_text())
    content["decisions"][0]["site"] = "blocks.77.attn"
    (tmp_path / "unknown.json").write_text(json.dumps(content))
    refused(tmp_path / "room" / "out", "blocks.77.attn", drop=str(tmp_path / "unknown.json"), samples=12)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size fails the real ONNX writer in the middle of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(tmp_path / "room" / "out", "is full", samples=12, drop="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_inspect_takes_a_module() -> None:
    inspection = compressor.inspect(Residual(), example_inputs=torch.zeros(2, 8), data="random")
    assert len(inspection.rows()) == 3
    assert (SAMPLE / "digits.npz").is_file()


def test_external_weights_are_shipped_under_their_new_name_and_as_readable_as_the_model(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "big", ends[:1], ends[1:], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    source = tmp_path / "result.onnx"
    onnx.save_model(model, source, save_as_external_data=True, location="result.onnx.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    shipped = pipeline._ship(source, tmp_path / "out" / "model.onnx")
    source.with_name("result.onnx.data").unlink()
    weights = shipped.with_name("model.onnx.data")
    assert weights.stat().st_mode == shipped.stat().st_mode
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(shipped).graph.initializer[0]), 1.0)
