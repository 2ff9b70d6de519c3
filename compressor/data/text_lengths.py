"""The numbers of tokens of the texts: texts that are truncated are counted, and texts without tokens are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compressor.data.readers.base import Samples
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess

COUNTED = 200  # samples in which unknown tokens are counted
MOST_UNKNOWN = 0.1  # largest share of them; tokenizers in their own language know nearly all words
BATCH = 20
CHUNK = 1024  # samples that are tokenized at a time; only their lengths are kept


@dataclass(frozen=True)
class Lengths:
    """The result of `check_lengths`.

    Attributes:
        faults: the reason for every sample that cannot be used, by position.
        tokens: number of tokens of the longest row of every other sample, by position, without truncation; empty for
            data other than texts.
        limitations: the limitation about truncated texts, if there are any.
    """

    faults: Mapping[int, str] = field(default_factory=dict)
    tokens: Mapping[int, int] = field(default_factory=dict)
    limitations: tuple[Limitation, ...] = ()


def check_lengths(samples: Samples, indices: Sequence[int], limit: int | None, least: int) -> Lengths:
    """Tokenize samples once: find the texts that are too short to use, count the truncated ones, and keep the lengths.

    Args:
        samples: the samples; those without texts have no lengths and pass.
        indices: positions of the samples to check.
        limit: number of tokens to which texts are truncated; None if they are not.
        least: minimum number of tokens of a text.
    """
    if samples.lengths is None:
        return Lengths()
    faults: dict[int, str] = {}
    tokens: dict[int, int] = {}
    texts = truncated = 0
    for index, lengths in _lengths(samples, indices):
        if min(lengths) < least:
            faults[index] = f"too few tokens ({min(lengths)}); expected at least {least}"
            continue
        tokens[index] = max(lengths)
        texts += len(lengths)
        truncated += sum(limit is not None and length > limit for length in lengths)
    if not truncated:
        return Lengths(faults, tokens)
    reason = f"{truncated:,} of {texts:,} texts have more than {limit:,} tokens and are truncated"
    return Lengths(faults, tokens, (Limitation("length of texts", reason),))


def check_unknown(samples: Samples, indices: Sequence[int], preprocess: Preprocess, name: str) -> None:
    """Check on the first `COUNTED` samples that the tokenizer knows the words of the texts.

    Args:
        samples: the samples; those without texts pass.
        indices: positions of the samples.
        preprocess: preprocessing of the model, with the token id of unknown words.
        name: name of the data in messages.

    Raises:
        DataError: more than `MOST_UNKNOWN` of the tokens are the unknown token.
    """
    if samples.lengths is None or preprocess.unknown is None:
        return
    unknown = known = 0
    others = [token for token in preprocess.special if token != preprocess.unknown]
    for start in range(0, min(len(indices), COUNTED), BATCH):
        ids = samples.feeds(indices[start : start + BATCH])["input_ids"]
        found = int((ids == preprocess.unknown).sum())
        unknown += found
        known += int((~np.isin(ids, others)).sum()) - found
    if unknown > MOST_UNKNOWN * (unknown + known):
        raise DataError(
            f"{unknown / (unknown + known):.0%} of the tokens in {name} are unknown to the tokenizer "
            f"({preprocess.tokenizer}), so the model does not see these texts; pass texts in its language and "
            "spelling, or the tokenizer that belongs to the model"
        )


def _lengths(samples: Samples, indices: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield each position with the numbers of tokens of the rows of that sample."""
    assert samples.lengths is not None
    for start in range(0, len(indices), CHUNK):
        chunk = indices[start : start + CHUNK]
        yield from zip(chunk, samples.lengths(chunk), strict=True)
