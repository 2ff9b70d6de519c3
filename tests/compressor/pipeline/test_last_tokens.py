"""Tests of the limitation of angular distances, on encoders whose tokenizers end texts with a token or not."""

import re
from pathlib import Path

import pytest

from compressor.api import inspect
from tests.text_models import SIZES, save_letters, save_model

ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@pytest.mark.parametrize("suffix", [True, False])
def test_texts_that_end_in_one_token_are_a_limitation(tmp_path: Path, suffix: bool) -> None:
    """Texts of letters that end differently, except for the token that the tokenizer adds."""
    model = save_letters(save_model(tmp_path / "model", "BertModel", "BertConfig", **SIZES), **ENDS, suffix=suffix)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(" ".join("abcdefghij"[: 3 + row % 7]) for row in range(24)))
    found = inspect(str(model), data=str(texts))
    about = [each for each in found.limitations if each.feature == "angular distances"]
    assert bool(about) == suffix
    assert not suffix or re.search(r"token 2 in (\d+) of \1 texts", about[0].reason)
