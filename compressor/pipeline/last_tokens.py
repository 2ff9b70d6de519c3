"""The tokens at which angular distances are measured: texts that all end in one token show little of their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from compressor.data.splits import Split
from compressor.limitations import Limitation
from compressor.lower.traced_model import TracedModel

SHARED = 0.9  # share of texts with one last token
CHECKED = 32  # texts whose last token is read
BATCH = 8
IDS, MASK = "input_ids", "attention_mask"


def of_last_tokens(subject: TracedModel) -> Iterator[Limitation]:
    """Yield a limitation of angular distances if nearly all texts end in one token, such as [SEP] or a full stop.

    Gromov et al. 2024 measure them at the last token of texts that are cut to one length, which is any word. An
    encoder's tokenizer ends every text with the same token, and paragraphs end in a full stop.
    """
    tokens = Counter(_last_tokens(subject.data.calibration.head(CHECKED)))
    ((token, count),) = tokens.most_common(1) or [(0, 0)]
    if count > 1 and count >= SHARED * tokens.total():
        yield Limitation(
            "angular distances",
            f"measured at the last token of each text, as published, which is token {token} in {count} of "
            f"{tokens.total()} texts, so they say little of other words; cosine similarity, --metric span and output "
            "divergence use all tokens",
        )


def _last_tokens(split: Split) -> Iterator[int]:
    """Yield the last token of each text that the mask does not leave out; nothing without token ids and a mask."""
    for batch in split.batches(BATCH):
        ids, mask = batch.feeds.get(IDS), batch.feeds.get(MASK)
        if ids is None or mask is None or ids.ndim != mask.ndim:
            return
        for row, real in zip(ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True):
            yield int(row[real.nonzero()[0].max()]) if real.any() else -1
