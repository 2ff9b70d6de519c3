"""The command line: what is printed where, exit statuses, and interrupts of a real process."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from compressor import __version__
from compressor.cli import Export, main


def invoke(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, args)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"], ["inspect", "--help"]])
def test_help_and_version_load_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys, compressor\nassert 'torch' not in sys.modules\nfrom compressor.cli import main\n"
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
def test_every_form_of_int8_parses_as_meant(arguments: list[str], int8: str | None, model: str | None) -> None:
    @click.command(cls=Export)
    @click.argument("model", required=False)
    @click.option("--drop")
    @click.option("--int8", is_flag=False, flag_value="static", type=click.Choice(["static", "dynamic"]))
    def command(model: str | None, drop: str | None, int8: str | None) -> None:
        click.echo(f"{int8} {model}")

    result = CliRunner().invoke(command, arguments)
    assert (result.exit_code, result.output) == (0, f"{int8} {model}\n")
    assert isinstance(main.commands["export"], Export)


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
        (["export", "--drop", "attention:99"], 1, "has only 12 of the kind attention"),
        (["export", "--drop", "garbage"], 1, "neither a site nor a block"),
        (["export", "--data", "EMPTY"], 1, "holds no images"),
        (["export", "--data", "EMPTY/none"], 1, "there is no file or folder"),
        (["inspect", "--data", "EMPTY"], 1, "holds no images"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
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


def test_cuda_without_cuda_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    code, out, err = invoke("export", "--device", "cuda", "--output", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert "CUDA" in err
    assert "load the model" not in err


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert "exists" in invoke("export", "--output", str(tmp_path))[2]
    assert "did not write" in invoke("export", "--force", "--output", str(tmp_path))[2]
    assert "cannot be written" in invoke("export", "--output", str(tmp_path / "mine.txt" / "out"))[2]
    assert "is no folder" in invoke("inspect", "--output", str(tmp_path / "mine.txt"))[2]


def test_targets_lists_every_runtime() -> None:
    code, out, err = invoke("targets")
    assert (code, err) == (0, "")
    assert "onnxruntime" in out


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


@pytest.fixture
def process(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", "from compressor.cli import main; main()", "export", "--samples", "60"]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        yield started
        started.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("after", "number", "status"),
    [
        ("run the original", signal.SIGINT, 130),
        ("rewrite", signal.SIGINT, 130),
        ("load the model", signal.SIGTERM, 143),
    ],
)
def test_an_interrupt_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, process: "subprocess.Popen[str]", after: str, number: signal.Signals, status: int
) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if after in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    sentences = [line for line in err.splitlines() if not line.startswith("✓")]
    assert sentences == (["Error: interrupted; nothing was written."] if number == signal.SIGINT else [])
    assert list(tmp_path.iterdir()) == []
