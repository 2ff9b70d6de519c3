"""Readers of .jsonl and .json files, and of .conll files: samples with named fields, such as words with tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter
from typing_extensions import TypedDict

from compressor.data.label_sets import sets_of_lists
from compressor.data.readers.base import TOO_LARGE, Samples, Skipped, other_kind
from compressor.data.readers.tables import TEXTS, Table, column_name, table_samples
from compressor.data.readers.texts import text_of, tokens
from compressor.data.readers.token_targets import IGNORED, answer_spans, spans_of, word_classes
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.preprocess import Preprocess
from runtimes.base.json_text import OBJECT, JsonTextError, parse

WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags", "label")
ANSWERS = ("answers", "answer", "answer_text")
LABEL_SETS = ("labels", "label")
UNKNOWN = 3  # unknown tags that an error names

Record = Mapping[str, Any]


class Data(TypedDict):
    """An object with the samples beside other fields."""

    data: list[dict[str, JsonValue]]


RECORDS: TypeAdapter[list[dict[str, JsonValue]]] = TypeAdapter(list[dict[str, JsonValue]])
DATA: TypeAdapter[Data] = TypeAdapter(Data)


def read_jsonl(path: Path, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read a file with one JSON object per line; ids are line numbers from 0, and empty lines are ignored.

    Raises:
        DataError: a line is no JSON object, or the fields do not fit the task.
    """
    records, ids = read_records(path, name)
    return record_samples(records, ids, name, preprocess, task, seed)


def read_records(path: Path, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the JSON objects of a file with one per line, and their ids; empty lines are ignored.

    Raises:
        DataError: a line is no JSON object, or there is none.
    """
    found = list(json_lines(path, name))
    if not found:
        raise DataError(f"{name} holds no samples; expected one JSON object per line")
    return [record for _, record in found], [str(row) for row, _ in found]


def json_lines(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line, from 0, and its JSON object; empty lines are left out.

    Raises:
        DataError: a line is no JSON object.
    """
    for row, line in enumerate(text_of(path, name).split("\n")):
        if line.strip():
            try:
                yield row, parse(line, OBJECT)
            except JsonTextError as error:
                reason = f"line {row + 1} of {name} is no JSON object ({error})"
                raise DataError(f"{reason}; expected one per line") from error


def read_json(path: Path, name: str, preprocess: Preprocess, task: str, seed: int = 0) -> Samples:
    """Read a file with one JSON list of objects, also as the field ``data`` of an object; ids are positions from 0.

    Raises:
        DataError: the file holds something else, or the fields do not fit the task.
    """
    text = text_of(path, name)
    try:
        records = parse(text, RECORDS) if text.lstrip().startswith("[") else parse(text, DATA)["data"]
    except JsonTextError as error:
        raise DataError(
            f"{name} is no list of JSON objects ({error}); expected one for each sample, or .jsonl with one per line"
        ) from error
    if not records:
        raise DataError(f"{name} holds no samples; expected a list of JSON objects")
    return record_samples(records, [str(row) for row in range(len(records))], name, preprocess, task, seed)


def table_of(records: Sequence[Record], ids: Sequence[str]) -> tuple[Table, list[str]]:
    """Return the fields of records with text or numbers as a table, and the names of the others."""
    nested = [field for field in _fields(records) if any(isinstance(each.get(field), list | dict) for each in records)]
    return _table(records, ids, nested), nested


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
        raise other_kind(name, "texts", preprocess.kind, preprocess.inputs)
    if task == "token-classification" and _field(records, WORDS) is not None:
        return _tagged(records, ids, name, preprocess)
    if task == "question-answering":
        return _questions(records, ids, name, preprocess)
    field = _field(records, LABEL_SETS)
    if field is not None and any(isinstance(record.get(field), list) for record in records):
        return _label_sets(records, ids, name, preprocess, field)
    return _plain(records, ids, name, preprocess, task, seed)


def _tagged(records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess) -> Samples:
    """Return words with their tags; rows without words, or with another number of tags, are skipped."""
    words, tags = _field(records, WORDS), _field(records, TAGS)
    assert words is not None
    usable, skipped = _sorted_out(ids, [_fault_of_tags(record, words, tags) for record in records])
    texts = [[str(word) for word in records[index][words]] for index in usable]
    classes = None if tags is None else _numbered([records[index][tags] for index in usable], name, preprocess)
    source = word_classes(texts, classes, preprocess)
    joined = [" ".join(text) for text in texts]
    return Samples(
        tuple(ids[index] for index in usable),
        source.feeds,
        f"words {words!r}" + ("" if tags is None else f" with tags {tags!r}"),
        label_kind=None if tags is None else "token classes",
        largest_class=None if classes is None else max((max(row) for row in classes), default=None),
        skipped=skipped,
        shown=joined.__getitem__,
        targets=source.targets,
        lengths=_lengths(preprocess, joined, None),
    )


def _fault_of_tags(record: Record, words: str, tags: str | None) -> str | None:
    if not isinstance(record.get(words), list) or not record[words]:
        return f"{words} is no list of words"
    if tags is None:
        return None
    if not isinstance(record.get(tags), list) or len(record[tags]) != len(record[words]):
        return f"{tags} is no list with a tag for each word"
    return None


def _numbered(rows: Sequence[Sequence[object]], name: str, preprocess: Preprocess) -> list[list[int]]:
    """Return the class numbers of tags, which are numbers or names of the model; -100 marks words without a tag.

    Raises:
        DataError: tags are not among the names of the model, or are negative numbers.
    """
    names = preprocess.class_names
    distinct = {repr(tag): tag for row in rows for tag in row}  # by text, as a list or an object cannot be a key
    numbers: dict[str, int] = {}
    for text, tag in distinct.items():
        found = names.numbers(tag) if names is not None and isinstance(tag, str) else ()
        if len(found) == 1:
            numbers[text] = found[0]
        elif type(tag) is int and (0 <= tag < TOO_LARGE or tag == IGNORED):
            numbers[text] = tag
    unknown = sorted(str(tag) for text, tag in distinct.items() if text not in numbers)
    if unknown:
        known = "none" if names is None else ", ".join(names.known(UNKNOWN))
        raise DataError(
            f"{name} holds tags that the model does not name ({', '.join(unknown[:UNKNOWN])}; the model's are {known}, "
            "...); use the names in id2label of its config, or class numbers"
        )
    return [[numbers[repr(tag)] for tag in row] for row in rows]


def _questions(records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess) -> Samples:
    """Return questions with their contexts, and the places of the answers."""
    if not {"question", "context"} <= set(_fields(records)):
        raise DataError(
            f"{name} has the fields {', '.join(_fields(records)) or 'none'}; question answering needs question and "
            "context, and answers for exact matches"
        )
    field = _field(records, ANSWERS)
    usable, skipped = _sorted_out(ids, [_fault_of_answers(record, field) for record in records])
    questions = [str(records[index]["question"]) for index in usable]
    contexts = [str(records[index]["context"]) for index in usable]
    answers = None
    if field is not None:
        answers = [spans_of(records[index].get(field), str(records[index]["context"])) for index in usable]
    source = answer_spans(questions, contexts, answers, preprocess)
    shown = [f"{question}\n{context}" for question, context in zip(questions, contexts, strict=True)]
    return Samples(
        tuple(ids[index] for index in usable),
        source.feeds,
        "questions with contexts" + ("" if field is None else f" and {field!r}"),
        label_kind=None if field is None else "spans",
        skipped=skipped,
        shown=shown.__getitem__,
        targets=source.targets,
        lengths=_lengths(preprocess, questions, contexts),
    )


def _fault_of_answers(record: Record, field: str | None) -> str | None:
    if not str(record.get("question") or "").strip() or not str(record.get("context") or "").strip():
        return "question or context is empty"
    try:
        if field is not None:
            spans_of(record.get(field), str(record["context"]))
    except ValueError as error:
        return str(error)
    return None


def _label_sets(
    records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess, field: str
) -> Samples:
    """Return texts with lists of labels; rows without a text or a list are skipped.

    Raises:
        DataError: the model predicts one class, or the records have no text.
    """
    if preprocess.problem_type != "multi_label_classification":
        raise DataError(
            f"{name} has label sets in {field!r}, but the model predicts one class; pass --problem-type "
            "multi_label_classification, or data with one label for each sample"
        )
    text = _field(records, TEXTS)
    if text is None:
        fields, expected = ", ".join(_fields(records)), ", ".join(TEXTS[:3])
        raise DataError(f"{name} has the fields {fields}; expected a text as {expected}")
    usable, skipped = _sorted_out(ids, [_fault_of_set(record, text, field) for record in records])
    source = tokens(name, [str(records[index][text]) for index in usable], None, False, preprocess)
    return Samples(
        tuple(ids[index] for index in usable),
        source.feeds,
        f"texts {text!r} with label sets {field!r}",
        labels=sets_of_lists([records[index][field] for index in usable], preprocess, name),
        label_kind="labels",
        skipped=skipped,
        shown=source.shown,
        lengths=None if preprocess.lengths is None else source.lengths,
    )


def _fault_of_set(record: Record, text: str, field: str) -> str | None:
    if not str(record.get(text) or "").strip():
        return "the text is empty"
    return None if isinstance(record.get(field), list) else f"{field} is no list of labels"


def _plain(
    records: Sequence[Record], ids: Sequence[str], name: str, preprocess: Preprocess, task: str, seed: int
) -> Samples:
    """Return the samples of records as those of a table; fields with lists or objects are not read, which is said."""
    table, nested = table_of(records, ids)
    samples = table_samples(table, name, preprocess, task, seed)
    if not nested:
        return samples
    limitation = Limitation("fields of the data", f"{', '.join(nested)} not read, because they are lists or objects")
    return replace(samples, limitations=(*samples.limitations, limitation))


def _sorted_out(ids: Sequence[str], faults: Sequence[str | None]) -> tuple[list[int], tuple[Skipped, ...]]:
    """Return the positions of the samples without a fault, and the others with their faults."""
    usable = [index for index, fault in enumerate(faults) if fault is None]
    return usable, tuple(Skipped(id, fault) for id, fault in zip(ids, faults, strict=True) if fault is not None)


def _lengths(
    preprocess: Preprocess, first: Sequence[str], second: Sequence[str] | None
) -> Callable[[Sequence[int]], list[list[int]]] | None:
    """Return the function that counts the tokens of samples without truncation; None if the model cannot count them."""
    count = preprocess.lengths
    if count is None:
        return None

    def lengths(indices: Sequence[int]) -> list[list[int]]:
        others = None if second is None else [second[index] for index in indices]
        return [[length] for length in count([first[index] for index in indices], others)]

    return lengths


def _table(records: Sequence[Record], ids: Sequence[str], nested: Sequence[str]) -> Table:
    """Return the fields of records with text or numbers as the columns of a table."""
    fields = [field for field in _fields(records) if field not in nested]
    cells = [tuple("" if record.get(field) is None else str(record[field]) for field in fields) for record in records]
    return Table(tuple(map(column_name, fields)), tuple(cells), tuple(ids))


def _fields(records: Sequence[Record]) -> list[str]:
    """Return the fields of all records, in order of first appearance."""
    return list(dict.fromkeys(field for record in records for field in record))


def _field(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """Return the first of some names that is a field of any record."""
    fields = set(_fields(records))
    return next((name for name in names if name in fields), None)
