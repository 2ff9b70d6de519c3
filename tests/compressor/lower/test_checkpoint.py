"""Checkpoints without whole blocks: `from_pretrained` of plain transformers opens the rewritten graph."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import compressor
from compressor import models
from compressor.benchmark.contenders import parse_contenders
from compressor.errors import SettingsError
from compressor.lower import checkpoint
from compressor.lower.checkpoint import CheckpointError
from compressor.lower.trace import trace
from compressor.measure import latency as engine_timing
from compressor.pipeline import export
from compressor.quality.parity import ParityError
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.target.checkpoint import Transformers
from passes.base import PassError, apply
from passes.execute.interpreter import run
from passes.graph.edit import replace_parameter
from passes.graph.graph import Site
from passes.graph.sites import find_sites
from passes.plan.plan import Decision, Plan
from passes.rewrite.remove_blocks import RemoveBlocks
from runtimes.base.protocols import BuildOptions
from tests.paths import SHARED_DATA

LLAMA = SHARED_DATA / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")

SAME = 1e-6  # of the largest value: the same operators in the same order, but a sum may be split differently
LAYERS, REMOVED = 3, (0,)

TEXT = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
DECODER = TEXT | {"intermediate_size": 24, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "Gemma2ForCausalLM": ("Gemma2Config", DECODER | {"head_dim": 4, "sliding_window": 6}),
    "BertForSequenceClassification": ("BertConfig", TEXT | {"intermediate_size": 24, "max_position_embeddings": 32}),
    "ViTForImageClassification": ("ViTConfig", PICTURE | {"intermediate_size": 24}),
}
PLAIN = {  # without a tokenizer, transformers creates none for these
    "LlamaForCausalLM": ("LlamaConfig", DECODER),
    "Qwen3ForCausalLM": ("Qwen3Config", DECODER | {"head_dim": 4}),
}
GENERATING = [name for name in ARCHITECTURES if name.endswith(("CausalLM", "LMHeadModel"))]


def saved(folder, name, **options):
    torch.manual_seed(0)
    config, fields = (ARCHITECTURES | PLAIN)[name]
    module = getattr(transformers, name)(getattr(transformers, config)(**fields, **options)).eval()
    for parameter in module.parameters():  # biases and norms of a fresh model are all zero and one
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Return a function that loads and traces a model of an architecture, once, with its sites and blocks."""

    @functools.cache
    def load_and_trace(name):
        folder = saved(tmp_path_factory.mktemp(name), name)
        model = models.load(folder)
        graph = trace(model)
        sites = find_sites(graph)
        return SimpleNamespace(
            folder=folder,
            model=model,
            graph=graph,
            sites=sites,
            blocks=tuple(dict.fromkeys(site.block for site in sites)),
        )

    return load_and_trace


def without(subject, removed=REMOVED):
    names = [site.name for site in subject.sites if site.block in [subject.blocks[number] for number in removed]]
    return Rewriter(subject.graph, subject.sites, None, whole=True).apply_changes(dict.fromkeys(names, "drop"))


def plan_of(subject, changes):
    decisions = tuple(Decision(site.name, changes.get(site.name, "keep"), "") for site in subject.sites)
    return Plan("model", "", "", "", decisions, tuple(changes))


def reopened(graph, subject, folder):
    path = checkpoint.write(graph, subject.model, folder / "written" / "config.json")
    module, info = type(subject.model.module).from_pretrained(path.parent, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return path, module.eval()


def inputs(model):
    """Return the example inputs without the KV cache."""
    return {name: model.example[name] for name in ("pixel_values", "input_ids") if name in model.example}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_pretrained_opens_the_model_without_those_layers(name, subject, tmp_path):
    """The oracle is the original module with the blocks deleted from its list."""
    mine = subject(name)
    path, module = reopened(without(mine), mine, tmp_path)
    assert module.config.num_hidden_layers == LAYERS - len(REMOVED)
    original = getattr(transformers, name).from_pretrained(mine.folder).eval()
    stack = original.get_submodule(mine.blocks[0].rpartition(".")[0])
    for number in reversed(REMOVED):
        del stack[number]
        del getattr(original.config, "layer_types", list(range(LAYERS)))[number]  # indexed by layer in forward
    extra = {"use_cache": False} if name in GENERATING else {}
    with torch.no_grad():
        expected, actual = (model(**inputs(mine.model), **extra).logits for model in (original, module))
    assert (actual - expected).abs().max() <= SAME * expected.abs().max()
    assert type(transformers.AutoConfig.from_pretrained(path.parent)) is type(mine.model.module.config)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("removed", [(1, 2), ()])
def test_the_checkpoint_computes_the_rewritten_graph(name, removed, subject, tmp_path):
    """Also with a KV cache, whose layers have the same numbers as in the graph."""
    mine = subject(name)
    graph = without(mine, removed)
    path = checkpoint.write(graph, mine.model, tmp_path / "written" / "config.json")
    with Transformers().load(path, BuildOptions()) as engine:
        actual = engine.run({name: value.numpy() for name, value in mine.model.example.items()})
    expected = dict(
        zip(graph.outputs, run(graph, {name: mine.model.example[name] for name in graph.inputs}), strict=True)
    )
    assert set(actual) == set(expected)
    for output, value in expected.items():
        assert np.abs(actual[output] - value.numpy()).max() <= SAME * value.abs().max()


@pytest.mark.parametrize("name", GENERATING)
def test_the_checkpoint_generates_the_tokens_of_the_graph(name, subject, tmp_path):
    mine = subject(name)
    graph = without(mine)
    _, module = reopened(graph, mine, tmp_path)
    ids = torch.tensor([[5, 9, 3]])
    generated = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    complete = mine.model.preprocess.complete
    while ids.shape[1] < generated.shape[1]:
        feeds = complete({"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)})
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        logits = dict(zip(graph.outputs, run(graph, {name: tensors[name] for name in graph.inputs}), strict=True))[
            "logits"
        ]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert ids.shape[1] > 4
    assert torch.equal(ids, generated)


def test_per_layer_lists_of_the_config_lose_the_removed_layers(subject, tmp_path):
    mine = subject("Gemma2ForCausalLM")
    kinds = mine.model.module.config.layer_types
    assert len(set(kinds)) == 2
    path = checkpoint.write(without(mine, (0,)), mine.model, tmp_path / "written" / "config.json")
    content = json.loads(path.read_text())
    assert content["layer_types"] == kinds[1:]
    assert mine.model.module.config.num_hidden_layers == LAYERS  # the original config is unchanged


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_tied_weights_are_stored_once_and_opened_tied(name, subject, tmp_path):
    mine = subject(name)
    path, module = reopened(without(mine), mine, tmp_path)
    stored = load_file(path.with_name("model.safetensors"))
    assert "lm_head.weight" not in stored
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    kept = sum(value.numel() for value in module.parameters())
    assert sum(value.numel() for value in stored.values()) == kept
    assert path.stat().st_mode & 0o777 == path.with_name("model.safetensors").stat().st_mode & 0o777


def test_the_weights_are_those_of_the_graph(subject, tmp_path):
    """Healing changes weights of the graph, not of the module."""
    mine = subject("Gemma2ForCausalLM")
    graph = without(mine, (0,))
    name = "model.layers.1.mlp.down_proj.weight"
    changed = torch.full_like(mine.model.module.get_parameter(name), 0.25)
    replace_parameter(graph, f"{graph.prefix}{name}", changed)
    path = checkpoint.write(graph, mine.model, tmp_path / "written" / "config.json")
    stored = load_file(path.with_name("model.safetensors"))
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight"], changed)
    assert not torch.equal(mine.model.module.get_parameter(name), changed)


def in_types(folder, name, *, shard="5GB"):
    """Save a model with matrices in bfloat16, norms in float32 and, of one block, float16; return the folder."""
    module = getattr(transformers, name).from_pretrained(saved(folder / "float", name))
    for path, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.data = weight.data.to(torch.float16 if ".1." in path else torch.bfloat16)
    module.config.dtype = torch.bfloat16
    module.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize(
    ("name", "shard"), [("GPT2LMHeadModel", "8KB"), pytest.param("Gemma2ForCausalLM", "5GB", marks=pytest.mark.slow)]
)
def test_every_tensor_keeps_its_type_and_its_bits(name, shard, tmp_path):
    """The oracle is the original file; GPT-2 stores its blocks under other names than the module."""
    folder = in_types(tmp_path / "from", name, shard=shard)
    stored = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    assert {value.dtype for value in stored.values()} == {torch.bfloat16, torch.float16, torch.float32}
    for disk in (False, True):
        model = models.load(folder, on_disk=disk)
        graph = trace(model)
        assert all(weight.dtype == torch.float32 for weight in graph.module.parameters())
        path = checkpoint.write(graph, model, tmp_path / f"to{disk}" / "config.json")
        written = load_file(path.with_name("model.safetensors"))
        assert set(written) == set(stored)
        for key, value in stored.items():
            assert written[key].dtype == value.dtype, key
            assert torch.equal(written[key], value), key
        assert json.loads(path.read_text())["dtype"] == "bfloat16"
        opened = type(model.module).from_pretrained(path.parent)
        assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight


def test_one_block_fewer_is_a_smaller_file(tmp_path, tokens):
    dense = transformers.LlamaForCausalLM.from_pretrained(saved(tmp_path / "f", "LlamaForCausalLM")).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    report = compressor.export(
        tmp_path / "dense", data=tokens, drop="block:1", target="transformers", rounds=1, output=tmp_path / "out"
    )
    before, after = (tmp_path / name / "model.safetensors" for name in ("dense", "out"))
    block = sum(value.nbytes for key, value in load_file(before).items() if ".layers.0." in key)  # all are equal
    values = [sum(value.nbytes for value in load_file(path).values()) for path in (before, after)]
    assert values[0] - values[1] == block
    assert after.stat().st_size < before.stat().st_size
    assert {value.dtype for value in load_file(after).values()} == {torch.bfloat16}
    (types,) = [each.reason for each in report.limitations if each.feature == "weight types"]
    assert "bfloat16 (30 tensors)" in types
    assert "written in these types" in types


def test_values_too_large_for_their_type_are_refused(tmp_path):
    dense = transformers.LlamaForCausalLM.from_pretrained(saved(tmp_path / "f", "LlamaForCausalLM")).half()
    dense.save_pretrained(tmp_path / "dense")
    model = models.load(tmp_path / "dense")
    graph = trace(model)
    name = "model.layers.1.mlp.down_proj.weight"
    replace_parameter(graph, f"{graph.prefix}{name}", torch.full_like(model.module.get_parameter(name), 1e5))
    with pytest.raises(CheckpointError, match=f"values of {name} too large for torch.float16"):
        checkpoint.rounded(graph, model)


def test_a_post_norm_block_leaves_its_norms_unless_it_is_removed(subject):
    mine = subject("BertForSequenceClassification")
    drops = {site.name: "drop" for site in mine.sites if site.block == mine.blocks[1]}
    kept = Rewriter(mine.graph, mine.sites, None).apply_changes(drops)
    norms = [node for node in kept.nodes() if node.target is torch.ops.aten.layer_norm.default]
    assert apply(RemoveBlocks((mine.blocks[1], mine.blocks[2])[:1]), kept).changed == (mine.blocks[1],)
    left = [node for node in kept.nodes() if node.target is torch.ops.aten.layer_norm.default]
    assert len(norms) - len(left) == 2
    with pytest.raises(PassError, match="as a whole"):
        apply(RemoveBlocks((mine.blocks[2],)), kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": "auto", "actions": "drop,linear"}, "can only drop: whole blocks, or .*; found --actions drop,linear"),
        ({"drop": "auto", "tokens": "8"}, "--tokens 8"),
        ({"drop": "block:1", "actions": "linear"}, "--actions linear"),
        ({"drop": "block:1", "tokens": "8"}, "--tokens 8"),
    ],
)
def test_changes_that_a_checkpoint_cannot_express_are_refused_by_the_settings(options, words):
    with pytest.raises(SettingsError, match=words):
        Settings(model="anything", data="nowhere", target="transformers", **options)


@pytest.mark.parametrize("drop", ["attention:2", "3", "25%", "mlp:1"])
def test_single_branches_of_other_models_are_refused_before_the_data_is_read(drop, tmp_path):
    dense = saved(tmp_path / "dense", "Qwen3ForCausalLM")
    with pytest.raises(CheckpointError) as error:
        export.export(Settings(dense, "nowhere", drop=drop, target="transformers", output=tmp_path / "out"))
    assert str(error.value) == (
        "--target transformers can only remove whole blocks, because the form that serving engines open with single "
        f"branches left out is for Llama and Mistral, not Qwen3ForCausalLM; found --drop {drop}: give --drop block:N, "
        "the names of whole blocks or a plan that drops whole blocks, or choose another --target, such as onnxruntime, "
        "which takes any plan."
    )


def test_the_error_names_the_site_of_a_plan_that_changes_more_than_whole_blocks(subject):
    mine = subject("Gemma2ForCausalLM")
    attention, mlp = (site.name for site in mine.sites if site.block == mine.blocks[1])
    for changes, words in (
        ({attention: "drop"}, f"drops {attention} but keeps {mlp}"),
        ({attention: "linear", mlp: "drop"}, f"linear at {attention}"),
        ({site.name: "drop" for site in mine.sites}, "no block of model.layers would be left"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.check_plan(plan_of(mine, changes), mine.sites, mine.model)
    checkpoint.check_plan(plan_of(mine, {attention: "drop", mlp: "drop"}), mine.sites, mine.model)


def test_stages_and_shared_blocks_are_refused():
    """The checks read only the modules; nothing is traced."""
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
    stages = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, window_size=4))
    pattern = "swin.encoder.layers.{}.blocks.{}"
    sites = [site(pattern.format(stage, number)) for stage in range(2) for number in range(2)]
    mine = SimpleNamespace(sites=sites)
    with pytest.raises(CheckpointError, match=r"has several \(swin.encoder.layers.0.blocks, swin.encoder.layers.1"):
        checkpoint.check_plan(
            plan_of(mine, {sites[1].name: "drop"}), sites, SimpleNamespace(name="swin", module=stages)
        )
    with pytest.raises(CheckpointError, match="has several"):
        checkpoint.check_blocks(sites, SimpleNamespace(name="swin", module=stages))
    shared = transformers.AlbertModel(transformers.AlbertConfig(**TEXT, intermediate_size=24, embedding_size=8))
    with pytest.raises(CheckpointError, match="shares its weights"):
        checkpoint.stack_of(shared, ["encoder.albert_layer_groups.0.albert_layers.0#2"])
    with pytest.raises(CheckpointError, match="counts 3 layers, which are not the 1 blocks"):
        checkpoint.stack_of(shared, ["encoder.albert_layer_groups.0.albert_layers.0"])


def site(block):
    return Site(f"{block}.attn", "attention", block, 0, 8, 2, "add", "branch", "trunk", "add")


def test_a_backbone_returns_the_features_of_its_last_block():
    config = transformers.Dinov2Config(**PICTURE)
    module = transformers.Dinov2ForImageClassification(config)
    checkpoint.set_layer_count(config, checkpoint.stack_of(module, ["dinov2.encoder.layer.1"]))
    assert config.stage_names == ["stem", "stage1", "stage2"]
    assert (config.num_hidden_layers, config.out_features, config.out_indices) == (2, ["stage2"], [2])


def test_models_of_other_libraries_are_refused_before_the_data_is_read(tmp_path):
    with pytest.raises(CheckpointError, match="is a model of timm"):
        export.export(
            Settings(models.SAMPLE, "nowhere", drop="block:1", target="transformers", output=tmp_path / "out")
        )
    assert not any(tmp_path.iterdir())


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 48, (24, 10)))
    return path


def test_an_exported_folder_can_be_opened_and_benchmarked(tmp_path, tokens, monkeypatch):
    dense = saved(tmp_path / "dense", "LlamaForCausalLM")
    options = {"data": tokens, "drop": "block:2", "target": "transformers", "rounds": 1}
    report = compressor.export(dense, **options, output=tmp_path / "out")
    assert report.parity["result"] <= SAME
    assert report.sizes["result"].parameters < report.sizes["baseline"].parameters
    assert report.sizes["result"].bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.sizes["result"].cache == report.sizes["baseline"].cache / LAYERS
    assert set(report.latency) == {"baseline", "result"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "plan.json", "report.json"} <= written
    assert not any(name.endswith((".onnx", ".pt2")) for name in written)
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert "model.safetensors" in listed

    text = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in text
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(text.split("```python\n")[1].split("```")[0], "card", "exec"), namespace := {})
    assert namespace["model"].config.num_hidden_layers == 1
    assert len(namespace["answer"]) > 1

    (each,) = parse_contenders([str(tmp_path / "out")])
    assert each.is_model
    compared = compressor.bench(
        tmp_path / "out", dense, data="random", rounds=1, context=(4,), output=tmp_path / "bench.json"
    )
    assert [entry.name for entry in compared.entries] == ["out (eager)", "dense (eager)"]
    small, whole = compared.generated.runs
    assert small.cache == whole.cache / LAYERS


def test_a_search_drops_whole_blocks(tmp_path, tokens, monkeypatch):
    """The export itself checks that the checkpoint computes the rewritten graph."""
    monkeypatch.setattr(engine_timing, "QUICK_ROUNDS", 1)
    dense = saved(tmp_path / "dense", "Qwen3ForCausalLM")
    out = tmp_path / "out"
    report = compressor.export(
        dense, data=tokens, drop="auto", target="transformers", rounds=1, speedup=1.01, generate="4:4", output=out
    )
    blocks = {decision.site.rpartition(".")[0] for decision in report.plan.decisions}
    removed = {name.rpartition(".")[0] for name in report.plan.changes}
    assert len(report.plan.changes) == 2 * len(removed) > 0
    assert set(report.plan.changes.values()) == {"drop"}
    assert all(decision.reason for decision in report.plan.decisions)
    assert {"as it is", "without every other block", "first block alone"} == set(report.search["prices"]["timings"])
    module = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert module.config.num_hidden_layers == len(blocks - removed) >= 1
    assert {step["unit"] for step in report.search["steps"]} == removed
    assert report.parity["result"] <= SAME
    again = compressor.export(
        dense, data=tokens, drop=str(out / "plan.json"), target="transformers", rounds=1, output=tmp_path / "again"
    )
    assert again.plan.changes == report.plan.changes


@pytest.mark.slow
def test_a_sweep_of_whole_blocks(tmp_path, tokens):
    dense = saved(tmp_path / "dense", "Gemma2ForCausalLM")
    front = compressor.sweep(
        dense, data=tokens, target="transformers", cost="macs", max_loss=1e6, rounds=1, output=tmp_path / "out"
    )
    assert len(front.points) == LAYERS  # all three blocks, two and one
    assert [len(point.plan.changes) for point in front.points] == [0, 2, 4]
    assert [point.latency is not None for point in front.points] == [True] * LAYERS


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_removing_blocks_one_by_one_equals_removing_them_together(name, subject):
    mine = subject(name)
    rewriter = Rewriter(mine.graph, mine.sites, None, whole=True)
    assert tuple(rewriter.units) == mine.blocks
    graph = mine.graph
    for block in (mine.blocks[1], mine.blocks[0]):
        graph = rewriter.changed(graph, block, "drop")
    feeds = {key: mine.model.example[key] for key in graph.inputs}
    for left, right in zip(run(graph, feeds), run(without(mine, (0, 1)), feeds), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(PassError, match="no block would be left"):
        rewriter.changed(graph, mine.blocks[2], "drop")
    with pytest.raises(PassError, match="only be dropped; found linear"):
        rewriter.changed(mine.graph, mine.blocks[2], "linear")
    with pytest.raises(PassError, match="only whole units"):
        rewriter.apply_changes({mine.sites[0].name: "drop"})


def test_layers_that_depend_on_their_number_fail_the_parity_check(tmp_path, tokens):
    dense = saved(tmp_path / "dense", "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ParityError, match="cannot describe the model without the removed blocks"):
        export.export(Settings(dense, tokens, drop="transformer.h.0", target="transformers", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_targets_lists_transformers_and_an_unknown_target_is_refused_with_it():
    assert compressor.targets()["transformers"] is None
    with pytest.raises(SettingsError, match="transformers"):
        Settings(target="transformer")


@pytest.mark.slow  # the usual run heals this model below
@needs_llama
def test_a_trained_llama_loses_a_block(tmp_path):
    report = compressor.export(
        LLAMA, data=LLAMA / "sampled_tokens.npy", drop="block:1", target="transformers", samples=12, rounds=1,
        output=tmp_path / "out",
    )  # fmt: skip
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert module.config.num_hidden_layers == 4
    assert report.parity["result"] <= SAME
    assert report.quality.figures["result"].value > report.quality.figures["baseline"].value


@needs_llama
def test_healed_weights_are_rounded_before_they_are_measured(tmp_path):
    """The checkpoint equals the measured graph to float32; rounding to bfloat16 changes weights by up to 0.4 %."""
    transformers.LlamaForCausalLM.from_pretrained(LLAMA).bfloat16().save_pretrained(tmp_path / "dense")
    report = compressor.export(
        tmp_path / "dense", data=LLAMA / "sampled_tokens.npy", drop="block:1", target="transformers", samples=24,
        heal="closed-form", rounds=1, output=tmp_path / "out",
    )  # fmt: skip
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert report.healed["kept"]
    assert report.parity["result"] <= SAME
