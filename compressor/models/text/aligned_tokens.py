"""Tokenization with the places of tokens in texts, for heads whose labels are words or spans."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from compressor.errors import DataError
from compressor.models.preprocess import Aligned


def tokenize_aligned(
    tokenizer: Any, inputs: tuple[str, ...], longest: int, least: int, first: list[Any], second: list[str] | None
) -> Aligned:
    """Tokenize a batch with a fast tokenizer, padded to the longest row, or to the least number of tokens.

    A pair is a question with a context, of which only the context is truncated.

    Args:
        tokenizer: a fast tokenizer of transformers.
        inputs: input names of the model.
        longest: maximum number of tokens.
        least: minimum number of tokens of a batch; 0 for any.
        first: texts, or texts split into words.
        second: second texts, if any.

    Raises:
        DataError: the tokenizer cannot pad, or a question leaves no room for its context.
    """
    if tokenizer.pad_token is None:
        raise DataError("the tokenizer has no padding token, so texts cannot be batched; set its pad_token")
    encode = partial(
        tokenizer,
        first,
        second,
        is_split_into_words=bool(first) and isinstance(first[0], list),
        truncation="only_second" if second is not None else True,
        return_offsets_mapping=True,
        return_tensors="np",
    )
    try:
        encoded = encode(padding=True, max_length=longest)
        if encoded["input_ids"].shape[1] < least:
            encoded = encode(padding="max_length", max_length=least)
    except Exception as error:  # the Rust tokenizer raises plain exceptions
        if "trunc" not in str(error).lower():
            raise
        raise DataError(
            f"a question has {longest} tokens or more, which leaves no room for its context; shorten or remove it"
        ) from error
    rows = range(len(first))
    return Aligned(
        {name: encoded[name].astype(np.int64) for name in inputs},
        np.array([_indices(encoded.word_ids(row)) for row in rows], dtype=np.int64),
        np.asarray(encoded["offset_mapping"], dtype=np.int64),
        np.array([_indices(encoded.sequence_ids(row)) for row in rows], dtype=np.int64),
    )


def _indices(values: list[int | None]) -> list[int]:
    return [-1 if value is None else value for value in values]
