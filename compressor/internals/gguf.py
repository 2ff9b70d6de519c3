"""Private APIs of the package gguf that `compressor` uses; checked with 0.19.0."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


def bounded_reader(path: Path) -> Any:
    """Open a GGUF file with `gguf.GGUFReader`, its tensors memory-mapped.

    Overrides `GGUFReader._get`. Without the override, an array that claims to be longer than the file makes the reader
    continue past the end of the file until memory is full.

    Raises:
        ValueError: the file is truncated, or is not a GGUF file.
    """
    from gguf.gguf_reader import GGUFReader

    def get(reader: Any, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = GGUFReader._get(reader, offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError("the file ends before the data does")
        return values

    return type("Reader", (GGUFReader,), {"_get": get})(path)


@contextlib.contextmanager
def read_once() -> Iterator[Callable[[Path], Any]]:
    """Yield a `bounded_reader` that reads each file once, and make transformers use it.

    Replaces `gguf.GGUFReader` and `gguf.get_tensor_name_map`. Without it, transformers reads the metadata three times
    and builds the table of names for each tensor: two thirds of the time to load a model of 135 million parameters.
    """
    import gguf

    read = functools.cache(bounded_reader)
    names = functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "GGUFReader", lambda path: read(Path(path).resolve())),
        mock.patch.object(gguf, "get_tensor_name_map", names),
    ):
        yield lambda path: read(path.resolve())
