"""Target gguf: engines of llama.cpp on small files."""

import gc

import numpy as np
import pytest
import torch

from runtimes.base.protocols import PAST, BuildError, BuildOptions, HoldsCache, RuntimesError, RuntimeUnavailable
from runtimes.gguf import internals, target

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install gguf)")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")

from tests.gguf_files import KEY_HEADS, LAYERS, VOCABULARY, small, written  # noqa: E402

OPTIONS = BuildOptions(threads=1)
HEAD = 32  # a row of a whole block of the quantized types
SIZES = {"hidden_size": 64, "head_dim": HEAD, "num_attention_heads": 2, "num_key_value_heads": KEY_HEADS}
KEYS = {"llama.attention.key_length": HEAD, "llama.attention.value_length": HEAD}
# Of the largest logit: the tokens of a batch and a token alone go through other kernels, with sums in another order.
SAME = 1e-2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    module = small(**SIZES)
    return written(tmp_path_factory.mktemp("source") / "small.gguf", module, metadata=KEYS)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    return target.build(source, tmp_path_factory.mktemp("built"), OPTIONS)


@pytest.fixture
def engine(built):
    with target.load(built, OPTIONS) as opened:
        yield opened


def feeds(rows=2, length=9, seed=0):
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME * np.abs(expected).max())


def test_a_token_behind_its_past_has_the_logits_of_the_whole_text(engine):
    text = feeds()
    whole = engine.run(text)["logits"]
    assert whole.shape == (2, 9, VOCABULARY)
    step = text | {"input_ids": text["input_ids"][:, 7:], PAST: text["input_ids"][:, :7]}
    assert_same(engine.run(step)["logits"], whole[:, 7:])


@pytest.mark.parametrize("left", [True, False])
def test_tokens_that_are_masked_do_not_count(engine, left):
    text, other = feeds(length=9), feeds(length=5, seed=1)
    kept = slice(4, None) if left else slice(0, 5)
    text["input_ids"][0, kept] = other["input_ids"][0]
    text["attention_mask"][0] = 0
    text["attention_mask"][0, kept] = 1
    found = engine.run(text)["logits"]
    assert_same(found[0, kept], engine.run(other)["logits"][0])
    assert not found[0, text["attention_mask"][0] == 0].any()


def test_long_texts_are_computed_in_parts(engine, monkeypatch):
    text = feeds(rows=1, length=40)
    expected = engine.run(text)["logits"]
    monkeypatch.setattr(target, "TOKENS_AT_ONCE", 16)
    assert_same(engine.run(text)["logits"], expected)


def test_bound_calls_repeat_on_the_same_cache(engine):
    text = feeds(rows=3)
    step = text | {"input_ids": text["input_ids"][:, 8:].copy(), PAST: text["input_ids"][:, :8].copy()}
    expected = engine.run(text)["logits"][:, -1]
    for inputs in (text, step):
        call = engine.bind(inputs)
        inputs["input_ids"][:] = 0  # bound inputs are a copy
        gc.collect(1)
        assert [call() for _ in range(3)] == [None] * 3
        context = engine._live()._contexts[-1]
        batch = context._batches[-1]
        places = [place for place in range(batch.n_tokens) if batch.logits[place]]
        assert_same(np.stack([context.logits(place) for place in places]), expected)


def test_generation_takes_the_most_probable_token(engine):
    text = feeds(rows=1)["input_ids"][0]
    made = engine.generate(text, 6)
    assert len(made) == 6
    whole = np.array([[*text, *made]])
    logits = engine.run({"input_ids": whole, "attention_mask": np.ones_like(whole)})["logits"][0]
    scale = SAME * np.abs(logits).max()
    for place, token in enumerate(made, len(text) - 1):
        assert logits[place, token] >= logits[place].max() - scale  # the most probable one, apart from ties


def test_the_cache_is_as_large_as_llama_cpp_says(engine, built):
    assert isinstance(engine, HoldsCache)
    assert engine.cache_bytes(2, 5) == 2 * 5 * LAYERS * KEY_HEADS * 2 * HEAD * 2
    model = internals.LoadedModel(built)
    context = model.context(1, 64, 1)
    sizes = []
    for length in (8, 40):
        context.clear()
        context.decode(context.batch([feeds(1, length)["input_ids"][0]], [0], [[]]))
        sizes.append(context.state_bytes(0))
    model.close()
    assert sizes[1] - sizes[0] == engine.cache_bytes(1, 32) + 32 * 12  # and the position of each token


@pytest.mark.parametrize(("precision", "loss"), [("fp16", 0.02), ("int8", 0.1), ("int4", 0.6)])
def test_precisions_are_the_types_of_the_matrices(source, built, precision, loss, tmp_path):
    from dataclasses import replace

    made = target.build(source, tmp_path, replace(OPTIONS, precision=precision))
    kinds = {"fp16": {"F16"}, "int8": {"Q8_0"}, "int4": {"Q4_0", "Q8_0"}}[precision]
    reader = gguf.GGUFReader(made)
    before = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        assert kind.name in (kinds if len(tensor.shape) > 1 else {"F32"}), tensor.name
        whole = gguf.quants.quantize(before[tensor.name], kind)
        np.testing.assert_array_equal(tensor.data.view(np.uint8).ravel(), whole.view(np.uint8).ravel())
    counts = target.layers(made, OPTIONS)
    assert counts.count == sum(counts.precisions.values()) == sum(counts.kinds.values()) == 2 + 7 * LAYERS
    assert counts.precisions[precision] == counts.count - (2 if precision == "int4" else 0)
    with target.load(made, OPTIONS) as lower, target.load(built, OPTIONS) as whole:
        found, expected = (each.run(feeds())["logits"] for each in (lower, whole))
    assert np.linalg.norm(found - expected) < loss * np.linalg.norm(expected)


def test_weights_that_were_rounded_to_four_bits_before_are_reproduced(tmp_path):
    from dataclasses import replace

    module, kinds = small(), {}
    for number, (name, weight) in enumerate(module.model.layers.named_parameters()):
        if weight.ndim > 1:
            kind = gguf.GGMLQuantizationType[("Q4_0", "Q4_1")[number % 2]]
            stored = gguf.quants.quantize(weight.detach().numpy(), kind)
            weight.data.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
            kinds[name] = kind.name
    path = written(tmp_path / "rounded.gguf", module)
    made = target.build(path, tmp_path, replace(OPTIONS, precision="int4"))
    before = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    found = [
        tensor for tensor in gguf.GGUFReader(made).tensors if tensor.name.startswith("blk") and tensor.n_elements > 64
    ]
    for tensor in found:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, before[tensor.name], rtol=0, atol=2e-3 * np.abs(before[tensor.name]).max())
    assert {tensor.tensor_type.name for tensor in found} == set(kinds.values())


def test_metadata_survives_a_change_of_precision(source, tmp_path):
    from dataclasses import replace

    made = target.build(source, tmp_path, replace(OPTIONS, precision="int8"))
    before, after = (gguf.GGUFReader(path).fields for path in (source, made))
    names = {name for name in before if not name.startswith("GGUF.")}
    assert names <= set(after)
    assert all(before[name].contents() == after[name].contents() for name in names)
    assert after["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


def test_rows_of_no_whole_blocks_are_f16(tmp_path):
    from dataclasses import replace

    path = written(tmp_path / "odd.gguf", small(hidden_size=48, intermediate_size=40, head_dim=12))
    made = target.build(path, tmp_path, replace(OPTIONS, precision="int8"))
    assert target.layers(made, OPTIONS).precisions == {"fp16": 2 + 7 * LAYERS}


def test_a_weight_beyond_fp16_is_refused(tmp_path):
    from dataclasses import replace

    module = small()
    module.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    path = written(tmp_path / "large.gguf", module)
    with pytest.raises(BuildError, match=r"a value of blk\.1\.ffn_up\.weight is too large for fp16; give"):
        target.build(path, tmp_path, replace(OPTIONS, precision="fp16"))


@pytest.mark.parametrize("content", [None, b"", b"this is no GGUF file"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_that_is_no_gguf_is_a_build_error(content, precision, tmp_path):
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=r"(broken|model)\.gguf.*\.$"):
        target.build(path, tmp_path, BuildOptions(threads=1, precision=precision))


def test_wrong_feeds_are_refused(engine):
    text = feeds()
    with pytest.raises(RuntimesError, match=r"Found inputs input_ids; the engine expects attention_mask, input_ids"):
        engine.run({"input_ids": text["input_ids"]})
    with pytest.raises(RuntimesError, match=r"'past_input_ids': found shape \[2, 0\]; expected \[2, 4\]"):
        engine.run(text | {"input_ids": text["input_ids"][:, 4:]})
    with pytest.raises(RuntimesError, match=r"Found a row without tokens"):
        engine.bind(text | {"attention_mask": np.zeros_like(text["input_ids"])})


def test_use_after_close_is_refused(built):
    opened = target.load(built, OPTIONS)
    step = opened.bind(feeds())
    opened.close()
    opened.close()
    for use in (lambda: opened.run(feeds()), lambda: opened.bind(feeds()), step, opened.__enter__):
        with pytest.raises(RuntimesError, match="This engine is closed"):
            use()


def test_without_llama_cpp_one_sentence_says_what_to_install(built, monkeypatch):
    monkeypatch.setattr(target.util, "find_spec", lambda name: None)
    assert target.missing() == "gguf and xllamacpp are not installed; pip install gguf xllamacpp"
    with pytest.raises(RuntimeUnavailable, match="Target gguf cannot be used here: gguf and xllamacpp"):
        target.load(built, OPTIONS)


def test_a_release_whose_structs_begin_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(internals, "DEFAULTS", (1024, 2048, 512, 1))
    with pytest.raises(RuntimesError, match=r"the structs of llama\.cpp in this release of xllamacpp.*xllamacpp=="):
        internals._library()._check()


def test_the_cores_are_at_least_one():
    assert target.physical_cores() >= 1
