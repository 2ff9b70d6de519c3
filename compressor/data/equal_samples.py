"""Equal samples in several splits: what is measured on them is not measured on data that the search has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compressor.data.readers.base import Samples
from compressor.data.sample_cache import digest, digest_of_feeds
from compressor.limitations import Limitation

if TYPE_CHECKING:
    from compressor.data.splits import Split


def equal_samples(samples: Samples, splits: Sequence[Split]) -> Iterator[Limitation]:
    """Yield a limitation if samples of the decision or test split are equal to samples of an earlier split.

    Two samples are equal if the model sees the same image, sound, text or array; their labels do not count.

    Args:
        samples: the samples as they were read, before texts are cut into windows.
        splits: the splits in the order in which they are used.
    """
    first: dict[bytes, str] = {}
    parts = []
    for split in splits:
        contents = [(_content(samples, index), samples.ids[index]) for index in split.indices]
        copies = [(id, first[content]) for content, id in contents if content in first]
        if copies and split.name in ("decision", "test"):
            copy, original = copies[0]
            parts.append(
                f"{len(copies):,} of {len(split):,} {split.name} samples (such as {copy}, equal to {original})"
            )
        for content, id in contents:
            first.setdefault(content, id)
    if parts:
        reason = (
            f"{' and '.join(parts)} are equal to samples of an earlier split, so the figures on them are not figures "
            "on data that the search has not seen; remove the copies if the model will not meet such inputs again"
        )
        yield Limitation("equal samples", reason)


def _content(samples: Samples, index: int) -> bytes:
    """Return a hash of a sample as it was read: of its text, its image or its sound, or of its arrays."""
    if samples.content is not None:
        return samples.content(index)
    if samples.shown is not None:
        text = samples.shown(index)
        assert isinstance(text, str), "readers of images set `content`"
        return digest(text)
    return digest_of_feeds(samples.feeds([index]))
