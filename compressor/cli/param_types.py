"""What the commands share: values with units on the command line, and where progress goes."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from typing import Any, ClassVar

import click


class Milliseconds(click.ParamType[float]):
    """A latency such as 5ms or 5."""

    name = "latency"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a latency as milliseconds."""
        text = str(value).strip().removesuffix("ms")
        try:
            return float(text)
        except ValueError:
            self.fail(f"{value!r} is no latency; expected milliseconds such as 5ms", param, ctx)


class Duration(click.ParamType[float]):
    """Seconds, or a number with a unit: 90, 90s, 5m, 1h."""

    name = "duration"
    units: ClassVar[dict[str, float]] = {"s": 1.0, "m": 60.0, "h": 3600.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a duration as seconds."""
        text = str(value).strip()
        number, unit = (text[:-1], text[-1]) if text[-1:] in self.units else (text, "s")
        try:
            return float(number) * self.units[unit]
        except ValueError:
            self.fail(f"{value!r} is no duration; expected seconds, or a number with s, m or h such as 5m", param, ctx)


class Bytes(click.ParamType[int]):
    """Bytes, with a unit as other tools have them: 8GiB, 8GB, 500MB."""

    name = "bytes"
    units: ClassVar[dict[str, int]] = {
        "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
        "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1,
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a size as bytes."""
        text = str(value).strip().lower()
        unit = next((unit for unit in self.units if text.endswith(unit)), "")
        try:
            number = float(text.removesuffix(unit))
        except ValueError:
            number = -1.0
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is no size; expected a number with a unit such as 8GiB or 500MB", param, ctx)
        return int(number * self.units.get(unit, 1))


class Names(click.ParamType[tuple[str, ...]]):
    """Names with commas; nothing is no name."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read names separated by commas."""
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(",") if part)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas, such as 1,8."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read numbers separated by commas."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; expected such as 1,8", param, ctx)


# What libraries log about their own insides, by logger and by a part of the text. Nothing here concerns a user's model.
INSIDES = (
    # torchao 0.18 registers enums at import in a way that torch 2.14 warns about; transformers imports it where it is.
    ("torch.utils._pytree", "register_constant() on Enum subclasses"),
)


def drop_messages_about_insides() -> None:
    """Keep what libraries log about their own insides out of standard error; all else passes."""
    for logger, part in INSIDES:
        filters = logging.getLogger(logger).filters
        if not any(isinstance(each, _Without) and each.part == part for each in filters):
            logging.getLogger(logger).addFilter(_Without(part))


class _Without(logging.Filter):
    """Drops the records whose text contains a part."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def filter(self, record: logging.LogRecord) -> bool:
        return self.part not in record.getMessage()


def console(quiet: bool) -> Any:
    """Progress goes to standard error, so that standard output holds only results."""
    from rich.console import Console

    return None if quiet else Console(stderr=True)


def command_line() -> str:
    """The command that runs, as a shell takes it."""
    return shlex.join(["compressor", *sys.argv[1:]])
