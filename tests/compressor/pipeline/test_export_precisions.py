"""Exports in each precision: the files of the folder and the contents of the report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor.benchmark.contenders import parse_contenders
from compressor.measure import latency as engine_timing
from runtimes.base.registry import runtime
from runtimes.base.timing import interleave
from tests.onnx_files import count, initializers

pytest.importorskip("onnxruntime")


class Residual(torch.nn.Module):
    """Two residual branches and a head, on vectors of 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))
        self.head = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner in self.inner:
            x = x + torch.relu(inner(x))
        out: torch.Tensor = self.head(x)
        return out


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a short export of a module with data."""
    monkeypatch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
    rows = np.random.default_rng(0).standard_normal((160, 32)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows, y=Residual()(torch.from_numpy(rows)).argmax(-1).numpy())
    common = {"model": Residual(), "example_inputs": torch.zeros(2, 32), "data": str(tmp_path / "rows.npz")}
    return common | {"drop": "none", "rounds": 1, "task": "image-classification", "output": tmp_path / "out"}


def test_an_int4_export_has_weights_of_4_bits(subject: dict[str, Any], tmp_path: Path) -> None:
    report = compressor.export(**subject, precision="int4", max_precision_loss=100.0)
    assert count(tmp_path / "out" / "model.onnx", "MatMulNBits") == 3
    assert (report.precision["result"]["precision"], report.precision["result"]["by"]) == ("int4", "onnxruntime")
    assert report.precision["result"]["loss"] > 0
    assert list(report.latency) == ["original", "baseline", "result"]


def test_an_auto_export_chooses_a_precision_of_the_target_and_reports_all_trials(
    subject: dict[str, Any], tmp_path: Path
) -> None:
    report = compressor.export(**subject, precision="auto", max_precision_loss=100.0)
    assert [trial["precision"] for trial in report.trials] == list(runtime("onnxruntime").precisions["cpu"])
    (chosen,) = [trial for trial in report.trials if trial["verdict"] == "chosen"]
    assert report.settings["precision"] == chosen["precision"]
    times = {trial["precision"]: trial["milliseconds"] for trial in report.trials}
    assert chosen["milliseconds"] == min(times.values())
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["settings"]["precision"] == chosen["precision"]
    assert content["trials"] == [dict(trial) for trial in report.trials]
    assert all(trial["verdict"] for trial in report.trials)
    assert set(report.precision) == (set() if chosen["precision"] == "fp32" else {"baseline", "result"})


def test_bench_measures_an_fp16_export_of_openvino_in_fp16(subject: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    out = tmp_path / "out"
    compressor.export(**subject, target="openvino", precision="fp16", max_precision_loss=100.0)
    assert initializers(out / "model.onnx")  # the portable file stays float32
    assert {value.dtype for value in initializers(out / "model.onnx").values()} <= {np.dtype("f4"), np.dtype("i8")}
    stored = sum(value.nbytes for value in initializers(out / "model.onnx").values())
    assert (out / "openvino_model.bin").stat().st_size < 0.75 * stored
    (entry,) = parse_contenders([str(out)])[0].entries(None, None, compiled=False)
    assert (entry.target, entry.precision, entry.file) == ("openvino", "fp16", out / "model.onnx")
    (elsewhere,) = parse_contenders([str(out)])[0].entries(None, "onnxruntime", compiled=False)
    assert (elsewhere.target, elsewhere.precision) == ("onnxruntime", "fp32")  # the precision of the ONNX file
