"""Llama checkpoints whose blocks differ: opened like those of transformers, or refused in a sentence."""

import json

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention

from compressor import models
from compressor.lower.trace import trace
from compressor.models import ModelError
from compressor.models.text import block_configs
from compressor.models.text.block_configs import BlockShape
from compressor.models.text.kv_cache import CACHE_NAMES
from compressor.models.text.nemotron_nas import DeciLMForCausalLM, NemotronNasConfig, block_shapes
from passes.execute.interpreter import run
from passes.graph.sites import find_sites

HEADS, HIDDEN = 4, 32
SAME = 1e-6  # of the largest value: the same operators in the same order
# Heads of keys and values, and widths: one block lacks its attention, one its MLP; two widths are no multiple of 256.
SHAPES = (BlockShape(2, 256), BlockShape(None, 512), BlockShape(4, None), BlockShape(1, 24))


def config_of(shapes=SHAPES, **fields):
    blocks = [shape.to_config(HEADS, HIDDEN) for shape in shapes]
    sizes = {"vocab_size": 48, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": len(shapes)}
    return NemotronNasConfig(**sizes | {"block_configs": blocks, "bos_token_id": 1, "eos_token_id": 2} | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("nas")
    torch.manual_seed(0)
    module = DeciLMForCausalLM(config_of())
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(path)
    return path


def llama_with_zeros(module):
    """Return a Llama of transformers with the same heads and widths, whose absent branches add zero."""
    blocks = []
    for shape in SHAPES:
        heads, width = shape.key_value_heads or HEADS, shape.width or 8
        sizes = {"vocab_size": 48, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 1}
        blocks.append(
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, num_key_value_heads=heads, intermediate_size=width)
            )
        )
    whole = blocks[0].eval()
    whole.model.layers = torch.nn.ModuleList(each.model.layers[0] for each in blocks)
    whole.config.num_hidden_layers = len(SHAPES)
    for number, (shape, block) in enumerate(zip(SHAPES, whole.model.layers, strict=True)):
        block.self_attn.layer_idx = number
        if shape.key_value_heads is None:
            block.self_attn.o_proj.weight.data.zero_()
        if shape.width is None:
            block.mlp.down_proj.weight.data.zero_()
    missing, unexpected = whole.load_state_dict(module.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[3] for name in missing} == {
        "self_attn",
        "input_layernorm",
        "mlp",
        "post_attention_layernorm",
    }
    return whole


def test_it_computes_llama_without_the_absent_branches(folder):
    """The oracle is LlamaForCausalLM with its own attention and MLP in each block, some of which add zero."""
    model = models.load(folder)
    assert type(model.module) is DeciLMForCausalLM
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = (
            each(ids, use_cache=False).logits for each in (llama_with_zeros(model.module), model.module)
        )
    assert (actual - expected).abs().max() <= SAME * expected.abs().max()


def test_the_cache_has_a_layer_for_each_attention_that_is_left(folder):
    model = models.load(folder)
    keys = [shape[1] for name, shape in ((n, v.shape) for n, v in model.example.items()) if name.endswith(".key")]
    assert keys == [shape.key_value_heads for shape in SHAPES if shape.key_value_heads]
    ids = torch.tensor([[5, 9, 3]])
    generated = model.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    again = ids
    with torch.no_grad():
        while again.shape[1] < generated.shape[1]:
            again = torch.cat([again, model.module(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(again, generated)
    output = model.module(ids)
    cache = next(output[name] for name in CACHE_NAMES if name in output)
    assert len(cache.layers) == len(keys)  # the config's use_cache is true


@pytest.mark.parametrize("on_disk", [False, True])
def test_its_graph_has_the_branches_that_are_left_and_no_others(folder, on_disk):
    model = models.load(folder, on_disk=on_disk)
    graph = trace(model)
    assert [(site.kind, site.block[-1]) for site in find_sites(graph)] == [
        (kind, str(number))
        for number, shape in enumerate(SHAPES)
        for kind, there in (("attention", shape.key_value_heads), ("mlp", shape.width))
        if there
    ]
    if not on_disk:
        expected = model.call(model.module, *model.example.values())
        for value, other in zip(run(graph, model.example), expected, strict=True):
            assert (value - other).abs().max() <= SAME * other.abs().max()


def test_transformers_records_skipped_branches_and_builds_them_all():
    """The day this fails, transformers opens a plain Llama without single branches, and that form is the better one."""
    skipping = {"per_layer_config": {"1": {"skip": ["attention"]}}}
    sizes = {"vocab_size": 48, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=24, **skipping))
    assert isinstance(module.model.layers[1].self_attn, LlamaAttention)


def test_random_weights_need_no_file(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = models.load(tmp_path, random_weights=True)
    assert block_shapes(model.module.config, "it") == SHAPES


def test_code_beside_a_checkpoint_is_not_run(folder, tmp_path):
    """NVIDIA's checkpoints name their own code in auto_map; the classes here take its place, also if it is trusted."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(content | {"auto_map": named}))
    (tmp_path / "code.py").write_text("raise AssertionError\n")
    for trusted in (False, True):
        assert type(models.load(tmp_path, trust_remote_code=trusted).module) is DeciLMForCausalLM


def test_a_width_by_ffn_mult_is_a_multiple_of_256():
    for hidden in (64, 576, 4096, 8192):
        for width in range(256, 4096, 256):
            multiple = block_configs.ffn_mult(width, hidden)
            assert block_configs.mlp_width(multiple, hidden) == width
            assert block_configs.mlp_width(round(multiple, 6), hidden) == width
        assert block_configs.ffn_mult(1000, hidden) is None
    # Two blocks of nvidia/Llama-3_3-Nemotron-Super-49B-v1, of width 8192.
    assert (block_configs.mlp_width(5.25, 8192), block_configs.mlp_width(1.3125, 8192)) == (28672, 7168)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "attention",
            {"replace_with_linear": True},
            "attention.replace_with_linear, which Compressor does not run",
        ),
        ("attention", {"window_length": 8}, "has attention.window_length"),
        ("attention", {"num_sink_tokens": 4}, "has attention.num_sink_tokens"),
        ("attention", {"n_heads_in_group": 3}, "n_heads_in_group to 3; expected a divisor of its 4 heads"),
        ("attention", {"n_heads_in_group": None}, "n_heads_in_group to None"),
        ("attention", {"no_op": None}, "lacks attention.no_op or ffn.no_op"),
        ("ffn", {"replace_with_linear": True}, "has ffn.replace_with_linear"),
        ("ffn", {"hidden_act": "gelu"}, "another ffn.hidden_act than the config's"),
        ("ffn", {"gated": False}, "an MLP without a gate"),
        ("ffn", {"ffn_mult": None}, "ffn_mult to None and intermediate_size to None"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(folder, tmp_path, part, change, words):
    content = json.loads((folder / "config.json").read_text())
    content["block_configs"][0][part] |= change
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError) as error:
        models.load(tmp_path)
    assert words in str(error.value)
    assert str(error.value).startswith("block_configs[0] of ")


def test_a_config_needs_an_entry_for_each_block():
    for blocks, found in ((None, "none"), ([], "0")):
        with pytest.raises(ModelError, match=f"has 4 layers; expected as many block_configs, found {found}"):
            block_shapes(config_of(block_configs=blocks), "it")
