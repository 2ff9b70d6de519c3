"""A tokenizer with more tokens than the model has embeddings is said when the model is loaded."""

import pytest
import transformers

from compressor import models
from tests.samples import tokenizer_of_words
from tests.text_models import SIZES, save_model

T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
KINDS = {
    "encoder": ("BertForSequenceClassification", "BertConfig", SIZES),
    "decoder with a cache": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "encoder and decoder": ("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": 0}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("surplus", [0, 3])
def test_tokens_without_an_embedding_are_a_limitation(kind, surplus, tmp_path):
    name, config, sizes = KINDS[kind]
    folder = save_model(tmp_path, name, config, **sizes, bos_token_id=1, eos_token_id=2)
    rows = getattr(transformers, name).from_pretrained(folder).get_input_embeddings().num_embeddings
    tokenizer_of_words(folder, vocabulary=rows + surplus)
    found = [each for each in models.load(str(folder)).limitations if each.feature == "tokens of the tokenizer"]
    reasons = [each.reason for each in found]
    assert reasons == [
        f"it has ids up to {rows + 2}, but the model has embeddings up to {rows - 1}, so it fails on texts with 3 of "
        f"its tokens (w{rows}, w{rows + 1}, w{rows + 2}); use the tokenizer that belongs to the model"
    ] * bool(surplus)
