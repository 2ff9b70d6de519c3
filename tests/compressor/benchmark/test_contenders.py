"""Tests of the engines that `bench` builds from an exported folder: file, precision and target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.benchmark.contenders import BenchError, ExportFolder, parse_contenders
from compressor.errors import CompressorError, FolderError
from compressor.workspace.output_folder import write_manifest


def folder(path: Path, file_name: str, target: str = "openvino", precision: str = "bf16", **engine: str) -> Path:
    """Write the parts of an exported folder that `bench` reads before it loads a model."""
    path.mkdir()
    (path / file_name).write_bytes(b"")
    report = {
        "settings": {"target": target, "precision": precision, "model": None},
        "model": {"name": "m", "source": "timm", "task": "x", "random_weights": True},
        "data": {
            "source": "random",
            "reading": "",
            "random": True,
            "seed": 0,
            "sizes": {"calibration": 1, "validation": 1, "test": 1},
            "test_ids": [],
        },
        "engine": engine,
    }
    (path / "report.json").write_text(json.dumps(report))
    write_manifest(path)
    return path


def entries(path: Path, target: str | None = None) -> list[tuple[str, str, Path | None]]:
    (one,) = parse_contenders([str(path)])
    return [(each.target, each.precision, each.file) for each in one.entries(None, target, compiled=False)]


def test_folder_is_built_from_model_onnx_in_its_precision(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "model.onnx", file="openvino_model.xml")
    assert ExportFolder.read(path).engine == path / "model.onnx"
    assert entries(path) == [("openvino", "bf16", path / "model.onnx")]
    assert entries(path, "onnxruntime") == [("onnxruntime", "fp32", path / "model.onnx")]
    written = folder(tmp_path / "int8", "model.onnx", precision="int8")  # model.onnx is int8 already
    assert entries(written) == [("openvino", "fp32", written / "model.onnx")]


def test_folder_without_model_onnx_uses_the_engine_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "model.pt2", file="model.pt2")
    assert ExportFolder.read(path).engine == path / "model.pt2"
    (one,) = parse_contenders([str(path)])
    assert next(iter(one.entries(None, None, compiled=False, trusted=True))).file == path / "model.pt2"
    with pytest.raises(BenchError, match="is compiled code, and opening it runs it; give --trust-remote-code"):
        entries(path)
    with pytest.raises(BenchError, match=r"out holds an engine of openvino, which onnxruntime cannot open; leave out"):
        entries(path, "onnxruntime")
    broken = folder(tmp_path / "gone", "other", file="model.pt2")
    with pytest.raises(FolderError, match=r"gone lacks model\.pt2; copy the whole folder again"):
        entries(broken)


def test_report_without_precision_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "model.onnx")
    report = json.loads((path / "report.json").read_text())
    del report["settings"]["precision"]
    (path / "report.json").write_text(json.dumps(report))
    write_manifest(path)
    with pytest.raises(CompressorError, match=r"settings\.precision: field required\); it is no report that"):
        parse_contenders([str(path)])
