"""The workshop: what an engine is built from and how, what is tried, and what a real export in each precision holds."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor.benchmark.contenders import given
from compressor.errors import CompressorError
from compressor.measure import workshop as module
from compressor.measure.workshop import PARITY_ROWS, Workshop
from compressor.quality.evaluate import EvaluationError
from compressor.quantize.precision import Converted, PrecisionError, Source
from compressor.settings import Settings
from compressor.target.availability import UsableError, usable
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildError, BuildOptions, Int8Style
from runtimes.base.registry import runtime
from runtimes.base.timing import interleave
from tests.onnx_files import K, count, initializers, mlp, normal, normed
from tests.samples import Tensors

pytest.importorskip("onnxruntime")


class Target:
    """A target that copies its source, and notes what it is asked for."""

    name = "fake"
    devices = ("cpu",)
    own = ("bf16",)
    int8 = Int8Style(activations="uint8", convolutions=False)

    def __init__(self, source: str = ".onnx", **facts: Any) -> None:
        self.source = source
        self.precisions = {"cpu": ("fp32", "fp16", "bf16", "int8")}
        self.asked: list[tuple[Path, Path, BuildOptions]] = []
        for name, value in facts.items():
            setattr(self, name, value)

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        assert out.is_dir()
        self.asked.append((source, out, options))
        (out / "engine").write_bytes(source.read_bytes())
        return out / "engine"


def workshop(folder: Path, target: Any = None, no_quality: str | None = "the data are random") -> Workshop:
    split = Tensors({"x": normal(40, 5, K)})
    data = SimpleNamespace(calibration=split, validation=split, test=split)
    model = SimpleNamespace(name="fake", task="feature-extraction", state={})
    subject: Any = SimpleNamespace(data=data, model=model, no_quality_because=no_quality)
    return Workshop(subject, Target() if target is None else target, BuildOptions(), folder)


# ---- building


def test_a_target_that_makes_a_precision_itself_is_given_samples_for_it(tmp_path: Path) -> None:
    target = Target()
    shop, path = workshop(tmp_path, target), mlp(tmp_path / "f.onnx")
    built = [shop.build(Source(path, precision)) for precision in ("fp32", "bf16", "int8")]
    assert len({each.parent for each in built}) == 3  # no engine lies over another's
    assert [options.precision for _, _, options in target.asked] == ["fp32", "bf16", "int8"]
    samples = [options.samples for _, _, options in target.asked]
    assert samples[0] is None
    assert samples[2] is None
    assert samples[1] is not None
    for _ in range(2):  # a fresh stream each time
        np.testing.assert_array_equal(np.concatenate([each["x"] for each in samples[1]()]), normal(40, 5, K))


def test_only_engines_from_exported_programs_are_kept(tmp_path: Path) -> None:
    for suffix, builds in ((".onnx", 2), (".pt2", 1)):
        target = Target(suffix)
        (tmp_path / f"m{suffix}").write_bytes(b"model")
        shop = workshop(tmp_path, target)
        assert shop.build(Source(tmp_path / f"m{suffix}")) == shop.build(Source(tmp_path / f"m{suffix}"))
        assert len(target.asked) == builds
        shop.build(Source(tmp_path / f"m{suffix}", "bf16"))
        assert len(target.asked) == builds + 1


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_output_folder_gets_the_portable_file_where_there_is_one(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"m{suffix}").write_bytes(b"model")
    (tmp_path / "out").mkdir()
    target = Target(suffix)
    source, engine = workshop(tmp_path, target).shipped(Source(tmp_path / f"m{suffix}", "bf16"), tmp_path / "out")
    assert engine == tmp_path / "out" / "engine"
    assert engine.read_bytes() == b"model"
    portable = tmp_path / "out" / "model.onnx"
    assert source == Source(portable if suffix == ".onnx" else tmp_path / "m.pt2", "bf16")
    assert portable.exists() is (suffix == ".onnx")
    assert target.asked[0][0] == source.path  # built from what is shipped


# ---- converting


@pytest.mark.parametrize(
    ("asked", "precision", "suffix"),
    [
        ("fp32", "fp32", "f.onnx"),
        ("bf16", "bf16", "f.onnx"),
        ("fp16", "fp16", "f.fp16.onnx"),
        ("int8", "int8", "f.int8.onnx"),
        ("auto", "int8", "f.int8.onnx"),
    ],
)
def test_a_file_to_be_timed_is_in_the_precision_asked_for(
    tmp_path: Path, asked: str, precision: str, suffix: str
) -> None:
    source = workshop(tmp_path).roughly(mlp(tmp_path / "f.onnx"), Settings(precision=asked))
    assert source == Source(tmp_path / suffix, precision)
    assert source.path.is_file()
    if precision == "int8":  # its ranges are those of one batch
        scale = initializers(source.path)["int8/x/scale"]
        few = normal(40, 5, K)[:PARITY_ROWS].reshape(PARITY_ROWS, -1)
        low, high = few.min(axis=1), few.max(axis=1)
        reach = min(few.max(), high.mean() + high.std()) - max(few.min(), low.mean() - low.std())
        assert float(scale) == pytest.approx(reach / 255, rel=1e-5)


@pytest.mark.parametrize(("had", "own"), [(("fp32", "bf16"), ()), (("fp32", "int8"), ("int8",))])
def test_auto_is_timed_in_float_where_int8_cannot_be_written_here(
    tmp_path: Path, had: tuple[str, ...], own: tuple[str, ...]
) -> None:
    shop = workshop(tmp_path, Target(precisions={"cpu": had}, own=own))
    assert shop.roughly(mlp(tmp_path / "f.onnx"), Settings(precision="auto")) == Source(tmp_path / "f.onnx")


def test_settings_reach_the_conversion_and_a_file_is_made_once(tmp_path: Path) -> None:
    shop, path = workshop(tmp_path), normed(tmp_path / "f.onnx")
    settings = Settings(precision="int8", calibration="minmax")
    source, facts = shop.converted(path, settings, lambda *_, **__: None)
    assert source == Source(tmp_path / "f.int8.compressor.onnx", "int8")
    assert facts.quantized is not None
    assert (facts.quantized.calibration, facts.quantized.samples, facts.loss) == ("minmax", 40, None)
    source.path.unlink()
    assert shop.converted(path, settings, lambda *_, **__: None) == (source, facts)
    assert not source.path.exists()


def measuring(monkeypatch: pytest.MonkeyPatch, losses: dict[str, float]) -> list[Source]:
    """Losses by precision or quantizer in place of an evaluation; returns what was asked about."""
    asked: list[Source] = []

    def loss(self: Workshop, path: Path) -> Any:
        def measure(source: Source) -> float:
            asked.append(source)
            return next(value for name, value in losses.items() if name in f"{source.path.name} {source.precision}")

        return measure

    monkeypatch.setattr(Workshop, "_loss", loss)
    return asked


def test_what_the_target_makes_itself_is_built_from_the_float_file_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring(monkeypatch, {"bf16": 0.3})
    path = mlp(tmp_path / "f.onnx")
    source, facts = workshop(tmp_path).converted(path, Settings(precision="bf16"), lambda *_, **__: None)
    assert (source, facts, asked) == (Source(path, "bf16"), Converted("bf16", "fake", 0.3), [source])


def test_of_several_quantizers_the_quickest_within_the_budget_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = Int8Style("uint8", False, ("compressor", "nncf"))
    monkeypatch.setattr("compressor.quantize.convert.util.find_spec", lambda _: object())
    monkeypatch.setattr("compressor.quantize.convert.nncf_to_int8", lambda source, to, _: to.write_bytes(b"by nncf"))
    measuring(monkeypatch, {"nncf": 0.4, "compressor": 0.05})
    times = {"nncf": 1.0, "compressor": 2.0}
    quick = lambda _, sources, __: {s: times[s.path.suffixes[-2][1:]] for s in sources.values()}  # noqa: E731
    monkeypatch.setattr(Workshop, "quick", quick)
    for limit, by in ((0.5, "nncf"), (0.3, "compressor")):
        settings = Settings(precision="int8", max_precision_loss=limit)
        shop = workshop(tmp_path, Target(int8=style))
        source, facts = shop.converted(mlp(tmp_path / "f.onnx"), settings, lambda *_, **__: None)
        assert source == Source(tmp_path / f"f.int8.{by}.onnx", "int8")
        assert (facts.by, len(facts.tried)) == (by, 2)


def test_every_variant_is_converted_but_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def converted(self: Workshop, path: Path, settings: Settings, tick: Any) -> Any:
        asked.append(path)
        return Source(path.with_suffix(".low"), "int8"), Converted("int8", "x", float(len(asked)))

    monkeypatch.setattr(Workshop, "converted", converted)
    a, b, settings = Path("a.onnx"), Path("b.onnx"), Settings(precision="int8")
    files, facts = workshop(tmp_path).precise({"baseline": a, "result": b}, settings, Steps())
    assert files["original"] == Source(a)
    assert files == {"original": Source(a), "baseline": Source(Path("a.low"), "int8"), "result": files["result"]}
    assert files["result"] == Source(Path("b.low"), "int8")
    assert (asked, {name: each.loss for name, each in facts.items()}) == ([a, b], {"baseline": 1.0, "result": 2.0})
    asked.clear()
    files, facts = workshop(tmp_path).precise({"baseline": a, "result": a}, settings, Steps())  # nothing was changed
    assert files["result"] is files["baseline"]
    assert facts["result"] is facts["baseline"]
    assert asked == [a]
    assert workshop(tmp_path).precise({"baseline": a, "result": b}, Settings(), Steps()) == (
        {"baseline": Source(a), "result": Source(b)},
        {},
    )


# ---- choosing


def test_quick_times_every_source_under_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(openers: Any, feeds: Any, **_: Any) -> Any:
        assert feeds["x"].shape == (2, 5, K)
        return {name: SimpleNamespace(quietest=opener.args[0].stat().st_size) for name, opener in openers.items()}

    monkeypatch.setattr(module, "interleave", fake)
    for name in ("short", "longer"):
        (tmp_path / name).write_text(name)
    shop = workshop(tmp_path, Target(load=print))
    sources = {1: Source(tmp_path / "longer"), 2: Source(tmp_path / "short")}
    assert shop.quick(sources, Settings(batch=2)) == {1: 6, 2: 5}


def test_every_precision_of_the_target_is_tried_and_the_fastest_within_the_budget_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mlp(tmp_path / "f.onnx")
    times = {"fp32": 4.0, "fp16": 1.0, "int8": 2.0, "int4": 3.0}

    def build(source: Path, out: Path, options: BuildOptions) -> Path:
        if options.precision == "bf16":
            raise BuildError("This processor has none.")
        return source

    def quick(self: Workshop, sources: dict[str, Source], settings: Settings) -> dict[str, float]:
        assert {name: source.precision for name, source in sources.items()} == {name: name for name in times}
        return {name: times[name] for name in sources}

    monkeypatch.setattr(Workshop, "quick", quick)
    measuring(monkeypatch, {"fp16": 0.9, "int8": 0.05, "int4": 0.1, "bf16": 0.0})
    target = Target(build=build, precisions={"cpu": ("fp32", "fp16", "bf16", "int8", "int4")})
    chosen, trials = workshop(tmp_path, target).choose_precision(path, Settings(precision="auto"), Steps())
    assert chosen == "int8"
    assert [(trial.precision, trial.verdict) for trial in trials] == [
        ("fp32", "what the others are held against"),
        ("fp16", "loses 0.90 %, more than 0.5 %"),
        ("bf16", "This processor has none."),
        ("int8", "chosen"),
        ("int4", "slower than int8"),
    ]


def test_a_precision_with_nothing_to_work_on_is_refused_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workshop, "quick", lambda _, sources, __: dict.fromkeys(sources, 1.0))
    monkeypatch.setattr(module, "convert", partial(refuse, CompressorError("int8 has nothing to work on.")))
    chosen, trials = workshop(tmp_path).choose_precision(mlp(tmp_path / "f.onnx"), Settings(precision="auto"), Steps())
    assert chosen == "fp32"
    assert [trial.precision for trial in trials if trial.milliseconds is None] == ["fp16", "int8"]


def refuse(error: Exception, *_: Any, **__: Any) -> Any:
    raise error


def test_an_answer_that_cannot_be_judged_is_the_worst_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mlp(tmp_path / "f.onnx")
    assert workshop(tmp_path)._loss(path) is None
    found = SimpleNamespace(expected_loss=lambda reference, name: {("float", "converted"): 0.7}[reference, name])
    splits: list[Any] = []

    def judge(self: Workshop, engines: dict[str, Path], split: Any, reference: str, tick: Any) -> Any:
        splits.append(split)
        assert (list(engines), reference) == (["float", "converted"], "float")
        if len(splits) > 1:
            raise EvaluationError("NaN")
        return found

    monkeypatch.setattr(Workshop, "_judge", judge)
    shop = workshop(tmp_path, no_quality=None)
    loss = shop._loss(path)
    assert loss is not None
    assert loss(Source(path, "bf16")) == 0.7
    assert loss(Source(path, "bf16")) == math.inf
    assert splits[0] is shop.subject.data.validation


# ---- what is refused


@pytest.mark.parametrize(
    ("target", "precision", "words"),
    [
        ("openvino", "bf16", "--precision bf16 can only be proven where openvino runs; .* one of: fp32, int8"),
        ("openvino", "auto", "--precision auto can only be proven where openvino runs"),
        ("tensorrt", "auto", "--precision auto can only be proven where tensorrt runs; .* one of: fp32, fp16, int8"),
    ],
)
def test_what_only_the_device_can_prove_is_not_deferred(target: str, precision: str, words: str) -> None:
    with pytest.raises(UsableError, match=words):
        usable(Settings(target=target, precision=precision, defer_build=True))


def test_engines_from_exported_programs_are_not_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime("openvino"), "source", ".pt2")
    with pytest.raises(UsableError, match="target openvino builds with torch, on this machine; leave out --defer"):
        usable(Settings(target="openvino", defer_build=True))


def test_what_can_be_written_here_is_deferred() -> None:
    target, options = usable(Settings(target="tensorrt", precision="fp16", defer_build=True))
    assert (target.name, options.device) == ("onnxruntime", "cpu")
    assert "fp16" in target.precisions["cpu"]


def test_a_precision_that_the_target_lacks_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(PrecisionError, match="target onnxruntime has no fp16 on cpu"):
        usable(Settings(precision="fp16"))


# ---- real exports


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
    """A module and data; timed for a moment only."""
    monkeypatch.setattr(module, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
    rows = np.random.default_rng(0).standard_normal((160, 32)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=rows, y=Residual()(torch.from_numpy(rows)).argmax(-1).numpy())
    common = {"model": Residual(), "example_inputs": torch.zeros(2, 32), "data": str(tmp_path / "rows.npz")}
    return common | {"drop": "none", "rounds": 1, "task": "image-classification", "output": tmp_path / "out"}


def test_an_int4_export_ships_weights_of_4_bits(subject: dict[str, Any], tmp_path: Path) -> None:
    report = compressor.export(**subject, precision="int4", max_precision_loss=100.0)
    assert count(tmp_path / "out" / "model.onnx", "MatMulNBits") == 3
    assert (report.precision["result"]["precision"], report.precision["result"]["by"]) == ("int4", "onnxruntime")
    assert report.precision["result"]["loss"] > 0
    assert list(report.latency) == ["original", "baseline", "result"]


def test_an_auto_export_is_in_one_of_the_targets_precisions_and_says_what_was_tried(
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


def test_an_fp16_export_of_openvino_is_measured_in_fp16_again(subject: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    out = tmp_path / "out"
    compressor.export(**subject, target="openvino", precision="fp16", max_precision_loss=100.0)
    assert initializers(out / "model.onnx")  # the portable file stays float32
    assert {value.dtype for value in initializers(out / "model.onnx").values()} <= {np.dtype("f4"), np.dtype("i8")}
    stored = sum(value.nbytes for value in initializers(out / "model.onnx").values())
    assert (out / "openvino_model.bin").stat().st_size < 0.75 * stored
    (entry,) = given([str(out)])[0].entries(None, None, compiled=False)
    assert (entry.target, entry.precision, entry.file) == ("openvino", "fp16", out / "model.onnx")
    (elsewhere,) = given([str(out)])[0].entries(None, "onnxruntime", compiled=False)
    assert (elsewhere.target, elsewhere.precision) == ("onnxruntime", "fp32")  # what the file itself is in
