"""The merged file of a decoder, run as Optimum and transformers.js run it, against transformers token for token."""

import numpy as np
import onnx
import onnxruntime
import pytest

from compressor.lower.cut.encoder_decoder import cut
from compressor.lower.cut.merge_decoder import merge
from compressor.quantize.half_precision import to_fp16
from tests.encoder_decoders import DROPPED, TEXT, build, generated, lowered, source, without

NEW = 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder_decoders")


def opened(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session, feeds):
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
    return dict(zip(names, values, strict=True))


def generate(folder, feeds, start):
    """Greedy tokens: caches of no token in the first call, and those of cross-attentions kept from it."""
    encoder, decoder = opened(folder / "encoder_model.onnx"), opened(folder / "decoder_model_merged.onnx")
    tokens = np.full((2, 1), start)
    states = {"encoder_hidden_states": run(encoder, feeds)["last_hidden_state"], "use_cache_branch": np.array([False])}
    states |= {"encoder_attention_mask": feeds["attention_mask"]} if "attention_mask" in feeds else {}
    pasts = [value for value in decoder.get_inputs() if value.name.startswith("past_key_values.")]
    states |= {past.name: np.zeros((2, past.shape[1], 0, past.shape[3]), np.float32) for past in pasts}
    for number in range(NEW):
        outputs = run(decoder, states | {"input_ids": tokens[:, -1:]})
        tokens = np.concatenate([tokens, outputs["logits"][:, -1:].argmax(-1)], 1)
        kept = {name: value for name, value in outputs.items() if number == 0 or ".encoder." not in name}
        states |= {name.replace("present", "past_key_values"): value for name, value in kept.items()}
        states["use_cache_branch"] = np.array([True])
    return tokens


def check(kind, dropped, folder):
    module = without(build(kind), dropped)
    onnx.checker.check_model(merge(folder), full_check=True)
    feeds = source(kind, 7)
    found = generate(folder, feeds, module.config.decoder_start_token_id)
    assert found.tolist() == generated(module, feeds, NEW).tolist()


@pytest.mark.parametrize("kind", ["whisper", *(pytest.param(kind, marks=pytest.mark.slow) for kind in TEXT)])
def test_generation_is_that_of_transformers(kind, shared, tmp_path):
    _, encoder = lowered(kind, DROPPED[kind], shared, tmp_path)
    check(kind, DROPPED[kind], encoder.parent)


def test_weights_are_stored_once(shared, tmp_path):
    _, encoder = lowered("bart", (), shared, tmp_path)
    path = merge(encoder.parent)
    both = [onnx.load(encoder.with_name(f"{stem}.onnx")) for stem in ("decoder_model", "decoder_with_past_model")]
    merged = onnx.load(path)
    expected = {each.name: each.raw_data for model in both for each in model.graph.initializer}
    assert {each.name: each.raw_data for each in merged.graph.initializer} == expected
    (node,) = merged.graph.node
    assert [len(attribute.g.initializer) for attribute in node.attribute] == [0, 0]
    assert [value.name for value in merged.graph.input][-1] == "use_cache_branch"
    caches = [value.name for value in merged.graph.input if value.name.startswith("past")]
    assert caches == [value.name for value in both[1].graph.input if value.name.startswith("past")]
    assert [value.name for value in merged.graph.output] == [value.name for value in both[0].graph.output]
    check("bart", (), encoder.parent)


def test_half_precision_and_weights_beside_the_file(shared, tmp_path, monkeypatch):
    _, encoder = lowered("bart", (), shared, tmp_path)
    graph = onnx.load(tmp_path / "whole.onnx").graph
    names = [*(name for node in graph.node for name in node.output), *(value.name for value in graph.input)]
    to_fp16(tmp_path / "whole.onnx", tmp_path / "half.onnx", dict.fromkeys(names, 1.0))
    monkeypatch.setattr("compressor.lower.cut.part.EXTERNAL_ABOVE", 0)
    cut(tmp_path / "half.onnx", tmp_path)
    check("bart", (), encoder.parent)
    assert (tmp_path / "decoder_model_merged.onnx.data").is_file()
