"""The journal of a search: measured values on disk, from which an interrupted search resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter
from typing_extensions import TypedDict

from compressor.errors import CompressorError
from runtimes.base.json_text import parse


class _First(TypedDict):
    subject: str


class _Line(TypedDict):
    key: str
    value: JsonValue


_FIRST: TypeAdapter[Any] = TypeAdapter(_First)
_LINE: TypeAdapter[Any] = TypeAdapter(_Line)


class JournalError(CompressorError):
    """The journal file cannot be written."""


@dataclass
class Journal:
    """Measured values by key, one JSON line each in `path`; without a path they are kept in memory only.

    The first line identifies the search (`subject`); a file with another subject is overwritten. An incomplete last
    line, left by an interrupt, is ignored. `found` counts the values that were reused from an earlier run.
    """

    subject: str = ""
    path: Path | None = None
    found: int = 0
    _values: dict[str, Any] = field(default_factory=dict)
    _earlier: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        lines = self._read(self.path)
        if lines[:1] != [{"subject": self.subject}]:
            lines = []
        self._values = {line["key"]: line["value"] for line in lines[1:]}
        self._earlier = set(self._values)
        self._write([{"subject": self.subject}, *lines[1:]])

    def __len__(self) -> int:
        return len(self._values)

    def recall(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the value of a key; measure and record it if the journal lacks it."""
        if key in self._values:
            self.found += key in self._earlier
            self._earlier.discard(key)
            return self._values[key]
        self.note(key, measure())
        return self._values[key]

    def knows(self, key: str) -> bool:
        """Return whether the journal holds a value for a key."""
        return key in self._values

    def note(self, key: str, value: Any) -> None:
        """Record a value and append it to the file at once, so that it survives an interrupt."""
        self._values[key] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")

    def forget(self) -> None:
        """Delete the file, once the search is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        assert self.path is not None
        try:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise JournalError(
                f"the search journal {self.path} cannot be written ({error.strerror}); choose another --output."
            ) from error

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        try:
            for text in path.read_text(encoding="utf-8").splitlines():
                lines.append(parse(text, _LINE if lines else _FIRST))
        except (OSError, ValueError):  # absent, another format, or cut short by an interrupt: keep the lines before
            pass
        return lines
