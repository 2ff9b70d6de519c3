"""Padded batches give the outputs that transformers gives for each text alone, as its pipelines run them."""

import re

import numpy as np
import pytest
import torch
import transformers

from compressor import models
from compressor.errors import DataError
from compressor.lower.trace import trace
from compressor.models import ModelError
from compressor.models.text.padding import find_padding
from passes.execute.interpreter import run
from tests.text_models import GPT2, OPT, SIZES, WORDS, XLNET, save_letters, save_model

SAME = 1e-5  # of the largest output: padding changes the order of sums
TEXTS = ("a b c", "d e f g h i j", "k")
ENDS = {"eos_token": "</s>", "unk_token": "<unk>"}
PADS = ENDS | {"pad_token": "<pad>"}
LEFT = {"padding_side": "left"}
LLAMA = ("LlamaForSequenceClassification", "LlamaConfig", SIZES)
CASES = {
    "no padding token, and every text ends with the end token": (*LLAMA, ENDS | {"suffix": True}),
    "a decoder without pad_token_id, padded on the left": (*LLAMA, PADS | LEFT),
    "the config and the tokenizer name different tokens": (*LLAMA[:2], SIZES | {"pad_token_id": 0}, PADS),
    "a pad_token_id of -1": (*LLAMA[:2], SIZES | {"pad_token_id": -1}, ENDS),
    "learned positions, padded on the left": ("GPT2ForSequenceClassification", "GPT2Config", GPT2, ENDS | LEFT),
    "pad_token_id is a word": ("GPT2ForSequenceClassification", "GPT2Config", GPT2 | {"pad_token_id": 7}, PADS),
    "no special token at all": ("GPT2ForSequenceClassification", "GPT2Config", GPT2 | {"eos_token_id": None}, {}),
    "features of learned positions, padded on the left": ("GPT2Model", "GPT2Config", GPT2, PADS | LEFT),
    "the last token counts, padded on the right": ("XLNetForSequenceClassification", "XLNetConfig", XLNET, PADS),
    "an encoder, padded on the left": ("BertForSequenceClassification", "BertConfig", SIZES, PADS | LEFT),
    "positions from 2": ("RobertaForSequenceClassification", "RobertaConfig", SIZES, PADS),
    "fewer positions than the longer test text": (
        "BertForSequenceClassification",
        "BertConfig",
        SIZES | {"max_position_embeddings": 8},
        PADS | LEFT,
    ),
    "positions from the mask": ("OPTForSequenceClassification", "OPTConfig", OPT, PADS | LEFT),
}


def alone(folder, name, model):
    """Return the outputs of transformers for each text, without padding."""
    module = getattr(transformers, name).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        for text in TEXTS:
            encoded = tokenizer(text, return_tensors="pt")
            yield getattr(module(**{key: encoded[key] for key in model.inputs}), model.answer)[0]


@pytest.mark.parametrize("case", CASES)
def test_each_row_of_a_batch_equals_its_text_alone(case, tmp_path):
    name, config, fields, options = CASES[case]
    folder = save_letters(save_model(tmp_path, name, config, **fields), **options)
    model = models.load(folder)
    feeds = model.preprocess.text(list(TEXTS), None)
    with torch.inference_mode():
        outputs = model.call(model.module, *(torch.from_numpy(feeds[key]) for key in model.inputs))
    batch = outputs[model.outputs.index(model.answer)]
    for row, (actual, expected) in enumerate(zip(batch, alone(folder, name, model), strict=True)):
        read = actual[torch.from_numpy(feeds["attention_mask"][row]).bool()] if actual.ndim > 1 else actual
        assert (read - expected).abs().max() <= SAME * expected.abs().max()
    assert model.tokenizer.padding_side == ("left" if feeds["attention_mask"][2, 0] == 0 else "right")


def test_the_traced_graph_finds_the_last_token_of_every_row(tmp_path):
    """The graph is traced with other lengths, and the padding token becomes a constant in it."""
    folder = save_letters(save_model(tmp_path, *LLAMA[:2], **SIZES), **ENDS, **LEFT, suffix=True)
    model = models.load(folder)
    graph = trace(model)
    feeds = model.preprocess.text(list(TEXTS), None)
    (logits,) = run(graph, {key: torch.from_numpy(value) for key, value in feeds.items()})
    for actual, expected in zip(logits, alone(folder, LLAMA[0], model), strict=True):
        assert (actual - expected).abs().max() <= SAME * expected.abs().max()


def test_a_changed_padding_is_a_limitation_and_is_in_the_files(tmp_path):
    folder = save_letters(
        save_model(tmp_path / "m", "GPT2ForSequenceClassification", "GPT2Config", **GPT2), **ENDS, **LEFT
    )
    model = models.load(folder)
    reasons = {each.feature: each.reason for each in model.limitations}
    assert "it was set to 2" in reasons["pad_token_id"]
    assert "on the right" in reasons["padding side"]
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == 2
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (saved.padding_side, saved.pad_token) == ("right", "</s>")


def test_a_padding_side_that_no_file_stated_is_in_the_files(tmp_path):
    """transformers writes only what the files stated before; XLNet needs its padding on the left."""
    folder = save_letters(save_model(tmp_path / "m", "XLNetForSequenceClassification", "XLNetConfig", **XLNET), **PADS)
    model = models.load(folder)
    assert model.tokenizer.padding_side == "left"
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"


def test_a_model_that_reads_its_padding_is_a_limitation(tmp_path):
    folder = save_letters(save_model(tmp_path, "FNetForSequenceClassification", "FNetConfig", **SIZES), **PADS)
    reasons = {each.feature: each.reason for each in models.load(folder).limitations}
    assert "depend on the longest text of the batch" in reasons["padding"]


def test_outputs_of_another_length_are_not_the_same_under_any_padding(tmp_path):
    """VITS makes a waveform whose length it draws; comparing two of them ended in a traceback."""
    lengths = iter(range(100, 1000, 7))

    def answer(feeds):
        return torch.zeros(len(feeds["input_ids"]), next(lengths))

    folder = save_letters(save_model(tmp_path, "BertModel", "BertConfig", **SIZES), **PADS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _, limitations = find_padding(answer, tokenizer, transformers.BertConfig(**SIZES), ("input_ids",), None)
    assert any(each.feature == "padding" for each in limitations)


def test_a_decoder_without_tokenizer_needs_a_token_for_its_batches(tmp_path):
    none = {"bos_token_id": None, "eos_token_id": None}
    folder = save_model(tmp_path / "none", "GPT2ForSequenceClassification", "GPT2Config", **GPT2 | none)
    with pytest.raises(ModelError, match=r"set pad_token_id in config\.json"):
        models.load(folder)
    folder = save_model(tmp_path / "end", "GPT2ForSequenceClassification", "GPT2Config", **GPT2)
    model = models.load(folder)
    assert "pad_token_id" in [each.feature for each in model.limitations]
    assert model.classes() == 2


def test_a_language_model_without_padding_token_is_padded_on_the_right(tmp_path):
    folder = save_letters(
        save_model(tmp_path, "GPT2LMHeadModel", "GPT2Config", **GPT2 | {"eos_token_id": None}), **LEFT
    )
    model = models.load(folder)
    feeds = model.preprocess.text(list(TEXTS), None)
    np.testing.assert_array_equal(feeds["attention_mask"].sum(1), [3, 7, 1])
    assert feeds["attention_mask"][:, 0].all()
    assert model.tokenizer.padding_side == "left"  # generation needs it
    assert "padding token" in [each.feature for each in model.limitations]


def test_a_language_model_that_reads_later_tokens_is_padded_where_it_finds_its_padding(tmp_path):
    """CPM-Ant reads the whole text in front of its prompt, and takes the last tokens that are not 0 for the text."""
    fields = {"hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 32, "num_hidden_layers": 2}
    fields |= {"vocab_size": 40, "prompt_types": 4, "prompt_length": 4, "position_bias_num_buckets": 32}
    tokens = {"unk_token": "</s>", "pad_token": "<unk>"}  # 0 is the padding
    folder = save_letters(save_model(tmp_path, "CpmAntForCausalLM", "CpmAntConfig", **fields), **tokens)
    model = models.load(folder, cache=False, sequence_length=12)
    feeds = model.preprocess.text(list(TEXTS), None)
    with torch.inference_mode():
        (logits,) = model.call(model.module, *(torch.from_numpy(feeds[key]) for key in model.inputs))
    for actual, mask, expected in zip(
        logits, feeds["attention_mask"], alone(folder, "CpmAntForCausalLM", model), strict=True
    ):
        assert (actual[torch.from_numpy(mask).bool()] - expected).abs().max() <= SAME * expected.abs().max()
    assert feeds["input_ids"].shape[1] == 12
    assert (model.preprocess.left_padding, model.tokenizer.padding_side) == (0, "left")
    assert "padding side" in [each.feature for each in model.limitations]


def test_a_word_without_a_token_is_an_error(tmp_path):
    """tokenizers raise a bare Exception."""
    folder = save_letters(save_model(tmp_path, "BertModel", "BertConfig", **SIZES), pad_token="<pad>")
    model = models.load(folder)
    with pytest.raises(DataError, match=r"the tokenizer fails on a text .*pass token ids as \.npy"):
        model.preprocess.text(["a b", "strange"], None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_truncated_on_the_side_of_the_tokenizer(side, tmp_path):
    folder = save_letters(
        save_model(tmp_path, "BertModel", "BertConfig", **SIZES), **PADS, length=4, truncation_side=side
    )
    feeds = models.load(folder).preprocess.text(["a b c d e f"], None)
    kept = "cdef" if side == "left" else "abcd"
    assert feeds["input_ids"].tolist() == [[WORDS.index(letter) for letter in kept]]


def test_a_slow_tokenizer_gives_the_tokens_of_transformers(tmp_path):
    """ByT5 has no fast tokenizer; it reads bytes."""
    folder = save_model(tmp_path, "BertModel", "BertConfig", **SIZES | {"vocab_size": 300, "pad_token_id": 0})
    transformers.ByT5Tokenizer(extra_ids=0, model_max_length=10**30).save_pretrained(folder)
    slow = transformers.AutoTokenizer.from_pretrained(folder)
    assert not slow.is_fast
    feeds = models.load(folder).preprocess.text(["abc", "é"], None)
    expected = slow(["abc", "é"], padding=True, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(feeds[name], expected[name])


FUNNEL = {"vocab_size": 40, "block_sizes": [1, 1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
CANINE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def refused(module, tokens):
    """Return whether a module fails on a text of a number of tokens."""
    try:
        with torch.inference_mode():
            module(input_ids=torch.ones(1, tokens, dtype=torch.int64))
    except (RuntimeError, IndexError):
        return True
    return False


@pytest.mark.parametrize(
    "architecture", [("FunnelModel", "FunnelConfig", FUNNEL), ("CanineModel", "CanineConfig", CANINE)]
)
def test_a_model_that_fails_on_a_few_tokens_states_its_shortest_text(architecture, tmp_path):
    """Funnel has no relative positions for four tokens in its last block; CANINE pools four characters into one."""
    name, config, fields = architecture
    model = models.load(save_model(tmp_path, name, config, **fields))
    least = next(each for each in model.limitations if each.feature == "least length")
    shortest = int(re.search(r"less than (\d+) tokens", least.reason)[1])
    assert refused(model.module, shortest - 1)
    assert not refused(model.module, shortest)
    assert model.example["input_ids"].shape[1] >= shortest


def test_texts_below_the_shortest_are_padded_to_it(tmp_path):
    folder = save_letters(save_model(tmp_path, "FunnelModel", "FunnelConfig", **FUNNEL), **PADS)
    model = models.load(folder)
    feeds = model.preprocess.text(["a b"], None)
    assert feeds["attention_mask"].sum() < feeds["attention_mask"].size == 5
    model.call(model.module, *(torch.from_numpy(feeds[name]) for name in model.inputs))


def test_a_text_model_that_fails_on_every_length_is_refused_with_its_first_reason(tmp_path):
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 3}
    folder = save_model(tmp_path, "T5Model", "T5Config", vocab_size=40, **small)
    with pytest.raises(ModelError, match=r"for any text of token ids alone .*exactly one of"):
        models.load(folder)


def test_words_are_padded_to_the_shortest_text_too(tmp_path):
    folder = save_letters(save_model(tmp_path, "FunnelForTokenClassification", "FunnelConfig", **FUNNEL), **PADS)
    model = models.load(folder)
    aligned = model.preprocess.align([["a", "b"]], None)
    assert aligned.feeds["input_ids"].shape == aligned.words.shape == (1, 5)
    assert aligned.words[0].tolist() == [0, 1, -1, -1, -1]
    model.call(model.module, *(torch.from_numpy(aligned.feeds[name]) for name in model.inputs))
