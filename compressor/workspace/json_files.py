"""Read JSON files, and write JSON. Every JSON file that Compressor opens is read here and checked against a schema."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from compressor.errors import CompressorError
from runtimes.base.json_text import JSON, OBJECT, JsonTextError, parse

__all__ = ["JSON", "LIMIT", "OBJECT", "JsonFileError", "json_text", "read_json", "utf8"]

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


def utf8(value: Any) -> Any:
    r"""Return JSON values with the bytes of file names that are no UTF-8 written as escapes.

    Python reads such a byte as half of a surrogate pair, which no file in UTF-8 can hold and other parsers refuse.

    >>> print(utf8({"id": ["caf\udce9.png", 3]}))
    {'id': ['caf\\udce9.png', 3]}
    """
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {utf8(key): utf8(each) for key, each in value.items()}
    return [utf8(each) for each in value] if isinstance(value, list | tuple) else value


def json_text(content: Any) -> str:
    """Return JSON values as an indented text that ends with a line feed."""
    return json.dumps(utf8(content), indent=2) + "\n"


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
