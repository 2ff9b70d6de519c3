"""The journal of a search: measured values on disk, from which an interrupted search resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter
from typing_extensions import TypedDict

from compressor.errors import CompressorError
from compressor.workspace.folder_errors import readable_errors
from runtimes.base.json_text import parse


def resumed(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence if a search used values of an interrupted run, by the ``search`` part of its report."""
    count = facts.get("recalled")
    return (f"The search was resumed: an interrupted run had measured {count} of its values.",) if count else ()


class _First(TypedDict):
    subject: str


class _Line(TypedDict):
    key: str
    value: JsonValue
    sum: str


_FIRST: TypeAdapter[Any] = TypeAdapter(_First)
_LINE: TypeAdapter[Any] = TypeAdapter(_Line)


class JournalError(CompressorError):
    """The journal file cannot be written."""


@dataclass
class Journal:
    """Measured values by key, one JSON line each in `path`; without a path they are kept in memory only.

    A new file begins with the first value, so that a search that stops before it leaves none.

    The first line identifies the search (`subject`); a file with another subject is overwritten. Every other line has a
    checksum. An incomplete last line, left by an interrupt, is cut off, and so is all from the first line that is
    damaged or was edited.

    Attributes:
        subject: a text that is equal for searches whose values can be exchanged.
        path: the file; None keeps no file.
        found: number of values that were reused from an earlier run.
        resumed: number of values that the file held at the start.
        discarded: number of values of another search that the file held at the start, and that were deleted.
        damaged: number of lines from the first that is damaged or was edited, which were deleted.
    """

    subject: str = ""
    path: Path | None = None
    found: int = 0
    resumed: int = 0
    discarded: int = 0
    damaged: int = 0
    _values: dict[str, Any] = field(default_factory=dict)
    _earlier: set[str] = field(default_factory=set)
    _new: bool = False

    def __post_init__(self) -> None:
        if self.path is None:
            return
        first, values, end, self.damaged = self._read(self.path)
        if first == {"subject": self.subject}:
            self._values, self._earlier, self.resumed = values, set(values), len(values)
            with self._writable(), self.path.open("r+b") as file:  # in place, so that a kill here loses no values
                file.truncate(end)
                file.seek(end - 1)
                file.write(b"\n" if file.read(1) != b"\n" else b"")
            return
        self.discarded, self._new = len(values), True
        with self._writable():
            self.path.unlink(missing_ok=True)

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
            first = _line({"subject": self.subject}) if self._new else ""
            with self._writable(), self.path.open("w" if self._new else "a", encoding="utf-8") as file:
                file.write(first + _line({"key": key, "value": value, "sum": _sum(key, value)}))
            self._new = False

    def message(self) -> str | None:
        """Return a sentence on what became of the values of an earlier run; None if there were none."""
        if self.resumed:
            rest = f"; {self.damaged} lines of its journal are damaged or edited, and are measured again"
            return (
                f"Resumed an interrupted search: {self.resumed} values that it measured are used again"
                f"{rest if self.damaged else ''}."
            )
        if self.discarded:
            return (
                f"{self.discarded} values of an interrupted search with another version, other settings, another model "
                "or other data were discarded, so the search starts anew."
            )
        if self.damaged:
            return "The journal of an interrupted search is damaged, or of another version, so the search starts anew."
        return None

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        assert self.path is not None
        try:
            with readable_errors(self.path):
                yield
        except OSError as error:
            raise JournalError(
                f"the search journal {self.path} cannot be written ({error.strerror}); choose another --output."
            ) from error

    @staticmethod
    def _read(path: Path) -> tuple[Any, dict[str, Any], int, int]:
        """Return the first line, the values by key, the bytes of all lines that can be read, and the number of others.

        An incomplete last line does not count.
        """
        first: Any = None
        values: dict[str, Any] = {}
        end, lines = 0, list[bytes]()
        with contextlib.suppress(OSError):  # absent
            lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines):
            try:
                content = parse(line, _LINE if end else _FIRST)
                if end and content["sum"] != _sum(content["key"], content["value"]):
                    raise ValueError("an edited line")
            except (ValueError, KeyError, TypeError):  # damaged, of another format, or cut short by an interrupt
                return first, values, end, len(lines[number:]) - (not lines[-1].endswith(b"\n"))
            if end:
                values[content["key"]] = content["value"]
            else:
                first = content
            end += len(line)
        return first, values, end, 0


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content) + "\n"


def _sum(key: str, value: Any) -> str:
    """Return the checksum of a value, by which an edited or damaged line is found."""
    return hashlib.blake2b(json.dumps([key, value]).encode(), digest_size=4).hexdigest()
