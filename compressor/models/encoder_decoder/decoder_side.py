"""The inputs of the decoder: target texts, or what the model itself generates from a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.internals.transformers import quiet
from compressor.limitations import Limitation
from compressor.models.base import ModelError, first_line
from compressor.models.preprocess import DecoderSide
from compressor.models.text.padding import encode

Array = npt.NDArray[Any]

GENERATED = 32  # tokens at most that the model generates where the data has no target
IGNORED = -100  # label of padding, as in transformers


@dataclass(frozen=True)
class _Decoder:
    """The decoder of a module of transformers, with its tokenizer if it has one."""

    module: Any
    tokenizer: Any
    longest: int
    start: int
    prompt: tuple[int, ...] = ()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of target texts, with the tokenizer's rules for targets, without the start token.

        The tokenizer of Whisper writes the start token, which `shift` adds to the others.
        """
        options = {"truncation": True, "max_length": self.longest}
        rows = encode(_ForTargets(self.tokenizer), texts, None, (), **options)["input_ids"]
        return [list(row[1:] if list(row[:1]) == [self.start] else row) for row in rows]

    def shift(self, labels: Array) -> Array:
        """Return the decoder inputs [rows, tokens] for labels [rows, tokens]: the start token, then the labels."""
        return _shifted(self.module, labels)

    def generate(self, feeds: dict[str, Array]) -> list[list[int]]:
        """Return the tokens that the module generates greedily for each row, the start token first.

        Tokens after the end token are left out.
        """
        from transformers import GenerationMixin

        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        new = min(GENERATED, self.longest - 1 - len(self.prompt))
        if self.prompt:
            rows = len(next(iter(feeds.values())))
            tensors["decoder_input_ids"] = torch.tensor([[self.start, *self.prompt]] * rows)
        with quiet(), torch.inference_mode():  # Whisper's own generate cuts long speech into segments
            found = GenerationMixin.generate(
                self.module, **tensors, do_sample=False, num_beams=1, min_new_tokens=1, max_new_tokens=new
            )
        return [_ended(row.tolist(), self._ends()) for row in found]

    def _ends(self) -> list[int]:
        end = self.module.generation_config.eos_token_id
        return [] if end is None else list(end) if isinstance(end, list) else [end]


def _shifted(module: Any, labels: Array) -> Array:
    own = getattr(module, "prepare_decoder_input_ids_from_labels", None)  # mBART starts with the language
    if own is not None:
        ids: Array = own(labels=torch.from_numpy(labels)).numpy()
        return ids
    start, padding = (getattr(module.config, f"{name}_token_id") for name in ("decoder_start", "pad"))
    shifted = np.concatenate([np.full((len(labels), 1), start), labels[:, :-1]], 1)
    return np.where(shifted == IGNORED, padding, shifted).astype(np.int64)


@dataclass(frozen=True)
class _ForTargets:
    """A tokenizer that treats the texts of a call as targets, as those of translation models must."""

    tokenizer: Any

    def __call__(self, texts: list[str], second: None, **options: Any) -> Any:
        return self.tokenizer(text_target=texts, **options)


def _ended(row: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens up to the first end token; the first token never ends a row, as it starts BART's decoder."""
    end = next((place for place, token in enumerate(row[1:], 1) if token in ends), len(row) - 1)
    return list(row[: end + 1])


def decoder_side(module: Any, tokenizer: Any, longest: int, location: str) -> DecoderSide:
    """Return how the inputs of a module's decoder are made.

    Args:
        module: an encoder-decoder of transformers.
        tokenizer: its tokenizer; None without one.
        longest: maximum number of tokens of a target.
        location: name of the model in the error message.

    Raises:
        ModelError: the module does not say with which token its decoder starts.
    """
    try:
        shifted = int(_shifted(module, np.array([[5, 2]]))[0, 0])
    except Exception as error:  # modules raise errors of all kinds
        raise ModelError(
            f"{location} does not say with which token its decoder starts ({first_line(error)}); set "
            "decoder_start_token_id in its config.json."
        ) from error
    stated = getattr(module.generation_config, "decoder_start_token_id", None)
    start = stated if isinstance(stated, int) else shifted
    decoder = _Decoder(module, tokenizer, longest, start, prompt_of(tokenizer, start))
    return DecoderSide(
        decoder.encode if tokenizer is not None else None,
        decoder.shift,
        decoder.generate,
        GENERATED,
        start,
        longest,
        decoder.prompt,
    )


def prompt_of(tokenizer: Any, start: int) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts between the start token and a target text, as that of Whisper does.

    They are the special tokens of an empty text without the end; empty for tokenizers that do not write the start.
    """
    if tokenizer is None:
        return ()
    ids = list(tokenizer(text_target="")["input_ids"])
    return tuple(ids[1:-1]) if ids[:1] == [start] and ids[-1] == tokenizer.eos_token_id else ()


def language_limitations(module: Any, tokenizer: Any) -> Iterator[Limitation]:
    """Set the language and the task of the prompt that generation_config.json states; yield what is not stated.

    Raises:
        ModelError: the tokenizer does not know the language.
    """
    config = module.generation_config
    if not hasattr(tokenizer, "set_prefix_tokens") or getattr(config, "lang_to_id", None) is None:
        return  # a model of one language, whose prompt names none
    stated = getattr(config, "language", None)
    if tokenizer.language is None and stated is not None:
        try:
            tokenizer.set_prefix_tokens(
                language=stated.strip("<|>"), task=getattr(config, "task", None) or "transcribe"
            )
        except ValueError as error:
            raise ModelError(
                f"generation_config.json states a language that is unknown: {first_line(error)}"
            ) from error
    if tokenizer.language is None:
        yield Limitation(
            "language of the transcripts",
            "neither the tokenizer nor generation_config.json states one, so the decoder's prompt names none; set "
            "`language` in generation_config.json, such as english",
        )
