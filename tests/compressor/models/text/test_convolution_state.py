"""Layers with a short convolution keep its last inputs beside the KV cache of the others, as in LFM2."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import ModelError
from compressor.models.text.kv_cache import positions
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.cache_state import bytes_per_token
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop

NEW = 12
LAYERS = ["conv", "full_attention", "conv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lfm2") / "m"
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, layer_types=LAYERS, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, block_auto_adjust_ff_dim=False, initializer_range=0.3,
    )  # fmt: skip
    transformers.Lfm2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def traced(folder):
    model = models.load(folder)
    return model, trace(model)


def text():
    """Return two rows of token ids with a mask, the first behind two tokens of padding."""
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask


def generated(call, state, ids, mask):
    """Return the logits of a prompt and of `NEW` further tokens, each chosen greedily, [rows, 1 + NEW, vocabulary]."""
    logits, new = [], ids
    for _ in range(1 + NEW):
        feeds = {"input_ids": new, "attention_mask": mask, "position_ids": positions(mask, new.shape[1])}
        outputs = call(feeds | state)
        logits.append(outputs["logits"][:, -1])
        new = logits[-1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(new)], 1)
        state = {
            name: outputs[name.replace("past_key_values", "present").replace("past_conv", "present_conv")]
            for name in state
        }
    return np.stack(logits, 1)


def empty(model, names):
    feeds = {"input_ids": np.zeros((2, 1), np.int64), "attention_mask": np.ones((2, 1), np.int64)}
    return {name: value for name, value in model.preprocess.complete(feeds).items() if name in names}


def test_a_file_generates_token_for_token_what_transformers_does(traced, tmp_path, folder):
    model, graph = traced
    session = onnxruntime.InferenceSession(
        str(lower(graph, model, tmp_path / "model.onnx")), providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_outputs()]
    ids, mask = text()
    state = empty(model, model.state.values())
    found = generated(
        lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)), state, ids.numpy(), mask.numpy()
    )
    expected = model.module.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=1 + NEW, min_new_tokens=1 + NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    np.testing.assert_array_equal(found.argmax(-1), np.stack([each.numpy().argmax(-1) for each in expected.logits], 1))
    np.testing.assert_allclose(found, np.stack([each.numpy() for each in expected.logits], 1), atol=1e-4)


def test_names_and_shapes_are_those_of_transformers_js(traced):
    model, graph = traced
    assert dict(model.state) == {
        "present_conv.0": "past_conv.0",
        "present.1.key": "past_key_values.1.key",
        "present.1.value": "past_key_values.1.value",
        "present_conv.2": "past_conv.2",
    }
    assert list(model.example["past_conv.0"].shape) == [2, 32, 3]
    assert model.dynamic_axes["past_conv.0"] == {0: "batch"}
    assert bytes_per_token(graph) == 2 * 2 * 8 * 4  # keys and values of two heads of width 8 in float32
    assert [site.kind for site in find_sites(graph)][::2] == ["conv", "attention", "conv"]


@pytest.mark.parametrize("gone", ["model.layers.0.conv", "model.layers.1.self_attn"])
def test_the_state_of_a_dropped_branch_goes_with_it(traced, folder, gone):
    model, graph = traced
    fork = graph.fork()
    (site,) = [each for each in find_sites(fork) if each.name == gone]
    apply(Drop((site.name,)), fork)
    layer = gone.split(".")[2]
    assert {name for name in model.state.values() if f".{layer}" in name} == set(model.state.values()) - set(
        fork.inputs
    )
    other = transformers.Lfm2ForCausalLM.from_pretrained(folder).eval()
    part = other.get_submodule(gone)
    none = lambda hidden_states, **_: hidden_states * 0  # noqa: E731
    part.forward = none if gone.endswith("conv") else lambda hidden_states, **_: (hidden_states * 0, None)
    ids, mask = text()
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions(mask.numpy(), 7)}
    feeds |= empty(model, fork.state.values())
    with torch.inference_mode():
        expected = other(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = run(fork, {name: torch.from_numpy(value) for name, value in feeds.items()})[0]
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=0)


def test_recurrent_states_are_refused_in_a_sentence(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    transformers.Qwen3NextForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layer 0 of its cache keeps a recurrent state.*pass --no-cache"):
        models.load(tmp_path)
