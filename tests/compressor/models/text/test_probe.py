"""The maximum number of tokens is that at which a call of the module still succeeds."""

import functools
import json
import types

import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor import models
from compressor.data.splits import load as load_data
from compressor.models.base import ModelError
from compressor.models.text.probe import (
    TOKENS,
    call_without_cache,
    logits_per_token,
    position_limit,
    reads_texts_alone,
)
from passes.torch_internals import FakeTensorMode
from tests.text_models import GPT2, OPT, SIZES, XLNET, save_letters, save_model

DEBERTA = SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
MODELS = {
    "RobertaModel": SIZES,
    "XLMRobertaModel": SIZES,
    "CamembertModel": SIZES,
    "LongformerModel": SIZES | {"attention_window": 4},
    "MPNetModel": SIZES,
    "EsmModel": SIZES | {"pad_token_id": 1, "mask_token_id": 5, "position_embedding_type": "absolute"},
    "Data2VecTextModel": SIZES,
    "IBertModel": SIZES,
    "RoFormerModel": SIZES,
    "BertModel": SIZES,
    "AlbertModel": SIZES | {"embedding_size": 8},
    "DebertaV2Model": DEBERTA,
    "GPT2Model": GPT2,
    "OPTModel": OPT,
    "XLNetModel": XLNET,
    "LlamaModel": SIZES,
    "T5EncoderModel": T5,
    "CLIPTextModel": SIZES,
}
OFFSET = ("Roberta", "XLMRoberta", "Camembert", "Longformer", "MPNet", "Esm", "Data2VecText", "IBert")
NONE = ("XLNet", "Llama", "T5")


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_is_where_calls_begin_to_fail(name):
    """T5 and MPNet also look up distances, whose rows do not run out."""
    torch.manual_seed(0)
    config = name.removesuffix("Model").removesuffix("Encoder") + "Config"
    module = getattr(transformers, name)(getattr(transformers, config)(**MODELS[name])).eval()
    limit = position_limit(module, module.config.pad_token_id)
    assert limit == (None if name.startswith(NONE) else 32 if name.startswith(OFFSET) else 34)
    token = 1 if module.config.pad_token_id == 0 else 0
    with torch.inference_mode():
        module(input_ids=torch.full((1, 60 if limit is None else limit), token))
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                module(input_ids=torch.full((1, limit + 1), token))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """Save a RoBERTa with 34 positions, of which 32 can be used, and a tokenizer without a maximum length."""
    folder = tmp_path_factory.mktemp("roberta")
    save_model(folder, "RobertaForSequenceClassification", "RobertaConfig", **SIZES)
    return save_letters(folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_texts(path, *lengths):
    letters = np.random.default_rng(0).choice(list("abcdefgh"), (len(lengths), max(lengths)))
    path.write_text("\n".join(" ".join(row[:length]) for row, length in zip(letters, lengths, strict=True)))
    return path


def test_texts_are_truncated_to_the_positions_and_counted(roberta, tmp_path):
    model = models.load(roberta)
    assert model.preprocess.longest == 32
    texts = write_texts(tmp_path / "t.txt", 32, 33, 34, 60, 5, 31)
    data = load_data(str(texts), model.preprocess, task=model.task)
    (limitation,) = [each for each in data.limitations if each.feature == "length of texts"]
    assert limitation.reason == "3 of 6 texts have more than 32 tokens and are truncated"
    pipeline = transformers.pipeline("text-classification", model=str(roberta), top_k=None, function_to_apply="none")
    for part in (data.calibration, data.validation, data.test):
        for batch in part.batches(1):
            (logits,) = model.call(model.module, *(torch.from_numpy(batch.feeds[name]) for name in model.inputs))
            line = texts.read_text().split("\n")[int(batch.ids[0])]
            scores = {each["label"]: each["score"] for each in pipeline(line, truncation=True, max_length=32)[0]}
            expected = [scores[f"LABEL_{number}"] for number in range(2)]
            np.testing.assert_allclose(logits[0].detach(), expected, rtol=1e-4, atol=1e-5)


def test_pairs_are_counted_as_rows(tmp_path):
    folder = save_letters(save_model(tmp_path / "m", "BertModel", "BertConfig", **SIZES), length=3, pad_token="<pad>")
    (tmp_path / "t.csv").write_text("sentence1,sentence2\na b c d,a\na,b c d e\na,b\na b c,a\n")
    for task, reason in (("feature-extraction", "2 of 8 texts"), ("text-classification", "3 of 4 texts")):
        model = models.load(folder, task="feature-extraction")
        (found,) = load_data(str(tmp_path / "t.csv"), model.preprocess, task=task).limitations
        assert found.reason.startswith(reason)


def test_an_export_truncates_everywhere_and_its_files_state_the_length(roberta, tmp_path):
    data = write_texts(tmp_path / "t.txt", *([50, 3, 34] * 4))
    report = compressor.export(roberta, data=data, drop="1", rounds=1, output=tmp_path / "out")
    assert "8 of 12 texts have more than 32 tokens" in str([str(each) for each in report.limitations])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 32
    card = (tmp_path / "out" / "README.md").read_text()
    assert "enable_truncation(32)" in card
    assert compressor.inspect(roberta, data="random").rows()  # its texts are no longer than 32 tokens


def test_texts_without_tokens_are_skipped(tmp_path):
    """A language model needs two tokens: the first has no score."""
    folder = save_letters(save_model(tmp_path / "m", "GPT2LMHeadModel", "GPT2Config", **GPT2), unk_token="<unk>")
    (tmp_path / "t.txt").write_text("a b\nc\nd e\nf g h\n")
    model = models.load(folder)
    data = load_data(str(tmp_path / "t.txt"), model.preprocess, task=model.task)
    (skipped,) = data.skipped
    assert (skipped.id, skipped.reason) == ("1", "too few tokens (1); expected at least 2")


SEQ2SEQ = {
    "vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 34,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "fields", "reason"),
    [
        ("T5Model", "T5Config", T5 | {"decoder_start_token_id": 3}, "input_ids"),
    ],
)
def test_a_model_that_needs_more_than_token_ids_is_refused_in_one_sentence(tmp_path, name, config, fields, reason):
    folder = save_letters(save_model(tmp_path, name, config, **fields), pad_token="<pad>", unk_token="<unk>")
    with pytest.raises(ModelError, match=rf"is a {name}, which does not give .*{reason}.*; pass it as a module"):
        models.load(folder)


LLAVA = {
    "text_config": SIZES | {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 16, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16, "patch_size": 8,
                      "projection_dim": 16},
    "image_token_index": 5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "fields", "said"),
    [
        (
            "LlavaModel",
            "LlavaConfig",
            LLAVA,
            "input pixel_values: the model also takes images, but the export does not.",
        ),
        ("BartModel", "BartConfig", SEQ2SEQ, "input decoder_input_ids: the export does not take it; the decoder reads"),
    ],
)
def test_inputs_that_a_text_model_also_takes_are_named(tmp_path, name, config, fields, said):
    folder = save_letters(save_model(tmp_path, name, config, **fields), pad_token="<pad>", unk_token="<unk>")
    limitations = [str(each) for each in models.load(folder, task="feature-extraction").limitations]
    assert [each for each in limitations if each.startswith(said)]


def test_a_text_model_names_no_other_inputs(tmp_path):
    folder = save_letters(save_model(tmp_path, "BertModel", "BertConfig", **SIZES), pad_token="<pad>")
    assert not [
        each for each in models.load(folder).limitations if "pixel" in each.feature or "decoder" in each.feature
    ]


def test_a_class_that_hands_its_keywords_on_beside_an_argument_of_its_own_is_called_without():
    class Part(torch.nn.Module):
        def forward(self, values, use_cache=None):
            return values, use_cache

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.config = Part(), types.SimpleNamespace(use_cache=True)

        def forward(self, values, **kwargs):
            return self.part(values, use_cache=True, **kwargs)

    assert call_without_cache(Whole(), values=1) == ((1, True), {})
    assert call_without_cache(Part(), values=1) == ((1, False), {"use_cache": False})


@functools.lru_cache(maxsize=4)
def positions(tokens):
    return torch.arange(tokens)


class OfPositions(torch.nn.Module):
    """A language model that keeps its positions in a cache of its file."""

    config = types.SimpleNamespace()

    def forward(self, input_ids):
        return {"logits": (input_ids + positions(input_ids.shape[1]))[..., None].float()}


def test_a_call_with_shapes_alone_leaves_no_tensor_without_elements_in_a_cache():
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert reads_texts_alone(OfPositions())
    assert positions(TOKENS).tolist() == [0, 1, 2]


class Scores(torch.nn.Module):
    """Scores of 23 tokens for each token, without a config."""

    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 23)

    def forward(self, input_ids):
        hidden = self.table(input_ids)
        return self.head(hidden + torch.relu(hidden))


def test_the_logits_of_a_token_are_those_of_the_output(tmp_path):
    for name, config in {
        "LlamaForCausalLM": "LlamaConfig",
        "BertForMaskedLM": "BertConfig",
        "LlamaModel": "LlamaConfig",
    }.items():
        folder = save_model(tmp_path / name, name, config, **SIZES)
        model = models.load(str(folder), cache=name != "LlamaForCausalLM")
        outputs = model.call(model.module, *model.example.values())
        found = outputs[model.outputs.index(model.answer)].shape[-1]
        assert logits_per_token(model) == (None if name == "LlamaModel" else found)
    ids = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    assert logits_per_token(models.load(Scores(), example_inputs=ids, task="fill-mask")) == 23
