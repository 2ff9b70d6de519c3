"""The files of models whose images vary in size: they generate what transformers does, token for token."""

import functools

import numpy as np
import onnx
import pytest
import torch

from compressor import models
from compressor.lower.cut.vision_language import cut
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.base import apply
from passes.execute.interpreter import run
from passes.image_tokens.image_tokens import DropImageTokens
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions, RuntimesError
from runtimes.base.registry import runtime
from runtimes.base.vision_language import FEATURES, greedy, parts_of
from tests.varying_images import DROPPED, KINDS, SIZES, TOKEN, build, generated, inputs, rows, saved
from tests.vision_language_models import without

ONE = BuildOptions(threads=1)
NEW = 8
SLOW = pytest.param("qwen2_5_vl", marks=pytest.mark.slow)
OTHERS = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2_5_vl", "glm4v", "hyperclovax", "gemma4_vision")
]


@functools.cache
def traced(kind, folder):
    model = models.load(str(saved(kind, folder)))
    return model, trace(model)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("varying")


@functools.cache
def files(kind, dropped, shared):
    """The path of the vision encoder of a model, without branches; its folder is shared."""
    model, graph = traced(kind, shared)
    graph = graph.fork()
    if dropped:
        apply(Drop(dropped), graph)
    folder = shared / f"{kind} {len(dropped)}"
    folder.mkdir()
    whole = lower(fold_graph(graph), model, folder / "whole.onnx")
    return cut(whole, folder, model.preprocess.image_token, model.preprocess.grid)


def check_generation(kind, dropped, vision, target="onnxruntime"):
    """Compare with a module whose dropped branches are zero: images of two sizes with texts of two lengths."""
    module, backend = without(build(kind), dropped), runtime(target)
    parts = [backend.build(part, vision.parent, ONE) for part in parts_of(vision)]
    different = set()
    with backend.load(parts[0], ONE) as engine:
        for size in SIZES:
            for words in (2, 9):
                found = inputs(kind, words, size, seed=words)
                answer = greedy(engine, rows(kind, found), NEW)
                assert answer.tolist() == generated(module, found, NEW).tolist()
                different.add(tuple(answer[0, -NEW:]))
    assert len(different) > 2, "images and texts do not matter, so the test shows nothing"


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava_next", "qwen3_vl", "mistral3", "gemma4", *OTHERS])
def test_generation_without_a_branch_of_the_vision_tower_and_an_attention_of_the_language_model(kind, shared):
    check_generation(kind, DROPPED[kind], files(kind, DROPPED[kind], shared))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generation_of_the_whole_model(kind, shared):
    check_generation(kind, (), files(kind, (), shared))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generation_in_openvino(kind, shared):
    check_generation(kind, DROPPED[kind], files(kind, DROPPED[kind], shared), "openvino")


@pytest.mark.parametrize("kind", ["qwen2_vl", SLOW])
def test_the_files_have_the_names_and_axes_that_transformers_js_feeds(kind, shared):
    vision, _, decoder = (onnx.load(part).graph for part in parts_of(files(kind, DROPPED[kind], shared)))
    grid = "grid_thw" if kind == "qwen2_vl" else "image_grid_thw"
    assert [value.name for value in vision.input] == ["pixel_values", grid]
    assert [[axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in vision.input] == [
        [0, 96],
        [0, 3],
    ]
    assert [value.name for value in vision.output] == [FEATURES]
    (positions,) = [value for value in decoder.input if value.name == "position_ids"]
    axes = [axis.dim_value or axis.dim_param for axis in positions.type.tensor_type.shape.dim]
    assert axes == [3, "batch_size", "sequence_length"]


def test_the_vision_encoder_takes_several_images_behind_each_other(shared):
    vision = files("qwen2_vl", DROPPED["qwen2_vl"], shared)
    images = [inputs("qwen2_vl", 2, size, seed) for seed, size in enumerate([*SIZES, (16, 16)])]
    session = onnx_session(vision)

    def encode(*found):
        feeds = {
            "pixel_values": np.concatenate([np.asarray(each["pixel_values"]) for each in found]),
            "grid_thw": np.concatenate([np.asarray(each["image_grid_thw"]) for each in found]),
        }
        return session.run([FEATURES], feeds)[0]

    assert np.allclose(encode(*images), np.concatenate([encode(each) for each in images]), rtol=1e-4, atol=1e-4)


def onnx_session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava_next", SLOW])
def test_rows_with_images_of_several_sizes_generate_together(kind, shared):
    """Images are padded behind, texts in front."""
    found = [rows(kind, inputs(kind, words, size, seed=words)) for words, size in zip((3, 7), SIZES, strict=True)]
    longest = {name: max(each[name].shape[1] for each in found) for name in found[0]}
    both = {}
    for name in found[0]:
        text = name in ("input_ids", "attention_mask")
        padded = []
        for each in found:
            missing = longest[name] - each[name].shape[1]
            width = ((0, 0), (missing, 0) if text else (0, missing), *((0, 0) for _ in each[name].shape[2:]))
            padded.append(np.pad(each[name], width, constant_values=1 if name == "input_ids" else 0))
        both[name] = np.concatenate(padded)
    with runtime("onnxruntime").load(files(kind, DROPPED[kind], shared), ONE) as engine:
        together = greedy(engine, both, NEW)[:, -NEW:]
        alone = [greedy(engine, each, NEW)[0, -NEW:] for each in found]
    assert together.tolist() == np.stack(alone).tolist()


def test_a_prompt_with_another_number_of_placeholders_is_refused(shared):
    feeds = rows("qwen2_vl", inputs("qwen2_vl", 2, SIZES[0]))
    feeds["input_ids"][0, np.flatnonzero(feeds["input_ids"][0] == TOKEN)[0]] = 5
    with (
        runtime("onnxruntime").load(files("qwen2_vl", DROPPED["qwen2_vl"], shared), ONE) as engine,
        pytest.raises(RuntimesError, match="row 0 of input_ids has 14 placeholders of image tokens in a row, but its"),
    ):
        greedy(engine, feeds, 1)


def test_image_tokens_that_remain_keep_their_positions_on_three_axes(shared):
    """The language model as a plain loop over its two layers, of which the second has the tokens that remain."""
    model, graph = traced("qwen2_vl", shared)
    feeds = model.preprocess.complete(rows("qwen2_vl", inputs("qwen2_vl", 4, SIZES[0])))
    feeds["past_key_values.1.tokens"] = np.zeros((1, 0), np.int64)
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    expected = dict(zip(graph.outputs, run(graph, {name: tensors[name] for name in graph.inputs}), strict=True))
    found = {}
    for share in (1.0, 0.4):
        fork = graph.fork()
        apply(DropImageTokens(((1, share),), image_token=TOKEN), fork)
        outputs = run(fork, {name: tensors[name] for name in fork.inputs})
        found[share] = dict(zip(fork.outputs, outputs, strict=True))
    assert torch.equal(found[1.0]["logits"], expected["logits"])
    kept = found[0.4]["present.1.tokens"][0]
    assert len(kept) == len(feeds["input_ids"][0]) - 9  # of 15 image tokens, 6 remain
    module = build("qwen2_vl")
    language, hidden = module.model.language_model, expected["inputs_embeds"]
    with torch.inference_mode():
        rotary = language.rotary_emb(hidden, tensors["position_ids"].permute(2, 0, 1))
        hidden = language.layers[0](hidden, position_embeddings=rotary)
        fewer = tuple(each[:, kept] for each in rotary)
        hidden = language.layers[1](hidden[:, kept], position_embeddings=fewer)
        logits = module.lm_head(language.norm(hidden))
    assert torch.allclose(found[0.4]["logits"], logits, rtol=1e-4, atol=1e-4)
