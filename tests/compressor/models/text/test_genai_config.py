"""ONNX Runtime GenAI opens the folder of a language model and generates what torch generates."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime_genai
import pytest
import torch

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.text.genai_config import FILE, why_not, write
from compressor.target.registry import target_named
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from runtimes.base.protocols import BuildOptions
from tests.decoders import LAYERS, saved

PROMPT = [5, 9, 33, 21]
LENGTH = 24


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """Return a Llama, and its graph without the attention of its second block."""
    model = models.load(saved(tmp_path_factory.mktemp("model"), "Llama", eos_token_id=63))
    graph = trace(model)
    apply(Drop((find_sites(graph)[2],)), graph)
    return model, graph


def greedy(model, graph):
    """Generate with torch, without a cache."""
    ids = torch.tensor([PROMPT])
    while ids.shape[1] < LENGTH:
        feeds = {name: value[:1, :, :0] for name, value in model.example.items() if name.startswith("past")}
        feeds |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        feeds["position_ids"] = torch.arange(ids.shape[1])[None]
        following = run(graph, feeds)[0][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
        if int(following) == 63:
            break
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime_fused"])
def test_generation_is_that_of_torch_token_for_token(dropped, target, tmp_path):
    model, graph = dropped
    source = lower(fold_graph(graph), model, tmp_path / "model.onnx")
    engine = target_named(target).build(source, tmp_path, BuildOptions(device="cpu"))
    assert write(tmp_path, engine.name, target, "cpu", model, graph) == ()
    opened = onnxruntime_genai.Model(str(tmp_path))
    parameters = onnxruntime_genai.GeneratorParams(opened)
    parameters.set_search_options(max_length=LENGTH, do_sample=False)
    generator = onnxruntime_genai.Generator(opened, parameters)
    generator.append_tokens(np.array([PROMPT], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[len(PROMPT) :] == greedy(model, graph)


def test_the_layers_are_those_with_a_cache(dropped, tmp_path):
    model, graph = dropped
    write(tmp_path, "model.fused.onnx", "onnxruntime_fused", "cpu", model, graph)
    found = json.loads((tmp_path / FILE).read_text())
    decoder = found["model"]["decoder"]
    assert (decoder["filename"], decoder["num_hidden_layers"]) == ("model.fused.onnx", LAYERS - 1)
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (2, 8)
    assert found["model"]["eos_token_id"] == [63]
    assert found["search"]["past_present_share_buffer"] is True


def test_no_file_is_written_where_it_could_not_be_opened(dropped, tmp_path):
    model, graph = dropped
    assert write(tmp_path, "openvino_model.xml", "openvino", "cpu", model, graph) == ()
    endless = replace(model, preprocess=replace(model.preprocess, longest=None))
    (limitation,) = write(tmp_path, "model.onnx", "onnxruntime", "cpu", endless, graph)
    assert str(limitation) == (
        "ONNX Runtime GenAI: the folder has no genai_config.json, because the maximum number of tokens of the model is "
        "unknown."
    )
    (limitation,) = write(tmp_path, "model.onnx", "onnxruntime", "cuda", model, graph)
    assert "because it was not tried with engines on cuda" in str(limitation)
    assert not list(tmp_path.iterdir())


def test_caches_of_different_sizes_are_a_reason(tmp_path):
    model = models.load(saved(tmp_path, "Gemma4Text"))
    assert why_not(trace(model), model) == "the caches of its layers differ in size"
