"""Workloads: the calls that are timed, and their inputs.

The workload of a model without a KV cache is one call on real inputs. A language model with a cache is timed on a
generation: one prefill call with the prompt, and one decode step per new token. The latency of the generation is the
sum of that of the prefill and, for each new token, that of a representative decode step. The cache of this step holds
the prompt and half of the new tokens, because the latency of a decode step grows about linearly with its cache length.
In place of the prefill, an encoder-decoder runs its encoder and the first call of its decoder on a source. Before the
prefill, a vision-language model runs its vision encoder on an image, whose tokens are part of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from compressor.data.rows import take_rows
from compressor.errors import SettingsError
from compressor.models.base import most_tokens
from runtimes.base.encoder_decoder import DECODER_IDS, ENCODER_HIDDEN
from runtimes.base.protocols import PAST, Engine, Feeds
from runtimes.base.timing import Latency
from runtimes.base.vision_language import FEATURES, FLATTENED, LAYOUTS, POSITIONS, is_image

if TYPE_CHECKING:
    from compressor.data.splits import Split
    from compressor.lower.traced_model import ModelAndData
    from compressor.models import Model
    from compressor.settings import Settings

USUAL = 128  # default number of prompt tokens, and of new tokens
SOURCE = 64  # default number of source tokens of an encoder-decoder
USUAL_TARGET = 32  # default number of new tokens of an encoder-decoder
BATCH = 32  # texts read at a time
TIMING_CANDIDATES = 32  # samples from which the one of median length is timed
RUN, IMAGE, PROMPT, TOKEN = "run", "image", "prompt", "token"


@dataclass(frozen=True)
class GenerationLengths:
    """Lengths of the generation that a language model is timed on.

    Attributes:
        prompt: tokens of the prompt, or length of the source of an encoder-decoder.
        new: tokens that are generated; 0 times the prefill alone.
        source: unit of the length of a source: ``tokens``, ``frames``, ``samples``, ``patches`` or ``pixels``; None for
            a prompt.
        images: image tokens among those of the prompt.
    """

    prompt: int
    new: int
    source: str | None = None
    images: int = 0

    @property
    def behind(self) -> int:
        """Length of the cache of the representative decode step, in tokens; at least the start token of a decoder."""
        return self.prompt + self.new // 2 if self.source is None else max(1, self.new // 2)


@dataclass(frozen=True)
class Call:
    """One kind of call of a workload.

    Attributes:
        times: how often the workload makes the call.
        inputs: feeds that are the same for all engines.
        shapes: shapes of all inputs, including those of the KV cache.
        filled: function that computes the KV cache of an engine, for a decode step; None for a call without a cache. It
            takes a function that opens the engine, and the path of a new folder to store the cache in.
        given: outputs of the graph that an earlier call has computed: the caches of cross-attentions.
        left_out: outputs of the graph that this call does not compute: the hidden states of an encoder.
    """

    times: int
    inputs: Feeds
    shapes: Mapping[str, tuple[int, ...]]
    filled: Callable[[Callable[[], Engine], Path], Feeds] | None = None
    given: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @staticmethod
    def alone(inputs: Feeds) -> Call:
        """Return a call that is made once, without a KV cache from another call."""
        return Call(1, inputs, {name: tuple(value.shape) for name, value in inputs.items()})

    def feeds(self, opener: Callable[[], Engine], folder: Path) -> Feeds:
        """Return all feeds of an engine; its KV cache is computed and stored in `folder`."""
        return self.inputs if self.filled is None else {**self.inputs, **self.filled(opener, folder)}


def generation_lengths(settings: Settings, model: Model) -> GenerationLengths | None:
    """Return the lengths of the generation to time; None for a model without a KV cache.

    The default is `USUAL` tokens each, or half of the model's positions if that is less. An engine that is built on
    another machine is timed there on the prefill alone by default.

    Raises:
        SettingsError: ``--generate`` is given and the model has no KV cache, or too few positions.
    """
    lengths = settings.generated
    if not model.state:
        if lengths is not None:
            raise SettingsError(f"--generate needs a language model with a KV cache; {model.name} does {model.task}.")
        return None
    if model.is_encoder_decoder:
        return _of_source(settings, model)
    most = most_tokens(model)
    images = tokens_of_images(model) if model.is_vision_language else 0
    if lengths is not None:
        if lengths[0] <= images:
            raise SettingsError(
                f"--generate {lengths[0]}:{lengths[1]} gives a prompt of {lengths[0]} tokens, but an image of "
                f"{model.name} has {images} alone; give more."
            )
        if most is not None and sum(lengths) > most:
            raise SettingsError(
                f"--generate {lengths[0]}:{lengths[1]} does not fit {model.name}, which has {most} positions; give "
                "fewer tokens."
            )
        return GenerationLengths(*lengths, images=images)
    text = USUAL if most is None else max(1, min(USUAL, (most - images) // 2))
    return GenerationLengths(images + text, 0 if settings.defer_build else text, images=images)


def tokens_of_images(model: Model) -> int:
    """Return the number of image tokens in the prompt that is timed: those of the example."""
    return int((model.preprocess.example["input_ids"][0] == model.preprocess.image_token).sum())


def _of_source(settings: Settings, model: Model) -> GenerationLengths:
    """Return the lengths of the source and of the target to time; by default those of the example and `USUAL_TARGET`.

    Raises:
        SettingsError: ``--generate`` gives more tokens than the model takes, or a length of speech, which is fixed.
    """
    decoder, first = model.preprocess.decoder, model.inputs[0]
    assert decoder is not None
    units = {"input_ids": "tokens", "pixel_values": "pixels", "input_values": "samples", FLATTENED: "patches"}
    unit, texts = units.get(first, "frames"), model.preprocess.kind == "text"
    length = SOURCE if texts else model.example[first].shape[1 if unit in ("tokens", "patches") else -1]
    longest = model.preprocess.longest
    if settings.generated is None:
        most = length if longest is None or not texts else min(longest, length)
        return GenerationLengths(most, max(1, min(USUAL_TARGET, decoder.longest // 2)), unit)
    source, new = settings.generated
    if not texts and source != length:
        raise SettingsError(
            f"--generate {source}:{new} gives a source of {source}, but {model.name} is timed on {length} {unit} of "
            f"its data; give {length}:{new}."
        )
    if (texts and longest is not None and source > longest) or new > decoder.longest:
        raise SettingsError(
            f"--generate {source}:{new} does not fit {model.name}, which takes sources of {longest} and targets of "
            f"{decoder.longest} tokens; give fewer tokens."
        )
    return GenerationLengths(source, new, unit)


def _source_calls(subject: ModelAndData, batch: int, lengths: GenerationLengths) -> dict[str, Call]:
    """Return the calls of the generation of an encoder-decoder: the encoder with the first token, and a further token.

    The target repeats the start token, because the time of a token does not depend on it.
    """
    model, decoder = subject.model, subject.model.preprocess.decoder
    assert decoder is not None
    assert model.preprocess.complete is not None
    source: dict[str, npt.NDArray[Any]]
    if model.preprocess.kind == "text":
        ids = token_ids(subject.data.test, batch, lengths.prompt)
        source = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    else:
        feeds = timing_feeds(subject.data.test, batch)
        source = {
            name: value for name, value in feeds.items() if name in model.preprocess.inputs and name != DECODER_IDS
        }
    target = np.full((batch, lengths.behind), decoder.start, dtype=np.int64)
    first = model.preprocess.complete({**source, "decoder_input_ids": target[:, :1]})
    calls = {PROMPT: Call.alone(first)}
    if lengths.new:
        step: dict[str, npt.NDArray[np.generic]] = {"decoder_input_ids": target[:, :1]}
        step |= {name: value for name, value in source.items() if name == "attention_mask"}
        filled = partial(_filled_caches, model, model.preprocess.complete({**source, "decoder_input_ids": target}))
        shapes = {name: tuple(value.shape) for name, value in first.items()}
        for name in (past for past in model.state.values() if past in shapes):
            shapes[name] = (batch, shapes[name][1], lengths.behind, shapes[name][3])
        given = tuple(present for present, past in model.state.items() if past not in model.inputs)
        calls[TOKEN] = Call(lengths.new, step, shapes, filled, given, (ENCODER_HIDDEN,))
    return calls


def _filled_caches(model: Model, feeds: Feeds, opener: Callable[[], Engine], folder: Path) -> Feeds:
    """Compute all caches of an encoder-decoder from a source and the tokens so far."""
    with opener() as engine:
        outputs = engine.run(feeds)
    cache = {before: outputs[after] for after, before in model.state.items() if after in outputs}
    return dict(memory_mapped(cache, folder))


def _image_calls(subject: ModelAndData, batch: int, lengths: GenerationLengths) -> dict[str, Call]:
    """Return the calls of the generation of a vision-language model: the image, the prompt, and a further token."""
    model, images = subject.model, tokens_of_images(subject.model)
    assert model.preprocess.complete is not None
    pixels = _pictures(subject, batch)
    text = token_ids(subject.data.test, batch, lengths.behind + 1 - images, model.preprocess.image_token)
    ids = np.concatenate([np.full((batch, images), model.preprocess.image_token, dtype=np.int64), text], 1)
    prompt = {"input_ids": ids[:, : lengths.prompt], "attention_mask": np.ones((batch, lengths.prompt), np.int64)}
    first = model.preprocess.complete({**pixels, **prompt})
    shapes = {name: tuple(value.shape) for name, value in first.items()}
    others = tuple(name for name in model.outputs if name != FEATURES)
    calls = {IMAGE: Call(1, pixels, shapes, left_out=others)}
    tokens = {name: value for name, value in first.items() if name not in pixels}
    calls[PROMPT] = Call(1, tokens, shapes, partial(_features, pixels), given=(FEATURES,))
    if lengths.new:
        step = _with_axes(feeds_with_cache(ids, lengths.behind), model)
        longer = shapes | {name: tuple(value.shape) for name, value in step.items() if name in shapes}
        for name in model.state.values():
            longer[name] = _cache_shape(model, name, batch, lengths.behind)
        whole = partial(_filled_cache, model, ids[:, :-1], pixels)
        calls[TOKEN] = Call(lengths.new, _without_past(step), longer, whole, given=(FEATURES,))
    return calls


def _pictures(subject: ModelAndData, batch: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return images of the data, as many tiles or patches of each as the first image of the example has."""
    example = {name: value[:1] for name, value in subject.model.preprocess.example.items() if is_image(name)}
    feeds = timing_feeds(subject.data.test, batch)
    return {
        name: np.resize(value if name in LAYOUTS else feeds[name], (batch, *value.shape[1:]))
        for name, value in example.items()
    }


def _features(pixels: Feeds, opener: Callable[[], Engine], folder: Path) -> Feeds:
    """Compute the features of images by the vision encoder of an engine."""
    with opener() as engine:
        return {FEATURES: engine.run(pixels)[FEATURES]}


def _without_past(feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """Return feeds without the earlier tokens, which only engines that keep the cache themselves read."""
    return {name: value for name, value in feeds.items() if name != PAST}


def workload_calls(subject: ModelAndData, settings: Settings) -> dict[str, Call]:
    """Return the calls of the workload by name: one call, or those of a generation."""
    model, split = subject.model, subject.data.test
    generate = generation_lengths(settings, model)
    if generate is None:
        return {RUN: Call.alone(timing_feeds(split, settings.batch))}
    if model.is_encoder_decoder:
        return _source_calls(subject, settings.batch, generate)
    if model.is_vision_language:
        return _image_calls(subject, settings.batch, generate)
    ids = token_ids(split, settings.batch, generate.behind + 1)
    prompt = ids[:, : generate.prompt]
    prompt_feeds = {"input_ids": prompt, "attention_mask": np.ones_like(prompt)}
    assert model.preprocess.complete is not None
    calls = {PROMPT: Call.alone(model.preprocess.complete(prompt_feeds))}
    if generate.new:
        step = feeds_with_cache(ids, generate.behind)
        shapes = {name: tuple(value.shape) for name, value in step.items()}
        for name in model.state.values():
            shapes[name] = _cache_shape(model, name, settings.batch, generate.behind)
        calls[TOKEN] = Call(generate.new, step, shapes, partial(_filled_cache, model, ids[:, :-1], {}))
    return calls


def timing_feeds(split: Split, batch: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return exactly `batch` rows of real inputs of median length, repeated if the split is smaller.

    A model of images and texts gets `batch` of each.
    """
    few = (part.feeds for part in split.middle(max(batch, TIMING_CANDIDATES)).batches(batch))
    by_size = sorted(few, key=lambda feeds: sum(value[0].size for value in feeds.values()))
    feeds = by_size[len(by_size) // 2]
    return take_rows(feeds, range(batch))


def total_latency(calls: Mapping[str, Call], latencies: Mapping[str, Latency]) -> Latency:
    """Return the latency of a whole workload.

    Each sample of the first call, which is made once, is extended by the medians of the other calls in the same round,
    multiplied by how often they are made. Timing whole generations would take too long.
    """
    first, *others = calls
    if not others:
        return latencies[first]
    rest = [
        sum(calls[name].times * float(np.median(latencies[name].samples_ms[number])) for name in others)
        for number in range(len(latencies[first].samples_ms))
    ]
    return Latency(
        tuple(
            tuple(sample + more for sample in burst)
            for burst, more in zip(latencies[first].samples_ms, rest, strict=True)
        )
    )


def _filled_cache(
    model: Model, ids: npt.NDArray[np.int64], images: Feeds, opener: Callable[[], Engine], folder: Path
) -> Feeds:
    """Compute the KV cache of an engine for tokens [rows, tokens]; it is read from files when an engine binds it."""
    with opener() as engine:
        tokens = _with_axes(feeds_with_cache(ids, 0), model)
        outputs = engine.run({**images, **tokens, **dict(empty_cache(engine, model, len(ids)))})
        cache = {before: outputs[after] for after, before in model.state.items() if before in engine.inputs}
    return dict(memory_mapped(cache, folder))


# ------------------------------------------------------------------------------------------------- feeds of generation


def token_ids(split: Split, rows: int, tokens: int, excluded: int | None = None) -> npt.NDArray[np.int64]:
    """Return real tokens [rows, tokens]: the concatenated texts without padding, repeated if they are too short.

    Args:
        split: the texts.
        rows: number of rows.
        tokens: tokens of a row.
        excluded: token id that is left out, that of the placeholders of images.
    """
    texts: list[npt.NDArray[np.int64]] = []
    count = 0
    for batch in split.batches(BATCH):
        ids, mask = batch.feeds["input_ids"], batch.feeds["attention_mask"]
        texts.append(ids[mask.astype(bool) & (ids != excluded)])
        count += texts[-1].size
        if count >= rows * tokens:
            break
    return np.resize(np.concatenate(texts), (rows, tokens)).astype(np.int64)


def feeds_with_cache(ids: npt.NDArray[np.int64], start: int) -> dict[str, npt.NDArray[np.generic]]:
    """Return the feeds of a call with the tokens from position `start`; the earlier tokens are in the KV cache.

    Engines that keep the cache themselves compute it from these tokens, see `runtimes.base.protocols.HoldsCache`.
    """
    from compressor.models.text.kv_cache import positions  # imports transformers

    mask = np.ones(ids.shape, dtype=np.int64)
    new = ids[:, start:]
    feeds: dict[str, npt.NDArray[np.generic]] = {
        "input_ids": new,
        "attention_mask": mask,
        "position_ids": positions(mask, new.shape[1]),
    }
    if start:
        feeds[PAST] = ids[:, :start]
    return feeds


def _with_axes(feeds: dict[str, npt.NDArray[np.generic]], model: Model) -> dict[str, npt.NDArray[np.generic]]:
    """Return feeds whose positions have the axes of the model, [rows, tokens, axes], all the same, as those of text."""
    example = model.example.get(POSITIONS)
    if example is None or example.ndim == feeds[POSITIONS].ndim:
        return feeds
    return feeds | {POSITIONS: np.repeat(feeds[POSITIONS][..., None], example.shape[-1], -1)}


def empty_cache(engine: Engine, model: Model, rows: int) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """Yield an empty cache for the layers that the engine still has.

    Keys and values are [rows, heads, 0, width]; the state of a convolution is zero, [rows, channels, kernel].
    """
    for name in model.state.values():
        if name in engine.inputs:
            shape = _cache_shape(model, name, rows, 0, engine.input_shapes[name])
            yield name, np.zeros(shape, dtype=engine.input_dtypes[name])


def _cache_shape(
    model: Model, name: str, rows: int, tokens: int, own: Sequence[int | None] | None = None
) -> tuple[int, ...]:
    """Return the shape of an input of the cache for a number of rows and of tokens so far.

    An engine states its `own` fixed sizes: where layers were dropped, a name may belong to another layer than before.
    """
    sizes: Sequence[int] = model.example[name].shape
    fixed = [size if other is None else other for size, other in zip(sizes, own or [None] * len(sizes), strict=True)]
    growing = model.dynamic_axes[name]
    return tuple(rows if axis == 0 else tokens if axis in growing else size for axis, size in enumerate(fixed))


def memory_mapped(cache: Feeds, folder: Path) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """Store arrays in a new folder and yield them as memory maps, which are read when an engine binds them."""
    folder.mkdir()
    for number, (name, value) in enumerate(cache.items()):
        np.save(folder / f"{number}.npy", value)
        yield name, np.load(folder / f"{number}.npy", mmap_mode="r")


class LastEngine:
    """The engine that was opened last; it is closed before another one is opened."""

    def __init__(self) -> None:
        self._opener: Callable[[], Engine] | None = None
        self._engine: Engine | None = None

    def open(self, opener: Callable[[], Engine]) -> Engine:
        """Return the engine of an opener, which is called unless it was the last one."""
        if self._engine is None or opener is not self._opener:
            self.close()
            self._opener, self._engine = opener, opener()
        return self._engine

    def close(self) -> None:
        """Close the engine, if one is open."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


class EngineWithFeeds:
    """An engine with feeds of its own, so that one interleaved run can time several kinds of calls.

    The engine is opened on entry and closed on exit. With `last`, it stays open for other feeds of the same opener.
    """

    def __init__(self, opener: Callable[[], Engine], feeds: Feeds, last: LastEngine | None = None) -> None:
        self._opener, self._feeds, self._last = opener, feeds, last

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Bind the feeds of this engine; the argument is ignored."""
        return self._engine.bind(self._feeds)

    def __enter__(self) -> EngineWithFeeds:
        """Open the engine."""
        self._engine = self._opener() if self._last is None else self._last.open(self._opener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
        if self._last is None:
            self._engine.close()
