"""Reader of .csv and .tsv files with texts, with or without a header, and detection of their text and label columns."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from compressor.data.label_sets import label_columns, listed, sets_of_columns, sets_of_lists
from compressor.data.readers.base import TOO_LARGE, Array, LabelKind, Samples, Skipped, wrong_class
from compressor.data.readers.texts import HOLDS_NUL, NUL, text_of, text_samples, tokens
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess

TEXTS = ("text", "sentence", "content", "review", "document", "question", "comment", "query", "prompt", "body")
PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("question", "answer"),
    ("query", "passage"),
)
CLASSES = ("label", "labels", "class", "target", "category", "sentiment", "intent")
SCORES = ("score", "similarity", "similarity_score", "relatedness_score", "rating")
LABEL_SETS = ("labels", "label", "classes", "categories", "tags")
LABELS = (*CLASSES, *SCORES)
SOURCES = ("source", "src", "source_text", "article", "input")
TARGETS = ("target", "tgt", "target_text", "summary", "highlights", "translation", "transcript", "output", "answer")
FEW = 10  # rows; in a shorter table, labels may be 0, 1, 2 by chance
NUMBERINGS = ("", "id", "idx", "index", "row", "guid")
NAMES = frozenset([*TEXTS, *(name for pair in PAIRS for name in pair), *LABELS, *SOURCES, *TARGETS])


@dataclass(frozen=True)
class Table:
    """Rows with equal numbers of cells; `header` is empty if the file has none. Ids are row numbers from 0.

    `class_names` maps a column of class numbers to the names that the data set gives them.
    `quoted` is False if quotes are characters of the cells, because they are not balanced.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ids: tuple[str, ...]
    class_names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    quoted: bool = True

    def column(self, column: int) -> list[str]:
        """Return all cells of a column."""
        return [row[column] for row in self.rows]

    def title(self, column: int) -> str:
        """Return the name of a column for messages: its title, or its number without a header."""
        return repr(self.header[column]) if self.header else str(column)


@dataclass(frozen=True)
class Columns:
    """The indices of one or two text columns, and of the label column, if any."""

    texts: tuple[int, ...]
    label: int | None


def read_table(path: Path, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read a .csv or .tsv file of texts with optional labels or scores."""
    table, ragged = parse(text_of(path, name), name)
    if task == "question-answering":
        from compressor.data.readers.records import record_samples

        records = [dict(zip(table.header, row, strict=False)) for row in table.rows]
        samples = record_samples(records, table.ids, name, preprocess, task, seed)
        return replace(samples, skipped=(*ragged, *samples.skipped))
    return table_samples(table, name, preprocess, task, seed, skipped=ragged)


def table_samples(
    table: Table, name: str, preprocess: Preprocess, task: str, seed: int = 0, *, skipped: Sequence[Skipped] = ()
) -> Samples:
    """Read the samples of a table; rows without a text or a usable label are skipped with a reason."""
    if preprocess.problem_type == "multi_label_classification":
        found = _with_label_sets(table, name, preprocess, skipped)
        if found is not None:
            return found
    if preprocess.decoder is not None:
        return _with_targets(table, name, preprocess, skipped)
    columns = choose(table, name, task)
    paired = len(columns.texts) == 2 and task != "text-classification"
    kind = _label_kind(table, columns, task, paired, preprocess.problem_type)
    reasons = [_fault(row, columns, kind) for row in table.rows]
    usable = [row for row, reason in zip(table.rows, reasons, strict=True) if reason is None]
    unusable = [Skipped(id, reason) for id, reason in zip(table.ids, reasons, strict=True) if reason is not None]
    texts = [[row[index] for row in usable] for index in columns.texts]
    source = tokens(name, texts[0], texts[1] if len(texts) == 2 else None, paired, preprocess)
    ids = tuple(id for id, reason in zip(table.ids, reasons, strict=True) if reason is None)
    if task in ("fill-mask", "token-classification"):
        found = text_samples(source, ids, _reading(table, columns, None), task, seed)
        limitations = tuple(_limitations(table, columns, task))
        return replace(found, skipped=(*skipped, *unusable), limitations=limitations)
    cells = None if columns.label is None else [row[columns.label].strip() for row in usable]
    names = table.class_names.get(columns.label) if columns.label is not None else None
    return Samples(
        ids=ids,
        feeds=source.feeds,
        reading=_reading(table, columns, kind),
        labels=None if cells is None else _labels(cells, kind, name),
        label_kind="tokens" if task == "text-generation" else kind,
        rows_per_sample=2 if paired else 1,
        pairs=len(texts) == 2,
        skipped=(*skipped, *unusable),
        shown=source.shown,
        whole=source.whole if task == "text-generation" and preprocess.whole is not None else None,
        class_names=names if cells is None or names is not None else _class_names(cells, kind),
        own_numbers=names is not None,
        limitations=tuple(_limitations(table, columns, task)),
        lengths=None if preprocess.lengths is None else source.lengths,
    )


def _with_targets(table: Table, name: str, preprocess: Preprocess, skipped: Sequence[Skipped]) -> Samples:
    """Read the sources of an encoder-decoder, and its targets if the table has a column for them."""
    columns = Columns(source_and_target(table, name), None)
    reasons = [_fault(row, columns, None) for row in table.rows]
    kept = [number for number, reason in enumerate(reasons) if reason is None]
    sources, *targets = [[table.rows[number][index] for number in kept] for index in columns.texts]
    source = tokens(name, sources, None, False, preprocess)
    titles = [f"{role} {table.title(index)}" for role, index in zip(("source", "target"), columns.texts, strict=False)]
    unusable = [Skipped(id, reason) for id, reason in zip(table.ids, reasons, strict=True) if reason is not None]
    return Samples(
        ids=tuple(table.ids[number] for number in kept),
        feeds=source.feeds,
        reading=f"table {'with' if table.header else 'without'} header: {', '.join(titles)}",
        skipped=(*skipped, *unusable),
        shown=source.shown,
        target_texts=targets[0] if targets else None,
        limitations=tuple(_limitations(table, columns, "")),
        lengths=None if preprocess.lengths is None else source.lengths,
    )


def source_and_target(table: Table, name: str) -> tuple[int, ...]:
    """Choose the column of the sources, and that of the targets if there is one, by their names or by their content.

    Raises:
        DataError: the columns are ambiguous.
    """
    texts = [index for index in _column_indices(table) if not _are_numbers(table.column(index))]
    target = next((table.header.index(title) for title in TARGETS if title in table.header), None)
    named = [table.header.index(title) for title in (*SOURCES, *TEXTS) if title in table.header]
    source = next((index for index in named if index != target), None)
    rest = [index for index in texts if index not in (source, target)]
    if source is None and rest:
        source, *rest = rest
    if source is None or (rest and len(texts) > 2 and not named):
        raise DataError(
            f"{name} has {len(texts)} columns that look like texts; expected one, or two, a source and its target; add "
            "a header with the names source and target"
        )
    if target is None and not named and rest:
        target = rest[0]
    return (source,) if target is None else (source, target)


def _limitations(table: Table, columns: Columns, task: str) -> Iterator[Limitation]:
    """Yield limitations for quotes and for columns that are not read; name the label column if there are others."""
    if not table.quoted:
        yield Limitation("quotes of the data", "they do not enclose whole cells, so they are read as characters")
    unread = [index for index in _column_indices(table) if index not in (*columns.texts, columns.label)]
    if unread:
        titles = ", ".join(table.title(index) for index in unread)
        also = "" if columns.label is not None or task in ("", "text-generation") else "; no column is used as label"
        if columns.label is not None and any(table.header[index] in LABELS for index in unread if table.header):
            also = f"; {table.title(columns.label)} is used as label"
        yield Limitation("columns of the data", f"{titles} not read{also}")


def parse(text: str, name: str, titles: Container[str] = NAMES) -> tuple[Table, tuple[Skipped, ...]]:
    """Parse the text of a file into a table; skip rows whose number of cells differs from that of most rows.

    A first line with one of `titles` is a header.

    The separator is the comma, semicolon or tab that splits the lines most evenly. csv.Sniffer uses letter frequencies
    and may choose a letter of the texts as separator. Quotes enclose cells. In a tab-separated file in which they do
    not, as in many corpora, they are characters of the texts.
    """
    with _cells_of_any_length(text):
        separator = _separator(text)
        quoted = not (separator == "\t" and _quote_fault(text, separator))
        lines = _split_lines(text, separator, name, quoted=quoted)
    if not lines:
        raise DataError(f"{name} holds no rows; expected texts with optional labels")
    width = _width(lines)
    header = tuple(column_name(cell) for cell in lines[0]) if _is_header(lines, width, titles) else ()
    rows = list(enumerate(lines[1:] if header else lines))
    ragged = [
        Skipped(str(row), f"{len(cells)} columns, expected {width}") for row, cells in rows if len(cells) != width
    ]
    kept = [(str(row), tuple(cells)) for row, cells in rows if len(cells) == width]
    if not kept:
        raise DataError(f"{name} holds a header but no rows; expected texts with optional labels")
    cells, ids = tuple(cells for _, cells in kept), tuple(row for row, _ in kept)
    return Table(header, cells, ids, quoted=quoted), tuple(ragged)


def choose(table: Table, name: str, task: str) -> Columns:
    """Choose the text and label columns by the names in the header, or else by their content.

    Raises:
        DataError: the columns are ambiguous.
    """
    texts = _named_texts(table, task)
    titles = (*SCORES, *CLASSES) if task == "sentence-similarity" else LABELS
    label = next((table.header.index(title) for title in titles if title in table.header), None)
    rest = [index for index in _column_indices(table) if index not in texts and index != label]
    if label is None and task != "text-generation":
        label = _label_by_content(table, rest, named=bool(texts), name=name, task=task)
    if not texts:
        texts = tuple(index for index in rest if index != label and not _are_numbers(table.column(index)))
    if not 1 <= len(texts) <= (1 if task == "text-generation" else 2):
        expected = "one" if task == "text-generation" else "one or two"
        raise DataError(
            f"{name} has {len(texts)} columns that look like texts; expected {expected}; "
            "add a header with the names text, or sentence1 and sentence2, and label or score"
        )
    return Columns(texts, None if task == "text-generation" else label)


@contextlib.contextmanager
def _cells_of_any_length(text: str) -> Iterator[None]:
    """Raise the limit of the csv module on the length of a cell, 131,072 characters, temporarily."""
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _quote_fault(text: str, separator: str) -> str:
    """Return what is wrong with the quotes of a text; an empty string if they enclose whole cells."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for _ in rows:
            pass
    except csv.Error as error:
        return f"{error}, line {rows.line_num}"
    return ""


def _split_lines(text: str, separator: str, name: str, *, quoted: bool) -> list[list[str]]:
    """Return the cells of each row that has any.

    Raises:
        DataError: a quote is opened and never closed, so the rows after it would be read as one cell.
    """
    fault = _quote_fault(text, separator) if quoted else ""
    if fault.startswith("unexpected end"):
        raise DataError(f"{name} has a quoted cell that does not end ({fault}); close its quote, or double the quote")
    lines = io.StringIO(text, newline="")
    try:
        rows = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        return [cells for cells in rows if any(cells)]
    except csv.Error as error:
        raise DataError(f"{name} is not a readable table ({error}); check its quotes") from error


def _separator(text: str) -> str:
    head = "\n".join(text.split("\n", 200)[:200])

    def evenness(separator: str) -> float:
        lines = [cells for cells in csv.reader(io.StringIO(head, newline=""), delimiter=separator) if any(cells)]
        width = _width(lines) if lines else 1
        return sum(len(cells) == width for cells in lines) / len(lines) if width > 1 else 0.0

    try:
        return max(",;\t", key=evenness)
    except csv.Error:
        return ","


def _width(lines: Sequence[Sequence[str]]) -> int:
    return Counter(len(cells) for cells in lines).most_common(1)[0][0]


def _is_header(lines: Sequence[Sequence[str]], width: int, titles: Container[str]) -> bool:
    first, rest = lines[0], [cells for cells in lines[1:] if len(cells) == width]
    if len(first) != width or any(_number(cell) is not None for cell in first):
        return False
    # A name that occurs again below the first line is a class label, not a title
    columns = list(zip(*rest, strict=True)) or [()] * width
    if any(column_name(cell) in titles and cell not in columns[index] for index, cell in enumerate(first)):
        return True
    return bool(rest) and any(_are_numbers(column) for column in columns)


def column_name(title: str) -> str:
    """Return the title of a column in lower case, with underscores."""
    return title.strip().lower().replace(" ", "_").replace("-", "_")


def _column_indices(table: Table) -> list[int]:
    indices = range(len(table.rows[0]))
    return [index for index in indices if not table.header or table.header[index] not in NUMBERINGS]


def _named_texts(table: Table, task: str) -> tuple[int, ...]:
    pair = next((pair for pair in PAIRS if set(pair) <= set(table.header)), None)
    if pair is not None and task != "text-generation":
        return tuple(table.header.index(title) for title in pair)
    single = (*TEXTS, *(first for first, _ in PAIRS))
    return tuple(table.header.index(title) for title in single if title in table.header)[:1]


def _label_by_content(table: Table, rest: Sequence[int], *, named: bool, name: str, task: str) -> int | None:
    numeric = [index for index in rest if _are_numbers(table.column(index))]
    if len(numeric) > 1 or len(table.rows) >= FEW:
        numeric = [index for index in numeric if not _are_row_numbers(table.column(index))]
    if len(numeric) > 1 and not named:
        titles = " and ".join(table.title(index) for index in numeric)
        raise DataError(
            f"{name} has the numeric columns {titles}; expected one; name the label column 'label' or 'score' in a "
            "header"
        )
    if len(numeric) == 1:
        return numeric[0]
    if task == "text-classification" and not numeric and not named and len(rest) > 1:
        return next((index for index in reversed(rest) if _are_categories(table.column(index))), None)
    return None


def _are_categories(cells: Sequence[str]) -> bool:
    """Return whether the cells are few distinct single words: class names rather than texts."""
    return len(set(cells)) <= max(2, len(cells) // 2) and not any(" " in cell.strip() for cell in cells)


def _are_row_numbers(cells: Sequence[str]) -> bool:
    """Return whether the cells are row numbers: 0, 1, 2, ... or 1, 2, 3, ..."""
    return list(cells) in ([str(row) for row in range(start, start + len(cells))] for start in (0, 1))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(_number(cell) is not None for cell in cells)


def _with_label_sets(table: Table, name: str, preprocess: Preprocess, skipped: Sequence[Skipped]) -> Samples | None:
    """Return the texts and label sets of a table, or None if it has none.

    The labels are columns of 0 and 1, named as the model's labels, or one column with lists.
    """
    columns = label_columns(table.header, preprocess.class_names)
    text = next((table.header.index(title) for title in TEXTS if title in table.header), None)
    lists = next((table.header.index(title) for title in LABEL_SETS if title in table.header), None)
    if text is None or not (columns or lists is not None):
        return None
    empty = [not row[text].strip() for row in table.rows]
    rows = [row for row, missing in zip(table.rows, empty, strict=True) if not missing]
    source = tokens(name, [row[text] for row in rows], None, False, preprocess)
    if columns:
        labels, shape = sets_of_columns(rows, columns, name), f"{len(columns)} label columns"
    else:
        assert lists is not None
        labels = sets_of_lists([listed(row[lists]) for row in rows], preprocess, name)
        shape = f"label sets {table.title(lists)}"
    unusable = [Skipped(id, "the text is empty") for id, missing in zip(table.ids, empty, strict=True) if missing]
    return Samples(
        tuple(id for id, missing in zip(table.ids, empty, strict=True) if not missing),
        source.feeds,
        f"table with header: text {table.title(text)}, {shape}",
        labels=labels,
        label_kind="labels",
        skipped=(*skipped, *unusable),
        shown=source.shown,
    )


def _label_kind(
    table: Table, columns: Columns, task: str, paired: bool, problem_type: str | None = None
) -> LabelKind | None:
    if columns.label is None:
        return None
    if problem_type == "regression":
        return "score"
    title = table.header[columns.label] if table.header else ""
    cells = [cell for cell in table.column(columns.label) if cell.strip()]
    if title in SCORES or (paired and task == "sentence-similarity" and _are_numbers(cells)):
        return "score"
    numbers = [_number(cell) for cell in cells]
    fraction = any(number is not None and math.isfinite(number) and number != int(number) for number in numbers)
    return "score" if fraction and _are_numbers(cells) else "class"


def _fault(row: Sequence[str], columns: Columns, kind: LabelKind | None) -> str | None:
    if any(not row[index].strip() for index in columns.texts):
        return "the text is empty"
    if any(NUL in row[index] for index in columns.texts):
        return HOLDS_NUL
    if columns.label is None:
        return None
    cell = row[columns.label].strip()
    if not cell:
        return f"the {kind} is empty"
    number = _number(cell)
    if kind == "score" and (number is None or not math.isfinite(number)):
        return f"the score {cell!r} is not a finite number"
    if kind == "class" and number == -1:
        return "its class is -1, which marks a sample without a label"
    return None


def _labels(cells: Sequence[str], kind: LabelKind | None, name: str) -> Array:
    if kind == "score":
        return np.array([float(cell) for cell in cells], dtype=np.float64)
    if not _are_numbers(cells):
        return np.unique(cells, return_inverse=True)[1].astype(np.int64).reshape(-1)
    values = np.array([float(cell) for cell in cells])
    wrong = ~np.isfinite(values) | (values < 0) | (values >= TOO_LARGE)
    if wrong.any():
        raise wrong_class(name, cells[int(np.argmax(wrong))])
    return values.astype(np.int64)


def _class_names(cells: Sequence[str], kind: LabelKind | None) -> tuple[str, ...] | None:
    """Return the sorted class names of a column, the names of the numbers in `_labels`; None for numbers."""
    return None if kind != "class" or _are_numbers(cells) else tuple(sorted(set(cells)))


def _reading(table: Table, columns: Columns, kind: LabelKind | None) -> str:
    texts = " and ".join(table.title(index) for index in columns.texts)
    label = "" if columns.label is None else f", {kind} {table.title(columns.label)}"
    return f"table {'with' if table.header else 'without'} header: texts {texts}{label}"
