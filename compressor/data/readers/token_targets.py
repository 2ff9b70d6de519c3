"""Texts whose labels are aligned with tokens: classes of words, spans of answers, and masked tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compressor.data.readers.base import Array, Feeds, Targets
from compressor.errors import DataError
from compressor.models.preprocess import Preprocess

MEMORY = 64 * 1024**2  # bytes of cached token ids; 512 rows of 128 tokens take 1.5 MB with three inputs
IGNORED = -100  # label of tokens that are not scored, as in torch and transformers
MASKED_SHARE = 0.15  # of the tokens of a text, as BERT was trained (Devlin et al., arXiv 1810.04805)

Prepared = tuple[Feeds, Targets]


@dataclass
class AlignedSamples:
    """Samples whose inputs and targets come from the same tokenization; small batches are cached.

    Attributes:
        prepare: returns the inputs and the targets of the samples at the given positions.
    """

    prepare: Callable[[Sequence[int]], Prepared]
    limit: int = MEMORY
    _batches: dict[tuple[int, ...], Prepared] = field(default_factory=dict)
    _bytes: int = 0

    def feeds(self, indices: Sequence[int]) -> Feeds:
        """Return token arrays by input name, [rows, longest row of the batch]."""
        return {name: array.copy() for name, array in self._prepared(indices)[0].items()}

    def targets(self, indices: Sequence[int]) -> Targets:
        """Return the labels and the scored positions of the same batch."""
        return self._prepared(indices)[1]

    def _prepared(self, indices: Sequence[int]) -> Prepared:
        key = tuple(indices)
        if key not in self._batches:
            prepared = self.prepare(key)
            size = sum(array.nbytes for array in prepared[0].values()) * 2
            if self._bytes + size > self.limit:
                return prepared
            self._batches[key] = prepared
            self._bytes += size
        return self._batches[key]


def masked_tokens(
    ids: Sequence[str], preprocess: Preprocess, seed: int, tokenize: Callable[..., Feeds]
) -> AlignedSamples:
    """Hide `MASKED_SHARE` of the tokens of each text, at least one; the labels are the hidden tokens.

    The choice depends on the seed and on the id of the sample, not on the other samples of the batch.

    Raises:
        DataError: the tokenizer has no mask token.
    """
    mask_token = preprocess.mask_token
    if mask_token is None:
        raise DataError("the tokenizer has no mask token, which a masked language model is evaluated with")

    def prepare(indices: Sequence[int]) -> Prepared:
        feeds = tokenize(indices)
        plain = ~np.isin(feeds["input_ids"], sorted(preprocess.special))
        hidden = np.stack([_hidden(plain[row], ids[index], seed) for row, index in enumerate(indices)])
        labels = np.where(hidden, feeds["input_ids"], IGNORED)
        feeds = feeds | {"input_ids": np.where(hidden, mask_token, feeds["input_ids"])}
        return feeds, Targets(labels, hidden)

    return AlignedSamples(prepare)


def _hidden(plain: Array, id: str, seed: int) -> Array:
    """Return the mask of the tokens to hide in one row."""
    hidden = np.zeros(len(plain), dtype=bool)
    places = np.flatnonzero(plain)
    if len(places):
        rng = np.random.default_rng([seed, zlib.crc32(id.encode(errors="surrogateescape"))])
        count = max(1, round(MASKED_SHARE * len(places)))
        hidden[rng.choice(places, count, replace=False)] = True
    return hidden


def plain_tokens(preprocess: Preprocess, tokenize: Callable[..., Feeds]) -> AlignedSamples:
    """Return texts without labels, of which all tokens but special ones are scored."""

    def prepare(indices: Sequence[int]) -> Prepared:
        feeds = tokenize(indices)
        return feeds, Targets(None, ~np.isin(feeds["input_ids"], sorted(preprocess.special)))

    return AlignedSamples(prepare)


def word_classes(
    words: Sequence[list[str]], classes: Sequence[Sequence[int]] | None, preprocess: Preprocess
) -> AlignedSamples:
    """Return texts split into words; the class of a word is the label of its first token, as in transformers.

    Raises:
        DataError: the model has no fast tokenizer.
    """
    align = _aligner(preprocess)

    def prepare(indices: Sequence[int]) -> Prepared:
        aligned = align([list(words[index]) for index in indices], None)
        previous = np.pad(aligned.words, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        first = (aligned.words >= 0) & (aligned.words != previous)
        if classes is None:
            return aligned.feeds, Targets(None, first)
        labels = np.full(first.shape, IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            labels[row, first[row]] = np.asarray(classes[index], dtype=np.int64)[aligned.words[row, first[row]]]
        return aligned.feeds, Targets(labels, labels != IGNORED)

    return AlignedSamples(prepare)


def answer_spans(
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[Sequence[tuple[int, int]]] | None,
    preprocess: Preprocess,
) -> AlignedSamples:
    """Return questions with contexts; labels are the first and last tokens of the answers, [rows, answers, 2].

    Without an answer, or if truncation removed it, the label is the first token. Rows with fewer answers repeat one.

    Args:
        questions: one for each sample.
        contexts: the texts that hold the answers.
        answers: first and last character (exclusive) of each answer in its context; None without labels.
        preprocess: preprocessing of the model.

    Raises:
        DataError: the model has no fast tokenizer.
    """
    align = _aligner(preprocess)

    def prepare(indices: Sequence[int]) -> Prepared:
        aligned = align([questions[index] for index in indices], [contexts[index] for index in indices])
        allowed = aligned.texts == 1
        allowed[:, 0] = True
        if answers is None:
            return aligned.feeds, Targets(None, allowed)
        spans = [
            [_token_span(aligned.offsets[row], aligned.texts[row] == 1, place) for place in answers[index]] or [(0, 0)]
            for row, index in enumerate(indices)
        ]
        most = max(map(len, spans))
        labels = np.array([row + [row[0]] * (most - len(row)) for row in spans], dtype=np.int64)
        return aligned.feeds, Targets(labels, allowed)

    return AlignedSamples(prepare)


def _token_span(offsets: Array, inside: Array, place: tuple[int, int]) -> tuple[int, int]:
    """Return the tokens that cover the characters of an answer; (0, 0) if truncation removed one of its ends."""
    start, end = place
    first = np.flatnonzero(inside & (offsets[:, 0] <= start) & (offsets[:, 1] > start))
    last = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] >= end))
    return (int(first[0]), int(last[0])) if len(first) and len(last) else (0, 0)


def _aligner(preprocess: Preprocess) -> Callable[..., Any]:
    if preprocess.align is None:
        raise DataError(
            "labels of words and spans need a fast tokenizer, which this model does not have; pass texts without "
            "labels, or add its tokenizer.json"
        )
    return preprocess.align


def spans_of(answers: object, context: str) -> list[tuple[int, int]]:
    """Return the places of answers in a context, from SQuAD's ``{"text": [...], "answer_start": [...]}`` or from texts.

    Texts without a place are searched for in the context. None, and empty texts, mean that there is no answer.

    Raises:
        ValueError: an answer is not in the context, or the answers have another form.

    >>> spans_of({"text": ["blue"], "answer_start": [11]}, "The sky is blue.")
    [(11, 15)]
    >>> spans_of("sky", "The sky is blue."), spans_of(None, "The sky is blue.")
    ([(4, 7)], [])
    """
    starts, texts = None, answers
    if isinstance(answers, Mapping):
        starts, texts = answers.get("answer_start"), answers.get("text", [])
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("the answers are no texts")
    if starts is None:
        starts = [context.find(text) for text in texts]
    if not isinstance(starts, list) or len(starts) != len(texts) or not all(type(start) is int for start in starts):
        raise ValueError("answer_start is no list with a number for each answer")
    places = [(start, start + len(text)) for start, text in zip(starts, texts, strict=True) if text]
    if any(start < 0 or end > len(context) for start, end in places):
        raise ValueError("an answer is not in the context")
    return places
