"""Encoder-decoders as three files, named as Optimum names them, that are opened as one engine.

The encoder runs once for a source. The first call of the decoder reads the encoder's hidden states, and returns the
keys and values of all attentions. Every later call reads those instead: the keys and values of self-attentions grow
with each token, and those of cross-attentions stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import DTypes, Engine, Feeds, RuntimesError, Shapes

ENCODER, DECODER, WITH_PAST = STEMS = ("encoder_model", "decoder_model", "decoder_with_past_model")
MERGED = "decoder_model_merged"  # both files of the decoder in one, for other programs
# Names in the files, and names in the graph that holds both towers.
HIDDEN, ENCODER_HIDDEN, LAST_HIDDEN = "encoder_hidden_states", "encoder_last_hidden_state", "last_hidden_state"
ENCODER_MASK, MASK = "encoder_attention_mask", "attention_mask"
IDS, DECODER_IDS = "input_ids", "decoder_input_ids"
PAST, PRESENT = "past_key_values.", "present."


def is_self(name: str) -> bool:
    """Return whether a cache belongs to a self-attention of the decoder, such as ``present.0.decoder.key``."""
    return name.startswith((PAST, PRESENT)) and ".decoder." in name


def is_cross(name: str) -> bool:
    """Return whether a cache belongs to a cross-attention, such as ``present.0.encoder.key``."""
    return name.startswith((PAST, PRESENT)) and ".encoder." in name


def past_of(present: str) -> str:
    """Return the input that an output becomes in the next call.

    >>> past_of("present.0.encoder.key")
    'past_key_values.0.encoder.key'
    """
    return PAST + present.removeprefix(PRESENT)


def parts_of(path: Path) -> tuple[Path, Path, Path] | None:
    """Return the three files of an encoder-decoder, given that of its encoder; None for other files."""
    prefix = path.stem.removesuffix(ENCODER)
    if not path.stem.endswith(ENCODER):
        return None
    encoder, decoder, with_past = (path.with_name(f"{prefix}{stem}{path.suffix}") for stem in STEMS)
    return (encoder, decoder, with_past) if decoder.is_file() and with_past.is_file() else None


class EncoderDecoderEngine:
    """The engines of an encoder and its decoder as one engine, with the inputs and outputs of both towers.

    Feeds with a source run the encoder and the first call of the decoder. If the caches of self-attentions are not
    empty, the decoder with caches runs too, with the caches of cross-attentions from the first call. Feeds without a
    source are those of a further token: they hold all caches.
    """

    def __init__(self, encoder: Engine, decoder: Engine, with_past: Engine) -> None:
        self._encoder, self._decoder, self._with_past = encoder, decoder, with_past
        self._pasts = tuple(name for name in with_past.inputs if is_self(name))
        mask = (MASK,) if MASK not in encoder.inputs and ENCODER_MASK in decoder.inputs else ()
        self.inputs: tuple[str, ...] = (*encoder.inputs, *mask, DECODER_IDS, *self._pasts)
        presents = [name for name in decoder.outputs if name.startswith(PRESENT)]
        presents = [*filter(is_self, presents), *filter(is_cross, presents)]
        self.outputs: tuple[str, ...] = ("logits", ENCODER_HIDDEN, *presents)
        self.input_dtypes: DTypes = {name: self._fact("input_dtypes", name) for name in self.inputs}
        self.input_shapes: Shapes = {name: self._fact("input_shapes", name) for name in self.inputs}

    def _fact(self, fact: str, name: str) -> Any:
        if name in self._encoder.inputs:
            return getattr(self._encoder, fact)[name]
        owner = self._with_past if name in self._pasts else self._decoder
        return getattr(owner, fact)[{DECODER_IDS: IDS, MASK: ENCODER_MASK}.get(name, name)]

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory; that of a further token returns no encoder states."""
        if not self._has_source(feeds):
            return self._with_past.run(_step(feeds))
        hidden = self._encoder.run(feeds)[LAST_HIDDEN]
        outputs = self._decoder.run(_first(feeds, hidden)) | {ENCODER_HIDDEN: hidden}
        if any(feeds[name].shape[2] for name in self._pasts if name in feeds):
            crosses = {past_of(name): value for name, value in outputs.items() if is_cross(name)}
            outputs |= self._with_past.run(_step({**feeds, **crosses}))
        return {name: outputs[name] for name in self.outputs}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device and return a function that runs one inference on them.

        The hidden states of the encoder are computed once and stay on the device: the decoder runs on the same ones.
        """
        if not self._has_source(feeds):
            return self._with_past.bind(_step(feeds))
        if any(feeds[name].shape[2] for name in self._pasts if name in feeds):
            raise RuntimesError(
                "The caches of self-attentions are not empty; expected the caches of cross-attentions and no source."
            )
        encoder = self._encoder.bind(feeds)
        decoder = self._decoder.bind(_first(feeds, self._encoder.run(feeds)[LAST_HIDDEN]))

        def call() -> None:
            encoder()
            decoder()

        return call

    def _has_source(self, feeds: Feeds) -> bool:
        return all(name in feeds for name in self._encoder.inputs)

    def close(self) -> None:
        """Free threads and memory of the three engines. Closing twice is allowed."""
        for engine in (self._encoder, self._decoder, self._with_past):
            engine.close()

    def __enter__(self) -> EncoderDecoderEngine:
        """Return the engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engines."""
        self.close()


def opened(parts: tuple[Path, Path, Path], load: Callable[[Path], Engine]) -> EncoderDecoderEngine:
    """Open the three files of an encoder-decoder; close what was opened if one fails."""
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(load(part)) for part in parts]
        stack.pop_all()
    return EncoderDecoderEngine(*engines)


def greedy(
    engine: EncoderDecoderEngine, source: Feeds, prompt: npt.NDArray[np.int64], new: int
) -> npt.NDArray[np.int64]:
    """Generate tokens greedily with the caches.

    Args:
        engine: an open engine.
        source: inputs of the encoder, first axis rows.
        prompt: tokens with which the decoder starts, int64 [rows, tokens].
        new: number of tokens to generate; an end token does not stop it.

    Returns:
        The prompt and the new tokens, int64 [rows, tokens].
    """
    tokens = prompt
    empty = {name: _empty(shape, len(prompt)) for name, shape in engine.input_shapes.items() if is_self(name)}
    feeds: dict[str, npt.NDArray[Any]] = {**source, DECODER_IDS: prompt, **empty}
    for _ in range(new):
        outputs = engine.run(feeds)
        tokens = np.concatenate([tokens, outputs["logits"][:, -1:].argmax(-1)], 1)
        feeds |= {past_of(name): value for name, value in outputs.items() if name.startswith(PRESENT)}
        feeds = {name: value for name, value in feeds.items() if name == MASK or name.startswith(PAST)}
        feeds[DECODER_IDS] = tokens[:, -1:]
    return tokens


def _empty(shape: tuple[int | None, ...] | None, rows: int) -> npt.NDArray[np.float32]:
    assert shape is not None
    return np.zeros((rows, shape[1] or 0, 0, shape[3] or 0), np.float32)


def _first(feeds: Feeds, hidden: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    return {**_of_decoder(feeds), HIDDEN: hidden}


def _step(feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    return dict(_of_decoder(feeds))


def _of_decoder(feeds: Feeds) -> Mapping[str, npt.NDArray[Any]]:
    """Return the feeds of the decoder under the names in its files."""
    renamed = {name: value for name, value in feeds.items() if name.startswith(PAST)}
    renamed |= {ENCODER_MASK: feeds[MASK]} if MASK in feeds else {}
    return renamed | {IDS: feeds[DECODER_IDS]}
