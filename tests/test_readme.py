"""Every command and snippet of the README does what the README says, run in a folder with the files it speaks of."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from PIL import Image

from compressor import models, settings
from compressor.cli.main import main
from compressor.deferred import build
from compressor.measure import workshop
from compressor.pipeline import export
from compressor.quantize import int8_search
from compressor.search import greedy
from compressor.target.registry import target_named, targets
from runtimes.base.timing import interleave
from tests.gguf_files import small, written
from tests.samples import worded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
COMPRESSOR = [line for line in COMMANDS if line.startswith("compressor ")]

TWO_FACTORS = ("dense float", "dense int8", "compressed float", "compressed int8")

OWN_MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(4)], nn.Linear(16, 3)), torch.rand(2, 16)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The files the README's commands name: a timm folder, pictures by class, a module of one's own, a small Llama."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(models.SAMPLE, folder / "my_vit")
    digits = np.load(models.SAMPLE / "digits.npz")
    for index, (image, label) in enumerate(zip(digits["images"][:60], digits["labels"][:60], strict=True)):
        (folder / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "photos" / str(label) / f"{index}.png")
    (folder / "my_models.py").write_text(OWN_MODEL)
    written(folder / "my_llm.Q8_0.gguf", small(), "Q8_0")
    rng = np.random.default_rng(0)
    worded(folder / "my_llm", vocabulary=40)
    lines = (" ".join(f"w{token}" for token in rng.integers(3, 40, 20)) for _ in range(12))
    (folder / "texts.txt").write_text("\n".join(lines))
    np.savez(folder / "inputs.npz", input=rng.normal(size=(60, 16)).astype(np.float32))
    np.save(folder / "tokens.npy", rng.integers(3, 48, (24, 10)))
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "my_llm")
    return folder


def brief(openers, feeds, **options):
    return interleave(openers, feeds, **(options | {"rounds": 2, "burst_seconds": 0.01, "warmup_seconds": 0.01}))


def few(settings, steps, _load=export.load):
    return _load(dataclasses.replace(settings, samples=min(settings.samples or 120, 120)), steps)


def shortly(*args, budget, _heal=export.heal, **options):
    return _heal(*args, budget=min(budget, 4.0), **options)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Real timing and a real search, but brief: these tests are about commands, not figures."""
    monkeypatch.setattr(workshop, "interleave", brief)
    monkeypatch.setattr(build, "interleave", brief)
    monkeypatch.setattr(settings, "AUTO_ACTIONS", ("drop",))
    monkeypatch.setattr(greedy, "PATIENCE", 1)
    monkeypatch.setattr(int8_search, "ENOUGH", float("inf"))  # the first way to find ranges will do
    monkeypatch.setattr(export, "load", few)
    monkeypatch.setattr(export, "heal", shortly)


def execute(line):
    if "--output" in line and " bench " not in line:  # made by a test before this one
        shutil.rmtree(shlex.split(line)[shlex.split(line).index("--output") + 1], ignore_errors=True)
    done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
    missed = "--speedup" in line and "as asked for" in done.output  # timing is brief here: a wish may be missed
    assert done.exit_code == (1 if missed else 0), done.output


@pytest.mark.parametrize("line", COMPRESSOR)
def test_command(line, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    # Tests may run in any order, in several processes: what a command reads is made first if need be.
    for made in re.findall(
        r"\w+(?=/(?:plans/\d+|plan)\.json)|(?<=compressor build )\w+|(?<=compressor bench )\w+", line
    ):
        if not (workspace / made).exists():
            execute(next(maker for maker in COMPRESSOR if f"--output {made}" in maker))
    execute(line)
    if " bench " in line:
        engines = json.loads((workspace / "bench.json").read_text())["engines"]
        assert list(engines) == [*(f"proof/{cell}" for cell in TWO_FACTORS), "my_vit (eager)"]
    elif " inspect " in line and "--study" not in line and "--output" in line:
        assert {"inspect.json", "similarity.png"} <= {path.name for path in (workspace / "looked_at").iterdir()}
    elif " inspect " in line and "--output" in line:
        assert {"study.json", "study.html"} <= {path.name for path in (workspace / "studied").iterdir()}
    elif "--output" in line:
        folder = workspace / shlex.split(line)[shlex.split(line).index("--output") + 1]
        files = set(json.loads((folder / "manifest.json").read_text())["files"])
        engine = {"plan.json", "report.json", "config.json", "README.md"}
        engine |= {"model.safetensors" if "--target transformers" in line else "model.onnx"}
        assert ({"sweep.json", "sweep.png", "plans/0.json"} if " sweep " in line else engine) <= files
    if line.startswith("compressor build"):
        content = json.loads((workspace / made / "report.json").read_text())
        assert content["engine"]["state"] == "built"
    if "small_vit/plan.json" in line:
        plan = workspace / "small_vit" / "plan.json"
        assert (workspace / "same_again" / "plan.json").read_text() == plan.read_text()


def test_python_snippet(workspace, monkeypatch, capsys):
    (snippet,) = [block for kind, block in BLOCKS if kind == "python"]
    monkeypatch.chdir(workspace)
    exec(compile(snippet, "README.md", "exec"), {})
    quality, speedup = map(float, capsys.readouterr().out.split())
    assert 0 <= quality <= 100
    assert speedup > 0


def test_make_targets_exist_and_ci_calls_the_readmes_test_command():
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    named = [line.removeprefix("make ") for line in COMMANDS if line.startswith("make ")]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert len(COMMANDS) == len(COMPRESSOR) + len(named)


def test_make_demo_is_the_promised_command():
    recipe = (ROOT / "Makefile").read_text()
    assert "compressor export --drop auto --target onnxruntime --output" in recipe


def test_drop_forms_of_the_table_parse():
    from passes.plan.selection import parse

    forms = re.findall(
        r"^\| ((?:`[^`]+`(?:, )?)+) \|", README.split("| `--drop` | changes |")[1].split("\n\n")[0], re.M
    )
    named = [form for cell in forms for form in re.findall(r"`([^`]+)`", cell)]
    assert len(named) >= 8
    for form in named:
        if form not in ("auto", "none", "plan.json"):
            selection = parse(form)
            assert selection.count is not None or selection.percent is not None or selection.names


def test_actions_of_the_table_are_all_there_are():
    from passes.plan.plan import ACTIONS, form_and_rank

    table = README.split("| `--actions` | what takes a branch's place |")[1].split("\n\n")[0]
    named = [
        form for row in table.splitlines() for form in re.findall(r"`([^`]+)`", row.split("|")[1] if "|" in row else "")
    ]
    assert {form_and_rank(form)[0] if form != "merge" else form for form in named} == set(ACTIONS)


def test_the_table_of_targets_states_their_precisions():
    table = README.split("| `--target` | engine |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    named = {row[0].strip("`"): row for row in rows}
    assert set(named) == set(targets())
    for name, (_, _, *cells) in named.items():
        for device, cell in zip(("cpu", "cuda"), cells, strict=True):
            told = re.sub(r"\(.*?\)|:.*", "", cell)
            had = target_named(name).precisions.get(device, ())
            assert tuple(each.strip() for each in told.split(",") if each.strip()) == had
