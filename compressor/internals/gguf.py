"""What `compressor` reads of the private parts of the package gguf; seen in 0.19.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def bounded_reader(path: Path) -> Any:
    """Open a GGUF file as the package gguf has it, its tensors mapped into memory.

    Left to itself the package reads on behind the end of a file whose arrays claim to be longer, until memory is full.
    Overrides `GGUFReader._get`; without that name, such files would fill the memory again.

    Raises:
        ValueError: the file ends where more should follow, or is no GGUF file.
    """
    from gguf import GGUFReader

    def get(reader: Any, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = GGUFReader._get(reader, offset, dtype, count, override_order)
        if len(found) < int(count):
            raise ValueError("it ends where more should follow")
        return found

    return type("Reader", (GGUFReader,), {"_get": get})(path)
