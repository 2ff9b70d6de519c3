"""Texts that the tokenizer does not know are refused, however they are stored."""

import json

import numpy as np
import pytest

from compressor.data.splits import load
from compressor.data.text_lengths import MOST_UNKNOWN
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

START, UNKNOWN = 0, 1


def words(*, unknown=UNKNOWN):
    """Return the preprocessing of a model whose tokenizer knows the words w2 to w9, and starts each text."""

    def row(text):
        return [START, *(int(word[1:]) if word[1:].isdigit() else UNKNOWN for word in text.split())]

    def tokenize(first, second=None):
        pairs = zip(first, first if second is None else second, strict=True)
        rows = [row(one) if second is None else [*row(one), *row(two)[1:]] for one, two in pairs]
        longest = max(map(len, rows))
        return {"input_ids": np.array([[*ids, *[START] * (longest - len(ids))] for ids in rows])}

    def lengths(first, second=None):
        return [len(row(text)) for text in first]

    example = {"input_ids": np.zeros((2, 4), np.int64)}
    return Preprocess(
        ("input_ids",),
        "text",
        example,
        text=tokenize,
        lengths=lengths,
        special=frozenset({START, UNKNOWN}),
        unknown=unknown,
        tokenizer="WordTokenizer of folder",
    )


def lines(share):
    """Return 20 texts of ten words, of which a share is unknown."""
    strange = round(share * 10)
    return ["x " * strange + "w3 " * (10 - strange) for _ in range(20)]


def written(folder, form, texts):
    path = folder / f"texts.{form}"
    if form == "txt":
        path.write_text("\n".join(texts))
    elif form == "csv":
        path.write_text("text,other\n" + "\n".join(f"{text},{text}" for text in texts))
    else:
        path.write_text("\n".join(json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(texts)))
    return str(path)


@pytest.mark.parametrize("form", ["txt", "csv", "jsonl"])
def test_texts_of_unknown_words_are_refused_with_the_name_of_the_tokenizer(tmp_path, form):
    task = "text-classification" if form == "jsonl" else "feature-extraction"
    path = written(tmp_path, form, lines(0.2))
    with pytest.raises(
        DataError, match=r"20% of the tokens in .* are unknown to the tokenizer \(WordTokenizer of folder"
    ):
        load(path, words(), task=task)
    assert load(written(tmp_path, form, lines(MOST_UNKNOWN)), words(), task=task).calibration


def test_a_token_that_marks_something_else_is_not_counted(tmp_path):
    assert load(written(tmp_path, "txt", lines(1.0)), words(unknown=None), task="feature-extraction").calibration
