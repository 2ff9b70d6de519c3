"""JSON is parsed in one place, against a schema, and no text ends in another error than JsonTextError."""

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, TypeAdapter

from runtimes.base.json_text import OBJECT, JsonTextError, parse
from tests.paths import ROOT

ANY: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)
HOMES = ("runtimes/base/json_text.py", "compressor/workspace/json_files.py")
PARSERS = (
    "load",
    "loads",
    "raw_decode",
    "JSONDecoder",
    "validate_json",
    "model_validate_json",
    "from_json",
    "safe_load",
)
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text()
documents = st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(documents)
def test_values_are_those_of_the_standard_library(document: Any) -> None:
    text = json.dumps(document)
    if "\\ud" in text.lower():  # a lone surrogate is no text of UTF-8
        return
    assert parse(text, ANY) == json.loads(text)


@given(st.binary(max_size=40) | st.text(max_size=40))
def test_any_other_text_is_refused(text: bytes | str) -> None:
    try:
        assert isinstance(parse(text, OBJECT), dict)
    except JsonTextError as error:
        assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5000, '"\\ud800"', b"\xff", "", "\ufeff{}"])
def test_texts_on_which_the_standard_library_fails_or_differs(text: str | bytes) -> None:
    with pytest.raises(JsonTextError, match="Invalid JSON"):
        parse(text, ANY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": [1, "x"]}}', "a.b.1: input should be a valid integer, found 'x'"),
        ('{"a": {"b": [true]}}', "a.b.0: input should be a valid integer, found true"),
        ('{"a": {"b": null}}', "a.b: input should be a valid array, found null"),
        ('{"a": [1]}', "a: input should be an object, found a list"),
        ('{"\\u001b[31m": {"b": [[]]}}', "?[31m.b.0: input should be a valid integer, found a list"),
    ],
)
def test_the_message_says_where_and_what(text: str, message: str) -> None:
    with pytest.raises(JsonTextError) as caught:
        parse(text, TypeAdapter(dict[str, dict[str, list[int]]]))
    assert str(caught.value) == message


def test_no_other_module_parses_json() -> None:
    """torch.load and onnx.load read other formats; a call on `json` or on a schema is what this looks for."""
    found = []
    for package in ("compressor", "passes", "runtimes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in PARSERS:
                    owner = node.value.id if isinstance(node.value, ast.Name) else ""
                    if owner in ("json", "yaml", "pydantic_core") or node.attr.endswith("validate_json"):
                        found.append(path.relative_to(ROOT).as_posix())
    assert set(found) <= set(HOMES)
    assert found  # the home of the parser
