"""Parameter types with units, the console for progress, and the filter of log messages."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from typing import Any, ClassVar

import click

COLUMNS = 80


class Milliseconds(click.ParamType[float]):
    """A latency such as 5ms or 5."""

    name = "latency"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert a latency to milliseconds."""
        text = str(value).strip().removesuffix("ms")
        try:
            return float(text)
        except ValueError:
            self.fail(f"{value!r} is not a latency; expected milliseconds such as 5ms", param, ctx)


class Percentage(click.ParamType[float | None]):
    """A percentage such as 1, 1% or 0.5%; ``none`` is None."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Convert a percentage to a number."""
        text = str(value).strip().removesuffix("%")
        if text == "none" and param is not None and param.default is None:
            return None
        try:
            return float(text)
        except ValueError:
            self.fail(f"{value!r} is not a percentage; expected a number such as 1 or 1%", param, ctx)


class Duration(click.ParamType[float]):
    """A duration in seconds, or with a unit: 90, 90s, 5m, 1h."""

    name = "duration"
    units: ClassVar[dict[str, float]] = {"s": 1.0, "m": 60.0, "h": 3600.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert a duration to seconds."""
        text = str(value).strip()
        number, unit = (text[:-1], text[-1]) if text[-1:] in self.units else (text, "s")
        try:
            return float(number) * self.units[unit]
        except ValueError:
            self.fail(
                f"{value!r} is not a duration; expected seconds, or a number with s, m or h such as 5m", param, ctx
            )

    def text(self, seconds: float) -> str:
        """Return a duration in its largest whole unit.

        >>> Duration().text(300.0), Duration().text(90.0)
        ('5m', '90s')
        """
        unit = max((unit for unit, size in self.units.items() if seconds % size == 0), key=self.units.__getitem__)
        return f"{seconds / self.units[unit]:g}{unit}"


class Bytes(click.ParamType[int]):
    """A size in bytes, or with a binary or decimal unit: 8GiB, 8GB, 500MB."""

    name = "bytes"
    units: ClassVar[dict[str, int]] = {
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
        "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert a size to bytes."""
        text = str(value).strip().lower()
        unit = next((unit for unit in self.units if text.endswith(unit)), "")
        try:
            number = float(text.removesuffix(unit))
        except ValueError:
            number = -1.0
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is not a size; expected a number with a unit such as 8GiB or 500MB", param, ctx)
        return int(number * self.units.get(unit, 1))


class Names(click.ParamType[tuple[str, ...]]):
    """Names separated by commas; empty parts are ignored."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split names at commas."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(",") if part)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Integers separated by commas, such as 1,8."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Split integers at commas."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers; expected one such as 1,8", param, ctx)


# Log messages of libraries about their own implementation, by logger and substring. None concerns a user's model.
INSIDES = (
    # torchao 0.18 registers enums in a way that torch 2.14 warns about; transformers imports torchao if present.
    ("torch.utils._pytree", "register_constant() on Enum subclasses"),
    # A call that tries an input (--max-memory) may fail; torch also raises the error that it logs.
    ("torch._subclasses.fake_tensor", "failed while attempting to run meta for"),
)


def filter_library_logs() -> None:
    """Filter the messages of `INSIDES` out of the logs."""
    for logger, substring in INSIDES:
        filters = logging.getLogger(logger).filters
        if not any(isinstance(each, _SubstringFilter) and each.substring == substring for each in filters):
            logging.getLogger(logger).addFilter(_SubstringFilter(substring))


class _SubstringFilter(logging.Filter):
    """A filter that drops records whose message contains a substring."""

    def __init__(self, substring: str) -> None:
        super().__init__()
        self.substring = substring

    def filter(self, record: logging.LogRecord) -> bool:
        return self.substring not in record.getMessage()


def console(quiet: bool) -> Any:
    """Return a console on standard error for progress, or None if `quiet`; standard output is kept for results."""
    from rich.console import Console

    return None if quiet else Console(stderr=True)


def print_table(table: Any) -> None:
    """Print a table on standard output with 80 columns at least, which all tables fit.

    In fewer, figures would be cut off; a narrower terminal breaks the lines instead.
    """
    from rich.console import Console

    Console(width=max(Console().width, COLUMNS)).print(table, highlight=False)


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["compressor", *sys.argv[1:]])
