"""Padding of token rows, chosen so that a padded row gives the outputs of the same row alone.

Pipelines of transformers run classifiers and encoders with one text at a time, without padding. An engine runs batches,
so the padding must not change the outputs. Which padding does not, depends on the model: GPT-2 needs it on the right,
because its positions are counted from the left; XLNet on the left, because it reads the last token; a decoder that
classifies finds its last token by comparing with the ``pad_token_id`` of its config. Paddings are therefore tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.base import ModelError, first_line
from compressor.models.text.probe import CHARACTERS

Rows = Mapping[str, Sequence[Sequence[int]]]
Answer = Callable[[dict[str, npt.NDArray[Any]]], torch.Tensor]
RIGHT, LEFT = "right", "left"
SHORT, LONG = "a b", "a b c d e f g h i j k l"  # texts of different lengths
SAME = 1e-4  # of the largest output: sums over padding are split differently; a wrong position changes far more
SPECIAL = ("pad", "eos", "unk", "sep", "cls", "bos", "mask")  # in the order in which they are tried


@dataclass(frozen=True)
class Padding:
    """Token id of the padding, the side on which rows are padded, ``right`` or ``left``, and the least length."""

    token: int
    side: str
    least: int = 0

    def pad(self, rows: Rows, type_token: int = 0) -> dict[str, npt.NDArray[np.int64]]:
        """Pad rows to the longest one, or to the least length.

        Args:
            rows: one list of integers for each text, by input name.
            type_token: value of token_type_ids at padding.

        Returns:
            int64 [rows, longest row, or `least`] by input name; the attention mask is 0 at padding.

        >>> Padding(9, "right").pad({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]})["input_ids"].tolist()
        [[1, 2], [3, 9]]
        """
        fill = {"input_ids": self.token, "token_type_ids": type_token}
        return {name: self._padded(values, fill.get(name, 0)) for name, values in rows.items()}

    def alone(self, rows: Rows, type_token: int = 0) -> dict[str, npt.NDArray[np.int64]]:
        """Return the first of some rows as it is, [1, tokens] by input name."""
        return replace(self, least=0).pad({name: values[:1] for name, values in rows.items()}, type_token)

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> npt.NDArray[np.int64]:
        padded = np.full((len(rows), max(self.least, *map(len, rows))), fill, dtype=np.int64)
        for target, row in zip(padded, rows, strict=True):
            if len(row):
                target[slice(0, len(row)) if self.side == RIGHT else slice(-len(row), None)] = row
        return padded


def causal_padding(tokenizer: Any, config: Any) -> Padding:
    """Return the padding for a language model: on the right, where no earlier token reads it."""
    return Padding(next(_tokens(tokenizer, config), 0), RIGHT)


def find_causal_padding(
    answer: Answer,
    tokenizer: Any,
    config: Any,
    inputs: Sequence[str],
    longest: int | None,
    fixed: int | None = None,
) -> tuple[Padding, list[Limitation]]:
    """Return the padding for a language model: on the right if it leaves the outputs of a row unchanged.

    The tokens of CPM-Ant read later ones too, and it finds its padding on the left. Arguments are those of
    `find_padding`.
    """
    usual = replace(causal_padding(tokenizer, config), least=fixed or 0)
    rows = _example_rows(tokenizer, inputs, longest)
    if rows is None:
        return usual, []
    try:
        alone = answer(usual.alone(rows, tokenizer.pad_token_type_id))
        padded = answer(usual.pad(rows, tokenizer.pad_token_type_id))
    except Exception as error:  # modules raise errors of all kinds
        return usual, [Limitation("padding", f"not checked, as the model fails on a short text ({first_line(error)})")]
    if _is_same(alone, padded, rows, RIGHT):
        return usual, []
    return find_padding(answer, tokenizer, config, inputs, longest, fixed=fixed)


def find_padding(
    answer: Answer,
    tokenizer: Any,
    config: Any,
    inputs: Sequence[str],
    longest: int | None,
    least: int = 0,
    fixed: int | None = None,
) -> tuple[Padding, list[Limitation]]:
    """Return the first padding that leaves the outputs of a row unchanged, and what has to be said about it.

    Sides are tried beginning with that of the tokenizer, and tokens beginning with its padding token. If the model
    refuses batches because its config has no ``pad_token_id``, as decoders that classify do, the config gets the token.

    Args:
        answer: computes the output that is evaluated, first axis rows, from int64 [rows, tokens] by input name.
        tokenizer: tokenizer of the model.
        config: config of the text model; its ``pad_token_id`` may be set.
        inputs: input names of the model.
        longest: maximum number of tokens of a row; None if there is none.
        least: minimum number of tokens of a row.
        fixed: number of tokens to which every row is padded; None for the longest row of a batch.
    """
    usual = Padding(next(_tokens(tokenizer, config), 0), tokenizer.padding_side, least)
    rows = _example_rows(tokenizer, inputs, longest)
    if rows is None:
        reason = "not checked, because the tokenizer does not make rows of two lengths of two test texts"
        usual = replace(usual, least=fixed or least)
        return usual, [Limitation("padding", reason)]
    alone = answer(usual.pad({name: values[:1] for name, values in rows.items()}, tokenizer.pad_token_type_id))
    if alone.ndim > 1 and alone.shape[1] == least:
        alone = _of_tokens(alone, len(rows["input_ids"][0]), usual.side)
    before = getattr(config, "pad_token_id", None)
    # A negative id pads nothing: older configs of Llama have -1.
    refuses = _refuses_batches(answer, usual, rows) or (before is not None and before not in _known(config))
    for padding in _candidates(tokenizer, config, fixed or least):
        if refuses:
            config.pad_token_id = padding.token
        if _is_same(alone, answer(padding.pad(rows, tokenizer.pad_token_type_id)), rows, padding.side):
            return padding, list(_choice(padding, usual, tokenizer, refuses))
    config.pad_token_id = usual.token if refuses else before
    reason = "no padding leaves the outputs of a text unchanged, so they depend on the longest text of the batch"
    if fixed is not None:
        reason = f"no padding to {fixed} tokens leaves the outputs of a text unchanged"
    usual = replace(usual, least=fixed or least)
    return usual, [Limitation("padding", f"{reason}; transformers' pipelines run one text at a time")]


def _choice(padding: Padding, usual: Padding, tokenizer: Any, refuses: bool) -> Iterator[Limitation]:
    """Yield how a padding differs from that of the tokenizer and the config."""
    if refuses:
        yield Limitation(
            "pad_token_id",
            f"the config has none in the vocabulary, which batches need; it was set to {padding.token}, and a text is "
            "read up to its last other token",
        )
    if padding.side != usual.side:
        yield Limitation(
            "padding side",
            f"texts are padded on the {padding.side}, because padding on the {usual.side}, the side of the tokenizer, "
            "changes the outputs",
        )
    if padding.token != tokenizer.pad_token_id:
        yield Limitation("padding token", f"texts are padded with the token id {padding.token}, not by the tokenizer")


def _candidates(tokenizer: Any, config: Any, least: int) -> Iterator[Padding]:
    tokens = list(_tokens(tokenizer, config)) or [0]
    for side in (tokenizer.padding_side, LEFT if tokenizer.padding_side == RIGHT else RIGHT):
        yield from (Padding(token, side, least) for token in tokens)


def _tokens(tokenizer: Any, config: Any) -> Iterator[int]:
    """Yield the token ids that can pad, without duplicates: of the tokenizer and the config, within the vocabulary."""
    ends = getattr(config, "eos_token_id", None)
    ids = [getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)]
    ids += ends if isinstance(ends, list) else [ends]
    ids += [getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL]
    known = _known(config)
    yield from dict.fromkeys(token for token in ids if isinstance(token, int) and token in known)


def _known(config: Any) -> range:
    """Return the token ids of a model; those of Unicode for one that hashes characters and states no vocabulary."""
    return range(getattr(config, "vocab_size", CHARACTERS))


def _example_rows(tokenizer: Any, inputs: Sequence[str], longest: int | None) -> dict[str, list[list[int]]] | None:
    """Return a shorter and a longer row of tokens by input name; None if the tokenizer does not return such rows."""
    cut = {} if longest is None else {"truncation": True, "max_length": longest}
    try:
        encoded = encode(tokenizer, [SHORT, LONG], None, inputs, **cut)
    except DataError:
        return None
    rows = {name: [list(row) for row in encoded[name]] for name in inputs if name in encoded}
    short, long = map(len, rows["input_ids"])
    return rows if 0 < short < long and set(rows) == set(inputs) else None


def _refuses_batches(answer: Answer, padding: Padding, rows: Rows) -> bool:
    """Return whether a model refuses two rows, although equal rows need no padding."""
    try:
        answer(padding.pad({name: [values[0], values[0]] for name, values in rows.items()}))
    except ValueError:
        return True
    return False


def _is_same(alone: torch.Tensor, batch: torch.Tensor, rows: Rows, side: str) -> bool:
    """Return whether the first row of a batch has the outputs of that row alone; outputs of padding are ignored."""
    row, tokens = batch[:1], len(rows["input_ids"][0])
    if row.ndim > 1 and row.shape[1] != alone.shape[1]:
        row = _of_tokens(row, tokens, side)
    if row.shape != alone.shape:  # sound of a length that is drawn at random (VITS)
        return False
    difference = (row - alone).abs().max()
    return bool(difference <= SAME * alone.abs().max())


def _of_tokens(outputs: torch.Tensor, tokens: int, side: str) -> torch.Tensor:
    """Return the outputs of the tokens of a row that is padded on a side, [1, tokens, ...]."""
    return outputs[:, :tokens] if side == RIGHT else outputs[:, -tokens:]


def allow_batches(answer: Answer, config: Any, inputs: Sequence[str], tokens: int = 2) -> list[Limitation]:
    """Set the ``pad_token_id`` of a model without a tokenizer that refuses batches without one.

    Returns:
        The limitation that says so, if any.

    Raises:
        ModelError: the model refuses batches, and its config has no token that can be the padding.
    """
    ids = [index % 2 + 1 for index in range(tokens)]
    rows = {name: [ids if name == "input_ids" else [int(name == "attention_mask")] * tokens] * 2 for name in inputs}
    if getattr(config, "pad_token_id", None) is not None or not _refuses_batches(answer, Padding(0, RIGHT), rows):
        return []
    token = next(_tokens(None, config), None)
    if token is None:
        raise ModelError(
            "the model refuses batches, because its config has no pad_token_id; set pad_token_id in config.json to the "
            "token id that pads your rows, or add the files of its tokenizer."
        )
    config.pad_token_id = token
    reason = f"the config has none, without which the model refuses batches; it was set to the end token {token}"
    return [Limitation("pad_token_id", f"{reason}, and rows are read up to their last other token")]


def encode(
    tokenizer: Any, texts: list[str], second: list[str] | None, inputs: Sequence[str], **options: Any
) -> Mapping[str, list[list[int]]]:
    """Tokenize texts, or pairs of texts, into lists of tokens without padding.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow.
        texts: texts, or first texts.
        second: second texts; None for single texts.
        inputs: input names of the model.
        options: truncation and max_length.

    Raises:
        DataError: the tokenizer fails, for example because a word has no token and there is none for unknown words.
    """
    masked = "attention_mask" in inputs
    try:
        encoded: Mapping[str, list[list[int]]] = tokenizer(
            texts, second, padding=False, return_attention_mask=masked, verbose=False, **options
        )
    except Exception as error:  # tokenizers raise bare exceptions
        raise DataError(
            f"the tokenizer fails on a text ({first_line(error)}); repair the tokenizer, or pass token ids as .npy"
        ) from error
    return encoded
