"""Causal language models with their cache: against transformers' own generation, token for token."""

import contextlib
import functools
import itertools
import json
import re
import types

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.base import without_cache
from compressor.models.kv_cache import PAST_TOKENS, causal, positions
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.cache_state import bytes_per_token
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.paths import SHARED_DATA
from tests.samples import check_listing

LLAMA = SHARED_DATA / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")

CLOSE = 2e-5  # of float32 sums in another order, on logits of size 1

CLOSE_FILE = 1e-4  # of the largest logit, ONNX Runtime against torch: other kernels; 1e-6 found
VOCABULARY, WINDOW = 64, 6
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
SMALL = COMMON | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
NARROW = GATED | {"head_dim": 8}
OLD = COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXED = ["sliding_attention", "full_attention"]
# By what they have that others have not; those of SLOW run with `make slow`.
DECODERS = {
    "LlamaConfig": GATED,
    "Qwen3Config": NARROW,  # queries and keys are normalised
    "MistralConfig": GATED | {"sliding_window": WINDOW},
    "Gemma2Config": NARROW | {"sliding_window": WINDOW},  # every other layer slides, logits are capped
    "Gemma4TextConfig": NARROW
    | {"sliding_window": WINDOW, "layer_types": MIXED, "global_head_dim": 16, "num_kv_shared_layers": 0}
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY},  # layers differ in width
    "PhiConfig": SMALL | {"intermediate_size": 48},  # attention and MLP side by side
    "GPT2Config": OLD,
    "OPTConfig": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoXConfig": SMALL | {"intermediate_size": 48},  # side by side
    "FalconConfig": SMALL,  # side by side, one head of keys and values, x @ W.T
    "GPTJConfig": OLD | {"rotary_dim": 4},
    "Phi3Config": GATED,  # one matrix for queries, keys and values
    "Qwen2Config": GATED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "GemmaConfig": NARROW,
    "Gemma3TextConfig": NARROW | {"sliding_window": WINDOW, "layer_types": MIXED},
    "StableLmConfig": GATED,
    "CohereConfig": GATED,
    "Olmo2Config": GATED,
    "GraniteConfig": GATED,
    "Starcoder2Config": GATED,
    "SmolLM3Config": GATED,
    "Glm4Config": NARROW,
    "GPTBigCodeConfig": OLD,
}
SLOW = tuple(DECODERS)[10:]
each_decoder = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DECODERS]
)


@functools.cache
def small(name):
    """The module, how it is called with its cache, the model around it, its graph and its sites."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**DECODERS[name])
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = causal(module, ("input_ids", "attention_mask"))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    model = types.SimpleNamespace(
        name=name, module=module, call=found.call, inputs=found.inputs, outputs=found.outputs, state=found.state,
        example=found.example({"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": mask}),
        dynamic_axes=found.dynamic_axes,
    )  # fmt: skip
    graph = trace(model)
    return module, found, model, graph, find_sites(graph)


def random_ids(rows, tokens, seed):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


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


@each_decoder
def test_sites_of_a_decoder(name):
    module, found, _, _, sites = small(name)
    kinds = [site.kind for site in sites]
    assert kinds.count("attention") == kinds.count("mlp") == module.config.num_hidden_layers == len(found.heads)
    assert len(sites) == 2 * module.config.num_hidden_layers
    check_listing(f"causal_{name.removesuffix('Config').lower()}", sites)


@each_decoder
def test_a_text_in_two_parts_gives_what_transformers_gives_at_once(name):
    module, _, _, graph, _ = small(name)
    ids = random_ids(3, 11, seed=1)
    with torch.inference_mode():
        expected = module(input_ids=ids, use_cache=False).logits
    for first in (1, 6, 10):
        logits, state = two_calls(graph, ids, first)
        torch.testing.assert_close(logits, expected, atol=CLOSE, rtol=0)
        assert {value.shape[2] for value in state.values()} == {11}


def generation(call, state, ids, mask, ends):
    """Logits of a text in several calls, each behind the cache of those before; `call` gives logits and that cache."""
    logits = []
    for start, end in itertools.pairwise((0, *ends)):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions(mask[:, :end], end - start),
        }
        found, state = call(feeds, state)
        logits.append(np.asarray(found))
    return np.concatenate(logits, 1)


def of_transformers(module, found):
    """A model that generates by transformers' own rules, with the kind of cache that it makes for itself."""

    def call(feeds, cache):
        taken = (*found.told, *found.followed)
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items() if name in taken}
        with torch.inference_mode():
            answer = module(**tensors, **{found.argument: cache}, use_cache=True)
        return answer.logits, answer[found.entry]

    return call


def of_file(session):
    """A file that generates by nothing but its names."""
    inputs, outputs = ([end.name for end in ends] for ends in (session.get_inputs(), session.get_outputs()))

    def call(feeds, state):
        told = {name: value for name, value in feeds.items() if name in inputs}
        found = dict(zip(outputs, session.run(outputs, told | state), strict=True))
        return found.pop("logits"), {name.replace("present", "past_key_values"): found[name] for name in found}

    return call


def empty_cache(session, rows):
    shapes = {end.name: end.shape for end in session.get_inputs() if end.name.startswith("past_key_values")}
    return {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


def opened(graph, model, path):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(str(lower(graph, model, path)), providers=["CPUExecutionProvider"])


def assert_generates_alike(session, module, found):
    """A prompt longer than any window, padded in one row as generation pads, then further tokens, one or several."""
    ids, mask = random_ids(2, 14, seed=3).numpy(), np.ones((2, 14), np.int64)
    mask[1, :3] = 0
    ends = (9, 10, 11, 14)
    expected = generation(of_transformers(module, found), None, ids, mask, ends)[mask.astype(bool)]
    got = generation(of_file(session), empty_cache(session, 2), ids, mask, ends)[mask.astype(bool)]
    np.testing.assert_allclose(got, expected, atol=CLOSE_FILE * np.abs(expected).max(), rtol=0)


@each_decoder
def test_the_file_of_a_decoder_generates_as_transformers_with_its_own_cache(name, tmp_path):
    module, found, model, graph, _ = small(name)
    assert_generates_alike(opened(graph, model, tmp_path / "model.onnx"), module, found)


@contextlib.contextmanager
def silent(module, site):
    """The model with one attention that adds nothing, though it still keeps its cache."""

    def nothing(_, __, answer):
        return (torch.zeros_like(answer[0]), *answer[1:])

    hook = module.get_submodule(site.name).register_forward_hook(nothing)
    try:
        yield module
    finally:
        hook.remove()


@each_decoder
def test_without_one_attention_a_decoder_is_the_silenced_model(name):
    module, found, _, graph, sites = small(name)
    site = [site for site in sites if site.kind == "attention"][-1]
    fork = graph.fork()
    apply(Drop((site.name,)), fork)
    last = len(found.heads) - 1
    assert set(graph.inputs) - set(fork.inputs) == {f"past_key_values.{last}.{part}" for part in ("key", "value")}
    ids = random_ids(2, 11, seed=4)
    with torch.inference_mode(), silent(module, site):
        expected = module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(two_calls(fork, ids, 8)[0], expected, atol=CLOSE, rtol=0)
    with pytest.raises(AssertionError):  # it did add something
        torch.testing.assert_close(two_calls(graph, ids, 8)[0], expected, atol=CLOSE, rtol=0)


def test_layers_of_different_widths_keep_their_names(tmp_path):
    """By a name that moved up the example, and the data's empty cache, would have another layer's shape."""
    module, found, model, graph, sites = small("Gemma4TextConfig")
    assert found.heads == ((2, 8), (2, 16))
    site = next(site for site in sites if site.kind == "attention")
    fork = graph.fork()
    apply(Drop((site.name,)), fork)
    assert fork.outputs == ("logits", "present.1.key", "present.1.value")
    assert fork.state == {f"present.1.{part}": f"past_key_values.1.{part}" for part in ("key", "value")}
    with silent(module, site):
        assert_generates_alike(opened(fork, model, tmp_path / "pruned.onnx"), module, found)


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config", "GPT2Config", "OPTConfig", "FalconConfig"])
def test_a_cache_goes_with_its_attention(name):
    """Names stay without a gap, and the rest of the model computes as if the branch added nothing."""
    _, found, _, graph, sites = small(name)
    ids = random_ids(2, 9, seed=2)
    reading = [site for site in sites if site.kind == "attention"]
    for gone in (reading[:1], reading[-1:], reading[:-1]):
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
    _, _, _, graph, sites = small("LlamaConfig")
    fork = graph.fork()
    apply(Drop(tuple(site.name for site in sites if site.kind == "attention")), fork)
    assert fork.outputs == ("logits",)
    assert not fork.state
    assert not [name for name in fork.inputs if name.startswith("past")]
    assert bytes_per_token(fork) == 0


def test_padding_is_no_position():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions(mask, 1).tolist() == [[2], [4]]


def test_bytes_of_a_token():
    """Keys and values in float32: two layers of two heads, of one width or of two."""
    assert bytes_per_token(small("LlamaConfig")[3]) == 2 * 2 * 2 * 8 * 4
    assert bytes_per_token(small("Gemma4TextConfig")[3]) == 2 * 2 * (8 + 16) * 4


class Decoder(torch.nn.Module):
    """One attention with a cache of its own making; what carries the cache in and out is what the tests are about."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def attended(self, input_ids, attention_mask, cache):
        """Logits, and the cache with the new keys and values."""
        cache = transformers.DynamicCache() if cache is None else cache
        x = self.embed(input_ids)
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        key, value = cache.update(key, value, 0)
        rows, columns = query.shape[2], key.shape[2]
        seen = torch.arange(columns)[None] <= torch.arange(rows)[:, None] + columns - rows
        allowed = seen[None, None] & attention_mask[:, None, None].bool()
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x), cache


class NewSpelling(Decoder):
    """As transformers 5.24 has it."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, cache)
        return {"logits": logits, "cache": cache} if use_cache else {"logits": logits}


class OldSpelling(Decoder):
    """As transformers 5.0 to 5.23 have it."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, past_key_values)
        return {"logits": logits, "past_key_values": cache} if use_cache else {"logits": logits}


class Hidden(Decoder):
    """A wrapper whose signature names nothing, as decorators leave it."""

    def forward(self, *, input_ids, **further):
        logits, cache = self.attended(input_ids, further["attention_mask"], further.get("past_key_values"))
        return {"logits": logits, "past_key_values": cache}


class Renamed(Decoder):
    """A spelling of next year: the argument has the name that the answer has."""

    def forward(self, input_ids, attention_mask=None, memory=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, memory)
        return {"logits": logits, "memory": cache}


class Neither(Decoder):
    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return {"logits": self.attended(input_ids, attention_mask, None)[0]}


class Unused(Decoder):
    """It takes any further argument and uses none of them."""

    def forward(self, input_ids, attention_mask=None, **further):
        logits, cache = self.attended(input_ids, attention_mask, None)
        return {"logits": logits, "cache": cache}


class Legacy(Decoder):
    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, None)
        return {"logits": logits, "past_key_values": tuple((each.keys, each.values) for each in cache.layers)}


class WithoutOption(Decoder):
    def forward(self, input_ids, attention_mask=None, cache=None):
        return {"logits": self.attended(input_ids, attention_mask, cache)[0]}


class Recurrent(Decoder):
    """What it keeps of a text is a state of one size, as in state-space models."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, None)
        states = types.SimpleNamespace(layers=[types.SimpleNamespace(conv_states=cache.layers[0].keys)])
        return {"logits": logits, "cache": states}


class Broken(Decoder):
    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        if cache is not None:
            raise RuntimeError("no second call")
        logits, cache = self.attended(input_ids, attention_mask, cache)
        return {"logits": logits, "cache": cache}


TOLD = {"input_ids": random_ids(2, 7, seed=1), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}


def own(kind, **options):
    return models.load(kind().eval(), example_inputs=TOLD, task="text-generation", **options)


@pytest.mark.parametrize(
    ("kind", "argument"),
    [(NewSpelling, "cache"), (OldSpelling, "past_key_values"), (Hidden, "past_key_values"), (Renamed, "memory")],
)
def test_the_cache_is_found_by_calling(kind, argument):
    found = causal(kind().eval(), tuple(TOLD))
    assert (found.argument, found.entry, found.followed, found.heads) == (argument, argument, (), ((2, 8),))


@pytest.mark.parametrize("kind", [NewSpelling, OldSpelling, Hidden, Renamed])
def test_ones_own_decoder_is_traced_with_its_cache(kind):
    """Behind a cache it continues the text as it reads it whole, in both spellings and with none."""
    model = own(kind)
    assert model.state == {f"present.0.{part}": f"past_key_values.0.{part}" for part in ("key", "value")}
    graph, ids = trace(model), random_ids(2, 11, seed=5)
    with torch.inference_mode():
        expected = Decoder.attended(model.module, ids, torch.ones_like(ids), None)[0]
    state, logits = {name: torch.zeros(2, 2, 0, 8) for name in model.state.values()}, []
    for start, end in ((0, 6), (6, 11)):
        feeds = {"input_ids": ids[:, start:end], "attention_mask": torch.ones(2, end, dtype=torch.int64)}
        found = outputs(graph, feeds | state)
        logits.append(found["logits"])
        state = {before: found[after] for after, before in graph.state.items()}
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Neither, "its output contains no cache, only logits"),
        (Unused, "does not accept one as cache or past_key_values"),
        (Legacy, "past_key_values as tuples of tensors"),
        (WithoutOption, "has no argument use_cache"),
        (Recurrent, "layer 0 of its cache (SimpleNamespace) has no keys and values"),
        (Broken, "does not accept one as cache or past_key_values (no second call)"),
    ],
)
def test_a_decoder_whose_cache_is_not_found_is_refused_in_a_sentence(kind, reason):
    with pytest.raises(models.ModelError) as told:
        own(kind)
    assert re.fullmatch(f"the KV cache of {kind.__name__} could not be detected: .*; pass --no-cache .*\\.", str(told.value))
    assert reason in str(told.value)


@pytest.mark.parametrize("kind", [Neither, NewSpelling, Broken])
def test_without_a_cache_an_export_goes_on_and_says_so(kind):
    model = own(kind, cache=False)
    assert (model.inputs, dict(model.state)) == (("input_ids", "attention_mask"), {})
    assert [limitation.feature for limitation in model.limitations if limitation.feature == "KV cache"] == ["KV cache"]
    assert "logits" in trace(model).outputs


def test_no_cache_is_for_language_models():
    with pytest.raises(models.ModelError, match="--no-cache is for language models"):
        models.load(torch.nn.Linear(4, 3), example_inputs=torch.rand(2, 4), cache=False)


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
    return generated(opened(llama()[1], llama()[0], tmp_path_factory.mktemp("dense") / "dense.onnx"), prompts())


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
    found = generated(opened(fork, llama()[0], tmp_path / "pruned.onnx"), prompts())
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
