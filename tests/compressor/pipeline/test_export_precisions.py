"""Exports in each precision: the files of the folder and the contents of the report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import compressor
from compressor.benchmark.contenders import parse_contenders
from compressor.errors import CompressorError
from compressor.measure import latency as engine_timing
from compressor.pipeline import export
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


class Wide(Residual):
    """A branch whose inner values reach 5e5, far beyond the range of fp16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1e-5 * self.inner[1](torch.relu(3e5 * self.inner[0](x)))
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


@pytest.mark.parametrize(
    ("precision", "by"), [("int8-weight-only", "onnxruntime"), ("int4", "onnxruntime"), ("int2", "compressor")]
)
def test_an_export_has_weights_of_few_bits(subject: dict[str, Any], tmp_path: Path, precision: str, by: str) -> None:
    report = compressor.export(**subject, precision=precision, max_precision_loss=100.0)
    assert count(tmp_path / "out" / "model.onnx", "MatMulNBits") == 3
    assert (report.precision["result"]["precision"], report.precision["result"]["by"]) == (precision, by)
    assert f"Weights are {precision.removesuffix('-weight-only')}" in (tmp_path / "out" / "README.md").read_text()
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


def test_an_fp16_export_for_another_machine_is_judged_in_fp16(
    subject: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", {"target": "tensorrt", "precision": "fp16", "defer_build": True}
    report = compressor.export(**subject | {"model": Wide()}, **options)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    content = json.loads((out / "report.json").read_text())
    kept = content["precision"]["result"]["float32"]
    assert any(str(each["module"]).endswith("inner.1") for each in kept)
    (limitation,) = [each for each in report.limitations if each.feature == "fp16 of all layers"]
    assert "(largest value " in limitation.reason
    assert limitation.reason in str(content["limitations"])
    for text in (report.summary(), (out / "report.html").read_text(), (out / "README.md").read_text()):
        assert limitation.reason in text
    assert content["engine"]["stand_in"]["measured"]["result"]["parity"] < 0.01
    assert report.quality is not None
    assert report.quality.precision_loss is not None
    # Without the check of the ranges no row is finite in fp16, and the export says so.
    monkeypatch.setattr("compressor.quantize.convert._maxima", lambda *_: {})
    with pytest.raises(CompressorError, match="NaN or infinity"):
        compressor.export(**subject | {"model": Wide(), "force": True}, **options)


def test_a_precision_that_loses_more_than_allowed_says_so_everywhere(subject: dict[str, Any], tmp_path: Path) -> None:
    report = compressor.export(**subject, precision="int4", max_precision_loss=0.0)
    out, lost = tmp_path / "out", report.precision["result"]["loss"]
    assert lost > 0
    sentence = f"The expected loss of the result in int4 is {lost:.2f} % by validation data, above the limit of 0 %."
    assert sentence in report.notes
    assert sentence in report.summary()
    assert sentence in json.loads((out / "report.json").read_text())["notes"]
    for page in ("report.html", "README.md"):
        assert sentence in (out / page).read_text()
    assert ("  limit of int4, %", "", "", "0, exceeded") in list(report._rows())


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


@pytest.fixture
def narrow(subject: dict[str, Any]) -> dict[str, Any]:
    """Options of an export in int8 of a module whose head has too few classes for int8, with data without labels."""
    module, rows = Residual(), np.load(subject["data"])["x"]
    module.head = torch.nn.Linear(32, 4)
    np.savez(subject["data"], x=rows)
    return subject | {"model": module, "precision": "int8", "max_precision_loss": 100.0}


def test_a_plan_that_leaves_no_layer_for_int8_is_made_milder(
    narrow: dict[str, Any],
) -> None:
    """A plan that changes both branches leaves no layer for int8."""
    report = compressor.export(**narrow | {"drop": "auto", "cost": "macs", "max_loss": 95.0})
    assert len(report.plan.changes) == 1
    assert report.precision["result"]["nodes"] == 1
    for options in ({}, {"factorial": True}, {"precision": "int4"}):
        sentence = (
            r"^a plan of 2 changes leaves no layer for int., though the original has some \(.*\); give a smaller --drop"
        )
        with pytest.raises(CompressorError, match=sentence):
            compressor.export(**narrow | {"drop": "other:2", "force": True} | options)


def test_exact_rewrites_that_leave_no_layer_for_int8_end_in_an_error(narrow: dict[str, Any]) -> None:
    """Two maps in a row are folded into one that is too small, so that no plan has a layer, not even the unchanged."""
    narrow["model"].inner = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Linear(4, 32))])
    narrow["model"].head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 4))
    with pytest.raises(CompressorError, match="nothing to quantize to int8"):
        compressor.export(**narrow | {"drop": "auto", "cost": "macs"})


def test_points_of_a_sweep_that_leave_no_layer_for_int8_are_not_built(narrow: dict[str, Any]) -> None:
    common = {key: value for key, value in narrow.items() if key not in ("drop", "max_precision_loss")}
    front = compressor.sweep(**common, cost="macs", max_loss=95.0, points=3, actions="drop")
    assert [point.number for point in front.points if point.latency is not None] == [0, 1]
    assert len(front.points) == 3
    (limitation,) = [each for each in front.limitations if each.feature == "int8 at point 2"]
    assert limitation.reason.startswith("not built, because no layer that can be quantized is left there")


def test_a_model_without_a_layer_for_int8_is_refused_before_the_search(
    narrow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow["model"].inner = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(32, 4), torch.nn.Linear(4, 32))])
    monkeypatch.setattr(export, "choose_plan", lambda *_: pytest.fail("the search was begun"))
    with pytest.raises(CompressorError, match="nothing to quantize to int8"):
        compressor.export(**narrow | {"drop": "auto"})
