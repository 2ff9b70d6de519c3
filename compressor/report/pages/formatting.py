"""How an export's page writes figures: with their unit and interval, as long as the reader needs."""

from __future__ import annotations

from typing import Any

from compressor.report.pages.html_page import Cell
from compressor.report.report import LABELS

Json = dict[str, Any]

INTERVALS = "Ranges are 95 % intervals."
DONE = {"keep": "kept", "drop": "dropped", "merge": "tokens merged", "fuse": "fused"}


def done(action: str) -> str:
    """What happened to a branch, without the amount.

    >>> done("drop"), done("low-rank:8"), done("merge:25%")
    ('dropped', 'low-rank', 'tokens merged')
    """
    form = action.partition(":")[0]
    return DONE.get(form, form)


def loss_unit(content: Json) -> str:
    """The unit of a loss."""
    metric = content["quality"]["metric"]
    return "%" if metric == "perplexity" else LABELS[metric][1]


def value_text(figure: Json, unit: str) -> str:
    """A figure's value with its unit."""
    return f"{figure['value']:.2f}{' ' if unit else ''}{unit}"


def interval(figure: Json, *, signed: bool = False, places: int = 2) -> str:
    """A figure's interval; of a difference with signs."""
    low, high = figure["low"], figure["high"]
    return f"{low:+.{places}f} to {high:+.{places}f}" if signed else f"{low:.{places}f}–{high:.{places}f}"


def cell(figure: Json, *, signed: bool = False, places: int = 2) -> Cell:
    """A table's cell: the value, and the interval below."""
    sign = "+" if signed else ""
    return f"{figure['value']:{sign}.{places}f}", interval(figure, signed=signed, places=places)


def times(speedup: Json | None) -> Cell:
    """A table's cell of a speed-up; empty where there is none."""
    return "" if speedup is None else (f"{speedup['ratio']:.2f}×", f"{speedup['low']:.2f}–{speedup['high']:.2f}")


def with_unit(label: str, unit: str) -> str:
    """A row's name with the unit of its figures, where they have one."""
    return f"{label}, {unit}" if unit else label


def capital(text: str) -> str:
    """A text with a capital letter, the rest as it is."""
    return text[:1].upper() + text[1:]
