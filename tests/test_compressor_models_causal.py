"""Causal language models with their cache: against transformers' own generation, token for token."""

import functools
import json
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from compressor import models
from compressor.lower import lower
from compressor.models.base import without_cache
from compressor.models.causal import PAST_TOKENS, causal, positions
from compressor.trace import trace
from passes.base import apply
from passes.drop import Drop
from passes.run import run
from passes.sites import find_sites
from passes.state import bytes_per_token

LLAMA = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")

CLOSE = 2e-5  # of float32 sums in another order, on logits of size 1

SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
ARCHITECTURES = {
    "LlamaConfig": SMALL | {"intermediate_size": 24, "num_key_value_heads": 2},
    "Gemma2Config": SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 6},
    "GPT2Config": {"vocab_size": 48, "n_embd": 16, "n_layer": 3, "n_head": 4},
    "OPTConfig": SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "FalconConfig": SMALL,
}


@functools.cache
def small(name):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**ARCHITECTURES[name])
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    told = ("input_ids", "attention_mask")
    found = causal(module, told)
    example = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    model = types.SimpleNamespace(
        name=name, module=module, call=found.call, inputs=found.inputs, outputs=found.outputs, state=found.state,
        example=found.example(example), dynamic_axes=found.dynamic_axes,
    )  # fmt: skip
    graph = trace(model)
    return module, found, graph, find_sites(graph)


def outputs(graph, feeds):
    return dict(zip(graph.outputs, run(graph, feeds), strict=True))


def two_calls(graph, ids, first):
    """Logits of a text given in two parts, the second behind the cache of the first."""
    mask = np.ones(ids.shape, dtype=np.int64)
    empty = {name: value[: len(ids), :, :0] for name, value in small_past(graph).items()}
    logits = []
    state = empty
    for start, end in ((0, first), (first, ids.shape[1])):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": torch.from_numpy(mask[:, :end]),
            "position_ids": torch.from_numpy(positions(mask[:, :end], end - start)),
        }
        found = outputs(graph, feeds | state)
        logits.append(found["logits"])
        state = {before: found[after] for after, before in graph.state.items()}
    return torch.cat(logits, 1), state


def small_past(graph):
    nodes = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    shapes = {name: nodes[name].meta["val"].shape for name in graph.state.values()}
    return {name: torch.zeros(8, shape[1], 0, shape[3]) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_text_in_two_parts_gives_what_transformers_gives_at_once(name):
    module, _, graph, _ = small(name)
    ids = torch.randint(0, 48, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = module(input_ids=ids, use_cache=False).logits
    for first in (1, 6, 10):
        logits, state = two_calls(graph, ids, first)
        torch.testing.assert_close(logits, expected, atol=CLOSE, rtol=0)
        assert {value.shape[2] for value in state.values()} == {11}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cache_goes_with_its_attention(name):
    """Names stay without a gap, and the rest of the model computes as if the branch added nothing."""
    _, found, graph, sites = small(name)
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(2))
    reading = [site for site in sites if site.kind == "attention"]
    for gone in (reading[:1], reading[-1:], reading[:2]):
        fork = graph.fork()
        apply(Drop(tuple(site.name for site in gone)), fork)
        left = len(found.heads) - len(gone)
        assert fork.outputs[1:] == graph.outputs[1 : 1 + 2 * left]
        assert tuple(fork.state.values()) == tuple(graph.state.values())[: 2 * left]
        assert bytes_per_token(fork) * len(found.heads) == bytes_per_token(graph) * left
        feeds = found.complete({"input_ids": ids.numpy(), "attention_mask": np.ones((2, 9), np.int64)})
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        at_once = run(graph, tensors, skip=gone)[0]
        torch.testing.assert_close(outputs(fork, tensors)["logits"], at_once, atol=CLOSE, rtol=0)
        torch.testing.assert_close(two_calls(fork, ids, 4)[0], at_once, atol=CLOSE, rtol=0)


def test_without_any_attention_there_is_no_cache():
    _, _, graph, sites = small("LlamaConfig")
    fork = graph.fork()
    apply(Drop(tuple(site.name for site in sites if site.kind == "attention")), fork)
    assert fork.outputs == ("logits",)
    assert not fork.state
    assert not [name for name in fork.inputs if name.startswith("past")]
    assert bytes_per_token(fork) == 0


def test_sites_are_those_of_the_model_without_a_cache():
    _, _, _, sites = small("LlamaConfig")
    assert [site.kind for site in sites] == ["attention", "mlp"] * 3


def test_padding_is_no_position():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions(mask, 1).tolist() == [[2], [4]]


def test_bytes_of_a_token():
    """Three layers of keys and values, two heads of width four, float32."""
    assert bytes_per_token(small("LlamaConfig")[2]) == 3 * 2 * 2 * 4 * 4


def test_a_model_without_such_a_cache_is_left_as_it_was():
    module = torch.nn.Linear(2, 2)
    assert causal(module, ("input_ids", "attention_mask")) is None


def test_a_folder_without_a_cache_says_so_in_every_config(tmp_path):
    """Whoever opens it goes by this field; nothing else of the configs changes, and none is made up."""
    (tmp_path / "config.json").write_text('{"use_cache": true, "vocab_size": 48}')
    without_cache(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"use_cache": False, "vocab_size": 48}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    without_cache(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2, "use_cache": False}


def test_a_plain_tokenizer_is_named_by_a_class_that_older_transformers_has_too(tmp_path):
    """Version 5 writes a name of its own, at which version 4, which Optimum needs, stops; both know the older one."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "story": 4}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "from")
    small("LlamaConfig")[0].save_pretrained(tmp_path / "from")
    (tmp_path / "to").mkdir()
    models.load(tmp_path / "from").save(tmp_path / "to")
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "to" / "tokenizer_config.json").read_text()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "to")("a story")["input_ids"] == [3, 4]


# ---------------------------------------------------------------------------------------------------- a trained one


PROMPTS, NEW = 10, 128


@functools.cache
def llama():
    model = models.load(LLAMA)
    graph = trace(model)
    return model, graph, find_sites(graph)


def prompts():
    return np.load(LLAMA / "sampled_tokens.npy")[:PROMPTS, :12].astype(np.int64)


def session_of(graph, path):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(str(lower(graph, llama()[0], path)), providers=["CPUExecutionProvider"])


def generated(session, ids):
    """Greedy, one token a call, by nothing but the names of inputs and outputs."""
    ends = {value.name: value for value in session.get_inputs()}
    heads = {name: value.shape for name, value in ends.items() if name.startswith("past_key_values")}
    state = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in heads.items()}
    names = [value.name for value in session.get_outputs()]
    step, every = ids, ids
    for _ in range(NEW):
        mask = np.ones(every.shape, np.int64)
        feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions(mask, step.shape[1])}
        found = dict(zip(names, session.run(names, feeds | state), strict=True))
        state = {name: found[name.replace("past_key_values", "present")] for name in heads}
        step = found["logits"][:, -1].argmax(-1)[:, None]
        every = np.concatenate([every, step], 1)
    return every


def greedy(module, ids):
    with torch.inference_mode():
        found = module.generate(
            torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64), do_sample=False,
            min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return found.numpy()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """What the file of the model as it is generates."""
    return generated(session_of(llama()[1], tmp_path_factory.mktemp("dense") / "dense.onnx"), prompts())


@needs_llama
def test_the_file_generates_what_transformers_generates(dense):
    assert dense.shape == (PROMPTS, 12 + NEW)
    np.testing.assert_array_equal(dense, greedy(llama()[0].module, prompts()))


@needs_llama
def test_the_pruned_file_generates_what_the_pruned_model_generates(dense, tmp_path):
    """The reference has the attention of one layer made silent by hand, and keeps no cache."""
    _, graph, sites = llama()
    site = [site for site in sites if site.kind == "attention"][2]
    fork = graph.fork()
    apply(Drop((site.name,)), fork)
    found = generated(session_of(fork, tmp_path / "pruned.onnx"), prompts())
    silent = transformers.AutoModelForCausalLM.from_pretrained(LLAMA).eval()
    silent.model.layers[2].self_attn.o_proj.weight.data.zero_()
    np.testing.assert_array_equal(found, greedy(silent, prompts()))
    assert (found != dense).any()


@needs_llama
def test_the_folder_of_a_language_model_has_what_generation_needs(tmp_path):
    model, graph, _ = llama()
    model.save(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    assert graph.inputs[:3] == ("input_ids", "attention_mask", "position_ids")
    assert model.example[graph.inputs[3]].shape[2] == PAST_TOKENS
