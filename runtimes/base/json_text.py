"""The only place that parses JSON: a text is checked against a schema before a value of it is used.

pydantic parses and checks in one step. Its parser refuses values that are nested deeper than 200 levels, so that no
text ends in a RecursionError. With `strict` it converts nothing: the text "1" is no number and true is no integer.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import JsonValue, TypeAdapter, ValidationError

T = TypeVar("T")
SHOWN = 60  # characters of a wrong value in a message
JSON: TypeAdapter[Any] = TypeAdapter(JsonValue)  # any JSON value
OBJECT: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])  # any JSON object


class JsonTextError(ValueError):
    """A text that is no JSON, or whose values do not fit the schema. The message is a clause without a full stop."""


def parse(text: str | bytes, schema: TypeAdapter[T]) -> T:
    """Return the value of a JSON text that fits a schema.

    Args:
        text: the JSON, as text or in UTF-8.
        schema: the types of the value; see https://docs.pydantic.dev for the types that pydantic knows.

    Raises:
        JsonTextError: the text is no JSON, is nested too deeply, or does not fit the schema.

    >>> parse('{"a": 1}', TypeAdapter(dict[str, int]))
    {'a': 1}
    >>> parse('{"a": "1"}', TypeAdapter(dict[str, int]))
    Traceback (most recent call last):
        ...
    runtimes.base.json_text.JsonTextError: a: input should be a valid integer, found '1'
    """
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        raise JsonTextError(_first(error)) from error


def _first(error: ValidationError) -> str:
    """Describe the first fault that pydantic found: where it is, what was expected, and what was found."""
    fault = error.errors(include_url=False, include_context=False)[0]
    if fault["type"] == "json_invalid":
        return _printable(fault["msg"])
    where = _printable(".".join(str(part) for part in fault["loc"]))
    wanted = fault["msg"].removeprefix("Value error, ")
    wanted = wanted[:1].lower() + wanted[1:]
    clause = f"{where}: {wanted}" if where else wanted
    return clause if fault["type"] in ("missing", "value_error") else f"{clause}, found {_shown(fault['input'])}"


def _shown(value: Any) -> str:
    """Return a short form of a wrong value; of a list or an object, the type alone."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _printable(repr(value))


def _printable(text: str) -> str:
    """Return the start of a text without control characters, which could steer a terminal."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
