"""The engines of an encoder and its decoder as one engine."""

import numpy as np
import pytest

from runtimes.base.encoder_decoder import EncoderDecoderEngine, parts_of
from runtimes.base.protocols import BuildOptions, RuntimesError
from runtimes.base.registry import runtime

ONE = BuildOptions(threads=1)
CACHES = ("past_key_values.0.decoder.key", "past_key_values.0.encoder.key")


def test_only_an_encoder_with_both_decoders_has_parts(tmp_path):
    encoder = tmp_path / "encoder_model.onnx"
    for name in ("encoder_model.onnx", "decoder_model.onnx", "model.onnx"):
        (tmp_path / name).touch()
    assert parts_of(encoder) is None
    (tmp_path / "decoder_with_past_model.onnx").touch()
    assert [part.name for part in parts_of(encoder)] == [
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx",
    ]  # fmt: skip
    assert parts_of(tmp_path / "decoder_model.onnx") is None
    assert parts_of(tmp_path / "model.onnx") is None
    assert parts_of(tmp_path / "openvino_encoder_model.xml") is None


@pytest.fixture
def engine(tmp_path):
    """Hidden states are the source, keys are the tokens, and logits are the sum of all keys and of the mask."""
    from onnx import TensorProto, helper, save

    def node(op, inputs, output, **attributes):
        return helper.make_node(op, inputs, [output], **attributes)

    def write(name, nodes, inputs, outputs):
        ends = [
            [helper.make_tensor_value_info(each, kind, [None] * rank) for each, kind, rank in side]
            for side in (inputs, outputs)
        ]
        axes = [helper.make_tensor(f"axes{axis}", TensorProto.INT64, [len(axis)], axis) for axis in ([1, 3], [1], [2])]
        for each, known in zip(axes, ("unsqueezed", "head", "tokens"), strict=True):
            each.name = known
        graph = helper.make_graph(nodes, name, *ends, axes)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        save(model, str(tmp_path / f"{name}.onnx"))

    ids, mask = ("input_ids", TensorProto.INT64, 2), ("encoder_attention_mask", TensorProto.INT64, 2)
    hidden = ("encoder_hidden_states", TensorProto.FLOAT, 2)
    keys = [(f"present.0.{part}.key", TensorProto.FLOAT, 4) for part in ("decoder", "encoder")]
    pasts = [(name, TensorProto.FLOAT, 4) for name in CACHES]
    logits = ("logits", TensorProto.FLOAT, 3)
    new = [node("Cast", ["input_ids"], "tokens_", to=1), node("Unsqueeze", ["tokens_", "unsqueezed"], "new")]
    masked = node("Cast", ["encoder_attention_mask"], "mask", to=1)

    def summed(own, cross):
        sums = [node("ReduceSum", [value, "tokens"], f"sum {value}", keepdims=0) for value in (own, cross)]
        rows = [
            masked,
            node("ReduceSum", ["mask", "head"], "rows", keepdims=1),
            node("Unsqueeze", ["rows", "head"], "r"),
        ]
        added = [node("Add", [f"sum {own}", f"sum {cross}"], "both"), node("Add", ["both", "r"], "logits")]
        return [*sums, *rows, *added]

    write(
        "encoder_model",
        [node("Cast", ["input_ids"], "last_hidden_state", to=1)],
        [ids],
        [("last_hidden_state", TensorProto.FLOAT, 2)],
    )
    first = [
        node("Identity", ["new"], "present.0.decoder.key"),
        node("Unsqueeze", ["encoder_hidden_states", "unsqueezed"], "present.0.encoder.key"),
    ]
    write(
        "decoder_model",
        [*new, *first, *summed("present.0.decoder.key", "present.0.encoder.key")],
        [ids, mask, hidden],
        [logits, *keys],
    )
    longer = node("Concat", [CACHES[0], "new"], "present.0.decoder.key", axis=2)
    write(
        "decoder_with_past_model",
        [*new, longer, *summed("present.0.decoder.key", CACHES[1])],
        [ids, mask, *pasts],
        [logits, keys[0]],
    )
    with runtime("onnxruntime").load(tmp_path / "encoder_model.onnx", ONE) as opened:
        assert isinstance(opened, EncoderDecoderEngine)
        yield opened


SOURCE = {"input_ids": np.array([[3, 4]]), "attention_mask": np.array([[1, 1]])}
EMPTY = {CACHES[0]: np.zeros((1, 1, 0, 1), np.float32)}


def test_a_first_call_and_one_further_token(engine):
    assert engine.inputs == ("input_ids", "attention_mask", "decoder_input_ids", CACHES[0])
    first = engine.run({**SOURCE, **EMPTY, "decoder_input_ids": np.array([[10, 20]])})
    assert tuple(first) == engine.outputs
    assert first["logits"].item() == 3 + 4 + 10 + 20 + 2
    assert first["encoder_last_hidden_state"].tolist() == [[3, 4]]
    step = {CACHES[0]: first["present.0.decoder.key"], CACHES[1]: first["present.0.encoder.key"] * 2}
    step |= {"attention_mask": SOURCE["attention_mask"], "decoder_input_ids": np.array([[100]])}
    further = engine.run(step)
    assert further["logits"].item() == 2 * (3 + 4) + 10 + 20 + 100 + 2  # the caches given, not those of a source
    assert further["present.0.decoder.key"].ravel().tolist() == [10, 20, 100]
    assert "encoder_last_hidden_state" not in further


def test_a_source_with_a_cache_runs_all_three_files(engine):
    past = {CACHES[0]: np.full((1, 1, 1, 1), 1000, np.float32)}
    found = engine.run({**SOURCE, **past, "decoder_input_ids": np.array([[10]])})
    assert tuple(found) == engine.outputs
    assert found["logits"].item() == 3 + 4 + 1000 + 10 + 2


def test_bound_calls_are_the_first_one_and_a_further_token(engine):
    engine.bind({**SOURCE, **EMPTY, "decoder_input_ids": np.array([[10]])})()
    with pytest.raises(RuntimesError, match="caches of self-attentions are not empty; expected the caches of cross"):
        engine.bind({**SOURCE, CACHES[0]: np.ones((1, 1, 1, 1), np.float32), "decoder_input_ids": np.array([[10]])})
    step = {name: np.ones((1, 1, 2, 1), np.float32) for name in CACHES}
    engine.bind({**step, "attention_mask": np.array([[1, 1]]), "decoder_input_ids": np.array([[1]])})()
    with pytest.raises(RuntimesError, match=r"expects .*past_key_values\.0\.encoder\.key"):
        engine.bind(
            {CACHES[0]: step[CACHES[0]], "attention_mask": np.array([[1]]), "decoder_input_ids": np.array([[1]])}
        )
