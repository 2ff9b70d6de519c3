"""Precision converter: the converted files, the trials, and the chosen precision."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from compressor.errors import CompressorError
from compressor.measure import latency as engine_timing
from compressor.measure import precision_converter as module
from compressor.measure.engine_builder import PARITY_ROWS
from compressor.measure.latency import EngineTimer
from compressor.measure.precision_converter import PrecisionConverter
from compressor.measure.workload import RUN, Call
from compressor.quality.evaluate import EvaluationError
from compressor.quantize.nncf import NncfError
from compressor.quantize.precision import Converted, Source
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildError, BuildOptions, Int8Style
from tests.engines import Target, builder
from tests.onnx_files import K, initializers, mlp, normal, normed

pytest.importorskip("onnxruntime")


def converter(
    folder: Path,
    target: Any = None,
    *,
    no_quality: str | None = "the data are random",
    calibration: Any = "auto",
    max_loss: float = 0.5,
) -> PrecisionConverter:
    timer = EngineTimer({RUN: Call.alone({"x": normal(2, 5, K)})}, 1)
    return PrecisionConverter(builder(folder, target, no_quality), timer, calibration, max_loss)


def no_progress(*_: Any, **__: Any) -> None:
    pass


# ---- converting


@pytest.mark.parametrize(
    ("requested", "precision", "suffix"),
    [
        ("fp32", "fp32", "f.onnx"),
        ("bf16", "bf16", "f.onnx"),
        ("fp16", "fp16", "f.fp16.onnx"),
        ("int8", "int8", "f.int8.onnx"),
        ("auto", "int8", "f.int8.onnx"),
    ],
)
def test_a_file_for_timing_has_the_requested_precision(
    tmp_path: Path, requested: str, precision: str, suffix: str
) -> None:
    source = converter(tmp_path).convert_for_timing(mlp(tmp_path / "f.onnx"), requested)
    assert source == Source(tmp_path / suffix, precision)
    assert source.path.is_file()
    if precision == "int8":  # the activation ranges are those of one batch
        scale = initializers(source.path)["int8/x/scale"]
        rows = normal(40, 5, K)[:PARITY_ROWS].reshape(PARITY_ROWS, -1)
        low, high = rows.min(axis=1), rows.max(axis=1)
        width = min(rows.max(), high.mean() + high.std()) - max(rows.min(), low.mean() - low.std())
        assert float(scale) == pytest.approx(width / 255, rel=1e-5)


@pytest.mark.parametrize(("precisions", "own"), [(("fp32", "bf16"), ()), (("fp32", "int8"), ("int8",))])
def test_auto_is_timed_in_float_if_int8_cannot_be_written_here(
    tmp_path: Path, precisions: tuple[str, ...], own: tuple[str, ...]
) -> None:
    precision_converter = converter(tmp_path, Target(precisions={"cpu": precisions}, own=own))
    assert precision_converter.convert_for_timing(mlp(tmp_path / "f.onnx"), "auto") == Source(tmp_path / "f.onnx")


def test_the_conversion_uses_the_calibration_and_runs_once_for_a_file(tmp_path: Path) -> None:
    precision_converter, path = converter(tmp_path, calibration="minmax"), normed(tmp_path / "f.onnx")
    source, facts = precision_converter.convert(path, "int8", no_progress)
    assert source == Source(tmp_path / "f.int8.compressor.onnx", "int8")
    assert facts.quantized is not None
    assert (facts.quantized.calibration, facts.quantized.samples, facts.loss) == ("minmax", 40, None)
    source.path.unlink()
    assert precision_converter.convert(path, "int8", no_progress) == (source, facts)
    assert not source.path.exists()


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int8-weight-only", "int4"])
def test_a_file_that_the_full_checker_rejects_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """ONNX Runtime sorts the nodes of a file itself, so that it opens files that other runtimes refuse."""
    path, written = normed(tmp_path / "f.onnx"), module.convert

    def unsorted(source: Path, to: Path, *rest: Any, **options: Any) -> Converted:
        facts = written(source, to, *rest, **options)
        model = onnx.load(to)
        nodes = list(reversed(model.graph.node))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.save(model, to)
        return facts

    assert converter(tmp_path).convert(path, precision, no_progress)[1].precision == precision
    monkeypatch.setattr(module, "convert", unsorted)
    with pytest.raises(CompressorError, match=rf"fails ONNX's checker after the conversion to {precision} "):
        converter(tmp_path).convert(path, precision, no_progress)


def measuring(monkeypatch: pytest.MonkeyPatch, losses: dict[str, float]) -> list[str]:
    """Fake the evaluation with losses keyed by a part of the engine's folder name; return the evaluated engines."""
    evaluated: list[str] = []

    def evaluate(builder: Any, engines: dict[str, Path], split: Any, reference: str, tick: Any) -> Any:
        assert (list(engines), reference) == (["float", "converted"], "float")
        assert split is builder.subject.data.validation
        engine = engines["converted"].parent.name
        evaluated.append(engine)
        loss = next(value for name, value in losses.items() if name in engine)
        if math.isnan(loss):
            raise EvaluationError("NaN")
        return SimpleNamespace(expected_loss=lambda *names: {("float", "converted"): loss}[names])

    monkeypatch.setattr(module, "evaluate_engines", evaluate)
    return evaluated


def test_the_targets_own_precision_is_built_from_the_float_file_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = measuring(monkeypatch, {"bf16": 0.3})
    path = mlp(tmp_path / "f.onnx")
    source, facts = converter(tmp_path, no_quality=None).convert(path, "bf16", no_progress)
    assert (source, facts) == (Source(path, "bf16"), Converted("bf16", "fake", 0.3))
    assert evaluated == ["f.bf16.fake"]


def test_the_fastest_quantizer_within_the_loss_budget_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = Int8Style("uint8", False, ("compressor", "nncf"))
    monkeypatch.setattr("compressor.quantize.convert.util.find_spec", lambda _: object())
    monkeypatch.setattr("compressor.quantize.convert.nncf_to_int8", lambda source, to, _: shutil.copy(source, to))
    measuring(monkeypatch, {"nncf": 0.4, "compressor": 0.05})
    times = {"nncf": 1.0, "compressor": 2.0}
    monkeypatch.setattr(
        PrecisionConverter, "quick", lambda _, sources: {s: times[s.path.suffixes[-2][1:]] for s in sources.values()}
    )
    for max_loss, by in ((0.5, "nncf"), (0.3, "compressor")):
        precision_converter = converter(tmp_path, Target(int8=style), no_quality=None, max_loss=max_loss)
        source, facts = precision_converter.convert(mlp(tmp_path / "f.onnx"), "int8", no_progress)
        assert source == Source(tmp_path / f"f.int8.{by}.onnx", "int8")
        assert (facts.by, len(facts.tried)) == (by, 2)


@pytest.mark.parametrize("failing", ["quantizing", "evaluating", "opening"])
def test_a_quantizer_of_another_package_that_fails_is_replaced_by_ours_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def nncf(source: Path, to: Path, _: Any) -> None:
        if failing == "quantizing":
            raise NncfError("NNCF cannot quantize f.onnx: no such operator.")
        shutil.copy(source, to)

    def fails(name: str) -> None:
        if "nncf" in name:
            raise BuildError("NNCF's file is refused.")

    def load(path: Path, _: BuildOptions) -> Any:
        fails(path.parent.name if failing == "opening" else "")
        return SimpleNamespace(close=lambda: None)

    def evaluate(_: Any, engines: dict[str, Path], *rest: Any) -> Any:
        fails(engines["converted"].parent.name)
        return SimpleNamespace(expected_loss=lambda *names: 0.1)

    monkeypatch.setattr("compressor.quantize.convert.util.find_spec", lambda _: object())
    monkeypatch.setattr("compressor.quantize.convert.nncf_to_int8", nncf)
    monkeypatch.setattr(module, "evaluate_engines", evaluate)
    target = Target(int8=Int8Style("uint8", False, ("compressor", "nncf")), load=load)
    no_quality = "the data are random" if failing == "opening" else None
    _, facts = converter(tmp_path, target, no_quality=no_quality).convert(mlp(tmp_path / "f.onnx"), "int8", no_progress)
    assert facts.by == "compressor"
    assert list(facts.refused) == ["nncf"]
    assert facts.refused["nncf"] == facts.to_dict()["refused"]["nncf"]
    assert facts.refused["nncf"].startswith("NNCF")


# ---- choosing


def test_quick_times_every_source_under_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(openers: Any, feeds: Any, **_: Any) -> Any:
        assert feeds["x"].shape == (2, 5, K)
        return {name: SimpleNamespace(quietest=opener.args[0].stat().st_size) for name, opener in openers.items()}

    monkeypatch.setattr(engine_timing, "interleave", fake)
    for name in ("short", "longer"):
        (tmp_path / name).write_text(name)
    precision_converter = converter(tmp_path, Target(load=print))
    sources = {1: Source(tmp_path / "longer"), 2: Source(tmp_path / "short")}
    assert precision_converter.quick(sources) == {1: 6, 2: 5}


def test_every_precision_of_the_target_is_tried_and_the_fastest_within_the_budget_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mlp(tmp_path / "f.onnx")
    times = {"fp32": 4.0, "fp16": 1.0, "int8": 2.0, "int4": 3.0}

    def build(source: Path, out: Path, options: BuildOptions) -> Path:
        if options.precision == "bf16":
            raise BuildError("This processor has none.")
        (out / "engine").write_bytes(source.read_bytes())
        return out / "engine"

    def quick(self: PrecisionConverter, sources: dict[str, Source]) -> dict[str, float]:
        assert {name: source.precision for name, source in sources.items()} == {name: name for name in times}
        return {name: times[name] for name in sources}

    monkeypatch.setattr(PrecisionConverter, "quick", quick)
    measuring(monkeypatch, {"fp16": 0.9, "int8": 0.05, "int4": 0.1, "bf16": 0.0})
    target = Target(build=build, precisions={"cpu": ("fp32", "fp16", "bf16", "int8", "int4")})
    chosen, trials = converter(tmp_path, target, no_quality=None).choose(path, Steps())
    assert chosen == "int8"
    assert [(trial.precision, trial.verdict) for trial in trials] == [
        ("fp32", "reference for the other precisions"),
        ("fp16", "loses 0.90 %, more than 0.5 %"),
        ("bf16", "This processor has none."),
        ("int8", "chosen"),
        ("int4", "slower than int8"),
    ]


def test_a_precision_that_cannot_be_converted_is_refused_and_the_others_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrecisionConverter, "quick", lambda _, sources: dict.fromkeys(sources, 1.0))
    monkeypatch.setattr(module, "convert", partial(refuse, CompressorError("int8 has nothing to work on.")))
    chosen, trials = converter(tmp_path).choose(mlp(tmp_path / "f.onnx"), Steps())
    assert chosen == "fp32"
    assert [trial.precision for trial in trials if trial.milliseconds is None] == ["fp16", "int8"]


def test_an_engine_that_cannot_be_opened_is_refused_although_no_loss_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, _: BuildOptions) -> Any:
        if "bf16" in path.parent.name:
            raise BuildError("The target cannot compile it.")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(PrecisionConverter, "quick", lambda _, sources: dict.fromkeys(sources, 1.0))
    target = Target(load=load, precisions={"cpu": ("fp32", "bf16")})
    chosen, trials = converter(tmp_path, target).choose(mlp(tmp_path / "f.onnx"), Steps())
    assert chosen == "fp32"
    assert [trial.verdict for trial in trials if trial.milliseconds is None] == ["The target cannot compile it."]


def refuse(error: Exception, *_: Any, **__: Any) -> Any:
    raise error


def test_an_output_that_cannot_be_evaluated_is_an_infinite_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mlp(tmp_path / "f.onnx")
    assert converter(tmp_path).convert(path, "bf16", no_progress)[1].loss is None
    measuring(monkeypatch, {"bf16": math.nan})
    assert converter(tmp_path, no_quality=None).convert(path, "bf16", no_progress)[1].loss == math.inf
