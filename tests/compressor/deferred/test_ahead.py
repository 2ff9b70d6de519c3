"""Engines built ahead of time: the part of the report, refusals, and whole exports with NVIDIA's builder."""

import errno
import json
import shutil

import pytest
import torch

import compressor
from compressor.deferred import build as device_build
from compressor.deferred.ahead import build_ahead
from compressor.deferred.check_package import read_package
from compressor.deferred.parser import parsed_by
from compressor.errors import FolderError
from compressor.pipeline import export as pipeline
from compressor.report.engine_text import describe_measurements
from compressor.target.gpus import Gpus
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildError, BuildOptions, LayerCounts
from runtimes.tensorrt_rtx import target as rtx
from tests.samples import Residual, labelled_rows

OPTIONS = BuildOptions(device="cuda")
LAYERS = LayerCounts(3, {"fp32": 2, "other": 1}, {"MATRIX_MULTIPLY": 2, "SHAPE": 1}, None)


class Builder:
    """Builds engines of the length of the GPU's name, and refuses those in `refused`."""

    def __init__(self, *refused):
        self.refused = refused

    def builder_version(self):
        return "Builder 1"

    def network_layers(self, source):
        assert source.name == "model.onnx"
        return LAYERS

    def build_for(self, source, out, options, gpu, progress):
        assert options is OPTIONS
        progress("Optimizing", 1, 2)
        if gpu in self.refused:
            raise BuildError(f"no products for {gpu}.")
        path = out / f"{source.stem}.{gpu}.engine"
        path.write_text(gpu)
        return path


def built(folder, *refused, names=("sm75", "sm89", "sm120"), named=False):
    return build_ahead(folder, Gpus(Builder(*refused), names, named), OPTIONS, Steps())


def test_every_gpu_gets_an_engine_with_its_size(tmp_path):
    part = built(tmp_path)
    assert part["builder"] == "Builder 1"
    assert part["layers"]["count"] == 3
    assert part["refused"] == {}
    for gpu, facts in part["engines"].items():
        assert (tmp_path / facts["file"]).read_text() == gpu
        assert facts["bytes"] == len(gpu)
        assert facts["seconds"] >= 0
    assert list(part["engines"]) == ["sm75", "sm89", "sm120"]


@pytest.mark.parametrize("refusing", ["sm75", "sm120"])
def test_of_all_gpus_one_that_refuses_is_left_out_with_the_reason(tmp_path, refusing):
    part = built(tmp_path, refusing)
    assert part["refused"] == {refusing: f"no products for {refusing}."}
    assert set(part["engines"]) == {"sm75", "sm89", "sm120"} - {refusing}


def test_a_named_gpu_that_refuses_stops_the_export(tmp_path):
    with pytest.raises(BuildError, match="no products for sm75"):
        built(tmp_path, "sm75", named=True)


def test_a_model_that_every_gpu_refuses_stops_the_export(tmp_path):
    with pytest.raises(BuildError, match="no products"):
        built(tmp_path, "sm75", "sm89", "sm120")


def test_the_text_names_builder_sizes_and_the_next_step(tmp_path):
    engine = {"state": "deferred", "target": "tensorrt_rtx", "ahead_of_time": built(tmp_path, "sm75")}
    text = " ".join(describe_measurements(engine))
    assert "Builder 1 built 2 engines ahead of time: sm89 0.0 MB, sm120 0.0 MB. They were not run." in text
    assert "compressor build" in text
    assert "3 layers before fusion: 2 fp32, 1 other" in text


def test_parsers_are_asked_for_nvidia_targets_alone(monkeypatch, tmp_path):
    files = {"result": tmp_path / "model.onnx"}
    monkeypatch.setattr(rtx, "missing_builder", lambda: "it is not installed")
    assert parsed_by("onnxruntime", files) == {}
    assert parsed_by("tensorrt", files) == {"parser": {"unknown": "it is not installed"}}
    monkeypatch.setattr(rtx, "missing_builder", lambda: None)
    monkeypatch.setattr(rtx, "builder_version", lambda: "Builder 1")
    monkeypatch.setattr(rtx, "network_layers", lambda path: LAYERS)
    part = parsed_by("tensorrt", files)["parser"]
    assert (part["builder"], part["files"]["result"]["count"]) == ("Builder 1", 3)
    assert "Builder 1 takes the ONNX files of this folder (result)" in " ".join(describe_measurements({"parser": part}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return labelled_rows(tmp_path_factory.mktemp("data") / "rows.npz", Residual(2), 120)


def export(data, output, **options):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    pytest.importorskip("onnxruntime", reason="it measures in place of the GPU")
    common = {"model": Residual(2), "example_inputs": torch.zeros(2, 32), "data": str(data), "rounds": 1, "drop": "1"}
    options = common | {"target": "tensorrt_rtx"} | options
    return compressor.export(**options, task="image-classification", output=output)


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """An int8 export for two GPUs, with its report."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    return folder, export(data, folder, gpu="sm86,sm89", int8="static", max_precision_loss=100.0)


def test_an_export_builds_engines_that_a_device_can_complete(exported):
    folder, report = exported
    assert sorted(path.name for path in (folder / "engines").iterdir()) == ["model.sm86.engine", "model.sm89.engine"]
    package = read_package(folder)  # holds the report to its schema and the files to the manifest
    assert {f"engines/model.{gpu}.engine" for gpu in ("sm86", "sm89")} <= set(package["digests"])
    engine = package["report"]["engine"]
    assert engine["state"] == "deferred"
    assert engine["ahead_of_time"]["layers"]["precisions"]["int8"] > 0
    assert "engines built ahead of time" in {each.feature for each in report.limitations}
    assert "TensorRT for RTX" in (folder / "README.md").read_text()
    assert set(engine["parser"]["files"]) == {"original", "baseline", "result"}


@pytest.mark.parametrize(
    ("precision", "words", "loses"),
    [
        ("bf16", "computes in bfloat16", (0.0, 0.5)),
        pytest.param("fp8", "are fp8 (E4M3)", (0.0, 1.0), marks=pytest.mark.slow),
        ("int4", "Weights are int4, with a scale per block; products compute in fp16", (0.0, 5.0)),
    ],
)
def test_an_export_in_other_precisions_is_measured_in_their_arithmetic(data, tmp_path, precision, words, loses):
    folder = tmp_path / "out"
    report = export(data, folder, gpu="sm89", precision=precision, max_precision_loss=100.0)
    engine = read_package(folder)["report"]["engine"]
    assert engine["ahead_of_time"]["layers"]["precisions"][precision] > 0
    assert words in (folder / "README.md").read_text()
    features = {each.feature: each.reason for each in report.limitations}
    half = "bf16" if precision == "bf16" else "fp16"
    assert f"measured with {half} arithmetic" in features[f"{precision} on the device"]
    assert ("int4 of all matrices" in features) == (precision == "int4")  # the head has four classes
    assert loses[0] <= report.precision["result"]["loss"] <= loses[1]
    assert 0 < report.parity["result"] < 0.2  # rounding, and no more


def test_a_float32_export_leaves_out_turing_with_the_reason(data, tmp_path):
    report = export(data, tmp_path / "out")
    part = json.loads((tmp_path / "out" / "report.json").read_text())["engine"]["ahead_of_time"]
    assert set(part["engines"]) == set(rtx.gpus()) - {"sm75"}
    assert "FP32 GEMM is not supported" in part["refused"]["sm75"]
    assert "engine for sm75" in {each.feature for each in report.limitations}


def test_a_deferred_export_for_tensorrt_is_held_to_the_parser(data, tmp_path):
    report = export(data, tmp_path / "out", target="tensorrt", defer_build=True)
    assert "parser on the device" in {each.feature for each in report.limitations}
    parser = read_package(tmp_path / "out")["report"]["engine"]["parser"]
    assert parser["builder"] == rtx.builder_version()


class Folding(torch.nn.Module):
    """A branch whose operator NVIDIA's parser lacks (Col2Im)."""

    def __init__(self):
        super().__init__()
        self.linear, self.fold = torch.nn.Linear(32, 32), torch.nn.Fold((4, 4), (2, 2), stride=2)
        self.head = torch.nn.Linear(32, 4)

    def forward(self, x):
        x = x + self.linear(x).relu()
        return self.head(x + self.fold(x.reshape(-1, 8, 4)).flatten(1))


def test_an_operator_that_the_parser_lacks_is_refused_before_the_search(tmp_path, monkeypatch):
    def search(*_):
        raise AssertionError("the search began")

    monkeypatch.setattr(pipeline, "choose_plan", search)
    torch.manual_seed(0)
    module = Folding().eval()
    data = labelled_rows(tmp_path / "rows.npz", module, 120)
    with pytest.raises(BuildError, match=r"layer model\.fold, node .*its parser does not support Col2Im"):
        export(data, tmp_path / "out", model=module, gpu="sm89")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]


def test_a_full_disk_while_building_leaves_no_folder(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rtx, "write_engine", full)
    with pytest.raises(FolderError, match="is full; free some space"):
        export(data, tmp_path / "out", gpu="sm89")
    assert list(tmp_path.iterdir()) == []


def test_the_build_on_the_device_keeps_the_engines_of_the_export(exported, tmp_path, monkeypatch):
    """ONNX Runtime stands for the device: the target's build is replaced, everything else is real."""
    folder = shutil.copytree(exported[0], tmp_path / "out")
    onnxruntime = compressor.deferred.build.runtime("onnxruntime")
    monkeypatch.setattr(rtx, "missing", lambda: None)
    monkeypatch.setattr(rtx, "build", lambda source, out, options: source)
    monkeypatch.setattr(rtx, "load", lambda path, options: onnxruntime.load(path, BuildOptions(threads=1)))
    monkeypatch.setattr(rtx, "layers", lambda path, options: None)
    report = device_build.build(folder, rounds=1)
    assert report.engine["state"] == "built"
    assert list(report.engine["ahead_of_time"]["engines"]) == ["sm86", "sm89"]
    assert (folder / "engines" / "model.sm89.engine").is_file()
