"""Commands, snippets, tables and pictures of the README and of the documentation do and show what they say.

Commands run in a folder with the files that they name.
"""

import dataclasses
import fnmatch
import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from PIL import Image

import runtimes
from compressor import api, models, settings
from compressor.cli.main import main
from compressor.deferred import build
from compressor.lower import write_onnx
from compressor.measure import latency as engine_timing
from compressor.pipeline import export, inspect, sweep
from compressor.quantize import int8_search
from compressor.search import greedy
from compressor.target.registry import target_named, targets
from passes.base import apply
from passes.execute.interpreter import run
from runtimes.base.protocols import BuildOptions, Engine, Runtime
from runtimes.base.timing import interleave
from tests.encoder_decoders import sentences
from tests.gguf_files import small, written
from tests.paths import ROOT
from tests.samples import digits, five_blocks, worded
from tests.two_towers import COLOURS, trained, write_captions, write_pictures
from tests.vision_language_models import picture, saved

DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}
BLOCKS = [
    (page, *block) for page, text in PAGES.items() for block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M)
]
LINES = [(page, line) for page, kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
COMMANDS = list(dict.fromkeys(line for _, line in LINES))
COMPRESSOR = [line for line in COMMANDS if line.startswith("compressor ")]
# Those of a contributor's pages are files, and have tests of their own.
SNIPPETS = list(
    dict.fromkeys(block for page, kind, block in BLOCKS if kind == "python" and "/contributing/" not in page)
)


def usual(items, kind):
    """Return parameters of a test: those of the README run in every suite, those of docs/ in `make slow`."""
    first = {item for page, item in kind if page == "README.md"}
    return [pytest.param(item, marks=() if item in first else pytest.mark.slow) for item in items]


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
    """The files that commands name: a timm folder, pictures by class, a module of one's own, a Llama, a BERT, texts."""
    folder = tmp_path_factory.mktemp("docs")
    five_blocks(folder / "my_vit")
    sample = np.load(models.SAMPLE / "digits.npz")
    for index, (image, label) in enumerate(zip(sample["images"][:60], sample["labels"][:60], strict=True)):
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
    encoder(folder / "my_encoder")
    translator(folder / "my_translator")
    trained(folder)
    write_pictures(folder / "pictures")
    write_captions(folder / "captions")
    (folder / "names.txt").write_text("\n".join(COLOURS))
    shutil.copytree(saved("llava", folder), folder / "my_llava")
    captions(folder / "my_captions")
    rows = (f"{' '.join(f'w{token}' for token in rng.integers(3, 40, 6))},{index % 2}" for index in range(40))
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    return folder


def encoder(folder):
    """A small BERT with two classes, whose tokens are the words w3, w4, ..."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def captions(folder):
    """A folder of images with their texts, for a vision-language model."""
    folder.mkdir()
    records = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(sentences(8))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    for number, record in enumerate(records):
        picture(number).save(folder / record["file_name"])


def translator(folder):
    """A small T5 with the same words."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def word_tokenizer():
    words = ["<pad>", "<unk>", "<s>", *(f"w{token}" for token in range(3, 40))]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")


def brief(openers, feeds, **options):
    return interleave(openers, feeds, **(options | {"rounds": 2, "burst_seconds": 0.01, "warmup_seconds": 0.01}))


def few(settings, steps, _load=export.load, **options):
    return _load(dataclasses.replace(settings, samples=min(settings.samples or 120, 120)), steps, **options)


def counted(settings, _export=export.export):
    """Export with a search by multiply-adds where a snippet searches; the commands time engines."""
    return _export(dataclasses.replace(settings, cost="macs") if settings.drop == "auto" else settings)


def shortly(*args, budget, _heal=export.heal, **options):
    return _heal(*args, budget=min(budget, 4.0), **options)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Real timing and a real search, but brief: these tests are about commands, not figures."""
    monkeypatch.setattr(engine_timing, "interleave", brief)
    monkeypatch.setattr(build, "interleave", brief)
    monkeypatch.setattr(settings, "AUTO_ACTIONS", ("drop",))
    monkeypatch.setattr(greedy, "PATIENCE", 1)
    monkeypatch.setattr(int8_search, "ENOUGH", float("inf"))  # the first way to find ranges will do
    for job in (export, sweep, inspect):
        monkeypatch.setattr(job, "load", few)
    monkeypatch.setattr(export, "heal", shortly)
    monkeypatch.setattr(api, "run_export", counted)


def execute(line):
    if "--output" in line and " bench " not in line:  # made by a test before this one
        shutil.rmtree(shlex.split(line)[shlex.split(line).index("--output") + 1], ignore_errors=True)
    done = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
    missed = "--speedup" in line and "as asked for" in done.output  # timing is brief here: a wish may be missed
    assert done.exit_code == (1 if missed else 0), done.output


def make(folder):
    """Execute the command that makes a folder, unless it is there already."""
    if not Path(folder).exists():
        execute(next(maker for maker in COMPRESSOR if f"--output {folder}" in maker))


@pytest.mark.parametrize("line", usual(COMPRESSOR, LINES))
def test_command(line, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    # Tests may run in any order, in several processes: what a command reads is made first if need be.
    for made in re.findall(
        r"\w+(?=/(?:plans/\d+|plan)\.json)|(?<=compressor build )\w+|(?<=compressor bench )\w+|(?<=--prices )\w+", line
    ):
        make(made)
    execute(line)
    words = shlex.split(line)
    folder = workspace / words[words.index("--output") + 1] if "--output" in words else workspace / "inspected"
    if " bench " in line:
        engines = json.loads((workspace / "bench.json").read_text())["engines"]
        assert list(engines) == [*(f"proof/{cell}" for cell in TWO_FACTORS), "my_vit (eager)"]
    elif " inspect" in line:
        files = {"study.json", "study.html"} if "--study" in line else set()
        assert {"inspect.json", "similarity.png"} | files <= {path.name for path in folder.iterdir()}
    elif " sweep " in line:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert {"sweep.json", "sweep.png", "plans/0.json"} <= set(files)
    elif "--output" in line:
        check_folder(folder, checkpoint="--target transformers" in line)
    if line.startswith("compressor build"):
        content = json.loads((workspace / made / "report.json").read_text())
        assert content["engine"]["state"] == "built"
    if "small_vit/plan.json" in line:
        plan = workspace / "small_vit" / "plan.json"
        assert (workspace / "same_again" / "plan.json").read_text() == plan.read_text()


def check_folder(folder, *, checkpoint):
    """Hold an exported folder to the pages of its files and of report.json."""
    files = set(json.loads((folder / "manifest.json").read_text())["files"])
    others = ("encoder_model.onnx", "vision_encoder.onnx", "model.gguf")
    model = next((name for name in others if (folder / name).is_file()), "model.onnx")
    model = "model.safetensors" if checkpoint else model
    assert {"plan.json", "report.json", "report.html", "README.md", "config.json", model} <= files
    page = PAGES["docs/reference/folder.md"]
    patterns = [pattern for row in cells(page, "| file | what |") for pattern in re.findall(r"`([^`]+)`", row[0])]
    assert not [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    report = PAGES["docs/reference/report.md"]
    keys = {row[0].strip("`") for row in cells(report, "| key | what |")}
    assert keys == set(json.loads((folder / "report.json").read_text()))
    keys = {row[0].strip("`") for row in cells(page, "| key | what |")}
    assert keys == set(json.loads((folder / "plan.json").read_text()))


@pytest.mark.parametrize(
    "snippet",
    usual(SNIPPETS, [(page, block) for page, kind, block in BLOCKS if kind == "python"]),
    ids=lambda snippet: snippet.splitlines()[0],
)
def test_python_snippet(snippet, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    for made in re.findall(r"\w+(?=/model\.onnx)|(?<=onnxruntime_genai\.Model\(\")\w+", snippet):
        make(made)
    capsys.readouterr()
    exec(compile(snippet, "documentation", "exec"), {})
    printed = capsys.readouterr().out
    if "onnxruntime_genai" in snippet:
        tokens = [int(number) for number in re.findall(r"\d+", printed)]
        assert tokens[:3] == [1, 20, 33]
        assert len(tokens) > 3
    elif "print(" in snippet:
        quality, speedup = map(float, printed.split())
        assert 0 <= quality <= 100
        assert speedup > 0


def as_module(page, name, folder, monkeypatch):
    """Write the Python of a page into a file, as it stands, and import it."""
    (code,) = [block for place, kind, block in BLOCKS if (place, kind) == (page, "python")]
    path = folder / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_a_pass_rewrites_the_sample(tmp_path, monkeypatch):
    module = as_module("docs/contributing/new-pass.md", "approximate_gelu", tmp_path, monkeypatch)
    model, _, graph, _ = digits()
    twin = graph.fork()
    done = apply(module.ApproximateGelu(), twin)
    assert len(done.changed) == 12  # one in each block
    assert twin.history[-1].name == "ApproximateGelu"
    assert apply(module.ApproximateGelu(), twin).changed == ()
    (exact,), (approximate,) = run(graph, model.example), run(twin, model.example)
    # The approximation is off by at most 5e-4 for each value; logits are of size 10.
    torch.testing.assert_close(approximate, exact, atol=0.05, rtol=0.0)
    assert not torch.equal(approximate, exact)


def test_the_example_of_a_runtime_runs_the_sample(tmp_path, monkeypatch):
    target = as_module("docs/contributing/new-runtime.md", "reference", tmp_path, monkeypatch)
    assert [name for name in dir(Runtime) if not name.startswith("_") and not hasattr(target, name)] == []
    assert target.missing() is None
    model, _, graph, _ = digits()
    source = write_onnx.lower(graph, model, tmp_path / "model.onnx")
    options = BuildOptions()
    feeds = {name: value.numpy() for name, value in model.example.items()}
    with target.load(target.build(source, tmp_path, options), options) as engine:
        assert [name for name in dir(Engine) if not name.startswith("_") and not hasattr(engine, name)] == []
        found = engine.run(feeds)
        engine.bind(feeds)()
    known = runtimes.runtime("onnxruntime")
    with known.load(source, options) as engine:
        assert found.keys() == engine.run(feeds).keys()
        for name, expected in engine.run(feeds).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-4)  # float32 sums in another order


def test_every_block_that_can_run_here_runs():
    assert {kind for _, kind, _ in BLOCKS} <= {"sh", "python", "console", "text"}
    assert [line for line in COMMANDS if not line.startswith(("compressor ", "make "))] == []
    pages = {page for page, kind, _ in BLOCKS if kind == "python" and "/contributing/" in page}
    assert pages == {"docs/contributing/new-pass.md", "docs/contributing/new-runtime.md"}


def test_make_targets_exist_and_ci_calls_the_readmes_test_command():
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    named = [line.removeprefix("make ") for page, line in LINES if page == "README.md" and line.startswith("make ")]
    assert named == ["demo", "test"]
    assert {word for text in PAGES.values() for word in re.findall(r"`make ([a-z]+)", text)} <= set(targets)
    assert {line.removeprefix("make ") for line in COMMANDS if line.startswith("make ")} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_make_demo_is_the_promised_command():
    recipe = (ROOT / "Makefile").read_text()
    assert "compressor export --drop auto --target onnxruntime --output" in recipe


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page):
    """Those of docs/ are checked by `mkdocs build --strict`."""
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", PAGES[page])
    assert links
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def cells(text, heading):
    """The rows of the table that begins with a heading, as lists of cells."""
    assert text.count(heading) == 1, heading
    table = text.split(heading)[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def tables(heading):
    """The tables that begin with a heading, of all pages; there is one at least."""
    found = [cells(text, heading) for text in PAGES.values() if heading in text]
    assert found, heading
    return found


def test_drop_forms_of_the_table_parse():
    from passes.plan.selection import parse

    for table in tables("| `--drop` | changes |"):
        named = [form for row in table for form in re.findall(r"`([^`]+)`", row[0])]
        assert len(named) >= 8
        for form in named:
            if form not in ("auto", "none", "plan.json"):
                selection = parse(form)
                assert selection.count is not None or selection.percent is not None or selection.names


def test_actions_of_the_table_are_all_there_are():
    from passes.plan.plan import ACTIONS, form_and_rank

    for table in tables("| `--actions` | what takes a branch's place |"):
        named = [form for row in table for form in re.findall(r"`([^`]+)`", row[0])]
        assert {form_and_rank(form)[0] if form != "merge" else form for form in named} == set(ACTIONS)


def test_choices_of_the_tables_are_all_there_are():
    options = {option.name: option for option in main.commands["export"].params}
    for heading, name in (("| `--metric` | ranks by |", "metric"), ("| `--heal` | what it does |", "heal")):
        for table in tables(heading):
            assert {row[0].strip("`") for row in table} == set(options[name].type.choices)


def test_the_tables_of_targets_state_their_precisions():
    found = tables("| `--target` | engine | precisions on the CPU | on a GPU |")
    assert len(found) == 2  # the README and the page about precisions
    for rows in found:
        named = {row[0].strip("`"): row for row in rows}
        assert set(named) == set(targets())
        for name, (_, _, *columns) in named.items():
            for device, cell in zip(("cpu", "cuda"), columns, strict=True):
                told = re.sub(r"\(.*?\)|:.*", "", cell)
                had = target_named(name).precisions.get(device, ())
                assert tuple(each.strip() for each in told.split(",") if each.strip()) == had


def script(name):
    """A script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_imports_is_of_the_present_imports():
    drawn = script("imports_picture")
    assert drawn.PICTURE.read_text() == drawn.picture(drawn.imports_between_packages()), (
        "run python docs/scripts/imports_picture.py"
    )


def test_the_picture_of_a_report_is_of_the_committed_results():
    """By its numbers: where lines lie depends on the release of matplotlib."""
    drawn = script("report_picture")
    text, row = drawn.PICTURE.read_text(), drawn.case()
    for variant in ("original", "baseline", "result"):
        assert f"{row['latency'][variant]['median']:.2f} ms" in text
        assert f">{row['quality']['figures'][variant]['value']:.1f}<" in text
    assert f"{row['speedup']['original']['ratio']:.2f}x faster" in text
    assert f"{len(row['plan']['changes'])} of {row['sites']} branches changed" in text
