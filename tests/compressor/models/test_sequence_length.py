"""Tests of exports for texts and clips of one length: they are padded and cut, and compared with transformers."""

import re

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.api import export
from compressor.data.sliding_windows import Window, window_batches
from compressor.errors import CompressorError, SettingsError
from compressor.lower import traced_model
from compressor.lower.fold_graph import fold_graph
from compressor.lower.size_guards import SizeError, SizeGuard
from compressor.lower.trace import OneLengthError, trace_with_guards
from compressor.lower.write_onnx import lower
from compressor.models.base import ModelError, NoSequenceLengthError
from compressor.report.report import REPORT
from compressor.settings import Settings
from compressor.workspace.json_files import OBJECT, read_json
from compressor.workspace.progress import Steps
from tests.sound_models import tone, wav2vec2
from tests.text_models import SIZES, save_letters, save_model

LENGTH = 12
PADS = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<s>"}
FUNNEL = {
    "vocab_size": 40, "block_sizes": [1, 1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32,
    "pad_token_id": 3, "initializer_std": 0.5,
}  # fmt: skip
CANINE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_hash_buckets": 50
}  # fmt: skip
RWKV = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "context_length": 64}
CODEC = {
    "num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16, "upsampling_ratios": [4, 2],
    "num_lstm_layers": 1, "target_bandwidths": [24.0], "sampling_rate": 16_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def funnel(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("funnel"), "FunnelForMaskedLM", "FunnelConfig", **FUNNEL)
    return save_letters(folder, **PADS)


def written(model, folder):
    """Return a session of the file of a model."""
    graph, _ = trace_with_guards(model)
    path = lower(fold_graph(graph), model, folder / "model.onnx")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def shapes(session):
    return {
        each.name: [size if isinstance(size, int) else None for size in each.shape] for each in session.get_inputs()
    }


# ------------------------------------------------------------------------------------------------------------- texts


def test_without_a_length_the_refusal_names_the_option(funnel):
    with pytest.raises(OneLengthError, match=r"any number of tokens .*; pass --sequence-length N to export it for N"):
        trace_with_guards(models.load(funnel))


def test_a_refusal_of_data_of_other_sizes_names_the_option(tmp_path, monkeypatch):
    folder = save_letters(save_model(tmp_path / "m", "BertForMaskedLM", "BertConfig", **SIZES), **PADS)
    (tmp_path / "texts.txt").write_text("a b c\n" * 8 + "a b c d e f g h\n" * 8)

    def traced(model):
        graph, _ = trace_with_guards(model)
        return graph, (SizeGuard("L['tensors'][0].size()[1] <= 4", model.inputs),)

    monkeypatch.setattr(traced_model, "trace_with_guards", traced)
    settings = Settings(model=str(folder), data=str(tmp_path / "texts.txt"), drop="none", tokens="none")
    with pytest.raises(SizeError, match=r"; pass --sequence-length N to export it for N tokens alone, to which texts"):
        traced_model.load(settings, Steps(None))


def test_a_refusal_names_no_option_that_does_not_help(tmp_path):
    """Hashing of Reformer draws random numbers in lists whose length is that of the batch."""
    fields = {"attn_layers": ["local"], "attention_head_size": 8, "hidden_size": 16, "num_attention_heads": 2}
    folder = save_model(
        tmp_path, "ReformerModel", "ReformerConfig", vocab_size=40, axial_pos_shape=[4, 4], axial_pos_embds_dim=[8, 8],
        feed_forward_size=16, local_attn_chunk_length=4, max_position_embeddings=16, **fields,
    )  # fmt: skip
    with pytest.raises(CompressorError) as caught:
        trace_with_guards(models.load(folder))
    assert "--sequence-length" not in str(caught.value)
    assert "is a ReformerModel, which computes with the number of rows in Python" in str(caught.value)


def test_texts_are_padded_and_truncated_to_the_length(funnel):
    model = models.load(funnel, sequence_length=LENGTH)
    feeds = model.preprocess.text(["a b c", " ".join("abcdefghijklmnopqrst")], None)
    assert feeds["input_ids"].shape == (2, LENGTH)
    assert feeds["attention_mask"].sum(1).tolist() == [3, LENGTH]
    assert feeds["input_ids"][0].tolist()[3:] == [3] * (LENGTH - 3)
    aligned = model.preprocess.align(["a b c"], None)
    assert aligned.feeds["input_ids"].shape == aligned.words.shape == (1, LENGTH)
    assert model.preprocess.tokenizer is not None
    assert model.tokenizer.model_max_length == LENGTH


def test_the_file_computes_what_the_class_does_for_padded_texts(funnel, tmp_path):
    model = models.load(funnel, sequence_length=LENGTH)
    session = written(model, tmp_path)
    assert shapes(session) == {"input_ids": [None, LENGTH], "attention_mask": [None, LENGTH]}
    texts = ["a b c d e f g h i j k l", "m n o", "p q r s t u v"]
    feeds = model.preprocess.text(texts, None)
    (logits,) = session.run(["logits"], feeds)
    own = transformers.FunnelForMaskedLM.from_pretrained(funnel).eval()
    with torch.inference_mode():
        expected = own(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_padding_that_changes_the_outputs_is_stated_and_other_padding_is_not(funnel, tmp_path):
    """Funnel pools neighbours, padding among them; BERT masks it: the padded row has the outputs of the row alone."""
    said = {each.feature: each.reason for each in models.load(funnel, sequence_length=LENGTH).limitations}
    assert said["length of texts"].startswith(
        f"the export takes only texts of {LENGTH} tokens; shorter ones are padded"
    )
    assert f"no padding to {LENGTH} tokens leaves the outputs of a text unchanged" in said["padding"]
    folder = save_letters(save_model(tmp_path, "BertModel", "BertConfig", **SIZES, pad_token_id=3), **PADS)
    model = models.load(folder, sequence_length=LENGTH)
    assert "padding" not in {each.feature for each in model.limitations}
    padded, alone = model.preprocess.text(["a b c"], None), {"input_ids": np.array([[4, 5, 6]])}
    with torch.inference_mode():
        long = model.call(model.module, *(torch.from_numpy(padded[name]) for name in model.inputs))[0]
        short = model.module(torch.from_numpy(alone["input_ids"])).last_hidden_state
    torch.testing.assert_close(long[:, :3], short, atol=1e-4, rtol=1e-4)


def test_a_model_that_reads_characters_is_exported_for_one_length(tmp_path):
    folder = save_model(tmp_path, "CanineForSequenceClassification", "CanineConfig", **CANINE)
    transformers.CanineTokenizer().save_pretrained(folder)
    model = models.load(folder, sequence_length=20)
    session = written(model, tmp_path)
    feeds = model.preprocess.text(["a short text", "another, far longer one of more characters"], None)
    assert {value.shape for value in feeds.values()} == {(2, 20)}
    (logits,) = session.run(["logits"], feeds)
    with torch.inference_mode():
        expected = model.module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_a_recurrent_language_model_needs_no_cache_beside_the_length(tmp_path):
    folder = save_letters(save_model(tmp_path, "RwkvForCausalLM", "RwkvConfig", **RWKV), **PADS)
    with pytest.raises(ModelError, match="a KV cache grows with every token; pass --no-cache too"):
        models.load(folder, sequence_length=LENGTH)
    model = models.load(folder, sequence_length=LENGTH, cache=False)
    session = written(model, tmp_path)
    feeds = model.preprocess.text(["a b c", "d e f g h i j k l m n o p"], None)
    (logits,) = session.run(["logits"], {name: feeds[name] for name in model.inputs})
    with torch.inference_mode():  # padding is behind the text, where no earlier token reads it
        expected = model.module(input_ids=torch.from_numpy(feeds["input_ids"][:1, :3])).logits.numpy()
    np.testing.assert_allclose(logits[:1, :3], expected, atol=1e-4 * np.abs(expected).max())


def test_windows_are_padded_to_the_length():
    text = {"input_ids": np.arange(5), "attention_mask": np.ones(5, np.int64)}
    (batch,) = window_batches([(0, text)], Window(4, 2), dict, 8, least=4)
    assert batch.feeds["input_ids"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 4]]
    assert batch.feeds["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.scored.tolist() == [[False, True, True, True], [False, False, True, False]]


def test_windows_of_a_model_that_is_padded_on_the_left():
    text = {"input_ids": np.arange(1, 6), "attention_mask": np.ones(5, np.int64)}
    (batch,) = window_batches([(0, text)], Window(4, 2), dict, 8, least=5, left=9)
    assert batch.feeds["input_ids"].tolist() == [[9, 1, 2, 3, 4], [9, 9, 3, 4, 5]]
    assert batch.feeds["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert batch.scored.tolist() == [[False, False, True, True, True], [False, False, False, False, True]]


# ------------------------------------------------------------------------------------------------------------- sound


def test_a_codec_that_computes_paddings_from_buffers_is_exported_for_one_length(tmp_path):
    folder = save_model(tmp_path, "EncodecModel", "EncodecConfig", **CODEC)
    transformers.EncodecFeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    model = models.load(folder, sequence_length=163)  # its LSTM is unrolled, step by step
    buffers = dict(model.module.named_buffers())
    session = written(model, tmp_path)
    assert shapes(session)["input_values"] == [None, 1, 163]
    kept = dict(model.module.named_buffers())
    assert {name: value.tolist() for name, value in kept.items()} == {
        name: value.tolist() for name, value in buffers.items()
    }
    clips = [tone(seconds, 200.0, number).astype(np.float32) for number, seconds in enumerate((0.005, 0.01, 0.02))]
    feeds = model.preprocess.audio(clips)
    assert all(value.shape[-1] == 163 for value in feeds.values())
    assert not feeds["input_values"][0, 0, 80:].any()
    (sound,) = session.run([model.answer], {name: feeds[name] for name in model.inputs})
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(feeds["input_values"])).audio_values.numpy()
    np.testing.assert_allclose(sound, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_the_refusal_of_a_codec_names_the_option(tmp_path):
    """It is named after the model was traced for the length of its example, whose LSTM is unrolled."""
    folder = save_model(tmp_path, "EncodecModel", "EncodecConfig", **CODEC)
    transformers.EncodecFeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    with pytest.raises(OneLengthError, match=r"any number of samples .*pass --sequence-length N to export it for N s"):
        trace_with_guards(models.load(folder))


def test_clips_are_padded_and_cut_to_the_length(tmp_path):
    wav2vec2(tmp_path)
    model = models.load(tmp_path, sequence_length=4_000)
    clips = [tone(seconds, 200.0, number).astype(np.float32) for number, seconds in enumerate((0.1, 0.5))]
    feeds = model.preprocess.audio(clips)
    assert {name: value.shape for name, value in feeds.items()} == dict.fromkeys(model.inputs, (2, 4_000))
    assert feeds["attention_mask"].sum(1).tolist() == [1_600, 4_000]
    assert model.preprocess.seconds == 0.25
    assert shapes(written(model, tmp_path)) == {name: [None, 4_000] for name in model.inputs}
    said = {each.feature: each.reason for each in model.limitations}
    assert "only clips of 4000 samples; shorter ones are padded, longer ones cut" in said["length of the clips"]


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_length_that_the_model_does_not_take_is_refused(funnel, tmp_path):
    with pytest.raises(ModelError, match=r"--sequence-length 2, but .* fails on texts of 2 tokens .*give another"):
        models.load(funnel, sequence_length=2)
    folder = save_model(tmp_path, "BertModel", "BertConfig", **SIZES)
    with pytest.raises(ModelError, match="takes at most 34 tokens; give 34"):
        models.load(folder, sequence_length=35)


def test_a_model_of_images_takes_no_length():
    with pytest.raises(NoSequenceLengthError, match=r"model of timm .*: leave --sequence-length out"):
        models.load("vit_tiny_patch16_224", random_weights=True, sequence_length=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "transformers", "drop": "block:1"}, "whose files take texts of any length"),
        ({"max_length": 8, "drop": "none"}, "found --max-length 8 with --sequence-length 16"),
        ({"max_memory": 2**30, "drop": "1", "defer_build": True}, "found --sequence-length 16 with --max-memory"),
    ],
)
def test_options_that_do_not_fit_a_length_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        Settings(model="model", data="random", sequence_length=16, **options)


def test_rows_of_another_length_are_refused(funnel, tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((6, 8), np.int64))
    with pytest.raises(CompressorError, match=r"rows of 8 tokens; expected 12, as --sequence-length has"):
        export(
            funnel, data=tmp_path / "rows.npy", drop="none", tokens="none", sequence_length=LENGTH,
            output=tmp_path / "out",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ whole exports


def test_an_export_states_its_length_and_its_card_pads_to_it(funnel, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join("abcdefghijklmnopqrstuvwxyz"[start : start + 9]) for start in range(12)))
    folder = tmp_path / "out"
    export(funnel, data=texts, drop="none", tokens="none", sequence_length=LENGTH, output=folder, rounds=1)
    report = read_json(folder / REPORT, OBJECT, remedy="")
    assert report["settings"]["sequence_length"] == report["model"]["text_length"] == LENGTH
    assert any(f"only texts of {LENGTH} tokens" in str(each) for each in report["limitations"])
    card = (folder / "README.md").read_text()
    assert f"only texts of {LENGTH} tokens" in card
    assert f"tokenizer.enable_truncation({LENGTH}" in card
    assert re.search(rf"tokenizer\.enable_padding\(.*length={LENGTH}\)", card)
