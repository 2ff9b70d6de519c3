"""Formatting of figures on an export's page, with units and intervals."""

from __future__ import annotations

from typing import Any

from compressor.quality.metrics import METRICS
from compressor.report.pages.html_page import Cell

Json = dict[str, Any]

INTERVALS = "Ranges are 95 % intervals."
DONE = {"keep": "kept", "drop": "dropped", "merge": "tokens merged", "fuse": "fused"}


def action_done(action: str) -> str:
    """Return the past participle of an action on a branch, without its amount.

    >>> action_done("drop"), action_done("low-rank:8"), action_done("merge:25%")
    ('dropped', 'low-rank', 'tokens merged')
    """
    form = action.partition(":")[0]
    return DONE.get(form, form)


def loss_unit(content: Json) -> str:
    """Return the unit of a loss."""
    return METRICS[content["quality"]["metric"]].loss_unit


def value_text(figure: Json, unit: str) -> str:
    """Format the value of a figure with its unit."""
    return f"{figure['value']:.2f}{' ' if unit else ''}{unit}"


def interval(figure: Json, *, signed: bool = False, places: int = 2) -> str:
    """Format the interval of a figure, for a difference with signs."""
    low, high = figure["low"], figure["high"]
    return f"{low:+.{places}f} to {high:+.{places}f}" if signed else f"{low:.{places}f}–{high:.{places}f}"


def cell(figure: Json, *, signed: bool = False, places: int = 2) -> Cell:
    """Return a table cell with the value of a figure and its interval below."""
    sign = "+" if signed else ""
    return f"{figure['value']:{sign}.{places}f}", interval(figure, signed=signed, places=places)


def speedup_cell(speedup: Json | None) -> Cell:
    """Return a table cell with a speed-up and its interval below; an empty cell for None."""
    return "" if speedup is None else (f"{speedup['ratio']:.2f}×", f"{speedup['low']:.2f}–{speedup['high']:.2f}")


def with_unit(label: str, unit: str) -> str:
    """Append the unit, if there is one, to the label of a row."""
    return f"{label}, {unit}" if unit else label


def capital(text: str) -> str:
    """Capitalise the first letter of a text and leave the rest unchanged."""
    return text[:1].upper() + text[1:]
