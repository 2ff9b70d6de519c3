"""What is timed: one call on real inputs, or the two kinds of calls that generation is made of, and feeds for them.

A language model with a cache is asked for a prompt once, and for each further token once. What a generation takes is
the time of the prompt's call and, for each further token, that of a call with one token behind the keys and values of
half of them and the prompt: the time of such a call grows about linearly with its cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compressor.errors import SettingsError
from runtimes.base.protocols import Engine, Feeds
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from compressor.data.splits import Split
    from compressor.lower.traced_model import Loaded
    from compressor.models import Model
    from compressor.settings import Settings

USUAL = 128  # tokens of context, and as many new ones, where none are asked for
BATCH = 32  # texts read at a time
TIMING_CANDIDATES = 32  # samples among which the one of median length is timed
RUN, PROMPT, TOKEN = "run", "prompt", "token"


@dataclass(frozen=True)
class Generate:
    """What a language model is timed at: tokens of a prompt, and `new` further ones (0: the prompt alone)."""

    prompt: int
    new: int

    @property
    def behind(self) -> int:
        """Tokens in the cache of the call that stands for each further token."""
        return self.prompt + self.new // 2


@dataclass(frozen=True)
class Call:
    """One kind of call: how often it is made, on which inputs, and the shapes of all inputs.

    `filled`, of a call behind a cache, takes what opens an engine and a folder that does not exist yet, and gives that
    engine's own cache, kept there.
    """

    times: int
    inputs: Feeds
    shapes: Mapping[str, tuple[int, ...]]
    filled: Callable[[Callable[[], Engine], Path], Feeds] | None = None

    @staticmethod
    def alone(inputs: Feeds) -> Call:
        """A call that is made once and keeps nothing of others."""
        return Call(1, inputs, {name: tuple(value.shape) for name, value in inputs.items()})

    def feeds(self, opener: Callable[[], Engine], folder: Path) -> Feeds:
        """Everything that one engine is fed."""
        return self.inputs if self.filled is None else {**self.inputs, **self.filled(opener, folder)}


def generate_of(settings: Settings, model: Model) -> Generate | None:
    """What generation is timed at: as asked for, else `USUAL` as far as it fits; None for models without a cache.

    An engine that is built on another machine is timed there by a prompt alone.

    Raises:
        SettingsError: the model keeps no cache, or has fewer positions.
    """
    asked = settings.generated
    if not model.state:
        if asked is not None:
            raise SettingsError(f"--generate needs a language model with a cache; {model.name} does {model.task}.")
        return None
    most = most_tokens(model)
    if asked is not None:
        if most is not None and sum(asked) > most:
            raise SettingsError(
                f"--generate {asked[0]}:{asked[1]} does not fit {model.name}, which has {most} positions; give fewer "
                "tokens."
            )
        return Generate(*asked)
    prompt = USUAL if most is None else max(1, min(USUAL, most // 2))
    return Generate(prompt, 0 if settings.defer_build else prompt)


def most_tokens(model: Model) -> int | None:
    """Most tokens that a model of transformers was made for; None where its config names no limit."""
    most = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def calls_of(subject: Loaded, settings: Settings) -> dict[str, Call]:
    """The calls whose time is the latency, by name: one alone, or those of a generation."""
    model, split = subject.model, subject.data.test
    asked = generate_of(settings, model)
    if asked is None:
        return {RUN: Call.alone(timing_feeds(split, settings.batch))}
    ids = token_ids(split, settings.batch, asked.behind + 1)
    prompt = ids[:, : asked.prompt]
    told = {"input_ids": prompt, "attention_mask": np.ones_like(prompt)}
    assert model.preprocess.complete is not None
    calls = {PROMPT: Call.alone(model.preprocess.complete(told))}
    if asked.new:
        step = called(ids, asked.behind)
        shapes = {name: tuple(value.shape) for name, value in step.items()}
        for name in model.state.values():
            _, heads, _, width = model.example[name].shape
            shapes[name] = (settings.batch, heads, asked.behind, width)
        calls[TOKEN] = Call(asked.new, step, shapes, partial(_filled, model, ids[:, :-1]))
    return calls


def timing_feeds(split: Split, batch: int) -> dict[str, npt.NDArray[np.generic]]:
    """Exactly `batch` rows of real inputs, repeated where the split is smaller; of texts those of median length."""
    few = itertools.islice((part.feeds for part in split.batches(batch)), max(1, TIMING_CANDIDATES // batch))
    by_size = sorted(few, key=lambda feeds: sum(value[0].size for value in feeds.values()))
    feeds = by_size[len(by_size) // 2]
    rows = len(next(iter(feeds.values())))
    return {name: np.concatenate([value] * (-(-batch // rows)))[:batch] for name, value in feeds.items()}


def together(calls: Mapping[str, Call], latencies: Mapping[str, Latency]) -> Latency:
    """The latency of all calls one after the other, as often as each is made.

    Each sample is one of the call that is made once, and the median of the others' bursts of the same round, as often
    as they are made: a sample of a generation as a whole would take too long.
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


def _filled(model: Model, ids: npt.NDArray[np.int64], opener: Callable[[], Engine], folder: Path) -> Feeds:
    """An engine's own cache of some tokens, [rows, tokens], read from files when it is bound."""
    with opener() as engine:
        answers = engine.run(called(ids, 0) | dict(empty(engine, model, len(ids))))
        cache = {before: answers[after] for after, before in model.state.items() if before in engine.inputs}
    return dict(stored(cache, folder))


# ------------------------------------------------------------------------------------------------- feeds of generation


def token_ids(split: Split, rows: int, tokens: int) -> npt.NDArray[np.int64]:
    """Real tokens, [rows, tokens]: the data's texts one after the other, no padding, from the start again at need."""
    texts: list[npt.NDArray[np.int64]] = []
    count = 0
    for batch in split.batches(BATCH):
        ids, mask = batch.feeds["input_ids"], batch.feeds["attention_mask"]
        texts.append(ids[mask.astype(bool)])
        count += texts[-1].size
        if count >= rows * tokens:
            break
    return np.resize(np.concatenate(texts), (rows, tokens)).astype(np.int64)


def called(ids: npt.NDArray[np.int64], start: int) -> dict[str, npt.NDArray[np.generic]]:
    """Feeds of a call with the tokens from `start`, those before being in the cache."""
    from compressor.models.kv_cache import positions  # imports transformers

    mask = np.ones(ids.shape, dtype=np.int64)
    new = ids[:, start:]
    return {"input_ids": new, "attention_mask": mask, "position_ids": positions(mask, new.shape[1])}


def empty(engine: Engine, model: Model, rows: int) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """A cache of no tokens, of what layers the engine has left: [rows, heads, 0, width] each."""
    for name in model.state.values():
        if name in engine.inputs:
            shape = engine.input_shapes[name]
            heads, width = model.example[name].shape[1::2] if shape is None else (shape[1], shape[3])
            assert heads is not None
            assert width is not None
            yield name, np.zeros((rows, heads, 0, width), dtype=engine.input_dtypes[name])


def stored(cache: Feeds, folder: Path) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """The same arrays, read from files when an engine binds them."""
    folder.mkdir()
    for number, (name, value) in enumerate(cache.items()):
        np.save(folder / f"{number}.npy", value)
        yield name, np.load(folder / f"{number}.npy", mmap_mode="r")


class Fed:
    """An engine with feeds of its own, opened when it is entered, so that one run can hold several kinds of calls."""

    def __init__(self, opener: Callable[[], Engine], feeds: Feeds) -> None:
        self._opener, self._feeds = opener, feeds

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Bind its own feeds in place of those of the run."""
        return self._engine.bind(self._feeds)

    def __enter__(self) -> Fed:
        """Open the engine."""
        self._engine = self._opener()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
        self._engine.close()
