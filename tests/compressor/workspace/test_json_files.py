"""Reading a JSON file: regular, of plausible size, and in its schema."""

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from compressor.workspace.json_files import JsonFileError, json_text, read_json

NUMBERS = TypeAdapter(dict[str, int])


def read(path: Path) -> dict[str, int]:
    return read_json(path, NUMBERS, remedy="do this", limit=2**20)


def test_a_file_that_fits_is_returned(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')  # a byte order mark, which some editors add
    assert read(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"a": "1"}',
            "{} holds other values than expected (a: input should be a valid integer, found '1'); do this.",
        ),
        (b" " * (2**20 + 1), "{} cannot be read (it is larger than 1 MiB); do this."),
        (None, "{} cannot be read (it is not a regular file); do this."),
    ],
)
def test_any_other_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(JsonFileError) as caught:
        read(path)
    assert str(caught.value) == message.format(path)


def test_a_folder_and_an_endless_device_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(JsonFileError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff", "caf\u00e9 \U0001f480.png".encode(), b"a.png"])
def test_any_name_of_a_file_is_written_as_json_that_is_read_again(tmp_path: Path, name: bytes) -> None:
    """The strict parser refuses half of a surrogate pair, which Python reads from a byte that is no UTF-8."""
    text = name.decode(errors="surrogateescape")
    (tmp_path / "a.json").write_text(json_text({text: [1, (text,)]}), encoding="utf-8")
    (key,) = read_json(tmp_path / "a.json", TypeAdapter(dict[str, list[int | list[str]]]), remedy="do this")
    assert key == name.decode(errors="backslashreplace").replace("\\x", "\\udc")
