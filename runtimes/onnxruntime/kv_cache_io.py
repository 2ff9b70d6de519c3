"""The KV cache as inputs and outputs of an ONNX file: names, axes, shared buffers, and calls row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping

from runtimes.base.protocols import Feeds

LENGTH_AXIS = 2  # of keys and values


FACT = "compressor.cache"  # metadata: which present may be the buffer of which past; none of them if it is empty


TOKENS, MASK = "input_ids", "attention_mask"  # [rows, new tokens] and [rows, all tokens]


def calls(feeds: Feeds) -> list[Feeds]:
    """The calls that the operator takes one for: one for each row, where there are several behind a cache."""
    rows, new = feeds[TOKENS].shape
    if rows == 1 or new == 1 or new == feeds[MASK].shape[1]:
        return [feeds]
    return [{name: value[row : row + 1] for name, value in feeds.items()} for row in range(rows)]


def shared(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """Which output may be the buffer of which input, by a file's metadata; None where nothing was fused."""
    return dict(json.loads(metadata[FACT])) if FACT in metadata else None
