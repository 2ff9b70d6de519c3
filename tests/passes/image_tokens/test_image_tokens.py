"""Image tokens dropped in stages: equal to a plain loop over the layers, in prompts and in further tokens."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import MistralConfig

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.base import Model
from passes.base import PassError, apply
from passes.execute.interpreter import run
from passes.graph.graph import value_of
from passes.image_tokens.image_tokens import DropImageTokens, stage_of_state
from passes.rewrite.drop import Drop
from tests import vision_language_models
from tests.image_tokens import (
    LAYERS,
    STATE,
    WIDTH,
    Pyramid,
    call,
    empty,
    feeds,
    traced,
    vision_language_model,
)

PARTS = ("key", "value")
SLOW = pytest.mark.slow
STAGES = ((1, 0.5), (3, 0.25))
IMAGE, TEXT = 12, 6
SAME = {"rtol": 0, "atol": 2e-5}  # logits of size 5, sums in float32 in another order


@pytest.fixture(scope="module")
def model():
    return vision_language_model()


@pytest.fixture(scope="module")
def dense(model):
    return traced(model)


@pytest.fixture(scope="module")
def dropped(dense):
    graph = dense.fork()
    apply(DropImageTokens(STAGES), graph)
    return graph


def prompt(rows=1, seed=0, images=IMAGE):
    """Return embeddings, image mask and attention mask: 2 tokens of text, an image, and more text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = images + TEXT
    image = torch.zeros(rows, tokens, dtype=torch.int64)
    image[:, 2 : 2 + images] = 1
    embeds = torch.randn(rows, tokens, WIDTH, generator=generator)
    return embeds, image, torch.ones(rows, tokens, dtype=torch.int64)


def lengths(outputs):
    return [outputs[f"present.{layer}.key"].shape[2] for layer in range(LAYERS)]


@pytest.mark.parametrize("method", ["attention", "norm"])
def test_a_prompt_equals_a_loop_over_the_layers(model, dense, method):
    graph = dense.fork()
    apply(DropImageTokens(STAGES, method), graph)
    given = prompt()
    outputs, _ = call(graph, feeds(graph, *given, empty(graph, 1)))
    expected = Pyramid(model, STAGES, method)
    torch.testing.assert_close(outputs["logits"], expected(*given), **SAME)
    assert lengths(outputs) == [18, 12, 12, 9]  # 12 image tokens, 6, 6 and 3, beside 6 of text
    for layer, cached in enumerate(expected.cache.layers):
        torch.testing.assert_close(outputs[f"present.{layer}.key"], cached.keys, **SAME)
        torch.testing.assert_close(outputs[f"present.{layer}.value"], cached.values, **SAME)
    assert torch.equal(outputs["present.1.tokens"], expected.cached[1])
    assert torch.equal(outputs["present.3.tokens"], expected.cached[3])


def generated(step, embedding, given, tokens=8):
    """Return greedily generated tokens and the last logits."""
    embeds, image, attended = given
    found = []
    for _ in range(tokens):
        logits = step(embeds, image, attended)[:, -1]
        found.append(logits.argmax(-1))
        embeds = embedding(found[-1])[:, None]
        image = torch.zeros(len(embeds), 1, dtype=torch.int64)
        attended = torch.cat([attended, torch.ones(len(embeds), 1, dtype=torch.int64)], 1)
    return torch.stack(found, 1), logits


def stepping(graph, rows):
    """Return a function that calls a graph and keeps its state."""
    state = empty(graph, rows)

    def step(*given):
        nonlocal state
        outputs, state = call(graph, feeds(graph, *given, state))
        return outputs["logits"]

    return step


def padded(given, padding):
    """Return a prompt with the first tokens of the second row as padding."""
    embeds, image, attended = (part.clone() for part in given)
    attended[1, :padding] = 0
    image[1] = image[1].roll(padding)
    return embeds, image, attended


@pytest.mark.parametrize("rows", [1, 2])
def test_generation_equals_a_loop_over_the_layers(model, dropped, rows):
    given = prompt(rows, seed=1) if rows == 1 else padded(prompt(rows, seed=1), 3)
    embedding = model.get_input_embeddings()
    found, logits = generated(stepping(dropped, rows), embedding, given)
    expected, wanted = generated(Pyramid(model, STAGES), embedding, given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, wanted, **SAME)


def test_sliding_windows_count_the_tokens_that_were_dropped():
    model = vision_language_model(lambda **sizes: MistralConfig(**sizes, sliding_window=14))
    graph = traced(model)
    apply(DropImageTokens(STAGES), graph)
    given, embedding = prompt(2), model.get_input_embeddings()
    found, logits = generated(stepping(graph, 2), embedding, given)
    expected, wanted = generated(Pyramid(model, STAGES), embedding, given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, wanted, **SAME)


@pytest.mark.parametrize("stages", [((1, 1.0),), ((2, 0.0),)])
def test_nothing_is_dropped_if_all_is_kept_or_no_token_is_of_an_image(model, dense, stages):
    graph = dense.fork()
    apply(DropImageTokens(stages), graph)
    embeds, image, attended = prompt(2)
    image = image if stages[0][1] else torch.zeros_like(image)
    outputs, _ = call(graph, feeds(graph, embeds, image, attended, empty(graph, 2)))
    expected, _ = call(dense, feeds(dense, embeds, image, attended, empty(dense, 2)))
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, **SAME)


def test_the_image_of_a_later_call_is_dropped_too(model, dropped):
    step, loop, attended = stepping(dropped, 1), Pyramid(model, STAGES), torch.zeros(1, 0, dtype=torch.int64)
    for seed, images in ((1, IMAGE), (2, 8)):
        embeds, image, new = prompt(seed=seed, images=images)
        attended = torch.cat([attended, new], 1)
        torch.testing.assert_close(step(embeds, image, attended), loop(embeds, image, attended), **SAME)


def test_rows_lose_as_many_image_tokens_as_the_row_with_the_fewest(dropped):
    embeds, image, attended = prompt(2)
    image[1, 8:] = 0  # 6 image tokens of 12: it loses 3 and 5
    outputs, _ = call(dropped, feeds(dropped, embeds, image, attended, empty(dropped, 2)))
    assert lengths(outputs) == [18, 15, 15, 13]
    for row in range(2):
        text = (image[row] == 0).nonzero()[:, 0].tolist()
        assert set(text) <= set(outputs["present.3.tokens"][row].tolist())


def test_the_random_choice_depends_on_the_seed_alone(dense):
    kept = []
    for seed in (0, 0, 1):
        graph = dense.fork()
        apply(DropImageTokens(((1, 0.5),), "random", seed), graph)
        for data in (0, 1):
            outputs, _ = call(graph, feeds(graph, *prompt(seed=data, images=40), empty(graph, 1)))
            kept.append(outputs["present.1.tokens"][0].tolist())
    assert kept[0] == kept[1] == kept[2] == kept[3]
    assert kept[4] == kept[5] != kept[0]
    assert len(kept[0]) == 20 + TEXT
    assert np.diff([place for place in kept[0] if 2 <= place < 42]).max() > 1  # not one piece


def test_every_cache_has_the_length_of_its_stage(dropped):
    expected = {f"past_key_values.{layer}.{part}": depth for layer, depth in ((1, 1), (2, 1), (3, 3)) for part in PARTS}
    assert stage_of_state(dropped) == expected | {"past_key_values.1.tokens": 1, "past_key_values.3.tokens": 3}


def test_the_inputs_are_added_behind_those_of_the_model(dense, dropped):
    assert dropped.inputs == (*dense.inputs, "image_token_mask", "past_key_values.1.tokens", "past_key_values.3.tokens")
    assert dropped.outputs == (*dense.outputs, "present.1.tokens", "present.3.tokens")
    assert dropped.state == STATE | {f"present.{depth}.tokens": f"past_key_values.{depth}.tokens" for depth in (1, 3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (((),), "found no stage"),
        ((((0, 0.5),),), "found the depths \\[0\\]"),
        ((((2, 0.5), (2, 0.25)),), "found the depths \\[2, 2\\]"),
        ((((1, 0.5), (2, 0.75)),), "found the shares"),
        ((((1, 1.5),),), "found the shares"),
        ((((1, 0.5),), "best"), "found the method 'best'; expected attention, norm, random"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(PassError, match=message):
        DropImageTokens(*options)


def test_a_depth_behind_the_last_block_is_refused_and_leaves_the_graph(dense):
    graph = dense.fork()
    before = graph.signature()
    with pytest.raises(
        PassError,
        match=r"depth 4, but the attentions are in .* 0 to 3, counted from 0; expected a depth from 1 to 3",
    ):
        DropImageTokens(((1, 0.5), (4, 0.25))).run(graph)
    assert graph.signature() == before
    assert graph.inputs == dense.inputs


def test_stages_count_blocks_whose_attention_was_dropped(dense):
    model, graph = vision_language_model(), dense.fork()
    first, second = (f"model.language_model.layers.{layer}.self_attn" for layer in (0, 1))
    torch.nn.init.zeros_(model.get_submodule(f"{second}.o_proj").weight)
    apply(Drop((second,)), graph)
    apply(DropImageTokens(((2, 0.5), (3, 0.25))), graph)
    given = prompt(seed=5)
    outputs, _ = call(graph, feeds(graph, *given, empty(graph, 1)))
    torch.testing.assert_close(outputs["logits"], Pyramid(model, ((2, 0.5), (3, 0.25)))(*given), **SAME)
    assert [outputs[f"present.{layer}.key"].shape[2] for layer in range(LAYERS - 1)] == [18, 12, 9]
    without_first = dense.fork()
    apply(Drop((first,)), without_first)
    with pytest.raises(PassError, match="blocks 1 to 3, counted from 0; expected a depth from 2 to 3"):
        DropImageTokens(((1, 0.5),)).run(without_first)


def test_a_graph_without_a_cache_is_refused(dense):
    graph = dense.fork()
    graph.state = {}
    with pytest.raises(PassError, match="found no attention with a KV cache"):
        DropImageTokens(STAGES).run(graph)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A vision-language model, and its graph from pixels and token ids to logits."""
    model = models.load(str(vision_language_models.saved("llava", tmp_path_factory.mktemp("models"))))
    return model, trace(model)


def test_image_tokens_are_told_by_their_ids(whole):
    model, graph = whole
    given = {name: torch.from_numpy(value) for name, value in vision_language_models.inputs("llava", 5).items()}
    is_image = (given["input_ids"] == vision_language_models.TOKEN).long()
    found, named = graph.fork(), graph.fork()
    apply(DropImageTokens(((1, 0.5),), image_token=vision_language_models.TOKEN), found)
    apply(DropImageTokens(((1, 0.5),)), named)
    assert found.inputs == (*graph.inputs, "past_key_values.1.tokens")
    feeds = {name: torch.from_numpy(value) for name, value in model.preprocess.complete(asnumpy(given)).items()}
    feeds |= {"past_key_values.1.tokens": torch.zeros(2, 0, dtype=torch.int64), "image_token_mask": is_image}
    outputs = dict(zip(found.outputs, run(found, {name: feeds[name] for name in found.inputs}), strict=True))
    expected = run(named, {name: feeds[name] for name in named.inputs})
    for value, wanted in zip(outputs.values(), expected, strict=True):
        assert torch.equal(value, wanted)
    assert outputs["logits"].shape[1] == given["input_ids"].shape[1] - 2  # 2 of 4 image tokens
    with pytest.raises(PassError, match="expected input_ids"):
        DropImageTokens(((1, 0.5),), image_token=1).run(traced(vision_language_model()))


class Hidden:
    """Hides dropped tokens from all others in the layers behind a depth; an oracle for any model of transformers."""

    def __init__(self, kept, tokens):
        seen = torch.zeros(len(kept), tokens, dtype=torch.bool).scatter(1, kept, torch.ones_like(kept).bool())
        self.seen = seen[:, None, None] | torch.eye(tokens, dtype=torch.bool)  # a dropped token sees itself: no NaN

    def __call__(self, layer, args, kwargs):
        mask = kwargs["attention_mask"]
        masked = mask & self.seen if mask.dtype == torch.bool else mask.masked_fill(~self.seen, -1e9)
        return args, kwargs | {"attention_mask": masked}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "paligemma" else pytest.mark.slow)
        for kind in vision_language_models.KINDS
    ],
)
def test_dropping_equals_hiding_in_models_of_every_kind(kind, tmp_path):
    model = models.load(str(vision_language_models.saved(kind, tmp_path)))
    graph = trace(model)
    apply(DropImageTokens(((1, 0.5),), image_token=vision_language_models.TOKEN), graph)
    given = {name: torch.from_numpy(value) for name, value in vision_language_models.inputs(kind, 5).items()}
    for name, first in (("input_ids", [[1], [1]]), ("attention_mask", [[1], [0]])):  # padding, so that a mask is made
        given[name] = torch.cat([torch.tensor(first), given[name]], 1)
    complete = {name: torch.from_numpy(value) for name, value in model.preprocess.complete(asnumpy(given)).items()}
    complete["past_key_values.1.tokens"] = torch.zeros(2, 0, dtype=torch.int64)
    outputs = dict(zip(graph.outputs, run(graph, {name: complete[name] for name in graph.inputs}), strict=True))
    kept, tokens = outputs["present.1.tokens"], given["input_ids"].shape[1]
    assert kept.shape[1] < tokens
    text = next(each for name, each in model.module.named_modules() if name.endswith(("language_model", "text_model")))
    blocks = next(each.layers for each in text.modules() if hasattr(each, "layers"))
    for layer in blocks[1:]:
        layer.register_forward_pre_hook(Hidden(kept, tokens), with_kwargs=True)
    given["position_ids"] = complete["position_ids"]
    if kind == "paligemma":  # which reads its whole prompt in both directions
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    if kind == "gemma3":  # which attends in both directions within an image
        given["token_type_ids"] = (given["input_ids"] == vision_language_models.TOKEN).long()
    with torch.no_grad():
        logits = model.module(**given).logits
    rows = torch.arange(2)[:, None]
    real = given["attention_mask"][rows, kept].bool()
    torch.testing.assert_close(outputs["logits"][real], logits[rows, kept][real], rtol=0, atol=1e-4)


def asnumpy(tensors):
    return {name: value.detach().numpy() for name, value in tensors.items()}


def written(model, graph):
    """A description of the language model for the ONNX writer."""
    axes = {name: {0: "batch", 1: "sequence"} for name in graph.inputs}
    axes["attention_mask"] = {0: "batch", 1: "total_sequence"}
    nodes = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    for name in graph.state.values():
        axis = 1 if name.endswith(".tokens") else 2
        axes[name] = {0: "batch", axis: f"past_{value_of(nodes[name]).shape[axis]}"}
    return Model(
        "llava",
        "",
        "text-generation",
        model,
        model.forward,
        graph.inputs,
        graph.outputs,
        "logits",
        {},
        axes,
        None,
        None,
    )


@pytest.mark.parametrize("method", ["attention", *(pytest.param(method, marks=SLOW) for method in ("norm", "random"))])
def test_the_onnx_file_generates_the_same(model, dense, tmp_path, method):
    graph = dense.fork()
    apply(DropImageTokens(STAGES, method), graph)
    session = onnxruntime.InferenceSession(lower(graph, written(model, graph), tmp_path / "model.onnx"))
    state = empty(graph, 2)

    def step(*given):
        nonlocal state
        values = session.run(graph.outputs, asnumpy(feeds(graph, *given, state)))
        outputs = {name: torch.from_numpy(value) for name, value in zip(graph.outputs, values, strict=True)}
        state = {past: outputs[present] for present, past in graph.state.items()}
        return outputs["logits"]

    given, embedding = padded(prompt(2, seed=4), 2), model.get_input_embeddings()
    found, logits = generated(step, embedding, given)
    expected, wanted = generated(stepping(graph, 2), embedding, given)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, wanted, **SAME)
