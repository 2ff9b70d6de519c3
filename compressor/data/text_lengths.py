"""The numbers of tokens of the texts: texts that are truncated are counted, and texts without tokens are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressor.data.readers.base import Samples
from compressor.limitations import Limitation

CHUNK = 1024  # samples that are tokenized at a time; only their lengths are kept


def check_lengths(
    samples: Samples, indices: Sequence[int], limit: int | None, least: int
) -> tuple[dict[int, str], tuple[Limitation, ...]]:
    """Tokenize samples once to find the texts that are too short to use, and to count those that are truncated.

    Args:
        samples: the samples; those without texts have no lengths and pass.
        indices: positions of the samples to check.
        limit: number of tokens to which texts are truncated; None if they are not.
        least: minimum number of tokens of a text.

    Returns:
        The reason for every sample that cannot be used, by position, and the limitation about truncated texts, if any.
    """
    if samples.lengths is None:
        return {}, ()
    faults: dict[int, str] = {}
    texts = truncated = 0
    for index, lengths in _lengths(samples, indices):
        if min(lengths) < least:
            faults[index] = f"too few tokens ({min(lengths)}); expected at least {least}"
            continue
        texts += len(lengths)
        truncated += sum(limit is not None and length > limit for length in lengths)
    if not truncated:
        return faults, ()
    reason = f"{truncated:,} of {texts:,} texts have more than {limit:,} tokens and are truncated"
    return faults, (Limitation("length of texts", reason),)


def _lengths(samples: Samples, indices: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield each position with the numbers of tokens of the rows of that sample."""
    assert samples.lengths is not None
    for start in range(0, len(indices), CHUNK):
        chunk = indices[start : start + CHUNK]
        yield from zip(chunk, samples.lengths(chunk), strict=True)
