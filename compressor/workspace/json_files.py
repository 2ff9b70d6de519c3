"""Read JSON files. Every JSON file that Compressor opens is read here and checked against a schema."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from compressor.errors import CompressorError
from runtimes.base.json_text import JSON, OBJECT, JsonTextError, parse

__all__ = ["JSON", "LIMIT", "OBJECT", "JsonFileError", "read_json"]

T = TypeVar("T")
LIMIT = 64 * 1024**2  # bytes; the largest file that we know, the tokenizer.json of a large vocabulary, has 35 MB


class JsonFileError(CompressorError):
    """A JSON file that is no regular file, is too large, or holds other values than expected."""


def read_json(path: Path, schema: TypeAdapter[T], *, remedy: str, limit: int = LIMIT) -> T:
    """Return the content of a JSON file that fits a schema.

    Args:
        path: the file.
        schema: the types of its content.
        remedy: what the user can do if the file does not fit, as the end of a sentence without a full stop.
        limit: largest size of the file in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        JsonFileError: the file cannot be read, is no regular file, is larger than `limit`, or does not fit the schema.
    """
    try:
        return parse(_read_bytes(path, limit), schema)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kind = "holds other values than expected" if isinstance(error, JsonTextError) else "cannot be read"
        raise JsonFileError(f"{path} {kind} ({reason}); {remedy}.") from error


def _read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; a pipe or a device could block or never end.

    Raises:
        ValueError: it is no regular file, or larger.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(limit + 1) if facts.st_size <= limit else None
    if content is None or len(content) > limit:
        raise ValueError(f"it is larger than {limit // 1024**2} MiB")
    return content.removeprefix(codecs.BOM_UTF8)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for a writer, as the opening of a named pipe does by default."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
