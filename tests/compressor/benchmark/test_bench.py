"""Tests of `export --factorial` and of `bench`, on a vision transformer with three small blocks."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner

import compressor
from compressor import CompressorError, models
from compressor.benchmark.bench import _hidden_overflow, _load, _of_modules, bench
from compressor.benchmark.bench_settings import BenchSettings
from compressor.benchmark.contenders import EngineEntry
from compressor.benchmark.results import Comparison
from compressor.cli.main import main
from compressor.errors import SettingsError
from compressor.measure import latency as engine_timing
from compressor.measure import peak_memory
from compressor.quality.chance import ChanceError
from compressor.quantize.half_precision import to_fp16
from compressor.report.factorial import cells_of
from compressor.report.report import Report
from compressor.settings import Settings
from compressor.target.torch_eager import Module
from runtimes.base.protocols import BuildError, BuildOptions, RuntimesError
from runtimes.base.timing import interleave
from tests.onnx_files import mlp

pytest.importorskip("onnxruntime", reason="the target of these exports")

FACTORY = f"{Path(__file__).stem}:small"
SIX, LITTLE = f"{Path(__file__).stem}:of_six_classes", f"{Path(__file__).stem}:of_small_images"
ONE = BuildOptions(threads=1)


def small(classes: int = 4, size: int = 16) -> tuple[torch.nn.Module, torch.Tensor]:
    """Build a model for ``module:factory``: three blocks with branches of significant effect, images of 16 tokens."""
    torch.manual_seed(0)
    sizes = {"img_size": size, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": classes}
    module = timm.create_model("vit_tiny_patch16_224", **sizes)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval(), torch.zeros(2, 3, size, size)


def of_six_classes() -> tuple[torch.nn.Module, torch.Tensor]:
    """Build such a model of six classes."""
    return small(classes=6)


def of_small_images() -> tuple[torch.nn.Module, torch.Tensor]:
    """Build such a model for images of 8 x 8 pixels."""
    return small(size=8)


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Any:
    """Shorten the timing, and make the factory importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.001, warmup_seconds=0.001))
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, str]:
    """Export a factorial of three factors; return folder, report and the data, labelled by the model itself."""
    folder = tmp_path_factory.mktemp("exported")
    module, _ = small()
    pictures = np.random.default_rng(0).standard_normal((80, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        labels = module(torch.from_numpy(pictures)).argmax(-1).numpy()
    data = str(folder / "rows.npz")
    np.savez(data, x=pictures, y=labels)
    report = compressor.export(
        FACTORY, data=data, drop="blocks.2.mlp", tokens="0,4,0", factorial=True, rounds=2, output=folder / "out"
    )
    return folder / "out", report, data


@pytest.fixture(scope="module")
def measured(
    exported: tuple[Path, Report, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, dict[str, Any]]:
    """Run `bench` once on a folder, an ONNX file and a module; return the comparison and the JSON."""
    output = tmp_path_factory.mktemp("measured") / "bench.json"
    folder = exported[0]
    comparison = compressor.bench(
        folder, folder / "model.onnx", FACTORY, against="out", batch=[2], threads=[1], rounds=2, output=output
    )
    return comparison, json.loads(output.read_text())


# --------------------------------------------------------------------------------------------------- the export


def test_export_holds_every_cell_and_the_conclusion(exported: tuple[Path, Report, str]) -> None:
    folder, report, _ = exported
    content = json.loads((folder / "report.json").read_text())["factorial"]
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert report.factorial is not None
    assert tuple(content["cells"]) == cells_of("int8")
    assert {cell["file"] for cell in content["cells"].values()} <= set(listed)
    assert content["cells"]["compressed int8"]["file"] == "model.onnx"
    assert set(report.latency) == {"original", "baseline", "result"}
    assert report.settings["precision"] == "int8"
    for sentence in content["conclusion"]:
        assert sentence in report.summary()


def test_cells_include_the_engines_of_the_report(exported: tuple[Path, Report, str]) -> None:
    _, report, _ = exported
    assert report.factorial is not None
    assert report.quality is not None
    cells = report.factorial
    for cell, name in {"dense float": "original", "dense int8": "baseline", "compressed int8": "result"}.items():
        assert cells.latency[cell] == report.latency[name]
        assert cells.figures[cell] == report.quality.figures[name]
    assert cells.figures["dense float"].value == 100.0  # the model itself made the labels
    # The two cells differ in merged tokens only.
    assert cells.losses["compressed float"] != cells.losses["changes float"]


def test_plan_without_changes_has_no_factorial(tmp_path: Path) -> None:
    module, inputs = torch.nn.Sequential(Branch(), torch.nn.Linear(32, 4)), torch.zeros(2, 32)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32))
    report = compressor.export(
        module,
        example_inputs=inputs,
        data=tmp_path / "x.npy",
        drop="none",
        factorial=True,
        rounds=1,
        output=tmp_path / "out",
    )
    assert report.factorial is None
    assert "Factorial: skipped, because the plan changes nothing." in report.notes
    assert not (tmp_path / "out" / "factorial").exists()
    with pytest.raises(CompressorError, match="builds the module with --model"):  # no factory to build the module again
        bench(BenchSettings((str(tmp_path / "out"),), output=tmp_path / "bench.json"))


class Branch(torch.nn.Module):
    """A residual branch, x + f(x), on vectors of length 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.inner(x))


def test_factorial_implies_int8() -> None:
    assert Settings(factorial=True).precision == "int8"
    assert Settings(factorial=True, int8="dynamic").precision == "int8-dynamic"
    assert Settings().precision == "fp32"


# -------------------------------------------------------------------------------------------------------- bench


def test_bench_measures_every_engine(measured: tuple[Comparison, dict[str, Any]]) -> None:
    _, content = measured
    names = [*(f"out/{cell}" for cell in cells_of("int8")), "model.onnx", f"{FACTORY} (eager)"]
    assert list(content["engines"]) == [row["engine"] for row in content["measurements"]] == names
    assert content["against"] == content["reference"] == "out/dense float"
    for row in content["measurements"]:
        latency = row["latency"]
        assert (row["batch"], row["threads"]) == (2, 1)
        assert latency["median"] <= latency["p90"] <= latency["p99"]
        assert len(latency["samples_ms"]) == 2
        assert row["rows_per_second"] == pytest.approx(2000.0 / latency["median"], rel=1e-12)
        assert (row["memory"] is None) is row["engine"].endswith("(eager)")
        assert (row["no_memory_because"] is None) is (row["memory"] is not None)
    assert content["measurements"][0]["speedup"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}


def test_bench_quality_equals_that_of_the_export(
    measured: tuple[Comparison, dict[str, Any]], exported: tuple[Path, Report, str]
) -> None:
    engines, report = measured[1]["engines"], exported[1]
    assert report.factorial is not None
    for cell, figure in report.factorial.figures.items():
        assert engines[f"out/{cell}"]["figure"]["value"] == figure.value
    assert engines["out/compressed int8"]["loss"]["value"] == report.factorial.losses["compressed int8"].value
    assert engines["model.onnx"]["figure"] == engines["out/compressed int8"]["figure"]  # the same file
    assert engines["model.onnx"]["bytes"] == (exported[0] / "model.onnx").stat().st_size
    assert engines[f"{FACTORY} (eager)"]["figure"]["value"] == 100.0
    assert engines[f"{FACTORY} (eager)"]["bytes"] is None


def test_bench_computes_the_factorial(measured: tuple[Comparison, dict[str, Any]]) -> None:
    comparison, content = measured
    (again,) = content["factorials"]
    assert again["folder"] == "out"
    assert tuple(again["cells"]) == cells_of("int8")
    assert len(again["interactions"]) == 3
    assert "at batch 2 on onnxruntime, threads 1" in again["conclusion"][0]
    for row in content["measurements"][: len(cells_of("int8"))]:
        assert again["cells"][row["engine"].removeprefix("out/")]["latency"] == row["latency"]
    assert f"out: {again['conclusion'][0]}" in comparison.summary()


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("model", {"target": "onnxruntime"}, "found --target onnxruntime, but only torch models are measured"),
        (
            "folder",
            {"compile": True, "model": FACTORY},
            "found --compile, but no torch model is measured; give a model",
        ),
    ],
)
def test_an_option_for_other_engines_is_refused(
    exported: tuple[Path, Report, str], tmp_path: Path, engine: str, options: dict[str, Any], words: str
) -> None:
    what = FACTORY if engine == "model" else exported[0]
    with pytest.raises(SettingsError, match=words):
        compressor.bench(what, data=exported[2], output=tmp_path / "bench.json", **options)


def test_a_module_beside_a_folder_of_images_takes_no_size() -> None:
    """The size is that of the folder, so a message to leave out --image-size has nothing to leave out."""
    folders: Any = {"out": SimpleNamespace(image_size="16x16")}
    settings = BenchSettings(what=("out", FACTORY))
    assert _load(FACTORY, settings, folders).source == "module"
    with pytest.raises(CompressorError, match="leave --image-size out"):
        _load(FACTORY, BenchSettings(what=("out", FACTORY), image_size=16), folders)


def test_wrong_labels_stop_the_comparison_with_the_original(exported: tuple[Path, Report, str], tmp_path: Path) -> None:
    rows = np.load(exported[2])
    data = tmp_path / "shifted.npz"
    np.savez(data, x=rows["x"], y=(rows["y"] + 1) % 4)
    with pytest.raises(ChanceError, match=r"\(eager\) has an accuracy of 0\.0 % .* labels of .*shifted\.npz are"):
        compressor.bench(FACTORY, data=data, rounds=1, output=tmp_path / "bench.json")
    assert not (tmp_path / "bench.json").exists()


def test_command_prints_every_engine_under_every_condition(exported: tuple[Path, Report, str], tmp_path: Path) -> None:
    folder, _, data = exported
    options = ["--model", FACTORY, "--data", data, "--batch", "1,3", "--threads", "1,2", "--rounds", "1"]
    files = [str(folder / "model.onnx"), str(folder / "factorial" / "dense.float.onnx")]
    output = tmp_path / "new" / "bench.json"
    done = CliRunner().invoke(
        main, ["bench", *files, *options, "--output", str(output), "--against", "dense.float.onnx"]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(output.read_text())["measurements"]
    assert [(row["batch"], row["threads"]) for row in rows[::2]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for row in rows[1::2]:
        assert row["speedup"]["ratio"] == 1.0
    for batch, threads in ((1, 1), (1, 2), (3, 1), (3, 2)):
        assert f"batch {batch}, threads {threads}" in done.stdout
    assert done.stdout.count("model.onnx") >= 4
    assert "Quality: top-1 accuracy in %, on 40 test samples" in " ".join(done.stdout.split())
    assert "measure the latency" in done.stderr


def test_fp16_files_on_the_cpu_hide_overflow_which_is_a_note(tmp_path: Path) -> None:
    files = {"float": mlp(tmp_path / "float.onnx"), "half": tmp_path / "half.onnx"}
    to_fp16(files["float"], files["half"], {})
    entries = [EngineEntry(name, "onnxruntime", file) for name, file in files.items()]
    entries.append(EngineEntry("elsewhere", "tensorrt", files["half"]))
    for device, expected in (("cpu", ["half"]), ("cuda", [])):
        options = BuildOptions(device=device)
        runner: Any = SimpleNamespace(entries=entries, conditions=[None], options=lambda *_, made=options: made)
        assert [note.partition(":")[0] for note in _hidden_overflow(runner)] == expected


@pytest.mark.parametrize("spelled", [False, True])
def test_calibration_samples_in_the_test_split_are_reported(
    exported: tuple[Path, Report, str], tmp_path: Path, spelled: bool
) -> None:
    """Also where the path of the data is spelled otherwise than in the export."""
    data = f"{Path(exported[2]).parent}/./out/../rows.npz" if spelled else None
    options: dict[str, Any] = {"model": FACTORY, "samples": 40, "rounds": 1, "output": tmp_path / "bench.json"}
    comparison = bench(BenchSettings((str(exported[0]),), data=data, **options))
    assert repr(comparison).startswith("Comparison(model='test_bench:small', engines=['out/")
    # Of 80 samples, the export used 20 for calibration and 20 for validation, which include the 20 test samples here.
    limitations = tuple(map(str, models.load(FACTORY).limitations))
    assert comparison.notes == (
        *limitations,
        "out was exported with more samples and may have been calibrated on 20 of the 20 test samples; give the "
        "--samples of the export.",
    )


@pytest.mark.parametrize(
    ("what", "options", "kind", "words"),
    [
        ([], {}, SettingsError, "nothing to measure"),
        ([torch.nn.Linear(2, 2)], {}, SettingsError, "what holds a Linear; expected paths and names"),
        (["OUT", "OUT"], {}, SettingsError, "is given twice; give"),
        (["OUT", "OUT/../out"], {}, SettingsError, "/out/../out); give each argument once."),
        (["OUT/model.onnx"], {}, SettingsError, "preprocessing they use with --model"),
        (["OUT/none.onnx"], {}, CompressorError, "there is no file"),
        (["OUT"], {"model": FACTORY, "against": "nobody"}, SettingsError, "--against nobody is not a measured engine"),
        (["OUT"], {}, CompressorError, "a folder cannot name code to run"),
        (["OUT"], {"batch": (0,)}, SettingsError, "batch is 0"),
        (["OUT"], {"batch": ()}, SettingsError, "batch is empty"),
        (["OUT"], {"threads": (2, 2)}, SettingsError, "threads is 2,2"),
        (["OUT"], {"threads": (10**6,)}, SettingsError, "threads is 1000000; expected integers of at most 4,096"),
        (["OUT"], {"output": "ROOM"}, SettingsError, "is a folder; expected a file"),
        (["OUT"], {"data": "NOISE", "output": "NOISE"}, CompressorError, "noise.npy, which this command reads; choose"),
        (["OUT"], {"output": "/dev/null"}, CompressorError, "/dev/null is a device, but a file is written there"),
        (["OUT"], {"model": FACTORY, "target": "onnxruntim"}, SettingsError, "did you mean onnxruntime"),
        (["OUT"], {"model": "nowhere_at_all:x"}, CompressorError, "could not be called"),
        (["BROKEN"], {}, CompressorError, "it has no valid manifest.json"),
        (["vit_basse_patch16_224"], {"data": "random"}, CompressorError, "did you mean vit_base"),
        (
            ["OUT"],
            {"data": "random", "workers": 2},
            SettingsError,
            "found --workers 2, whose processes measure quality, but",
        ),
        (["OUT"], {"random_weights": True, "ray": "auto"}, SettingsError, "but the weights are random, so none is"),
        (
            [FACTORY, SIX],
            {"data": "NOISE"},
            CompressorError,
            "test_bench:of_six_classes (eager) gives 6 values for each",
        ),
        (["OUT/model.onnx"], {"model": LITTLE, "data": "EIGHT"}, RuntimesError, "model.onnx: Input 'x': found shape"),
        (["OUT/model.onnx"], {"model": "SAMPLE", "data": "DIGITS"}, CompressorError, "x to output, but sample maps"),
    ],
)
def test_bad_input_is_reported_in_one_sentence_and_writes_no_files(
    exported: tuple[Path, Report, str],
    tmp_path: Path,
    what: list[str],
    options: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text('{"settings": {}}')
    paths = {
        "OUT": str(exported[0]),
        "ROOM": str(tmp_path / "room"),
        "BROKEN": str(tmp_path / "broken"),
        "SAMPLE": str(models.SAMPLE),
        "DIGITS": str(models.SAMPLE / "digits.npz"),
        "NOISE": str(tmp_path / "noise.npy"),
        "EIGHT": str(tmp_path / "eight.npy"),
    }
    for name, size in (("noise", 16), ("eight", 8)):
        pixels = np.random.default_rng(0).random((12, 3, size, size), dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", pixels)

    def filled(text: Any) -> Any:
        for name, path in paths.items():
            text = text.replace(name, path) if isinstance(text, str) else text
        return text

    values = {"output": str(tmp_path / "room" / "bench.json"), "samples": 12, "rounds": 1} | options
    with pytest.raises(kind) as caught:
        bench(BenchSettings(tuple(map(filled, what)), **{key: filled(value) for key, value in values.items()}))
    assert words in str(caught.value)
    assert list((tmp_path / "room").iterdir()) == []


def test_wrong_usage_ends_with_status_2_and_failure_with_1(tmp_path: Path) -> None:
    for arguments, status in ((["bench"], 2), (["bench", "--batch", "one"], 2), (["bench", "none.onnx"], 1)):
        done = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "bench.json")])
        assert (done.exit_code, done.stdout) == (status, "")
        assert "Error: " in done.stderr
    options = {parameter.name for parameter in main.commands["bench"].params}
    assert options - {"quiet"} == set(BenchSettings.__dataclass_fields__)


# ---------------------------------------------------------------------------------------------- torch and memory


def test_torch_engine_equals_its_module_and_restores_threads() -> None:
    module, inputs = small()
    model = models.load(module, example_inputs=inputs)
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}
    before = torch.get_num_threads()
    with Module(model).open(BuildOptions(threads=before + 1)) as engine:
        assert torch.get_num_threads() == before + 1
        with torch.inference_mode():
            expected = module(torch.from_numpy(feeds["x"])).numpy()
        np.testing.assert_array_equal(engine.run(feeds)["output"], expected)  # the same kernels on the same numbers
        step = engine.bind(feeds)
        step()
        with pytest.raises(RuntimesError, match="expected"):
            engine.run({"x": feeds["x"].astype(np.float64)})
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimesError, match="closed"):
        step()
    with pytest.raises(BuildError, match="on the CPU only"):
        Module(model).open(BuildOptions(device="cuda"))


def test_compiled_module_is_compiled_once_per_shape_and_equals_eager() -> None:
    """With the backend `eager`: Inductor compiles C++ for a minute."""
    module, inputs = small()
    compiling = Module(models.load(module, example_inputs=inputs), compiles=True, backend="eager")
    rows = {count: np.random.default_rng(0).standard_normal((count, 3, 16, 16)).astype(np.float32) for count in (1, 2)}
    for _ in range(2):  # as for each burst
        for count, pictures in rows.items():
            with compiling.open(ONE) as engine, torch.inference_mode():
                expected = module(torch.from_numpy(pictures)).numpy()
                # The traced graph calls the same operators.
                np.testing.assert_allclose(engine.run({"x": pictures})["output"], expected, rtol=1e-5, atol=1e-6)
            assert len(compiling.compiled) >= count
    assert len(compiling.compiled) == 2
    with (
        Module(compiling.model, compiles=True, backend="nonsense").open(ONE) as engine,
        pytest.raises(BuildError, match="leave out --compile"),
    ):
        engine.bind({"x": rows[1]})


def test_memory_is_that_of_a_process_with_the_engine(exported: tuple[Path, Report, str]) -> None:
    feeds = {"x": np.zeros((2, 3, 16, 16), np.float32)}
    memory = peak_memory.measure("onnxruntime", exported[0] / "model.onnx", ONE, feeds)
    assert memory is None or 1_000_000 < memory.before < memory.peak  # None if the system does not report it
    with pytest.raises(peak_memory.PeakMemoryError, match=r"memory of none\.onnx failed \(.*There is no ONNX file"):
        peak_memory.measure("onnxruntime", exported[0] / "none.onnx", ONE, feeds)


def test_what_is_not_compared_between_modules_of_ones_own_is_said() -> None:
    own, other = SimpleNamespace(needs_module=True), SimpleNamespace(needs_module=False)
    found: Any = {"a": own, "b": other, "c": own}
    (note,) = _of_modules(found)
    assert note.startswith(
        "a, c are of modules of your own: their inputs have the same names and shapes, but it is not"
    )
    assert not list(_of_modules({"a": found["a"], "b": found["b"]}))
