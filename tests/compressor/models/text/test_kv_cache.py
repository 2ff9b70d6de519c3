"""Causal language models with their KV cache, compared with generation in transformers token by token."""

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
from compressor.models.base import disable_use_cache
from compressor.models.text.kv_cache import PAST_TOKENS, detect_cache, positions
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.cache_state import bytes_per_token
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.paths import SHARED_DATA
from tests.samples import check_listing

LLAMA = SHARED_DATA / "stories260k"
needs_llama = pytest.mark.skipif(not LLAMA.is_dir(), reason="the trained Llama in ../shared/data is not here")

CLOSE = 2e-5  # absolute, for logits of size 1; float32 sums in another order

CLOSE_FILE = 1e-4  # relative to the largest logit; ONNX Runtime has other kernels than torch; 1e-6 was measured
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
# The comments name the distinctive features. The decoders in SLOW run with `make slow`.
DECODERS = {
    "LlamaConfig": GATED,
    "Gemma2Config": NARROW | {"sliding_window": WINDOW},  # every other layer slides, logits are capped
    "Gemma4TextConfig": NARROW
    | {"sliding_window": WINDOW, "layer_types": MIXED, "global_head_dim": 16, "num_kv_shared_layers": 0}
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY},  # layers differ in width
    "GPT2Config": OLD,
    "GPTNeoXConfig": SMALL | {"intermediate_size": 48},  # attention and MLP side by side
    "FalconConfig": SMALL,  # side by side, one head of keys and values, x @ W.T
    "Qwen3Config": NARROW,  # queries and keys are normalised
    "MistralConfig": GATED | {"sliding_window": WINDOW},
    "PhiConfig": SMALL | {"intermediate_size": 48},  # side by side
    "OPTConfig": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
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
    "DeepseekV3Config": SMALL
    | {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
    | {"intermediate_size": 48, "first_k_dense_replace": 2, "head_dim": 8},  # keys and values differ in width
}
# The last two layers read the keys and values of the two before them; each layer adds embeddings of its own.
TWICE = NARROW | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": MIXED * 2, "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
SHARING = {
    "Gemma3nTextConfig": TWICE
    | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "laurel_rank": 8},
    "Gemma4TextConfig sharing": TWICE | {"global_head_dim": 16},
}
SLOW = tuple(name for name in tuple(DECODERS)[6:] if name != "DeepseekV3Config")
WRITTEN = ("LlamaConfig", "Gemma2Config")  # written as ONNX in the usual run too
each_decoder = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in DECODERS]
)


@functools.cache
def small(name):
    """Return the module, its call with a cache, the model description, its graph and its sites."""
    torch.manual_seed(0)
    config = getattr(transformers, name.split()[0])(**(DECODERS | SHARING)[name])
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    causal_lm = detect_cache(module, ("input_ids", "attention_mask"))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    model = types.SimpleNamespace(
        name=name, module=module, call=causal_lm.call, inputs=causal_lm.inputs, outputs=causal_lm.outputs,
        state=causal_lm.state,
        example=causal_lm.example({"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": mask}),
        dynamic_axes=causal_lm.dynamic_axes, sizes=(), preprocess=types.SimpleNamespace(longest=None),
    )  # fmt: skip
    graph = trace(model)
    return module, causal_lm, model, graph, find_sites(graph)


def random_ids(rows, tokens, seed):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def outputs(graph, feeds):
    return dict(zip(graph.outputs, run(graph, feeds), strict=True))


def two_calls(graph, ids, first):
    """Return the logits of a text in two calls, the second with the cache of the first, and the final cache."""
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
        results = outputs(graph, feeds | state)
        logits.append(results["logits"])
        state = {before: results[after] for after, before in graph.state.items()}
    return torch.cat(logits, 1), state


def small_past(graph):
    nodes = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    shapes = {name: nodes[name].meta["val"].shape for name in graph.state.values()}
    return {name: torch.zeros(8, shape[1], 0, shape[3]) for name, shape in shapes.items()}


@each_decoder
def test_sites_of_a_decoder(name):
    module, causal_lm, _, _, sites = small(name)
    kinds = [site.kind for site in sites]
    assert kinds.count("attention") == kinds.count("mlp") == module.config.num_hidden_layers == len(causal_lm.sizes)
    assert len(sites) == 2 * module.config.num_hidden_layers
    check_listing(f"causal_{name.removesuffix('Config').lower()}", sites)


@each_decoder
def test_a_text_in_two_calls_has_the_logits_of_one_call(name):
    module, _, _, graph, _ = small(name)
    ids = random_ids(3, 11, seed=1)
    with torch.inference_mode():
        expected = module(input_ids=ids, use_cache=False).logits
    for first in (1, 6, 10):
        logits, state = two_calls(graph, ids, first)
        torch.testing.assert_close(logits, expected, atol=CLOSE, rtol=0)
        assert {value.shape[2] for value in state.values()} == {11}


def generation(call, state, ids, mask, ends):
    """Return the logits of a text in several calls that share a cache; `call` returns logits and the new cache."""
    logits = []
    for start, end in itertools.pairwise((0, *ends)):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions(mask[:, :end], end - start),
        }
        step, state = call(feeds, state)
        logits.append(np.asarray(step))
    return np.concatenate(logits, 1)


def of_transformers(module, causal_lm):
    """Return a `call` of `generation` for a module of transformers with its default cache class."""

    def call(feeds, cache):
        taken = (*causal_lm.token_inputs, *causal_lm.derived_inputs)
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items() if name in taken}
        with torch.inference_mode():
            answer = module(**tensors, **{causal_lm.argument: cache}, use_cache=True)
        return answer.logits, answer[causal_lm.entry]

    return call


def of_file(session):
    """Return a `call` of `generation` for an ONNX file that uses only the names of inputs and outputs."""
    inputs, outputs = ([end.name for end in ends] for ends in (session.get_inputs(), session.get_outputs()))

    def call(feeds, state):
        tokens = {name: value for name, value in feeds.items() if name in inputs}
        results = dict(zip(outputs, session.run(outputs, tokens | state), strict=True))
        return results.pop("logits"), {name.replace("present", "past_key_values"): results[name] for name in results}

    return call


def empty_cache(session, rows):
    shapes = {end.name: end.shape for end in session.get_inputs() if end.name.startswith("past_key_values")}
    return {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


def opened(graph, model, path):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(str(lower(graph, model, path)), providers=["CPUExecutionProvider"])


def assert_same_generation(session, module, causal_lm):
    """Compare a left-padded prompt longer than the sliding window, then decode steps of one and of several tokens."""
    ids, mask = random_ids(2, 14, seed=3).numpy(), np.ones((2, 14), np.int64)
    mask[1, :3] = 0
    ends = (9, 10, 11, 14)
    expected = generation(of_transformers(module, causal_lm), None, ids, mask, ends)[mask.astype(bool)]
    got = generation(of_file(session), empty_cache(session, 2), ids, mask, ends)[mask.astype(bool)]
    np.testing.assert_allclose(got, expected, atol=CLOSE_FILE * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in WRITTEN else pytest.mark.slow) for name in DECODERS]
)
def test_the_file_of_a_decoder_generates_the_same_as_transformers(name, tmp_path):
    module, causal_lm, model, graph, _ = small(name)
    assert_same_generation(opened(graph, model, tmp_path / "model.onnx"), module, causal_lm)


@contextlib.contextmanager
def silent(module, site):
    """Make one attention of the module add zero while it still updates its cache."""

    def nothing(_, __, answer):
        return (torch.zeros_like(answer[0]), *answer[1:])

    hook = module.get_submodule(site.name).register_forward_hook(nothing)
    try:
        yield module
    finally:
        hook.remove()


@each_decoder
def test_dropping_an_attention_equals_zeroing_its_output(name):
    module, causal_lm, _, graph, sites = small(name)
    site = [site for site in sites if site.kind == "attention"][-1]
    fork = graph.fork()
    apply(Drop((site.name,)), fork)
    last = len(causal_lm.sizes) - 1
    assert set(graph.inputs) - set(fork.inputs) == {f"past_key_values.{last}.{part}" for part in ("key", "value")}
    ids = random_ids(2, 11, seed=4)
    with torch.inference_mode(), silent(module, site):
        expected = module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(two_calls(fork, ids, 8)[0], expected, atol=CLOSE, rtol=0)
    with pytest.raises(AssertionError):  # the attention does contribute
        torch.testing.assert_close(two_calls(graph, ids, 8)[0], expected, atol=CLOSE, rtol=0)


def test_layers_of_different_widths_keep_their_names(tmp_path):
    """With renumbered names, the example and the empty cache of the data would have the shape of another layer."""
    module, causal_lm, model, graph, sites = small("Gemma4TextConfig")
    assert causal_lm.sizes == (((2, 8),) * 2, ((2, 16),) * 2)
    site = next(site for site in sites if site.kind == "attention")
    fork = graph.fork()
    apply(Drop((site.name,)), fork)
    assert fork.outputs == ("logits", "present.1.key", "present.1.value")
    assert fork.state == {f"present.1.{part}": f"past_key_values.1.{part}" for part in ("key", "value")}
    with silent(module, site):
        assert_same_generation(opened(fork, model, tmp_path / "pruned.onnx"), module, causal_lm)


@pytest.mark.parametrize(
    "name", [pytest.param("Gemma3nTextConfig", marks=pytest.mark.slow), "Gemma4TextConfig sharing"]
)
def test_layers_that_read_the_keys_of_an_earlier_one_have_no_cache(name, tmp_path):
    module, causal_lm, model, graph, _ = small(name)
    pasts = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert list(causal_lm.state.values()) == pasts
    ids = random_ids(3, 11, seed=1)
    with torch.inference_mode():
        expected = module(input_ids=ids, use_cache=False).logits
    for first in (1, 6):
        torch.testing.assert_close(two_calls(graph, ids, first)[0], expected, atol=CLOSE, rtol=0)
    assert_same_generation(opened(graph, model, tmp_path / "model.onnx"), module, causal_lm)


@pytest.mark.parametrize("name", ["LlamaConfig", "Gemma2Config", "GPT2Config", "OPTConfig", "FalconConfig"])
def test_a_cache_is_dropped_with_its_attention(name):
    """Cache names have no gap, and the rest of the model computes as if the branch added zero."""
    _, causal_lm, _, graph, sites = small(name)
    ids = random_ids(2, 9, seed=2)
    reading = [site for site in sites if site.kind == "attention"]
    for gone in (reading[:1], reading[-1:], reading[:-1]):
        fork = graph.fork()
        apply(Drop(tuple(site.name for site in gone)), fork)
        left = len(causal_lm.sizes) - len(gone)
        assert fork.outputs[1:] == graph.outputs[1 : 1 + 2 * left]
        assert tuple(fork.state.values()) == tuple(graph.state.values())[: 2 * left]
        assert bytes_per_token(fork) * len(causal_lm.sizes) == bytes_per_token(graph) * left
        feeds = causal_lm.complete({"input_ids": ids.numpy(), "attention_mask": np.ones((2, 9), np.int64)})
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


def test_padding_does_not_advance_positions():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions(mask, 1).tolist() == [[2], [4]]


def test_bytes_per_token():
    """Keys and values are float32; two layers of two heads, with equal or different head dimensions."""
    assert bytes_per_token(small("LlamaConfig")[3]) == 2 * 2 * 2 * 8 * 4
    assert bytes_per_token(small("Gemma4TextConfig")[3]) == 2 * 2 * (8 + 16) * 4


class Decoder(torch.nn.Module):
    """A decoder with one attention; its subclasses differ in the arguments and outputs that carry the cache."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def attended(self, input_ids, attention_mask, cache):
        """Return the logits, and the cache with the new keys and values."""
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


class CacheArgument(Decoder):
    """The argument name of transformers 5.24."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, cache)
        return {"logits": logits, "cache": cache} if use_cache else {"logits": logits}


class PastKeyValuesArgument(Decoder):
    """The argument name of transformers 5.0 to 5.23."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, past_key_values)
        return {"logits": logits, "past_key_values": cache} if use_cache else {"logits": logits}


class Hidden(Decoder):
    """A wrapper whose signature does not name the cache, as decorators leave it."""

    def forward(self, *, input_ids, **further):
        logits, cache = self.attended(input_ids, further["attention_mask"], further.get("past_key_values"))
        return {"logits": logits, "past_key_values": cache}


class Renamed(Decoder):
    """An unknown name, which is the same in the arguments and in the output."""

    def forward(self, input_ids, attention_mask=None, memory=None, use_cache=False):
        logits, cache = self.attended(input_ids, attention_mask, memory)
        return {"logits": logits, "memory": cache}


class Neither(Decoder):
    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return {"logits": self.attended(input_ids, attention_mask, None)[0]}


class Unused(Decoder):
    """A decoder that accepts and ignores any keyword argument."""

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
    """A decoder with a state of fixed size, as in state-space models."""

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


class OneByOne(CacheArgument):
    """Takes single tokens with a cache, as ProphetNet does."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=False):
        if cache is not None and input_ids.shape[1] > 1:
            raise ValueError("one at a time")
        return super().forward(input_ids, attention_mask, cache=cache, use_cache=use_cache)


EXAMPLE = {"input_ids": random_ids(2, 7, seed=1), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}


def load_decoder(kind, **options):
    return models.load(kind().eval(), example_inputs=EXAMPLE, task="text-generation", **options)


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (CacheArgument, "cache"),
        (PastKeyValuesArgument, "past_key_values"),
        (Hidden, "past_key_values"),
        (Renamed, "memory"),
    ],
)
def test_the_cache_is_detected_by_calling(kind, argument):
    causal_lm = detect_cache(kind().eval(), tuple(EXAMPLE))
    assert (causal_lm.argument, causal_lm.entry, causal_lm.derived_inputs, causal_lm.sizes) == (
        argument,
        argument,
        (),
        (((2, 8), (2, 8)),),
    )


@pytest.mark.parametrize("kind", [CacheArgument, PastKeyValuesArgument, Hidden, Renamed])
def test_a_user_defined_decoder_is_traced_with_its_cache(kind):
    """A text in two calls with a cache gives the logits of one call, for every name of the cache."""
    model = load_decoder(kind)
    assert model.state == {f"present.0.{part}": f"past_key_values.0.{part}" for part in ("key", "value")}
    graph, ids = trace(model), random_ids(2, 11, seed=5)
    with torch.inference_mode():
        expected = Decoder.attended(model.module, ids, torch.ones_like(ids), None)[0]
    state, logits = {name: torch.zeros(2, 2, 0, 8) for name in model.state.values()}, []
    for start, end in ((0, 6), (6, 11)):
        feeds = {"input_ids": ids[:, start:end], "attention_mask": torch.ones(2, end, dtype=torch.int64)}
        results = outputs(graph, feeds | state)
        logits.append(results["logits"])
        state = {before: results[after] for after, before in graph.state.items()}
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
        (OneByOne, "with a cache it takes no more than one token (one at a time)"),
    ],
)
def test_a_decoder_without_a_detectable_cache_is_rejected(kind, reason):
    with pytest.raises(models.ModelError) as caught:
        load_decoder(kind)
    assert re.fullmatch(
        f"the KV cache of {kind.__name__} could not be detected: .*; pass --no-cache .*\\.", str(caught.value)
    )
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", [Neither, CacheArgument, Broken])
def test_a_model_without_a_cache_has_a_limitation(kind):
    model = load_decoder(kind, cache=False)
    assert (model.inputs, dict(model.state)) == (("input_ids", "attention_mask"), {})
    assert [limitation.feature for limitation in model.limitations if limitation.feature == "KV cache"] == ["KV cache"]
    assert "logits" in trace(model).outputs


def test_no_cache_is_for_language_models():
    with pytest.raises(models.ModelError, match="--no-cache is for language models"):
        models.load(torch.nn.Linear(4, 3), example_inputs=torch.rand(2, 4), cache=False)


def test_use_cache_is_false_in_every_config_of_a_model_without_cache(tmp_path):
    """Only the field `use_cache` of existing configs changes."""
    (tmp_path / "config.json").write_text('{"use_cache": true, "vocab_size": 48}')
    disable_use_cache(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"use_cache": False, "vocab_size": 48}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    disable_use_cache(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2, "use_cache": False}


def test_the_tokenizer_class_of_a_saved_folder_exists_in_transformers_4(tmp_path):
    """transformers 5 writes a class name that transformers 4, which Optimum needs, does not have."""
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


# -------------------------------------------------------------------------------------------------- trained model


PROMPTS, NEW = 10, 128


@functools.cache
def llama():
    model = models.load(LLAMA)
    graph = trace(model)
    return model, graph, find_sites(graph)


def prompts():
    return np.load(LLAMA / "sampled_tokens.npy")[:PROMPTS, :12].astype(np.int64)


def generated(session, ids):
    """Generate greedily, one token per call, using only the names of inputs and outputs."""
    ends = {value.name: value for value in session.get_inputs()}
    heads = {name: value.shape for name, value in ends.items() if name.startswith("past_key_values")}
    state = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in heads.items()}
    names = [value.name for value in session.get_outputs()]
    step, every = ids, ids
    for _ in range(NEW):
        mask = np.ones(every.shape, np.int64)
        feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions(mask, step.shape[1])}
        results = dict(zip(names, session.run(names, feeds | state), strict=True))
        state = {name: results[name.replace("past_key_values", "present")] for name in heads}
        step = results["logits"][:, -1].argmax(-1)[:, None]
        every = np.concatenate([every, step], 1)
    return every


def greedy(module, ids):
    with torch.inference_mode():
        tokens = module.generate(
            torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64), do_sample=False,
            min_new_tokens=NEW, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return tokens.numpy()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return the tokens that the file of the unmodified model generates."""
    return generated(opened(llama()[1], llama()[0], tmp_path_factory.mktemp("dense") / "dense.onnx"), prompts())


@needs_llama
def test_the_file_generates_the_same_as_transformers(dense):
    assert dense.shape == (PROMPTS, 12 + NEW)
    np.testing.assert_array_equal(dense, greedy(llama()[0].module, prompts()))


@pytest.mark.slow  # tests/runtimes/onnxruntime_fused prunes this model in the usual run
@needs_llama
def test_the_pruned_file_generates_the_same_as_the_pruned_model(dense, tmp_path):
    """In the reference, the output projection of one attention is zero."""
    _, graph, sites = llama()
    site = [site for site in sites if site.kind == "attention"][2]
    fork = graph.fork()
    apply(Drop((site.name,)), fork)
    tokens = generated(opened(fork, llama()[0], tmp_path / "pruned.onnx"), prompts())
    silent = transformers.AutoModelForCausalLM.from_pretrained(LLAMA).eval()
    silent.model.layers[2].self_attn.o_proj.weight.data.zero_()
    np.testing.assert_array_equal(tokens, greedy(silent, prompts()))
    assert (tokens != dense).any()


@needs_llama
def test_the_folder_of_a_language_model_has_the_files_for_generation(tmp_path):
    model, graph, _ = llama()
    model.save(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    assert graph.inputs[:3] == ("input_ids", "attention_mask", "position_ids")
    assert model.example[graph.inputs[3]].shape[2] == PAST_TOKENS
