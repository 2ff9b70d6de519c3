"""Private APIs of the package gguf that `compressor` uses; checked with 0.19.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def bounded_reader(path: Path) -> Any:
    """Open a GGUF file with `gguf.GGUFReader`, its tensors memory-mapped.

    Overrides `GGUFReader._get`. Without the override, an array that claims to be longer than the file makes the reader
    continue past the end of the file until memory is full.

    Raises:
        ValueError: the file is truncated, or is not a GGUF file.
    """
    from gguf import GGUFReader

    def get(reader: Any, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = GGUFReader._get(reader, offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError("the file ends before the data does")
        return values

    return type("Reader", (GGUFReader,), {"_get": get})(path)
