"""The files of an encoder and its decoder: they generate what transformers does, token for token."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from compressor.lower.cut.encoder_decoder import cut
from compressor.lower.cut.part import CutError
from compressor.quantize.half_precision import to_fp16
from passes.analysis.symbolic_cost import Counter
from runtimes.base.encoder_decoder import greedy, parts_of
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.encoder_decoders import DROPPED, KINDS, build, generated, lowered, source, traced, without

ONE = BuildOptions(threads=1)
NEW = 10


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder_decoders")


@functools.cache
def dense(kind, shared):
    """The model as it is, and the path of its encoder; its folder is shared, so it is not written to."""
    folder = shared / f"dense {kind}"
    folder.mkdir()
    return lowered(kind, (), shared, folder)


def check_generation(kind, dropped, encoder, target="onnxruntime"):
    """Compare with a module whose dropped branches are zero, at two source lengths, two rows with padding."""
    module, backend = without(build(kind), dropped), runtime(target)
    parts = [backend.build(part, encoder.parent, ONE) for part in parts_of(encoder)]
    start = np.full((2, 1), module.config.decoder_start_token_id)
    different = set()
    with backend.load(parts[0], ONE) as engine:
        for tokens in (4, 11):
            feeds = source(kind, tokens)
            found = greedy(engine, feeds, start, NEW)
            assert found.tolist() == generated(module, feeds, NEW).tolist()
            different |= {tuple(row) for row in found.tolist()}
    assert len(different) > 1, "the sources do not matter, so the test shows nothing"
    assert len({token for row in different for token in row}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_generation_without_a_self_attention_and_a_cross_attention(kind, shared, tmp_path):
    _, encoder = lowered(kind, DROPPED[kind], shared, tmp_path)
    check_generation(kind, DROPPED[kind], encoder)
    names = [value.name for value in onnx.load(tmp_path / "decoder_with_past_model.onnx").graph.input]
    caches = [f"past_key_values.0.{part}.{name}" for part in ("decoder", "encoder") for name in ("key", "value")]
    assert [name for name in names if name.startswith("past")] == caches  # of two layers, numbered without a gap


@pytest.mark.parametrize("kind", ["bart", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_generation_of_the_whole_model(kind, shared):
    model, encoder = dense(kind, shared)
    check_generation(kind, (), encoder)
    with (
        runtime("onnxruntime").load(encoder.with_name("whole.onnx"), ONE) as whole,
        runtime("onnxruntime").load(encoder, ONE) as engine,
    ):
        assert (engine.inputs, engine.outputs) == (model.inputs, model.outputs) == (whole.inputs, whole.outputs)
        for tensors in (
            model.example,
            {name: value[:1] for name, value in model.example.items()},
        ):  # caches of 5 tokens
            feeds = {name: value.numpy() for name, value in tensors.items()}
            expected, found = whole.run(feeds), engine.run(feeds)
            assert all(np.array_equal(expected[name], found[name]) for name in whole.outputs)  # the same nodes


def test_inputs_stand_in_the_order_of_optimum(shared):
    """Optimum feeds caches by their positions: those of a layer together, its self-attention first."""
    _, encoder = dense("bart", shared)
    decoder, further = (onnx.load(part).graph for part in parts_of(encoder)[1:])
    caches = [
        f"{layer}.{part}.{name}" for layer in "01" for part in ("decoder", "encoder") for name in ("key", "value")
    ]
    assert [value.name for value in decoder.output] == ["logits", *(f"present.{name}" for name in caches)]
    assert [value.name for value in decoder.input] == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    assert [value.name for value in further.input][2:] == [f"past_key_values.{name}" for name in caches]
    assert [value.name for value in further.output][1:] == [f"present.{name}" for name in caches if "decoder" in name]


@pytest.mark.parametrize("kind", ["bart", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_file_in_half_precision_is_cut_at_its_half_values(kind, shared, tmp_path):
    """The outputs of such a file are casts, and nodes read the values before them.

    ONNX Runtime computes in float32 here and rounds to half where a value is stored, which differs between the files;
    so they agree to the resolution of half precision.
    """
    model, encoder = dense(kind, shared)
    graph = onnx.load(encoder.with_name("whole.onnx")).graph
    names = [*(name for node in graph.node for name in node.output), *(value.name for value in graph.input)]
    to_fp16(encoder.with_name("whole.onnx"), tmp_path / "half.onnx", dict.fromkeys(names, 1.0))
    feeds = {name: value.numpy() for name, value in model.example.items()}
    backend = runtime("onnxruntime")
    with (
        backend.load(tmp_path / "half.onnx", ONE) as whole,
        backend.load(cut(tmp_path / "half.onnx", tmp_path), ONE) as engine,
    ):
        expected, found = whole.run(feeds), engine.run(feeds)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= np.finfo(np.float16).eps * np.abs(value).max(), name
    further = onnx.load(tmp_path / "decoder_with_past_model.onnx").graph
    assert not [value.name for value in further.input if value.name == "encoder_hidden_states"]


@pytest.mark.parametrize("kind", ["bart"])
def test_a_further_token_costs_nothing_in_the_encoder(kind, shared):
    _, graph = traced(kind, shared)
    shapes = {name: tuple(value.shape) for name, value in traced(kind, shared)[0].example.items()}
    crosses = [name for name in graph.outputs if ".encoder." in name]
    further = Counter(graph, shapes, crosses, ("encoder_last_hidden_state",)).count(graph)
    longer = {
        name: (shape[0], 99) if name in ("input_ids", "attention_mask") else shape for name, shape in shapes.items()
    }
    assert Counter(graph, longer, crosses, ("encoder_last_hidden_state",)).count(graph).products == further.products
    whole = Counter(graph, shapes).count(graph)
    rows, source = shapes["input_ids"]
    encoder = 2 * rows * source * (4 * 32 * 32 + 2 * 32 * 48)  # two layers: four maps of attention, two of the MLP
    crossed = 2 * rows * source * (2 * 32 * 32)  # keys and values of two cross-attentions
    assert whole.products - further.products == encoder + crossed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_openvino(kind, shared, tmp_path):
    _, encoder = lowered(kind, DROPPED[kind], shared, tmp_path)
    check_generation(kind, DROPPED[kind], encoder, "openvino")


def test_a_decoder_that_reads_other_values_of_the_encoder_is_refused(shared, tmp_path):
    model = ir.load(dense("bart", shared)[1].with_name("whole.onnx"))
    (logits,) = [value for value in model.graph.outputs if value.name == "logits"]
    ids = ir.node("Cast", [model.graph.inputs[0]], {"to": ir.DataType.FLOAT})
    total = ir.node("ReduceSum", [ids.outputs[0]], {"keepdims": 0})
    added = ir.node("Add", [logits, total.outputs[0]])
    model.graph.extend([ids, total, added])
    logits.name, added.outputs[0].name = "inner", "logits"
    added.outputs[0].shape, added.outputs[0].type = logits.shape, logits.type
    model.graph.outputs[0] = added.outputs[0]
    ir.save(model, tmp_path / "reads.onnx")
    with pytest.raises(CutError, match=r"decoder_model\.onnx cannot be cut: Cast reads input_ids of the whole model"):
        cut(tmp_path / "reads.onnx", tmp_path)
