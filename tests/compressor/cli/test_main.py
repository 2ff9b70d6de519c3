"""Tests of the command line: output streams, exit statuses, options, and interrupts of a real process."""

import importlib
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.table import Table

import runtimes
from compressor import __version__
from compressor.choices import AUTO, BUDGETS, CALIBRATIONS, COSTS, HEAL_METHODS, PROBLEM_TYPES, SHORT_FORMS, TASKS
from compressor.cli.main import Export, main
from compressor.cli.param_types import print_table
from compressor.commands import SweepSettings
from compressor.measure import latency as engine_timing
from compressor.pipeline import export as pipeline
from compressor.pipeline import sweep
from compressor.settings import API_ONLY, Settings
from compressor.workspace.plan_file import read_plan
from passes.plan.selection import METRICS
from runtimes.base.protocols import DEVICES, PRECISIONS
from runtimes.base.timing import interleave
from tests.samples import DIGITS, five_blocks

INTERRUPTED = "Error: interrupted; no output was written. Repeat the command to resume an interrupted search."


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, args)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["export", "--help"], ["sweep", "--help"], ["bench", "--help"], ["build", "--help"]],
)
def test_help_and_version_load_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys, compressor\nassert 'torch' not in sys.modules\nfrom compressor.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code in (None, 0)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout or __version__ in done.stdout


@pytest.mark.parametrize(
    ("arguments", "int8", "model"),
    [
        ([], None, None),
        (["--int8"], "static", None),
        (["--int8", "dynamic"], "dynamic", None),
        (["--int8=static", "m"], "static", "m"),
        (["--int8", "m"], "static", "m"),
        (["m", "--int8", "--drop", "4"], "static", "m"),
        (["--int8", "static", "m"], "static", "m"),
        (["m", "--int8"], "static", "m"),
    ],
)
def test_int8_parses_with_and_without_a_value(arguments: list[str], int8: str | None, model: str | None) -> None:
    @click.command(cls=Export)
    @click.argument("model", required=False)
    @click.option("--drop")
    @click.option("--int8", is_flag=False, flag_value="static", type=click.Choice(["static", "dynamic"]))
    def command(model: str | None, drop: str | None, int8: str | None) -> None:
        click.echo(f"{int8} {model}")

    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, result.output) == (0, f"{int8} {model}\n")
    assert isinstance(main.commands["export"], Export)
    assert isinstance(main.commands["sweep"], Export)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["export", "--drop", "150%"], 2, "expected at most 100%"),
        (["export", "--drop", ""], 2, "drop is empty"),
        (["export", "--target", "onnxruntim"], 2, "did you mean onnxruntime"),
        (["export", "--threads", "0"], 2, "'--threads'"),
        (["export", "--metric", "size"], 2, "'--metric'"),
        (["export", "--data", "random"], 2, "needs real data"),
        (["export", "vit_tiny_patch16_224"], 2, "no data given"),
        (["export", "vit_basse_patch16_224", "--data", "random", "--drop", "1"], 1, "did you mean vit_base"),
        (["export", "--drop", "2", "--speedup", "1.5"], 2, "--speedup is a goal of the search; found --drop 2"),
        (["export", "--drop", "2", "--latency", "5ms"], 2, "--latency is a goal of the search; found --drop 2"),
        (["export", "--speedup", "1.5", "--latency", "5ms"], 2, "which both set the goal for speed"),
        (["export", "--latency", "5ms", "--cost", "macs"], 2, "leave out --cost macs"),
        (["export", "--latency", "5ms", "--defer-build"], 2, "give --speedup"),
        (["export", "--actions", "teleport"], 2, "unknown action 'teleport'"),
        (["export", "--drop", "2", "--actions", "drop,linear"], 2, "several actions need --drop auto"),
        (["export", "--int8", "--precision", "fp32"], 2, "found --int8 and --precision fp32, which contradict"),
        (["sweep", "--precision", "fp32", "--int8", "dynamic"], 2, "found --int8 and --precision fp32"),
        (["export", "--factorial", "--precision", "fp32"], 2, "found --factorial and --precision fp32"),
        (["export", "--speedup", "0.5"], 2, "speedup is 0.5; expected a finite number above 1"),
        (["export", "--latency", "soon"], 2, "'soon' is not a latency; expected milliseconds such as 5ms"),
        (["export", "--heal-budget", "5d"], 2, "'5d' is not a duration"),
        (["export", "--heal-budget", "0"], 2, "heal-budget is 0; expected a finite number above 0"),
        (["export", "--heal", "prayer"], 2, "'--heal'"),
        (["export", "--cost", "time"], 2, "'--cost'"),
        (["export", "--precision", "fp4"], 2, "'--precision'"),
        (["export", "--calibration", "median"], 2, "'--calibration'"),
        (["export", "--int8", "--precision", "fp16"], 2, "give one of them"),
        (["export", "--precision", "fp16"], 1, "target onnxruntime has no fp16 on cpu; it has fp32, int8"),
        (["sweep", "--calibration", "mse"], 2, "No such option"),
        (["sweep", "--drop", "2"], 2, "No such option"),
        (["sweep", "--heal", "distill"], 2, "No such option"),
        (["sweep", "--points", "1"], 2, "'--points'"),
        (["sweep", "--max-loss", "-1"], 2, "expected a finite percentage"),
        (["sweep", "--actions", "drop,teleport"], 2, "unknown action 'teleport'"),
        (["sweep", "--data", "random"], 2, "needs real data"),
        (["sweep", "--data", "EMPTY"], 1, "holds no images"),
        (["export", "--drop", "attention:99"], 1, "has only 12 of the kind attention"),
        (["export", "--drop", "garbage"], 1, "neither a site nor a block"),
        (["export", "--data", "EMPTY"], 1, "holds no images"),
        (["export", "--data", "EMPTY/none"], 1, "there is no file or folder"),
        (["inspect", "--data", "EMPTY"], 1, "holds no images"),
    ],
)
def test_bad_input_is_reported_in_one_sentence_and_leaves_no_files(
    tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "room").mkdir()
    filled = [argument.replace("EMPTY", str(tmp_path / "empty")) for argument in arguments]
    code, out, err = invoke(*filled, "--output", str(tmp_path / "room" / "out"), "--quiet", "--samples", "12")
    assert (code, out) == (status, "")
    assert err.splitlines()[-1].startswith("Error: ")
    assert words in err
    assert list((tmp_path / "room").iterdir()) == []


class FakeResult:
    """A fake of a pipeline function and of the report or front that it returns; records the arguments."""

    def __init__(self, *missed: str) -> None:
        self.sentences = missed
        self.settings: Settings | None = None

    def __call__(self, settings: Settings, **_: object) -> "FakeResult":
        self.settings = settings
        return self

    factorial = None
    trials = ()

    def table(self) -> str:
        return "table"

    def summary(self) -> str:
        return "\n".join(["summary", *self.sentences])

    def missed(self) -> tuple[str, ...]:
        return self.sentences


def recorded(monkeypatch: pytest.MonkeyPatch, command: str, *args: str) -> FakeResult:
    """Invoke a command with a fake pipeline, which records the settings."""
    result = FakeResult()
    monkeypatch.setattr(importlib.import_module(f"compressor.pipeline.{command}"), command, result)
    assert invoke(command, *args, "--quiet")[0] == 0
    assert result.settings is not None
    return result


def test_default_options_equal_the_default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(monkeypatch, "export").settings == Settings()
    assert recorded(monkeypatch, "sweep").settings == SweepSettings()
    assert (SweepSettings().max_loss, SweepSettings().output, SweepSettings().points) == (20.0, "front", 8)


def test_every_setting_is_an_option_of_export_or_of_python_only() -> None:
    options = {parameter.name for parameter in main.commands["export"].params}
    assert options - {"quiet"} == set(Settings.__dataclass_fields__) - set(API_ONLY)
    assert API_ONLY == ("example_inputs",)


def test_choices_equal_those_of_the_settings() -> None:
    expected = {
        "precision": (AUTO, *PRECISIONS),  # copied in choices.py, because importing them would slow --help
        "int8": tuple(SHORT_FORMS),
        "calibration": (AUTO, *CALIBRATIONS),
        "cost": COSTS,
        "budget": BUDGETS,
        "heal": HEAL_METHODS,
        "metric": METRICS,
        "device": DEVICES,
        "task": TASKS,
        "problem_type": PROBLEM_TYPES,
    }
    options = {each.name: each.type for each in main.commands["export"].params if isinstance(each, click.Option)}
    for name, values in expected.items():
        choice = options[name]
        assert isinstance(choice, click.Choice)
        assert set(choice.choices) == set(values)
    for command in ("sweep", "inspect"):
        for each in main.commands[command].params:
            if isinstance(each, click.Option) and isinstance(each.type, click.Choice):
                assert each.name is not None
                assert set(each.type.choices) <= set(expected[each.name])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--speedup", "1.5"], {"speedup": 1.5}),
        (["--latency", "5ms"], {"latency": 5.0}),
        (["--latency", "2.5"], {"latency": 2.5}),
        (["--latency", "5 ms"], {"latency": 5.0}),
        (["--heal", "distill", "--heal-budget", "5m"], {"heal": "distill", "heal_budget": 300.0}),
        (["--heal-budget", "90s"], {"heal_budget": 90.0}),
        (["--heal-budget", "90"], {"heal_budget": 90.0}),
        (["--heal-budget", "1.5h"], {"heal_budget": 5400.0}),
        (["--heal", "closed-form"], {"heal": "closed-form"}),
        (["--cost", "macs", "--max-loss", "2"], {"cost": "macs", "max_loss": 2.0}),
        (["--actions", "drop,low-rank:8"], {"actions": "drop,low-rank:8"}),
        (["--actions", "tba", "--drop", "block:2"], {"actions": "tba", "drop": "block:2"}),
        (["--tokens", "none"], {"tokens": "none"}),
        (["--precision", "int4"], {"precision": "int4"}),
        (["--precision", "auto", "--max-precision-loss", "2"], {"precision": "auto", "max_precision_loss": 2.0}),
        (["--int8", "--calibration", "entropy"], {"precision": "int8", "calibration": "entropy"}),
        (["--int8", "dynamic"], {"precision": "int8-dynamic"}),
        (["--defer-build", "--target", "tensorrt"], {"defer_build": True, "target": "tensorrt"}),
    ],
)
def test_options_are_converted_to_settings(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: dict[str, Any]
) -> None:
    assert recorded(monkeypatch, "export", *arguments).settings == Settings(**expected)


def test_missed_speedup_is_printed_and_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "export", FakeResult("The result is too slow."))
    code, out, err = invoke("export", "--speedup", "9", "--output", "somewhere", "--quiet")
    assert (code, err) == (1, "")
    assert out.splitlines() == ["table", "summary", "The result is too slow.", "Written to somewhere."]


def test_interrupt_prints_how_to_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    assert invoke("sweep") == (130, "", INTERRUPTED + "\n")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Sweep three blocks with drops only, by multiply-adds and with short timing; return folder and output."""
    output = tmp_path_factory.mktemp("swept") / "front"
    subject = [five_blocks(tmp_path_factory.mktemp("model") / "three", kept=(0, 4, 9)), "--data", DIGITS]
    sizes = ["--samples", "40", "--search-samples", "8", "--points", "2", "--rounds", "1", "--max-loss", "40"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_timing, "interleave", partial(interleave, burst_seconds=0.01, warmup_seconds=0.01))
        code, out, err = invoke(
            "sweep", *subject, "--cost", "macs", "--actions", "drop", *sizes, "--output", str(output)
        )
    assert code == 0, err
    assert "search" in err
    return output, out


def test_sweep_writes_a_complete_folder(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    content = json.loads((folder / "sweep.json").read_text())
    rows = content["points"]
    plans = [f"plans/{number}.json" for number in range(len(rows))]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"sweep.json", "sweep.png", *plans}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no journal, no scratch
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows) > 2
    for row, name in zip(rows, plans, strict=True):
        plan = read_plan(folder / name)
        assert row["plan"] == name
        assert plan.changes == row["changes"]
        assert len(plan.changes) == row["number"]
        assert row["predicted"] == pytest.approx(rows[0]["multiply_adds"] / row["multiply_adds"], rel=1e-12)
    assert rows[0]["changes"] == {}
    assert all(row["loss"] <= 40.0 for row in rows)
    built = [row for row in rows if "latency" in row]
    assert len(built) == 2
    assert built[0]["number"] == 0
    assert content["search"]["prices"]["unit"] == "multiply-adds"
    assert content["settings"]["points"] == 2


def test_sweep_prints_every_point_and_keeps_progress_off_standard_output(swept: tuple[Path, str]) -> None:
    folder, out = swept
    rows = json.loads((folder / "sweep.json").read_text())["points"]
    assert "load the model" not in out
    for row in rows[1:]:
        assert list(row["changes"])[-1] in out
    assert max(map(len, out.splitlines())) <= 80 + len(str(folder))
    assert "Export a point with --drop FOLDER/plans/NUMBER.json." in out
    assert f"Written to {folder}." in " ".join(out.split())


def test_sweep_replaces_only_what_it_wrote(swept: tuple[Path, str], tmp_path: Path) -> None:
    code, _, err = invoke("sweep", "--output", str(swept[0]))
    assert (code, "exists" in err) == (1, True)
    (tmp_path / "mine.txt").write_text("x")
    assert "did not write" in invoke("sweep", "--force", "--output", str(tmp_path))[2]


def test_sweep_refuses_precision_auto(tmp_path: Path) -> None:
    code, out, err = invoke("sweep", "--precision", "auto", "--output", str(tmp_path / "front"))
    assert (code, out) == (2, "")
    assert err == "Error: a sweep compares plans in one precision; found --precision auto, give one such as int8.\n"
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_cuda_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    code, out, err = invoke("export", "--device", "cuda", "--output", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert "CUDA" in err
    assert "load the model" not in err


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert "exists" in invoke("export", "--output", str(tmp_path))[2]
    assert "did not write" in invoke("export", "--force", "--output", str(tmp_path))[2]
    assert "cannot be written" in invoke("export", "--output", str(tmp_path / "mine.txt" / "out"))[2]
    assert "is not a folder" in invoke("inspect", "--output", str(tmp_path / "mine.txt"))[2]


def test_targets_lists_every_runtime() -> None:
    code, out, err = invoke("targets")
    assert (code, err) == (0, "")
    text = "".join(part for line in out.splitlines() for part in line.split("│")).replace(" ", "")
    for name in runtimes.targets():
        assert name[:8] in text  # folded in a narrow terminal
    assert "cuda:fp32,fp16" in text


def test_inspect_writes_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke("inspect", "--samples", "24", "--output=~/in", "--quiet")
    assert (code, err) == (0, "")
    assert (tmp_path / "home" / "in" / "inspect.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_figures_are_whole_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table()
    for number in range(5):
        table.add_column(str(number), no_wrap=True)
    table.add_row(*["12345.678"] * 5)
    print_table(table)
    assert capsys.readouterr().out.count("12345.678") == 5


def test_inspect_writes_its_files_and_keeps_progress_off_standard_output(tmp_path: Path) -> None:
    code, out, err = invoke("inspect", "--samples", "24", "--output", str(tmp_path / "in"))
    assert code == 0
    assert "load the model" in err
    assert "load the model" not in out
    assert "blocks.11.mlp" in out
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))
    content = json.loads((tmp_path / "in" / "inspect.json").read_text())
    assert len(content["sites"]) == 24
    assert len(content["similarity"]) == len(content["states"])
    assert (tmp_path / "in" / "similarity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("options", "after", "number", "status", "left"),
    [
        (("--cost", "macs"), "validate the original", signal.SIGINT, 130, {".out.journal"}),
        pytest.param(("--drop", "2"), "rewrite", signal.SIGINT, 130, set(), marks=pytest.mark.slow),
        (("--drop", "2"), "load the model", signal.SIGTERM, 143, set()),
    ],
)
def test_interrupt_prints_one_line_and_leaves_at_most_a_journal(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    options: tuple[str, ...],
    after: str,
    number: signal.Signals,
    status: int,
    left: set[str],
) -> None:
    # A shell that runs the tests in the background makes its child processes ignore SIGINT.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{restore}\nfrom compressor.cli.main import main\nmain()"
    model = five_blocks(tmp_path_factory.mktemp("model") / "two", kept=(0, 9))
    command = [sys.executable, "-c", program, "export", model, "--data", DIGITS, "--samples", "60", *options]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if after in line:
                    break
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (status, "")
    sentences = [line for line in err.splitlines() if not line.startswith("✓")]
    assert sentences == [
        INTERRUPTED if number == signal.SIGINT else INTERRUPTED.replace("interrupted", "ended by SIGTERM", 1)
    ]
    assert {path.name for path in tmp_path.iterdir()} <= left


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["inspect"], "photos"),
        (["inspect", "--study", "--against-data", "photos"], "photos"),
        (["sweep"], "photos/front"),
        (["export"], "photos/out"),
        (["bench"], "photos/bench.json"),
    ],
)
def test_no_command_writes_into_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    data = [] if "--study" in command else ["--data", "photos"]
    status, _, errors = invoke(*command, *data, "-o", output)
    assert status == 1
    assert errors.startswith(f"Error: {output} is or lies in the data photos, whose files")
    assert list((tmp_path / "photos").iterdir()) == []
