"""The rules of serving engines for nemotron-nas checkpoints: a folder that meets all, and one that breaks each."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.lower.nemotron_nas.engine_rules import ENGINES, Checkpoint, serving, verdicts
from compressor.models.text.block_configs import BlockShape
from compressor.models.text.nemotron_nas import DeciLMForCausalLM, NemotronNasConfig

HEADS, HIDDEN = 4, 32
LLAMA2 = {"model": {"type": "BPE", "byte_fallback": True}, "decoder": {"type": "Sequence"}}
WHOLE, NO_ATTENTION, NO_MLP = BlockShape(2, 256), BlockShape(None, 256), BlockShape(2, None)


def written(folder, *shapes, tokenizer=LLAMA2, **fields):
    """Write a checkpoint with blocks of these shapes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": len(shapes)}
    blocks = [shape.to_config(HEADS, HIDDEN) for shape in shapes]
    config = NemotronNasConfig(**sizes | {"block_configs": blocks, "tie_word_embeddings": True} | fields)
    DeciLMForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return written(tmp_path_factory.mktemp("sound"), WHOLE, NO_ATTENTION, WHOLE)


def of(folder):
    return verdicts(Checkpoint.read(folder))


def broken(folder, tmp_path, change):
    """Copy a checkpoint with another config."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    return of(tmp_path)


def test_a_checkpoint_without_an_attention_meets_the_rules_of_all_engines(sound):
    assert of(sound) == dict.fromkeys(ENGINES)
    assert serving(sound) == {"serving": {"form": "nemotron-nas", "engines": dict.fromkeys(ENGINES)}}


def test_other_checkpoints_have_no_verdicts(sound, tmp_path):
    broken(sound, tmp_path, lambda content: content.update(model_type="llama"))
    assert serving(tmp_path) == {}


ALL = tuple(ENGINES)
FFN = ("SGLang", "TensorRT-LLM", "llama.cpp")


@pytest.mark.parametrize(
    ("shapes", "fields", "engines", "words"),
    [
        ((NO_ATTENTION, WHOLE), {}, ("vLLM", "llama.cpp"), "it needs the attention of the first block"),
        ((WHOLE, NO_MLP), {}, ("llama.cpp",), "would skip the attention of block 1 too"),
        ((WHOLE, BlockShape(2, 24)), {}, FFN, "from ffn_mult, which has no value for the 24 of block 1"),
        ((WHOLE, BlockShape(1, 256)), {}, ("SGLang",), "same number of heads of keys and values"),
        ((WHOLE,), {"hidden_act": "gelu"}, ALL, "it has the activation silu only, and the config names gelu"),
        ((WHOLE,), {"mlp_bias": True}, ("SGLang", "TensorRT-LLM"), "its MLP has no biases"),
        ((WHOLE,), {"attention_bias": True}, ("TensorRT-LLM",), "its attention has no biases"),
        ((WHOLE,), {"head_dim": 16}, ("llama.cpp",), "heads of 8 features, and the config states head_dim 16"),
        ((WHOLE,), {"vocab_size": 64, "tokenizer": {"model": {"type": "BPE"}}}, ("llama.cpp",), "of Llama 2, or a"),
        ((WHOLE,), {"tokenizer": None}, ("llama.cpp",), "its converter needs a tokenizer.json"),
    ],
)
def test_each_engine_names_the_rule_that_a_model_breaks(shapes, fields, engines, words, tmp_path):
    found = of(written(tmp_path, *shapes, **fields))
    assert {name for name, reason in found.items() if reason is not None} == set(engines)
    assert all(words in found[name] for name in engines)


def entry(part, change, block=1):
    return lambda content: content["block_configs"][block][part].update(change)


def without(part, key):
    return lambda content: content["block_configs"][1][part].pop(key)


@pytest.mark.parametrize(
    ("change", "engines", "words"),
    [
        (lambda content: content.update(architectures=["LlamaForCausalLM"]), ALL, "does not name DeciLMForCausalLM"),
        (lambda content: content["block_configs"].pop(), ALL, "does not have an entry for each layer"),
        (without("attention", "no_op"), ALL, "block 1 does not state attention.no_op"),
        (lambda content: content.update(auto_map={}), ALL, "holds code (auto_map in config.json)"),
        (lambda content: content.update(sliding_window=8), ALL, "it has no sliding window"),
        (entry("attention", {"replace_with_linear": True}), ALL, "linear maps, "),
        (entry("attention", {"n_heads_in_group": 3}, block=0), ALL, "block 0 is 3, no divisor of 4 heads"),
        (
            entry("ffn", {"ffn_mult": 24.0}),
            ALL,
            "gate_proj.weight have the shape [256, 32], but the config implies",
        ),
        (entry("ffn", {"no_op": True, "ffn_mult": None}), ALL, "belong to no branch of the config"),
        (entry("attention", {"no_op": False, "n_heads_in_group": 2}), ALL, "1.input_layernorm.weight are missing"),
        (lambda content: content.update(tie_word_embeddings=False), ALL, "the weights lm_head.weight are missing"),
        (entry("ffn", {"ffn_mult": None, "intermediate_size": 256}), ALL, "ffn_mult"),
        (without("attention", "n_heads_in_group"), ("llama.cpp",), "of each block; block 1 lacks one"),
        (entry("attention", {"n_heads_in_group": 2}), ("llama.cpp",), "contradicts no_op in block 1"),
        (entry("ffn", {"ffn_mult": 12}, block=0), ("llama.cpp",), "a decimal point in the ffn_mult of the first block"),
        (
            lambda content: content.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            ("llama.cpp",),
            "the positions default and llama3, and the config names yarn",
        ),
    ],
)
def test_each_engine_names_the_rule_that_a_config_breaks(sound, tmp_path, change, engines, words):
    found = broken(sound, tmp_path, change)
    assert {name for name, reason in found.items() if reason is not None} == set(engines)
    assert all(words in found[name] for name in engines)


def test_an_mlp_without_its_own_rule_of_width_is_for_vllm(tmp_path):
    """Its entry has intermediate_size and no ffn_mult: vLLM reads the first if the second is absent."""
    folder = written(tmp_path, WHOLE, BlockShape(None, 24))
    ffn = json.loads((folder / "config.json").read_text())["block_configs"][1]["ffn"]
    assert ffn == {"no_op": False, "replace_with_linear": False, "intermediate_size": 24}
    assert of(folder)["vLLM"] is None


def test_code_in_the_folder_is_named(sound, tmp_path):
    broken(sound, tmp_path, lambda content: None)
    (tmp_path / "modeling.py").write_text("")
    assert set(of(tmp_path).values()) == {"the folder holds code (modeling.py), which it should not"}


def test_weights_of_an_absent_branch_are_named(sound, tmp_path):
    broken(sound, tmp_path, lambda content: None)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file(load_file(sound / "model.safetensors") | {name: torch.zeros(2)}, tmp_path / "model.safetensors")
    assert set(of(tmp_path).values()) == {f"the weights {name} belong to no branch of the config"}
