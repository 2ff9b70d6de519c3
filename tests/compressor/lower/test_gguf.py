"""GGUF files of rewritten models: llama.cpp computes from them what torch computes from the graph."""

import re

import numpy as np
import pytest
import torch
import transformers
from tokenizers import models as tokenizer_models
from tokenizers import normalizers, pre_tokenizers

from compressor import models
from compressor.lower.gguf import rules, vocabulary, writer
from compressor.lower.gguf.rules import GgufError
from compressor.lower.trace import trace
from passes.base import apply
from passes.execute.interpreter import run
from passes.rewrite.drop import Drop
from runtimes.base.protocols import PAST, BuildError, BuildOptions

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install gguf)")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")

from runtimes.gguf import target  # noqa: E402
from tests.gguf_files import TOKENS, VOCABULARY, small, written  # noqa: E402
from tests.llama_cpp import Traced, byte_level, saved, sentencepiece, tokens  # noqa: E402

# Of the largest logit: llama.cpp rounds keys and values to F16, 2^-11 of each: up to 5e-3 with these random weights. A
# wrong order of rows is off by more than the largest logit itself.
SAME = 2e-2
ONE_THREAD = BuildOptions(threads=1)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
MODULES = {
    "llama": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "scaled positions": {"rope_parameters": LINEAR},
    "positions of Llama 3": {"rope_parameters": LLAMA3},
}

RARE = ("wide heads", "scaled positions")


def mistral(**changed):
    config = transformers.MistralConfig(**small(num_hidden_layers=4).config.to_dict() | changed)
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Traced(saved(tmp_path_factory.mktemp("llama")))


def without(traced, *places):
    graph = traced.graph.fork()
    apply(Drop(traced.named(*places)), graph)
    return graph


def logits(graph, model, feeds):
    complete = model.preprocess.complete(feeds)
    return run(graph, {name: torch.from_numpy(complete[name]) for name in graph.inputs})[0].numpy()


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME * np.abs(expected).max())


def assert_computes(path, graph, model):
    """Hold a file in llama.cpp to a graph: a batch, and one more token behind its cache."""
    feeds = tokens(length=20)
    expected = logits(graph, model, feeds)
    last = {"input_ids": feeds["input_ids"][:, 19:], PAST: feeds["input_ids"][:, :19]}
    with target.load(path, ONE_THREAD) as engine:
        assert_same(engine.run(feeds)["logits"], expected)
        assert_same(engine.run(feeds | last)["logits"], expected[:, 19:])


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in MODULES]
)
def test_every_form_of_a_llama_computes_the_same(name, tmp_path):
    traced = Traced(saved(tmp_path / "model", small(num_hidden_layers=4, **MODULES[name])))
    for places, architecture in (((), "llama"), (((2, "attention"),), "deci")):
        graph = without(traced, *places)
        path = writer.write(graph, traced.model, tmp_path / f"{architecture}.gguf")
        assert fields(path)["general.architecture"] == architecture
        assert_computes(path, graph, traced.model)


@pytest.mark.parametrize(
    ("places", "heads"),
    [
        ((1,), 2),
        ((0, 3), 2),
        (((3, "attention"),), [2, 2, 2, 0]),
        ((0, (2, "attention")), [2, 0, 2]),
        (((1, "attention"), (2, "attention"), (3, "attention")), [2, 0, 0, 0]),
    ],
)
def test_blocks_and_attentions_that_were_dropped_are_left_out(llama, places, heads, tmp_path):
    graph = without(llama, *places)
    path = writer.write(graph, llama.model, tmp_path / "small.gguf")
    content = fields(path)
    prefix = content["general.architecture"]
    assert prefix == ("llama" if isinstance(heads, int) else "deci")
    assert content[f"{prefix}.attention.head_count_kv"] == heads
    assert_computes(path, graph, llama.model)


def test_a_mistral_computes_the_same_up_to_its_sliding_window(tmp_path):
    traced = Traced(saved(tmp_path / "model", mistral(sliding_window=32)))
    path = writer.write(traced.graph, traced.model, tmp_path / "mistral.gguf")
    assert fields(path)["llama.context_length"] == 32
    assert_computes(path, traced.graph, traced.model)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("places", "action", "message"),
    [
        (((1, "mlp"),), "drop", r"drops model\.layers\.1\.mlp but keeps model\.layers\.1\.self_attn"),
        (((0, "attention"),), "drop", r"drops model\.layers\.0\.self_attn in the first block that is left"),
        ((0, (1, "attention")), "drop", r"drops model\.layers\.1\.self_attn in the first block that is left"),
        ((0, 1, 2, 3), "drop", r"no block would be left"),
        (((2, "attention"),), "linear", r"the plan has linear at model\.layers\.2\.self_attn"),
        (((2, "attention"),), "constant", r"the plan has constant"),
        (((2, "attention"),), "merge:4", r"the plan has merge:4"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(llama, places, action, message):
    changes = {site.name: action for site in llama.named(*places)}
    with pytest.raises(GgufError, match=rf"--target gguf.*{message}"):
        rules.check_changes(changes, llama.sites)


@pytest.mark.parametrize("places", [((1, "mlp"),), ((0, "attention"),)])
def test_a_graph_without_such_a_branch_is_not_written(llama, places, tmp_path):
    with pytest.raises(GgufError, match=r"which llama\.cpp cannot compute"):
        writer.write(without(llama, *places), llama.model, tmp_path / "small.gguf")
    assert not list(tmp_path.iterdir())


def test_llama_cpp_opens_no_file_without_the_first_attention(llama, tmp_path, monkeypatch):
    """The rule is llama.cpp's: it reads the size of the heads in the first block."""
    blocks = tuple(writer.Block(number, attention=number > 0) for number in range(4))
    monkeypatch.setattr(writer, "blocks_of", lambda graph: blocks)
    path = writer.write(without(llama, (0, "attention")), llama.model, tmp_path / "small.gguf")
    with pytest.raises(BuildError, match=r"llama\.cpp cannot open small\.gguf: .*attn_q.* wrong shape"):
        target.load(path, ONE_THREAD)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: small(hidden_act="gelu"), r"the activation gelu"),
        (lambda: small(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), r"by dynamic"),
        (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )), r"found Qwen2ForCausalLM: choose another --target"),
    ],
)  # fmt: skip
def test_other_models_are_refused(module, message, tmp_path):
    model = models.load(saved(tmp_path, module().eval()))
    with pytest.raises(GgufError, match=message):
        rules.check_model(model)


# ------------------------------------------------------------------------------------------------------------ tokenizer

NUMBERS = {token: number for number, token in enumerate(TOKENS)}
TEXTS = ("hello world", "Hello, 12 worlds!\n\nhell", "é→ hello", "")


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
def test_llama_cpp_tokenizes_as_transformers_does(tokenizer, tmp_path):
    theirs = tokenizer()
    theirs.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    module = small(vocab_size=len(theirs) + 3)
    traced = Traced(saved(tmp_path / "model", module, theirs))
    vocabulary.check_tokenizer(traced.model)
    path = writer.write(traced.graph, traced.model, tmp_path / "small.gguf")
    with target.load(path, ONE_THREAD) as engine:
        for text in TEXTS:
            assert engine.tokenize(text) == traced.model.tokenizer(text, add_special_tokens=False).input_ids, text
    content = fields(path)
    assert content["tokenizer.ggml.tokens"][-3:] == [f"[PAD{len(theirs) + number}]" for number in range(3)]
    assert content["tokenizer.ggml.token_type"][-3:] == [gguf.TokenType.UNUSED] * 3
    assert content["tokenizer.ggml.bos_token_id"] == theirs.bos_token_id
    assert content["tokenizer.chat_template"] == theirs.chat_template
    begins = traced.model.tokenizer("a").input_ids[0] == theirs.bos_token_id
    assert content["tokenizer.ggml.add_bos_token"] == begins


def test_the_tokenizer_of_a_gguf_file_is_copied(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed, without which transformers reads no GGUF")
    metadata = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.padding_token_id": 3}
    source = written(tmp_path / "source.gguf", small(), metadata=metadata)
    traced = Traced(source)
    path = writer.write(trace(traced.model), traced.model, tmp_path / "small.gguf")
    before, after = fields(source), fields(path)
    names = [name for name in before if name.startswith("tokenizer.")]
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    assert after["tokenizer.ggml.tokens"] == TOKENS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), "normalized by Lowercase"),
        (lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()), "splits texts by Whitespace"),
        (lambda backend: setattr(backend, "model", tokenizer_models.WordLevel(NUMBERS, "</s>")), "is WordLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(change, message, tmp_path):
    backend = byte_level().backend_tokenizer
    change(backend)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    model = models.load(saved(tmp_path, small(), tokenizer))
    with pytest.raises(GgufError, match=rf"--target gguf: the tokenizer of .*{re.escape(message)}"):
        vocabulary.check_tokenizer(model)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    small().save_pretrained(tmp_path)
    model = models.load(tmp_path)
    with pytest.raises(GgufError, match=r"--target gguf needs the tokenizer of"):
        vocabulary.check_tokenizer(model)
