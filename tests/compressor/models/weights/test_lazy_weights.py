"""Weights on disk: their values are those that from_pretrained loads."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor import models
from compressor.lower.trace import trace
from compressor.models import ModelError
from compressor.models.weights import lazy_weights
from compressor.models.weights.lazy_weights import stored_bytes, write_from_disk
from passes.execute.interpreter import run
from passes.execute.offloaded_weights import has_offloaded, in_memory, is_offloaded
from passes.graph.sites import find_sites
from tests.decoders import DECODERS, LAYERS, VOCABULARY, decoder, random_tokens, saved

QUICK = ("Qwen3", "GPT2", "GPTNeoX")  # tied, transposed, renamed; Gemma4Text has learned buffers
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def on_disk(folder, **options):
    return models.load(folder, on_disk=True, **options)


def assert_reads(module, expected):
    """Check that parameters and buffers equal those of the other module bit for bit, with the same weights tied."""
    left, right = (dict(each.named_parameters(remove_duplicate=False)) for each in (module, expected))
    assert set(left) == set(right)
    for name, weight in left.items():
        assert is_offloaded(weight), name
        value = in_memory(weight)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, right[name].float(), rtol=0, atol=0)
    assert len({id(each) for each in left.values()}) == len({id(each) for each in right.values()})
    buffers = dict(expected.named_buffers())
    assert set(dict(module.named_buffers())) == set(buffers)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, buffers[name].to(buffer.dtype), rtol=0, atol=0)


@functools.cache
def both(name, folder):
    """Return model and graph of an architecture with weights on disk, and with weights in memory."""
    loaded = [load(saved(folder / name, name)) for load in (on_disk, models.load)]
    return [(model, trace(model)) for model in loaded]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoders")


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_is_the_one_that_from_pretrained_loads(name, folder):
    (left, _), (right, _) = both(name, folder)
    assert_reads(left.module, right.module)
    assert left.inputs == right.inputs
    assert left.state == right.state


@pytest.mark.parametrize("name", EVERY)
def test_the_graph_has_the_same_sites_and_outputs(name, folder):
    (_, streamed), (right, graph) = both(name, folder)
    assert find_sites(streamed) == find_sites(graph)
    assert len(find_sites(graph)) == 2 * LAYERS
    assert has_offloaded(streamed)
    assert not has_offloaded(graph)
    ids = random_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    feeds = right.preprocess.complete({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    feeds = {key: torch.from_numpy(value) for key, value in feeds.items()}
    for output, expected in zip(run(streamed, feeds), run(graph, feeds), strict=True):
        assert torch.equal(output, expected)


def test_some_architectures_are_tied_and_some_are_not(folder):
    """Check the properties that QUICK is chosen for."""
    modules = {
        name: models.load(saved(folder / name, name)).module for name in ("Llama", "Qwen3", "GPT2", "Gemma4Text")
    }
    tied = {name: modules[name].config.tie_word_embeddings for name in ("Llama", "Qwen3", "GPT2")}
    assert tied == {"Llama": False, "Qwen3": True, "GPT2": True}
    assert dict(modules["Gemma4Text"].named_buffers())["model.layers.0.layer_scalar"] != 1


def test_several_shards_in_16_bits(tmp_path):
    saved(tmp_path, "Llama", dtype=torch.bfloat16, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_reads(on_disk(tmp_path).module, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_names_without_the_prefix_of_the_bare_model(name, tmp_path):
    """GPT-2 on the hub has such names; a tied weight has no tensor of its own."""
    saved(tmp_path, name, tie_word_embeddings=True)
    prefix = {"GPT2": "transformer.", "Llama": "model."}[name]
    stored = load_file(tmp_path / SINGLE)
    save_file({key.removeprefix(prefix): value for key, value in stored.items()}, tmp_path / SINGLE, {"format": "pt"})
    assert_reads(on_disk(tmp_path).module, decoder(name, tie_word_embeddings=True))


def test_a_tied_weight_is_read_by_either_name(tmp_path):
    saved(tmp_path, "Qwen3")
    names = {"model.embed_tokens.weight": "lm_head.weight"}
    stored = {names.get(key, key): value for key, value in load_file(tmp_path / SINGLE).items()}
    save_file(stored, tmp_path / SINGLE, {"format": "pt"})
    assert_reads(on_disk(tmp_path).module, decoder("Qwen3"))


def test_the_generation_config_is_that_of_the_folder(tmp_path):
    """The folder may set several end tokens and sampling options that are not in the config."""
    generation = transformers.GenerationConfig(eos_token_id=[2, 5], do_sample=True, top_k=7, max_new_tokens=9)
    generation.save_pretrained(saved(tmp_path / "from", "Llama"))
    for load in (on_disk, models.load):
        model = load(tmp_path / "from")
        (tmp_path / load.__name__).mkdir()
        model.save(tmp_path / load.__name__)
    actual, expected = (
        json.loads((tmp_path / load.__name__ / "generation_config.json").read_text()) for load in (on_disk, models.load)
    )
    assert actual == expected
    assert (actual["eos_token_id"], actual["top_k"]) == ([2, 5], 7)


def test_weights_are_not_in_memory_until_they_are_read(tmp_path):
    module = on_disk(saved(tmp_path, "Llama")).module
    for weight in module.parameters():
        assert weight.untyped_storage().nbytes() == weight.itemsize
        assert torch.isnan(weight).all()
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ModelError, match=r"there is no file .*model\.safetensors on this machine; --max-memory reads"):
        in_memory(module.get_parameter("model.embed_tokens.weight"))


def test_bytes_on_disk_are_those_of_the_files(tmp_path):
    graph = trace(on_disk(saved(tmp_path, "GPT2", dtype=torch.bfloat16)))  # tied
    stored = load_file(tmp_path / SINGLE)
    assert stored_bytes(graph) == sum(value.nbytes for value in stored.values())


# ------------------------------------------------------------------------------------------------------------ refused


def broken(folder, change):
    """Save a Llama with modified tensors."""
    stored = load_file(saved(folder, "Llama") / SINGLE)
    save_file(change(stored), folder / SINGLE, {"format": "pt"})
    return folder


def test_weights_without_a_safetensors_file_are_rejected(tmp_path):
    (saved(tmp_path, "Llama") / SINGLE).unlink()
    with pytest.raises(ModelError, match=rf"has no {SINGLE} and no {INDEX}.*save_pretrained once"):
        on_disk(tmp_path)


def test_tensors_that_transformers_converts_on_loading_are_rejected(tmp_path):
    """In a mixture of experts, the file has one matrix per expert, and the module has one for all."""
    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"experts.gate_up_proj, or transformers converts it on loading"):
        on_disk(tmp_path)


def test_unknown_tensor_names_are_rejected(tmp_path):
    renamed = {"model.norm.weight": "model.final_norm.weight"}
    broken(tmp_path, lambda stored: {renamed.get(key, key): value for key, value in stored.items()})
    with pytest.raises(ModelError, match=r"no tensor model.norm.weight, .* leave --max-memory out"):
        on_disk(tmp_path)


def test_quantized_weights_are_rejected(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    broken(tmp_path, lambda stored: stored | {name: stored[name].to(torch.int8)})
    with pytest.raises(
        ModelError, match=rf"{name} .* type I8, but --max-memory reads F32, F16, BF16; .* not quantized"
    ):
        on_disk(tmp_path)


def test_shapes_that_contradict_the_config_are_rejected(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    broken(tmp_path, lambda stored: stored | {name: stored[name][:, 1:].contiguous()})
    with pytest.raises(ModelError, match=rf"{name} .* shape \[32, 47\], but the config implies \[32, 48\]"):
        on_disk(tmp_path)


def test_other_models_than_language_models_of_transformers_are_rejected(tmp_path):
    with pytest.raises(ModelError, match=r"--max-memory is for language models of transformers.* is a model of timm"):
        on_disk(models.SAMPLE)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a model for feature-extraction; leave --max-memory out"):
        on_disk(tmp_path)


# ------------------------------------------------------------------------------------------------------------ written


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        *((name, "20KB") for name in ("Llama", "Qwen3", "GPT2", "GPTNeoX", "Gemma4Text")),
        ("Gemma4Text", "5GB"),
        *(pytest.param(name, "5GB", marks=pytest.mark.slow) for name in ("Llama", "Qwen3", "GPT2", "GPTNeoX")),
    ],
)
def test_written_weights_equal_the_original_in_values_and_dtype(name, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_weights, "SHARD", shard)
    saved(tmp_path / "from", name, dtype=torch.bfloat16)
    (tmp_path / "to").mkdir()
    write_from_disk(on_disk(tmp_path / "from").module, tmp_path / "to")
    files = sorted((tmp_path / "to").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB") == (tmp_path / "to" / INDEX).exists()
    written = {key: value for path in files for key, value in load_file(path).items()}
    stored = load_file(tmp_path / "from" / SINGLE)
    assert set(written) == set(stored)
    for key, value in stored.items():  # buffers are float32, as in the module
        assert written[key].dtype == (torch.float32 if key.endswith("layer_scalar") else torch.bfloat16)
        assert torch.equal(written[key], value.to(written[key].dtype))
    if len(files) > 1:
        index = json.loads((tmp_path / "to" / INDEX).read_text())
        assert set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert opened.dtype == torch.bfloat16
    assert opened.config.vocab_size == VOCABULARY


def test_a_written_file_has_the_layout_of_safetensors(tmp_path):
    """The bytes are equal, also for dtypes of different widths, which must be aligned to their element size."""
    stored = load_file(saved(tmp_path / "from", "Llama") / SINGLE)
    odd = {"a": torch.arange(3, dtype=torch.float16), "b": stored["lm_head.weight"], "n": torch.tensor(True)}
    save_file(odd, tmp_path / "expected", {"format": "pt"})
    lazy_weights._write_shard(tmp_path / "written", odd)
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
    assert np.array_equal(load_file(tmp_path / "written")["b"].numpy(), odd["b"].numpy())
