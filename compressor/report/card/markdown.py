"""Escaping of text from outside for Markdown: names of models, branches, classes and files, rules of plans, reasons.

The card is rendered by the Hugging Face Hub and by GitHub, as CommonMark with tables and raw HTML.
"""

from __future__ import annotations

import re

# A code span: a run of backticks up to the next run of the same length. Nothing inside it is Markdown or HTML.
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# An underscore between two letters or digits begins no emphasis, and is left as it is.
_SPECIAL = re.compile(r"[&<>]|[\\*\[\]|~`]|(?<![^\W_])_|_(?![^\W_])")
_BLOCK = re.compile(r"([#+=-]|\d+[.)])")  # at the start of a line: a heading, a list, a rule


def prose(text: str) -> str:
    r"""Return Markdown that shows a text in one line as it is, except that code spans in it stay code spans.

    >>> print(prose("see `plan.json` <b>\n[x](y)"))
    see `plan.json` &lt;b&gt; \[x\](y)
    """
    line, parts, end = " ".join(text.split()), [], 0
    for span in _SPAN.finditer(line):
        parts += [_escaped(line[end : span.start()]), span[0]]
        end = span.end()
    escaped = "".join([*parts, _escaped(line[end:])])
    start = _BLOCK.match(escaped)
    return escaped if start is None else f"{start[0][:-1]}\\{start[0][-1]}{escaped[start.end() :]}"


def code(text: str, *, in_table: bool = False) -> str:
    """Return a code span that shows a text in one line.

    >>> print(code("blocks.0"), code("a`b"))
    `blocks.0` ``a`b``
    """
    line = " ".join(text.split())
    if not line:
        return ""
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    # In a table, a bar ends the cell even in a code span, unless it is escaped.
    line = line.replace("|", "\\|") if in_table else line
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, language: str) -> str:
    """Return a block of code."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: _HTML.get(found[0], f"\\{found[0]}"), text)


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks; 0 without any."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
