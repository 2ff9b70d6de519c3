"""Fused attention behind a cache generates what the portable file and transformers do, its buffers shared or not."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest

from compressor.lower.write_onnx import lower
from compressor.models.kv_cache import positions
from compressor.quantize.int4 import to_int4
from compressor.quantize.int8_search import quantize
from passes.base import apply
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions, RuntimesError
from runtimes.onnxruntime import target as onnxruntime
from runtimes.onnxruntime.kv_cache_io import FACT
from runtimes.onnxruntime_fused import target as onnxruntime_fused
from runtimes.onnxruntime_fused.encoder_fusions import fuse
from tests.compressor.models.test_kv_cache import (
    DECODERS,
    LLAMA,
    NEW,
    PROMPTS,
    VOCABULARY,
    greedy,
    llama,
    needs_llama,
    prompts,
    silent,
    small,
)
from tests.processors import need_exact_int8

pytest.importorskip("onnxruntime", reason="the extra `cpu` or `gpu` is not installed")

ONE = BuildOptions(threads=1)
CLOSE = 5e-6  # of the largest logit, float32 sums in another order: 8e-7 found
INT8 = 0.05  # of the largest logit: rounding moves single values to the next of 256 steps; 0.02 found
CAP, SHARPER = 50.0, 8.0  # the limit of scores in Gemma 2, which would not touch random ones, and 50 times the scores
ROWS, TOKENS = 3, 16
FIRST = 9  # tokens of the prompt, more than any window of these models
# Grouped heads, a sliding window; limited scores; a single head of keys; another way to ask for sizes.
QUICK = ("Gemma2Config", "FalconConfig", "GPT2Config")
STEPS = (FIRST, *range(FIRST + 1, TOKENS + 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def portable(name, folder):
    """The portable file of a small decoder, whose weights are made so large that its scores differ."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        _, _, model, graph, _ = small(name)
        made = onnx.load(lower(graph, model, path))
        for each in made.graph.initializer:
            value = onnx.numpy_helper.to_array(each)
            limit = value.size == 1 and value == CAP
            if value.dtype == np.float32 and (value.ndim == 2 or limit):
                sharper = (value * (0.01 if limit else SHARPER)).astype(np.float32)
                each.CopyFrom(onnx.numpy_helper.from_array(sharper, each.name))
        onnx.save(made, path)
    return path


def fused(path, folder):
    """An engine of the fused copy."""
    (folder / path.stem).mkdir(exist_ok=True)
    return onnxruntime_fused.load(onnxruntime_fused.build(path, folder / path.stem, ONE), ONE)


def texts(rows=ROWS):
    """Token numbers and their mask, each row with more padding to the left than the one before."""
    ids, mask = np.random.default_rng(0).integers(3, VOCABULARY, (rows, TOKENS)), np.ones((rows, TOKENS), np.int64)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return ids, mask


def told(ids, mask, start, end):
    tokens = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
    return tokens | {"position_ids": positions(mask[:, :end], end - start)}


def empty(engine, rows):
    shapes = {name: shape for name, shape in engine.input_shapes.items() if name.startswith("past")}
    return {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


def growing(engine, ids, mask, ends=STEPS):
    """Logits of a text in several calls, each handed the cache that the one before gave."""
    state, logits = empty(engine, len(ids)), []
    for start, end in zip((0, *ends), ends, strict=False):
        found = engine.run(told(ids, mask, start, end) | state)
        logits.append(found.pop("logits"))
        state = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    return np.concatenate(logits, 1), state


def in_place(engine, ids, mask, ends=STEPS, room=0):
    """The same from one cache that is written in place, and longer than the text."""
    cache = engine.cache(len(ids), ids.shape[1] + room)
    parts = zip((0, *ends), ends, strict=False)
    return np.concatenate([cache(told(ids, mask, *part))["logits"] for part in parts], 1)


def assert_alike(found, expected, mask, share=CLOSE):
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=share * np.abs(expected[real]).max(), rtol=0)


def kinds(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# ---------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]
)
def test_a_decoder_generates_as_its_portable_file(name, folder):
    """A padded batch: a prompt, then tokens, with a cache that is handed on, and with one written in place."""
    ids, mask = texts()
    path = portable(name, folder)
    with onnxruntime.load(path, ONE) as plain:
        expected, _ = growing(plain, ids, mask)
    with fused(path, folder) as engine:
        assert_alike(growing(engine, ids, mask)[0], expected, mask)
        for room in (0, 5):
            assert_alike(in_place(engine, ids, mask, room=room), expected, mask)
    counts = kinds(folder / name / onnxruntime_fused.FILE)
    assert counts["GroupQueryAttention"] == 2
    assert not counts["Softmax"]


def test_one_call_is_what_the_portable_file_gives(folder):
    """Every output, cache included, and the same names in the same order."""
    ids, mask = texts()
    path = portable("MistralConfig", folder)
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        assert (engine.inputs, engine.outputs) == (plain.inputs, plain.outputs)
        assert (engine.input_shapes, engine.input_dtypes) == (plain.input_shapes, plain.input_dtypes)
        feeds = told(ids, mask, 0, TOKENS) | empty(plain, ROWS)
        expected, found = plain.run(feeds), engine.run(feeds)
    assert list(found) == list(expected)
    for key in expected:
        assert_alike(np.moveaxis(found[key], -2, 1), np.moveaxis(expected[key], -2, 1), mask)


@pytest.mark.parametrize("gone", [[0], [1], [0, 1]], ids=["first", "last", "all"])
def test_pruned_models_generate_as_their_portable_file(folder, gone):
    """The cache of an attention that is gone is gone too; without any there is nothing to write in place."""
    _, _, model, graph, sites = small("Gemma2Config")
    attentions = [site.name for site in sites if site.kind == "attention"]
    fork = graph.fork()
    apply(Drop(tuple(attentions[place] for place in gone)), fork)
    path = lower(fork, model, folder / f"pruned{''.join(map(str, gone))}.onnx")
    ids, mask = texts()
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        expected, _ = growing(plain, ids, mask)
        assert_alike(growing(engine, ids, mask)[0], expected, mask)
        if len(gone) < 2:
            assert_alike(in_place(engine, ids, mask, room=3), expected, mask)
        else:
            with pytest.raises(RuntimesError, match="no KV cache that can be updated in place"):
                engine.cache(1, 8)


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4"])
def test_quantized_files_are_fused_too(folder, precision):
    """Products of attention are of floats in all of them."""
    need_exact_int8(precision)
    path = folder / f"{precision}.onnx"
    ids, mask = texts()
    source = portable("Qwen3Config", folder)
    if precision == "int4":
        to_int4(source, path)
    else:
        with onnxruntime.load(source, ONE) as plain:
            feeds = [told(ids, mask, 0, TOKENS) | empty(plain, ROWS)]
        quantize(source, path, lambda: iter(feeds), mode="dynamic" if precision == "int8-dynamic" else "static")
    with onnxruntime.load(path, ONE) as plain:
        expected, _ = growing(plain, ids, mask)
    with fused(path, folder) as engine:
        assert_alike(growing(engine, ids, mask)[0], expected, mask, INT8)
        assert_alike(in_place(engine, ids, mask, room=5), expected, mask, INT8)
    before, after = kinds(path), kinds(folder / precision / onnxruntime_fused.FILE)
    assert after["GroupQueryAttention"] == 2
    products = ("MatMulNBits", "MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear")
    assert any(before[kind] for kind in products)
    assert {kind: after[kind] for kind in products} == {kind: before[kind] for kind in products}


def test_several_tokens_behind_a_cache_are_read_row_by_row(folder):
    """ONNX Runtime's operator takes them for one row only."""
    ids, mask = texts()
    path = portable("LlamaConfig", folder)
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        expected, state = growing(plain, ids, mask, (5, 12))
        assert_alike(growing(engine, ids, mask, (5, 12))[0], expected, mask[:, :12])
        feeds = told(ids, mask, 12, TOKENS) | state
        step, answers = engine.bind(feeds), plain.run(feeds)
        step()
        for key, value in step.outputs().items():
            np.testing.assert_allclose(value, answers[key], atol=CLOSE * np.abs(answers[key]).max(), rtol=0)
        one = growing(plain, ids[:1], mask[:1], (5, 12, TOKENS))[0]
        assert_alike(in_place(engine, ids[:1], mask[:1], (5, 12, TOKENS), 4), one, mask[:1])


# ------------------------------------------------------------------------------------------------------- shared buffers


def test_a_bound_step_writes_its_cache_in_place(folder):
    """As often as it is called: the new tokens lie behind the same past, in the one buffer that holds both."""
    ids, mask = texts()
    path = portable("LlamaConfig", folder)
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        _, state = growing(plain, ids, mask, (TOKENS - 1,))
        feeds = told(ids, mask, TOKENS - 1, TOKENS) | state
        expected, step = plain.run(feeds), engine.bind(feeds)
        for _ in range(3):
            step()
            found = step.outputs()
            assert found.keys() == expected.keys()
            for key, value in found.items():
                np.testing.assert_allclose(value, expected[key], atol=CLOSE * np.abs(expected[key]).max(), rtol=0)
        for present, value in step._outputs.items():
            if present != "logits":
                past = step._inputs[present.replace("present", "past_key_values")]
                assert value.data_ptr() == past.data_ptr()


def test_a_cache_goes_on_where_it_ended(folder):
    ids, mask = texts()
    with fused(portable("LlamaConfig", folder), folder) as engine:
        cache = engine.cache(ROWS, TOKENS)
        cache(told(ids, mask, 0, FIRST))
        assert cache.tokens == FIRST
        with pytest.raises(
            RuntimesError, match=r"Found 1 new tokens and an attention mask of 12 behind a cache of 9; expected a mask"
        ):
            cache(told(ids, mask, 11, 12))
        cache(told(ids, mask, FIRST, FIRST + 1))
        longer = np.ones((ROWS, TOKENS + 1), np.int64)
        with pytest.raises(RuntimesError, match="at most 16"):
            engine.cache(ROWS, TOKENS)(told(longer, longer, 0, TOKENS + 1))
    with pytest.raises(RuntimesError, match="closed"):
        cache(told(ids, mask, FIRST + 1, FIRST + 2))


def test_the_portable_file_has_no_cache_to_write_in_place(folder):
    with onnxruntime.load(portable("LlamaConfig", folder), ONE) as plain:
        message = r"^This file has no KV cache that can be updated in place; expected a language model built for onnx"
        with pytest.raises(RuntimesError, match=message):
            plain.cache(1, 8)


# ---------------------------------------------------------------------------------------------- what looks otherwise


def changed(folder, name, edit):
    """A file of a small Llama whose graph an edit has changed without breaking it."""
    model = onnx.load(portable("LlamaConfig", folder))
    edit(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def nodes(graph, kind):
    return [node for node in graph.node if node.op_type == kind]


def otherwise(graph):
    """The weights of the last attention go through an operator that does nothing."""
    softmax = nodes(graph, "Softmax")[-1]
    place = list(graph.node).index(softmax)
    before = onnx.helper.make_node("Identity", softmax.input[:1], ["otherwise"])
    softmax.input[0] = "otherwise"
    graph.node.insert(place, before)


def hidden_by(graph, number):
    for each in graph.initializer:
        if each.data_type == onnx.TensorProto.FLOAT and onnx.numpy_helper.to_array(each).max() < -1e30:
            each.CopyFrom(onnx.numpy_helper.from_array(np.float32(number), each.name))


def endless(graph):
    """What is hidden is so by minus infinity."""
    hidden_by(graph, -np.inf)


def faint(graph):
    """What is hidden is seen a little."""
    hidden_by(graph, -2.0)


def turned(graph):
    """The same comparison, written the other way round."""
    for node in nodes(graph, "LessOrEqual"):
        node.op_type = "GreaterOrEqual"
        node.input[:] = [node.input[1], node.input[0]]


def seeing_all(graph):
    """Tokens see those after them."""
    for node in nodes(graph, "LessOrEqual"):
        node.op_type = "Equal"
        node.input[:] = [node.input[0], node.input[0]]


def told_whole_shape(graph):
    """The length of the past is taken from the whole shape, which a longer buffer would change."""
    node = next(node for node in nodes(graph, "Shape") if node.input[0].startswith("past"))
    place = list(graph.node).index(node)
    two = onnx.numpy_helper.from_array(np.array([2]), "two")
    graph.initializer.append(two)
    whole = onnx.helper.make_node("Shape", node.input[:], ["whole"])
    node.CopyFrom(onnx.helper.make_node("Gather", ["whole", "two"], node.output[:]))
    graph.node.insert(place, whole)


@pytest.mark.parametrize(
    ("edit", "found", "may_share"),
    [
        (otherwise, 1, False),
        (endless, 0, False),
        (faint, 2, True),
        (turned, 2, True),
        (seeing_all, 2, True),
        (told_whole_shape, 2, False),
    ],
)
def test_what_looks_otherwise_is_right_all_the_same(folder, edit, found, may_share):
    """Not fused, or not by more than the graph says; buffers are shared only where nothing else reads them."""
    path = changed(folder, edit.__name__, edit)
    ids, mask = texts()
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        expected, _ = growing(plain, ids, mask)
        assert_alike(growing(engine, ids, mask)[0], expected, mask)
        if may_share:
            assert_alike(in_place(engine, ids, mask, room=2), expected, mask)
        else:
            with pytest.raises(RuntimesError, match="no KV cache that can be updated in place"):
                engine.cache(1, 8)
    made = onnx.load(folder / edit.__name__ / onnxruntime_fused.FILE)
    assert len(nodes(made.graph, "GroupQueryAttention")) == found
    unmasked = [
        any(each.name == "causal" for each in node.attribute) for node in nodes(made.graph, "GroupQueryAttention")
    ]
    assert (
        unmasked == [edit is not otherwise] * found
    )  # the operator hides nothing by itself where it is not known to be hidden
    facts = {each.key: json.loads(each.value) for each in made.metadata_props}
    assert (FACT in facts) == bool(found)
    assert bool(facts.get(FACT)) == may_share


def test_heads_of_odd_widths_stay(folder):
    """ONNX Runtime's operator takes multiples of eight."""
    model = onnx.load(portable("LlamaConfig", folder))
    for end in (*model.graph.input, *model.graph.output):
        sizes = end.type.tensor_type.shape.dim
        if len(sizes) == 4:
            sizes[3].dim_value = 12
    assert not fuse(model)["GroupQueryAttention"]


def test_a_graph_with_other_inputs_stays(folder):
    model = onnx.load(portable("LlamaConfig", folder))
    next(end for end in model.graph.input if end.name == "attention_mask").name = "mask"
    for node in model.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]
    assert not fuse(model)["GroupQueryAttention"]


# ------------------------------------------------------------------------------------------------------ a trained one


def generated(call, ids):
    """Greedy, one token a call; `call` gives logits."""
    step, every = ids, ids
    for _ in range(NEW):
        mask = np.ones(every.shape, np.int64)
        logits = call(told(every, mask, every.shape[1] - step.shape[1], every.shape[1]))["logits"]
        step = logits[:, -1].argmax(-1)[:, None]
        every = np.concatenate([every, step], 1)
    return every


@needs_llama
@pytest.mark.parametrize("gone", [None, 2], ids=["dense", "pruned"])
def test_a_trained_model_generates_in_place_what_transformers_does(tmp_path, gone):
    """Ten prompts, 128 tokens each, in buffers of just that length."""
    model, graph, sites = llama()
    fork, module = graph.fork(), model.module
    expected = greedy(module, prompts())
    if gone is not None:
        site = [site for site in sites if site.kind == "attention"][gone]
        apply(Drop((site.name,)), fork)
        dense = expected
        with silent(module, site):
            expected = greedy(module, prompts())
        assert (expected != dense).any()
    with fused(lower(fork, model, tmp_path / "model.onnx"), tmp_path) as engine:
        found = generated(engine.cache(PROMPTS, prompts().shape[1] + NEW), prompts())
    np.testing.assert_array_equal(found, expected)


@needs_llama
def test_a_trained_model_of_4_bits_answers_as_its_portable_file(tmp_path):
    """Its kernel rounds what it multiplies to 8 bits: in other calls the portable file is as far from itself.

    Both are 0.018 of the largest logit away, and nearly every next token is the same.
    """
    model, graph, _ = llama()
    to_int4(lower(graph, model, tmp_path / "float.onnx"), tmp_path / "model.onnx")
    ids = np.load(LLAMA / "sampled_tokens.npy")[:PROMPTS, :64].astype(np.int64)
    mask, ends = np.ones_like(ids), (12, *range(13, 65))
    with onnxruntime.load(tmp_path / "model.onnx", ONE) as plain:
        expected = growing(plain, ids, mask, ends)[0]
    with fused(tmp_path / "model.onnx", tmp_path) as engine:
        found = in_place(engine, ids, mask, ends)
    assert_alike(found, expected, mask, INT8)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.99
