"""The files of a vision-language model: they generate what transformers does, token for token."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from compressor import models
from compressor.lower.cut.part import CutError
from compressor.lower.cut.vision_language import cut
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quantize.half_precision import to_fp16
from passes.base import apply
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions, RuntimesError
from runtimes.base.registry import runtime
from runtimes.base.vision_language import EMBEDS, FACTS, FEATURES, TEXT_EMBEDS, greedy, parts_of
from tests.vision_language_models import DROPPED, KINDS, QUERIES, TOKEN, build, generated, inputs, saved, without

ONE = BuildOptions(threads=1)
NEW = 10
HALF = 4 * 2.0**-11  # relative: some roundings to 16 bits
OTHERS = tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])


@functools.cache
def traced(kind, folder):
    model = models.load(str(saved(kind, folder)))
    return model, trace(model)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("vision_language")


def lowered(kind, dropped, shared, folder):
    """The path of the vision encoder beside the whole file, whole.onnx."""
    model, graph = traced(kind, shared)
    graph = graph.fork()
    if dropped:
        apply(Drop(dropped), graph)
    return cut(lower(fold_graph(graph), model, folder / "whole.onnx"), folder, TOKEN)


@functools.cache
def dense(kind, shared):
    """The path of the vision encoder of the model as it is; its folder is shared, so it is not written to."""
    folder = shared / f"dense {kind}"
    folder.mkdir()
    return lowered(kind, (), shared, folder)


def check_generation(kind, dropped, vision, target="onnxruntime"):
    """Compare with a module whose dropped branches are zero: images with texts of two lengths, and a text alone."""
    module, backend = without(build(kind), dropped), runtime(target)
    parts = [backend.build(part, vision.parent, ONE) for part in parts_of(vision)]
    different = set()
    with backend.load(parts[0], ONE) as engine:
        for words in (2, 9):
            feeds = inputs(kind, words)
            found = greedy(engine, feeds, NEW)
            assert found.tolist() == generated(module, feeds, NEW).tolist()
            different |= {tuple(row[-NEW:]) for row in found.tolist()}
        if kind in QUERIES:  # their own forward always reads an image
            return
        text = {name: value[:1] for name, value in feeds.items() if "pixel" not in name}
        text = {name: value[:, -6:] for name, value in text.items()}
        assert greedy(engine, text, NEW).tolist() == generated(module, text, NEW).tolist()
    assert len(different) > 2, "images and texts do not matter, so the test shows nothing"


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], *OTHERS[1:]])
def test_generation_without_a_branch_of_the_vision_tower_and_an_attention_of_the_language_model(kind, shared, tmp_path):
    vision = lowered(kind, DROPPED[kind], shared, tmp_path)
    check_generation(kind, DROPPED[kind], vision)
    names = [value.name for value in onnx.load(tmp_path / "decoder_model_merged.onnx").graph.input]
    assert names[-2:] == ["past_key_values.0.key", "past_key_values.0.value"]  # of two layers, numbered without a gap
    assert len([name for name in names if name.startswith("past")]) == 2


@pytest.mark.parametrize("kind", [KINDS[0], *OTHERS])
def test_generation_of_the_whole_model(kind, shared):
    vision, model = dense(kind, shared), traced(kind, shared)[0]
    check_generation(kind, (), vision)
    with (
        runtime("onnxruntime").load(vision.with_name("whole.onnx"), ONE) as whole,
        runtime("onnxruntime").load(vision, ONE) as engine,
    ):
        assert set(engine.outputs) == set(whole.outputs) == set(model.outputs)
        assert set(engine.inputs) == set(model.inputs) == set(whole.inputs)
        feeds = {name: value.numpy() for name, value in model.example.items()}
        expected, found = whole.run(feeds), engine.run(feeds)
        assert all(np.array_equal(expected[name], found[name]) for name in whole.outputs)  # the same nodes


def test_the_files_have_the_names_that_transformers_js_feeds(shared):
    parts = {part.stem: onnx.load(part).graph for part in parts_of(dense("llava", shared))}
    names = {
        stem: ([value.name for value in graph.input], [value.name for value in graph.output])
        for stem, graph in parts.items()
    }
    caches = [f"{layer}.{name}" for layer in "01" for name in ("key", "value")]
    assert names["vision_encoder"] == (["pixel_values"], ["image_features"])
    assert names["embed_tokens"] == (["input_ids"], ["inputs_embeds"])
    own, given = names["decoder_model_merged"]
    assert set(own[:3]) == {"inputs_embeds", "attention_mask", "position_ids"}
    assert own[3:] == [f"past_key_values.{name}" for name in caches]
    assert given == ["logits", *(f"present.{name}" for name in caches)]
    cache = onnx.load(parts_of(dense("llava", shared))[2]).graph.input[3].type.tensor_type.shape.dim
    assert [axis.dim_param for axis in cache][::2] == ["batch_size", "past_sequence_length"]
    assert not [node for graph in parts.values() for node in graph.node if node.op_type == "If"]


def test_rows_of_several_lengths_generate_together_if_padded_on_the_left(shared):
    long, short = inputs("llava", 9), inputs("llava", 4)
    missing = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    padded = {name: np.pad(short[name], ((0, 0), (missing, 0)), constant_values=1) for name in ("input_ids",)}
    padded["attention_mask"] = np.pad(short["attention_mask"], ((0, 0), (missing, 0)))
    rows = {name: np.concatenate([long[name][:1], padded[name][1:]]) for name in padded}
    rows["pixel_values"] = long["pixel_values"]
    with runtime("onnxruntime").load(dense("llava", shared), ONE) as engine:
        assert greedy(engine, rows, NEW).tolist() == generated(build("llava"), rows, NEW).tolist()


@pytest.mark.parametrize("kind", [KINDS[0], *OTHERS[:1]])
def test_a_file_in_half_precision_is_cut_at_its_half_values(kind, shared, tmp_path):
    """The outputs of such a file are casts, and nodes read the values before them."""
    model, vision = traced(kind, shared)[0], dense(kind, shared)
    graph = onnx.load(vision.with_name("whole.onnx")).graph
    names = [*(name for node in graph.node for name in node.output), *(value.name for value in graph.input)]
    to_fp16(vision.with_name("whole.onnx"), tmp_path / "half.onnx", dict.fromkeys(names, 1.0))
    feeds = {name: value.numpy() for name, value in model.example.items()}
    backend = runtime("onnxruntime")
    with (
        backend.load(tmp_path / "half.onnx", ONE) as whole,
        backend.load(cut(tmp_path / "half.onnx", tmp_path, TOKEN), ONE) as engine,
    ):
        expected, found = whole.run(feeds), engine.run(feeds)
    assert all(np.array_equal(expected[name], found[name]) for name in (FEATURES, TEXT_EMBEDS, EMBEDS))
    for name in expected:  # ONNX Runtime fuses other nodes at the borders of a file
        assert np.abs(found[name] - expected[name]).max() < HALF * np.abs(expected[name]).max()


def test_a_language_model_that_asks_for_the_placeholders_keeps_its_tokens_as_an_input(shared, tmp_path):
    """As one does that leaves image tokens out: here the logits are those of the text alone."""
    model, graph = traced("llava", shared)
    graph = graph.fork()
    logits = graph.module.graph.output_node().args[0][0]
    (mask,) = [node for node in graph.nodes() if node.target is torch.ops.aten.eq.Scalar and TOKEN in node.args]
    with graph.module.graph.inserting_after(logits):
        hidden = graph.module.graph.call_function(torch.ops.aten.unsqueeze.default, (mask, -1))
        hidden.meta["val"] = mask.meta["val"][..., None]
    with graph.module.graph.inserting_after(hidden):
        filled = graph.module.graph.call_function(torch.ops.aten.masked_fill.Scalar, (logits, hidden, 0.0))
        filled.meta["val"] = logits.meta["val"]
    output = graph.module.graph.output_node()
    output.args = ((filled, *output.args[0][1:]),)
    graph.module.recompile()
    vision = cut(lower(fold_graph(graph), model, tmp_path / "whole.onnx"), tmp_path, TOKEN)
    assert "input_ids" in [value.name for value in onnx.load(tmp_path / "decoder_model_merged.onnx").graph.input]
    feeds = {name: value.numpy() for name, value in model.example.items()}
    with runtime("onnxruntime").load(vision, ONE) as engine:
        found, is_image = engine.run(feeds)["logits"], feeds["input_ids"] == TOKEN
        assert not found[is_image].any()
        assert found[~is_image].any()
        prompt = inputs("llava", 5)
        assert greedy(engine, prompt, 1).tolist() == generated(build("llava"), prompt, 1).tolist()


def test_a_language_model_that_reads_the_pixels_is_refused(shared, tmp_path):
    model = ir.load(dense("llava", shared).with_name("whole.onnx"))
    (logits,) = [value for value in model.graph.outputs if value.name == "logits"]
    (pixels,) = [value for value in model.graph.inputs if value.name == "pixel_values"]
    total = ir.node("ReduceSum", [pixels], {"keepdims": 0})
    added = ir.node("Add", [logits, total.outputs[0]])
    model.graph.extend([total, added])
    logits.name, added.outputs[0].name = "inner", "logits"
    added.outputs[0].shape, added.outputs[0].type = logits.shape, logits.type
    model.graph.outputs[0] = added.outputs[0]
    ir.save(model, tmp_path / "reads.onnx")
    with pytest.raises(
        CutError, match=r"decoder_model_merged\.onnx cannot be cut: ReduceSum reads pixel_values of the"
    ):
        cut(tmp_path / "reads.onnx", tmp_path, TOKEN)


def test_files_without_the_noted_placeholder_are_refused(shared, tmp_path):
    for part in parts_of(dense("llava", shared)):
        (tmp_path / part.name).write_bytes(part.read_bytes())
    with pytest.raises(RuntimesError, match=rf"There is no {FACTS} beside vision_encoder\.onnx; copy the whole folder"):
        runtime("onnxruntime").load(tmp_path / "vision_encoder.onnx", ONE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_openvino(kind, shared, tmp_path):
    check_generation(kind, DROPPED[kind], lowered(kind, DROPPED[kind], shared, tmp_path), "openvino")
