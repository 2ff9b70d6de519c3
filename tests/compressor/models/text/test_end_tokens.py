"""Classifiers of texts that read the last end token, held to transformers."""

import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models.text.end_tokens import at_last, reads_end_token
from tests.text_models import SIZES, save_letters, save_model

END, PAD = 2, 3
SPECIAL = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD, "vocab_size": 40}
BART = SPECIAL | {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 34,
    "decoder_start_token_id": END, "attention_type": "original_full", "init_std": 0.2, "num_labels": 4,
}  # fmt: skip
T5 = SPECIAL | {
    "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "decoder_start_token_id": PAD, "num_labels": 4,
}  # fmt: skip
CLASSES = {
    "Bart": BART, "MBart": BART, "Mvp": BART, "PLBart": BART, "BigBirdPegasus": BART, "T5": T5, "MT5": T5, "UMT5": T5,
}  # fmt: skip
TOKENIZER = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def texts(rows, tokens, ends):
    """Return random rows with `ends` end tokens each, the last text shorter than the others by two tokens."""
    generator = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(4, 40, (rows, tokens), generator=generator)
    lengths = torch.tensor([tokens] * (rows - 1) + [tokens - 2])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    for row, length in enumerate(lengths.tolist()):
        ids[row, length - 1] = END
        ids[row, 1 + row : ends + row] = END
    return {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}


@pytest.mark.parametrize("name", CLASSES)
def test_the_file_of_a_classifier_that_reads_its_end_token_equals_transformers(name, tmp_path):
    """At two batch sizes and lengths other than those of the trace, with one and two end tokens in a row."""
    kind = f"{name}ForSequenceClassification"
    folder = save_model(tmp_path / "m", kind, f"{name}Config", **CLASSES[name])
    model = models.load(save_letters(folder, suffix=True, **TOKENIZER))
    path = lower(fold_graph(trace(model)), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    module = getattr(transformers, kind).from_pretrained(folder).eval()
    for rows, tokens, ends in ((1, 5, 1), (3, 12, 1), (3, 9, 2)):
        feeds = texts(rows, tokens, ends)
        with torch.inference_mode():
            expected = module(**feeds).logits
        (found,) = session.run(["logits"], {key: value.numpy() for key, value in feeds.items()})
        assert expected.shape == (rows, 4)
        torch.testing.assert_close(torch.from_numpy(found), expected, **CLOSE)


def test_rows_may_have_different_numbers_of_end_tokens():
    values = torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert at_last(values, mask).flatten().tolist() == [3.0, 4.0, 8.0]


def test_padding_of_texts_leaves_their_classes_unchanged(tmp_path):
    folder = save_model(tmp_path / "m", "BartForSequenceClassification", "BartConfig", **BART)
    model = models.load(save_letters(folder, suffix=True, **TOKENIZER))
    feeds = {key: torch.from_numpy(each) for key, each in model.preprocess.text(["a b c d e", "f"], None).items()}
    with torch.inference_mode():
        (batch,) = model.call(model.module, *feeds.values())
        (alone,) = model.call(model.module, *(each[1:, :2] for each in feeds.values()))
    torch.testing.assert_close(batch[1:], alone, **CLOSE)
    assert not [each for each in model.limitations if each.feature == "end token"]


def test_texts_without_an_end_token_are_a_limitation(tmp_path):
    folder = save_model(tmp_path / "m", "BartForSequenceClassification", "BartConfig", **BART)
    for location in (folder, save_letters(folder, **TOKENIZER)):
        (said,) = [each for each in models.load(location).limitations if each.feature == "end token"]
        assert "at its last token id 2; one without it is classified at its first token" in said.reason


class Mean(transformers.BartForSequenceClassification):
    """A classifier that reads the mean of its end tokens."""

    def forward(self, input_ids):
        hidden = self.model(input_ids)[0]
        selected = hidden[input_ids.eq(END), :].view(hidden.size(0), -1, hidden.size(-1))
        return {"logits": self.classification_head(selected.mean(1))}


def test_only_classifiers_with_the_same_logits_are_read_by_index():
    torch.manual_seed(0)
    config = transformers.BartConfig(**BART)
    own, mean = transformers.BartForSequenceClassification(config).eval(), Mean(config).eval()
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    assert reads_end_token(own, "text-classification")
    assert not reads_end_token(own, "text-generation")
    assert not reads_end_token(mean, "text-classification")
    assert not reads_end_token(bert, "text-classification")
