"""What `bench` makes of an exported folder: which file an engine is built from, in which precision, for whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.benchmark.contenders import BenchError, Exported, given


def folder(path: Path, holds: str, target: str = "openvino", precision: str = "bf16", **engine: str) -> Path:
    """An exported folder, as far as `bench` looks at it before it loads anything."""
    path.mkdir()
    (path / holds).write_bytes(b"")
    report = {
        "settings": {"target": target, "precision": precision, "model": None},
        "model": {"task": "x"},
        "data": {"test_ids": []},
        "engine": engine,
    }
    (path / "report.json").write_text(json.dumps(report))
    return path


def entries(path: Path, target: str | None = None) -> list[tuple[str, str, Path | None]]:
    (one,) = given([str(path)])
    return [(each.target, each.precision, each.file) for each in one.entries(None, target, compiled=False)]


def test_a_folder_is_built_again_from_its_portable_file_in_its_precision(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "model.onnx", file="openvino_model.xml")
    assert Exported.read(path).engine == path / "model.onnx"
    assert entries(path) == [("openvino", "bf16", path / "model.onnx")]
    assert entries(path, "onnxruntime") == [("onnxruntime", "fp32", path / "model.onnx")]
    written = folder(tmp_path / "int8", "model.onnx", precision="int8")  # the file is in int8 already
    assert entries(written) == [("openvino", "fp32", written / "model.onnx")]


def test_a_folder_without_a_portable_file_is_opened_as_it_is(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "model.pt2", file="model.pt2")
    assert Exported.read(path).engine == path / "model.pt2"
    assert entries(path)[0][2] == path / "model.pt2"
    with pytest.raises(BenchError, match=r"out holds an engine of openvino, which onnxruntime cannot open; leave out"):
        entries(path, "onnxruntime")
    broken = folder(tmp_path / "gone", "other", file="model.pt2")
    with pytest.raises(BenchError, match=r"there is no file .*model\.pt2"):
        entries(broken)


def test_a_report_without_a_precision_is_of_an_older_version(tmp_path: Path) -> None:
    path = folder(tmp_path / "out", "model.onnx")
    report = json.loads((path / "report.json").read_text())
    del report["settings"]["precision"]
    (path / "report.json").write_text(json.dumps(report))
    with pytest.raises(BenchError, match="no report that `compressor export` wrote; export again"):
        given([str(path)])
