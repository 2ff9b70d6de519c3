"""Readers of .jsonl files and of .conll files: samples with named fields, such as words with tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.data.label_sets import sets_of_lists
from compressor.data.readers.base import Samples, Skipped
from compressor.data.readers.tables import TEXTS, Table, table_samples
from compressor.data.readers.texts import text_of, tokens
from compressor.data.readers.token_targets import AlignedSamples, answer_spans, spans_of, word_classes
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess
from runtimes.base.json_text import OBJECT, JsonTextError, parse

WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags", "label")
ANSWERS = ("answers", "answer", "answer_text")
LABEL_SETS = ("labels", "label")
UNKNOWN = 3  # unknown tags that an error names

Record = Mapping[str, Any]


def read_jsonl(path: Path, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read a file with one JSON object per line; ids are line numbers from 0, and empty lines are ignored.

    Raises:
        DataError: a line is no JSON object, or the fields do not fit the task.
    """
    records, ids = [], []
    for row, line in enumerate(text_of(path, name).split("\n")):
        if not line.strip():
            continue
        try:
            record = parse(line, OBJECT)
        except JsonTextError as error:
            raise DataError(f"line {row + 1} of {name} is no JSON object ({error}); expected one per line") from error
        records.append(record)
        ids.append(str(row))
    if not records:
        raise DataError(f"{name} holds no samples; expected one JSON object per line")
    return record_samples(records, ids, name, preprocess, task, seed)


def read_conll(path: Path, name: str, preprocess: Preprocess, task: str) -> Samples:
    """Read a CoNLL file: a word and its tag per line, in the first and the last column; blank lines end sentences.

    Raises:
        DataError: the model does not classify tokens, or the file holds no sentence.
    """
    if task != "token-classification":
        raise DataError(f"{name} holds words with tags, but the task of the model is {task}; pass texts")
    records: list[dict[str, list[str]]] = [{"tokens": [], "tags": []}]
    for line in text_of(path, name).splitlines():
        cells = line.split()
        if not cells:
            records.append({"tokens": [], "tags": []})
        elif cells[0] != "-DOCSTART-":
            records[-1]["tokens"].append(cells[0])
            records[-1]["tags"].append(cells[-1])
    kept = [record for record in records if record["tokens"]]
    if not kept:
        raise DataError(f"{name} holds no sentence; expected a word and its tag per line")
    return record_samples(kept, [str(row) for row in range(len(kept))], name, preprocess, task)


def record_samples(
    records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess, task: str, seed: int = 0
) -> Samples:
    """Return the samples of records for the task of the model."""
    if preprocess.kind != "text":
        raise DataError(f"{name} holds texts, but the model takes {preprocess.kind} inputs; pass --data of that kind")
    if task == "token-classification" and any(field in records[0] for field in WORDS):
        return _tagged(records, ids, name, preprocess)
    if task == "question-answering":
        return _questions(records, ids, name, preprocess)
    if preprocess.problem_type == "multi_label_classification" and _field(records[0], LABEL_SETS) is not None:
        return _label_sets(records, ids, name, preprocess)
    return table_samples(_table(records, ids), name, preprocess, task, seed)


def _tagged(records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess) -> Samples:
    """Return words with their tags; rows without words, or with another number of tags, are skipped."""
    words, tags = _field(records[0], WORDS), _field(records[0], TAGS)
    assert words is not None
    reasons = [_fault_of_tags(record, words, tags) for record in records]
    usable = [index for index, reason in enumerate(reasons) if reason is None]
    skipped = [Skipped(ids[index], reason) for index, reason in enumerate(reasons) if reason is not None]
    texts = [[str(word) for word in records[index][words]] for index in usable]
    classes = None if tags is None else _numbered([records[index][tags] for index in usable], name, preprocess)
    reading = f"words {words!r}" + ("" if tags is None else f" with tags {tags!r}")
    largest = None if classes is None else max((max(row) for row in classes), default=None)
    source = word_classes(texts, classes, preprocess)
    return _samples(
        source, [ids[index] for index in usable], reading, skipped, [" ".join(text) for text in texts],
        kind=None if tags is None else "token classes", largest=largest,
    )  # fmt: skip


def _fault_of_tags(record: Record, words: str, tags: str | None) -> str | None:
    if not isinstance(record.get(words), list) or not record[words]:
        return f"{words} is no list of words"
    if tags is None:
        return None
    if not isinstance(record.get(tags), list) or len(record[tags]) != len(record[words]):
        return f"{tags} is no list with a tag for each word"
    return None


def _numbered(rows: Sequence[Sequence[object]], name: str, preprocess: Preprocess) -> list[list[int]]:
    """Return the class numbers of tags, which are numbers or the model's own names.

    Raises:
        DataError: tags are not among the names of the model.
    """
    numbers = {tag: index for index, tag in enumerate(preprocess.class_names)}
    unknown = sorted({str(tag) for row in rows for tag in row if not isinstance(tag, int) and tag not in numbers})
    if unknown:
        known = ", ".join(preprocess.class_names[:UNKNOWN]) or "none"
        raise DataError(
            f"{name} holds tags that the model does not name ({', '.join(unknown[:UNKNOWN])}; the model's are {known}, "
            "...); use the names in id2label of its config, or class numbers"
        )
    return [[tag if isinstance(tag, int) else numbers[str(tag)] for tag in row] for row in rows]


def _questions(records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess) -> Samples:
    """Return questions with their contexts, and the places of the answers."""
    if not {"question", "context"} <= set(records[0]):
        raise DataError(
            f"{name} has the fields {', '.join(records[0])}; question answering needs question and context, and "
            "answers for exact matches"
        )
    field = _field(records[0], ANSWERS)
    empty = [not str(record.get("question", "")).strip() or not str(record.get("context", "")) for record in records]
    usable = [index for index, missing in enumerate(empty) if not missing]
    skipped = [Skipped(ids[index], "question or context is empty") for index, missing in enumerate(empty) if missing]
    questions = [str(records[index]["question"]) for index in usable]
    contexts = [str(records[index]["context"]) for index in usable]
    answers = None
    if field is not None:
        answers = [spans_of(records[index].get(field), str(records[index]["context"])) for index in usable]
    reading = "questions with contexts" + ("" if field is None else f" and {field!r}")
    source = answer_spans(questions, contexts, answers, preprocess)
    shown = [f"{question}\n{context}" for question, context in zip(questions, contexts, strict=True)]
    kind = None if field is None else "spans"
    return _samples(source, [ids[index] for index in usable], reading, skipped, shown, kind=kind)


def _label_sets(records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess) -> Samples:
    """Return texts with lists of labels."""
    field, text = _field(records[0], LABEL_SETS), _field(records[0], TEXTS)
    if text is None:
        raise DataError(f"{name} has the fields {', '.join(records[0])}; expected a text as {', '.join(TEXTS[:3])}")
    assert field is not None
    lists = [value if isinstance(value := record.get(field), list) else [] for record in records]
    texts = [str(record.get(text, "")) for record in records]
    source = tokens(name, texts, None, False, preprocess)
    return Samples(
        tuple(ids), source.feeds, f"texts {text!r} with label sets {field!r}",
        labels=sets_of_lists(lists, preprocess.class_names, name), label_kind="labels", shown=source.shown,
    )  # fmt: skip


def _samples(
    source: AlignedSamples, ids: Sequence[str], reading: str, skipped: Sequence[Skipped], shown: Sequence[str],
    *, kind: Any, largest: int | None = None,
) -> Samples:  # fmt: skip
    return Samples(
        tuple(ids), source.feeds, reading, label_kind=kind, skipped=tuple(skipped), shown=shown.__getitem__,
        targets=source.targets, largest_class=largest,
    )  # fmt: skip


def _table(records: Sequence[Record], ids: Sequence[str]) -> Table:
    """Return the fields of records with text or numbers as the columns of a table."""
    fields = [
        field for field, value in records[0].items() if isinstance(value, str | int | float | bool) or value is None
    ]
    cells = [tuple("" if record.get(field) is None else str(record[field]) for field in fields) for record in records]
    titles = tuple(field.strip().lower().replace(" ", "_").replace("-", "_") for field in fields)
    return Table(titles, tuple(cells), tuple(ids))


def _field(record: Record, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record), None)
