"""Tests of GroupQueryAttention fusion against the portable file and transformers, with and without shared buffers."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest

from compressor.lower.write_onnx import lower
from compressor.models.text.kv_cache import positions
from compressor.quantize.int8_search import quantize
from compressor.quantize.weight_only import to_int2, to_int4
from passes.base import apply
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions, RuntimesError
from runtimes.onnxruntime import target as onnxruntime
from runtimes.onnxruntime.kv_cache_io import SHARED_BUFFERS_KEY
from runtimes.onnxruntime_fused import target as onnxruntime_fused
from runtimes.onnxruntime_fused.encoder_fusions import fuse
from tests.compressor.models.text.test_kv_cache import (
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
CLOSE = 5e-6  # share of the largest logit, for float32 sums in another order; measured 8e-7
INT8 = 0.05  # share of the largest logit: rounding moves single values to the next of 256 steps; measured 0.02
CAP, SHARPER = 50.0, 8.0  # the softcap of Gemma 2, too large for random weights; and the factor of the weights
ROWS, TOKENS = 3, 16
FIRST = 9  # tokens of the prompt, more than any sliding window of these models
# Grouped heads, sliding window and softcap; a single key head; another way to compute sizes.
QUICK = ("Gemma2Config", "FalconConfig", "GPT2Config")
LATENT = ("DeepseekV3Config",)  # the cache holds latent states, from which each call computes keys and values
STEPS = (FIRST, *range(FIRST + 1, TOKENS + 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def portable(name, folder):
    """Write a small decoder with weights scaled up, so that the attention scores differ."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        _, _, model, graph, _ = small(name)
        exported = onnx.load(lower(graph, model, path))
        for tensor in exported.graph.initializer:
            value = onnx.numpy_helper.to_array(tensor)
            softcap = value.size == 1 and value == CAP
            if value.dtype == np.float32 and (value.ndim == 2 or softcap):
                sharper = (value * (0.01 if softcap else SHARPER)).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(sharper, tensor.name))
        onnx.save(exported, path)
    return path


def fused(path, folder):
    """Build and open the fused copy of a file."""
    (folder / path.stem).mkdir(exist_ok=True)
    return onnxruntime_fused.load(onnxruntime_fused.build(path, folder / path.stem, ONE), ONE)


def texts(rows=ROWS):
    """Return token ids and their mask, with left padding that increases from row to row."""
    ids, mask = np.random.default_rng(0).integers(3, VOCABULARY, (rows, TOKENS)), np.ones((rows, TOKENS), np.int64)
    for row in range(rows):
        mask[row, : 3 * row] = 0
    return ids, mask


def token_feeds(ids, mask, start, end):
    tokens = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
    return tokens | {"position_ids": positions(mask[:, :end], end - start)}


def empty(engine, rows):
    shapes = {name: shape for name, shape in engine.input_shapes.items() if name.startswith("past")}
    return {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


def decode(engine, ids, mask, ends=STEPS):
    """Return the logits of several calls, passing the KV cache from call to call, and the last cache."""
    state, logits = empty(engine, len(ids)), []
    for start, end in zip((0, *ends), ends, strict=False):
        found = engine.run(token_feeds(ids, mask, start, end) | state)
        logits.append(found.pop("logits"))
        state = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    return np.concatenate(logits, 1), state


def decode_in_place(engine, ids, mask, ends=STEPS, room=0):
    """Return the logits of several calls with one in-place cache, with capacity for `room` more tokens."""
    cache = engine.cache(len(ids), ids.shape[1] + room)
    parts = zip((0, *ends), ends, strict=False)
    return np.concatenate([cache(token_feeds(ids, mask, *part))["logits"] for part in parts], 1)


def assert_alike(found, expected, mask, share=CLOSE):
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=share * np.abs(expected[real]).max(), rtol=0)


def kinds(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# ------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]
)
def test_decoder_agrees_with_its_portable_file(name, folder):
    """A padded batch, prefill and single-token decode, with a cache passed on and with an in-place cache."""
    ids, mask = texts()
    path = portable(name, folder)
    with onnxruntime.load(path, ONE) as plain:
        expected, _ = decode(plain, ids, mask)
    with fused(path, folder) as engine:
        assert_alike(decode(engine, ids, mask)[0], expected, mask)
        for room in (0, 5) if name not in LATENT else ():
            assert_alike(decode_in_place(engine, ids, mask, room=room), expected, mask)
    counts = kinds(folder / name / onnxruntime_fused.FILE)
    assert counts["GroupQueryAttention"] == (0 if name in LATENT else 2)
    assert not counts["ScatterND"]
    assert bool(counts["Softmax"]) == (name in LATENT)


def test_outputs_of_one_call_agree_with_the_portable_file(folder):
    """All outputs, including the cache, with the same names in the same order."""
    ids, mask = texts()
    path = portable("Gemma2Config", folder)
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        assert (engine.inputs, engine.outputs) == (plain.inputs, plain.outputs)
        assert (engine.input_shapes, engine.input_dtypes) == (plain.input_shapes, plain.input_dtypes)
        feeds = token_feeds(ids, mask, 0, TOKENS) | empty(plain, ROWS)
        expected, found = plain.run(feeds), engine.run(feeds)
    assert list(found) == list(expected)
    for key in expected:
        assert_alike(np.moveaxis(found[key], -2, 1), np.moveaxis(expected[key], -2, 1), mask)


@pytest.mark.parametrize(
    "dropped",
    [
        pytest.param([0], id="first"),
        pytest.param([1], id="last", marks=pytest.mark.slow),
        pytest.param([0, 1], id="all"),
    ],
)
def test_pruned_models_agree_with_their_portable_file(folder, dropped):
    """A dropped attention has no cache; without any attention there is no in-place cache."""
    _, _, model, graph, sites = small("Gemma2Config")
    attentions = [site.name for site in sites if site.kind == "attention"]
    fork = graph.fork()
    apply(Drop(tuple(attentions[place] for place in dropped)), fork)
    path = lower(fork, model, folder / f"pruned{''.join(map(str, dropped))}.onnx")
    ids, mask = texts()
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        expected, _ = decode(plain, ids, mask)
        assert_alike(decode(engine, ids, mask)[0], expected, mask)
        if len(dropped) < 2:
            assert_alike(decode_in_place(engine, ids, mask, room=3), expected, mask)
        else:
            with pytest.raises(RuntimesError, match="no KV cache that can be updated in place"):
                engine.cache(1, 8)


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "int4", "int2"])
def test_quantized_files_are_fused_too(folder, precision):
    """The attention itself computes in float in all of them."""
    need_exact_int8(precision)
    path = folder / f"{precision}.onnx"
    ids, mask = texts()
    source = portable("LlamaConfig", folder)
    if precision in ("int4", "int2"):
        (to_int4 if precision == "int4" else to_int2)(source, path)
    else:
        with onnxruntime.load(source, ONE) as plain:
            feeds = [token_feeds(ids, mask, 0, TOKENS) | empty(plain, ROWS)]
        quantize(source, path, lambda: iter(feeds), mode="dynamic" if precision == "int8-dynamic" else "static")
    with onnxruntime.load(path, ONE) as plain:
        expected, _ = decode(plain, ids, mask)
    with fused(path, folder) as engine:
        assert_alike(decode(engine, ids, mask)[0], expected, mask, INT8)
        assert_alike(decode_in_place(engine, ids, mask, room=5), expected, mask, INT8)
    before, after = kinds(path), kinds(folder / precision / onnxruntime_fused.FILE)
    assert after["GroupQueryAttention"] == 2
    products = ("MatMulNBits", "MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear")
    assert any(before[kind] for kind in products)
    assert {kind: after[kind] for kind in products} == {kind: before[kind] for kind in products}


def test_several_tokens_behind_a_cache_run_row_by_row(folder):
    """ONNX Runtime's operator supports this for one row only."""
    ids, mask = texts()
    path = portable("LlamaConfig", folder)
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        expected, state = decode(plain, ids, mask, (5, 12))
        assert_alike(decode(engine, ids, mask, (5, 12))[0], expected, mask[:, :12])
        feeds = token_feeds(ids, mask, 12, TOKENS) | state
        step, answers = engine.bind(feeds), plain.run(feeds)
        step()
        for key, value in step.outputs().items():
            np.testing.assert_allclose(value, answers[key], atol=CLOSE * np.abs(answers[key]).max(), rtol=0)
        one = decode(plain, ids[:1], mask[:1], (5, 12, TOKENS))[0]
        assert_alike(decode_in_place(engine, ids[:1], mask[:1], (5, 12, TOKENS), 4), one, mask[:1])


# ------------------------------------------------------------------------------------------------------- shared buffers


def test_bound_step_updates_its_cache_in_place(folder):
    """Each call writes the same new tokens behind the same past, in the buffer that holds both."""
    ids, mask = texts()
    path = portable("LlamaConfig", folder)
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        _, state = decode(plain, ids, mask, (TOKENS - 1,))
        feeds = token_feeds(ids, mask, TOKENS - 1, TOKENS) | state
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


def test_cache_checks_the_mask_and_its_capacity(folder):
    ids, mask = texts()
    with fused(portable("LlamaConfig", folder), folder) as engine:
        cache = engine.cache(ROWS, TOKENS)
        cache(token_feeds(ids, mask, 0, FIRST))
        assert cache.tokens == FIRST
        with pytest.raises(
            RuntimesError, match=r"Found 1 new tokens and an attention mask of 12 behind a cache of 9; expected a mask"
        ):
            cache(token_feeds(ids, mask, 11, 12))
        cache(token_feeds(ids, mask, FIRST, FIRST + 1))
        longer = np.ones((ROWS, TOKENS + 1), np.int64)
        with pytest.raises(RuntimesError, match="at most 16"):
            engine.cache(ROWS, TOKENS)(token_feeds(longer, longer, 0, TOKENS + 1))
    with pytest.raises(RuntimesError, match="closed"):
        cache(token_feeds(ids, mask, FIRST + 1, FIRST + 2))


def test_portable_file_has_no_in_place_cache(folder):
    with onnxruntime.load(portable("LlamaConfig", folder), ONE) as plain:
        message = r"^This file has no KV cache that can be updated in place; expected a language model built for onnx"
        with pytest.raises(RuntimesError, match=message):
            plain.cache(1, 8)


# ------------------------------------------------------------------------------------------------------ other patterns


def changed(folder, name, edit):
    """Write the file of a small Llama after `edit` changed its graph."""
    model = onnx.load(portable("LlamaConfig", folder))
    edit(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def nodes(graph, kind):
    return [node for node in graph.node if node.op_type == kind]


def identity_before_softmax(graph):
    """Insert an Identity before the Softmax of the last attention."""
    softmax = nodes(graph, "Softmax")[-1]
    position = list(graph.node).index(softmax)
    before = onnx.helper.make_node("Identity", softmax.input[:1], ["otherwise"])
    softmax.input[0] = "otherwise"
    graph.node.insert(position, before)


def set_mask_value(graph, number):
    for each in graph.initializer:
        if each.data_type == onnx.TensorProto.FLOAT and onnx.numpy_helper.to_array(each).max() < -1e30:
            each.CopyFrom(onnx.numpy_helper.from_array(np.float32(number), each.name))


def infinite_mask(graph):
    """Mask with minus infinity, and set the weights of rows without keys, which are NaN, to 0."""
    set_mask_value(graph, -np.inf)
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "no_weight"))
    for number, softmax in enumerate(nodes(graph, "Softmax")):
        position, weights = list(graph.node).index(softmax), softmax.output[0]
        softmax.output[0] = f"weights_{number}"
        test = onnx.helper.make_node("IsNaN", softmax.output[:], [f"test_{number}"])
        guard = onnx.helper.make_node("Where", [f"test_{number}", "no_weight", softmax.output[0]], [weights])
        graph.node.insert(position + 1, guard)
        graph.node.insert(position + 1, test)


def soft_mask(graph):
    """Mask with a small value that leaves some attention weight."""
    set_mask_value(graph, -2.0)


def reversed_comparison(graph):
    """Write the causal comparison as row >= column."""
    for node in nodes(graph, "LessOrEqual"):
        node.op_type = "GreaterOrEqual"
        node.input[:] = [node.input[1], node.input[0]]


def bidirectional(graph):
    """Let tokens attend to later ones."""
    for node in nodes(graph, "LessOrEqual"):
        node.op_type = "Equal"
        node.input[:] = [node.input[0], node.input[0]]


def length_from_whole_shape(graph):
    """Compute the length of the past from its whole shape, which is wrong for a longer buffer."""
    (node, *_) = (
        node
        for node in nodes(graph, "Shape")
        if node.input[0].startswith("past") and {each.name: each.i for each in node.attribute}.get("start") == 2
    )
    position = list(graph.node).index(node)
    two = onnx.numpy_helper.from_array(np.array([2]), "two")
    graph.initializer.append(two)
    whole = onnx.helper.make_node("Shape", node.input[:], ["whole"])
    node.CopyFrom(onnx.helper.make_node("Gather", ["whole", "two"], node.output[:]))
    graph.node.insert(position, whole)


@pytest.mark.parametrize(
    ("edit", "fused_count", "may_share"),
    [
        (identity_before_softmax, 1, False),
        (infinite_mask, 0, False),
        (soft_mask, 2, True),
        (reversed_comparison, 2, True),
        (bidirectional, 2, True),
        (length_from_whole_shape, 2, False),
    ],
)
def test_other_patterns_stay_correct(folder, edit, fused_count, may_share):
    """Other patterns are not fused or keep their mask; buffers are shared only without other consumers."""
    path = changed(folder, edit.__name__, edit)
    ids, mask = texts()
    with onnxruntime.load(path, ONE) as plain, fused(path, folder) as engine:
        expected, _ = decode(plain, ids, mask)
        assert_alike(decode(engine, ids, mask)[0], expected, mask)
        if may_share:
            assert_alike(decode_in_place(engine, ids, mask, room=2), expected, mask)
        else:
            with pytest.raises(RuntimesError, match="no KV cache that can be updated in place"):
                engine.cache(1, 8)
    model = onnx.load(folder / edit.__name__ / onnxruntime_fused.FILE)
    attentions = nodes(model.graph, "GroupQueryAttention")
    assert len(attentions) == fused_count
    # The causal mask of the operator is off (causal=0) unless the graph's mask is provably causal.
    not_causal = [any(attribute.name == "causal" for attribute in node.attribute) for node in attentions]
    assert not_causal == [edit is not identity_before_softmax] * fused_count
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (SHARED_BUFFERS_KEY in facts) == bool(fused_count)
    assert bool(facts.get(SHARED_BUFFERS_KEY)) == may_share


def test_unsupported_head_widths_are_not_fused(folder):
    """ONNX Runtime's operator requires a multiple of eight."""
    model = onnx.load(portable("LlamaConfig", folder))
    for end in (*model.graph.input, *model.graph.output):
        sizes = end.type.tensor_type.shape.dim
        if len(sizes) == 4:
            sizes[3].dim_value = 12
    assert not fuse(model)["GroupQueryAttention"]


def test_graph_with_other_inputs_is_not_fused(folder):
    model = onnx.load(portable("LlamaConfig", folder))
    next(end for end in model.graph.input if end.name == "attention_mask").name = "mask"
    for node in model.graph.node:
        node.input[:] = ["mask" if name == "attention_mask" else name for name in node.input]
    assert not fuse(model)["GroupQueryAttention"]


# ------------------------------------------------------------------------------------------------------ trained models


def generate_greedily(call, ids):
    """Generate NEW tokens greedily, one a call; `call` returns logits."""
    step, every = ids, ids
    for _ in range(NEW):
        mask = np.ones(every.shape, np.int64)
        logits = call(token_feeds(every, mask, every.shape[1] - step.shape[1], every.shape[1]))["logits"]
        step = logits[:, -1].argmax(-1)[:, None]
        every = np.concatenate([every, step], 1)
    return every


@needs_llama
@pytest.mark.parametrize(
    "dropped", [pytest.param(None, id="dense", marks=pytest.mark.slow), pytest.param(2, id="pruned")]
)
def test_trained_model_generates_the_same_tokens_as_transformers(tmp_path, dropped):
    """Ten prompts, 128 new tokens each, in buffers of exactly that capacity."""
    model, graph, sites = llama()
    fork, module = graph.fork(), model.module
    expected = greedy(module, prompts())
    if dropped is not None:
        site = [site for site in sites if site.kind == "attention"][dropped]
        apply(Drop((site.name,)), fork)
        dense = expected
        with silent(module, site):
            expected = greedy(module, prompts())
        assert (expected != dense).any()
    with fused(lower(fork, model, tmp_path / "model.onnx"), tmp_path) as engine:
        found = generate_greedily(engine.cache(PROMPTS, prompts().shape[1] + NEW), prompts())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow  # the usual run has a small int4 model above
@needs_llama
def test_trained_int4_model_agrees_with_its_portable_file(tmp_path):
    """The int4 kernel rounds activations to 8 bits, so logits differ by 0.018 of the largest one.

    The portable file differs from itself as much if the calls are split in another way. Nearly all next tokens agree.
    """
    model, graph, _ = llama()
    to_int4(lower(graph, model, tmp_path / "float.onnx"), tmp_path / "model.onnx")
    ids = np.load(LLAMA / "sampled_tokens.npy")[:PROMPTS, :64].astype(np.int64)
    mask, ends = np.ones_like(ids), (12, *range(13, 65))
    with onnxruntime.load(tmp_path / "model.onnx", ONE) as plain:
        expected = decode(plain, ids, mask, ends)[0]
    with fused(tmp_path / "model.onnx", tmp_path) as engine:
        found = decode_in_place(engine, ids, mask, ends)
    assert_alike(found, expected, mask, INT8)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.99
