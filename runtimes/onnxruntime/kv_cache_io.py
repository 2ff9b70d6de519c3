"""KV cache inputs and outputs of an ONNX file: names, axes, shared buffers and row-by-row calls."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import TypeAdapter

from runtimes.base.json_text import JsonTextError, parse
from runtimes.base.protocols import BuildError, Feeds

TOKEN_AXIS = 2  # the token axis of keys and values, [rows, heads, tokens, width]
# Key of the metadata: a JSON map from present outputs to the past inputs whose buffers they may share.
SHARED_BUFFERS_KEY = "compressor.cache"
_NAMES = TypeAdapter(dict[str, str])
TOKENS, MASK = "input_ids", "attention_mask"  # [rows, new tokens] and [rows, all tokens]


def split_rows(feeds: Feeds) -> list[Feeds]:
    """Split a decode of several rows and several new tokens behind a cache into one call per row."""
    rows, new = feeds[TOKENS].shape
    if rows == 1 or new == 1 or new == feeds[MASK].shape[1]:
        return [feeds]
    return [{name: value[row : row + 1] for name, value in feeds.items()} for row in range(rows)]


def shared_buffers(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """Return the map from present outputs to the past inputs whose buffers they share; None if nothing was fused.

    Raises:
        BuildError: the metadata of the file holds something else.
    """
    if SHARED_BUFFERS_KEY not in metadata:
        return None
    try:
        return parse(metadata[SHARED_BUFFERS_KEY], _NAMES)
    except JsonTextError as error:
        raise BuildError(f"{SHARED_BUFFERS_KEY} in the file holds other values than expected: {error}.") from error
