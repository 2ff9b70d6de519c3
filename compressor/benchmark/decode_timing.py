"""Generation timed: the first token after a prompt, and each further one behind a cache of so many tokens.

What is compared is one call of each engine. The first token is one call with a prompt of `context` tokens and an empty
cache, all that the model does before it can answer. A further token is one call with one token, behind the keys and
values of `context` tokens, which lie where the engine runs and were computed by that engine from that prompt; every
output is written, the longer cache too. The same step is repeated: the context does not grow while it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from compressor.benchmark.contenders import BenchError, Entry
from compressor.benchmark.runner import Condition, Engines, Stand
from compressor.errors import SettingsError
from compressor.measure.workload import USUAL, Fed, called, empty, most_tokens, stored, token_ids
from compressor.measure.workshop import timed
from compressor.models import Model
from compressor.workspace.progress import Steps
from runtimes.base.protocols import Engine, Feeds
from runtimes.base.timing import Latency

FIRST, NEXT = "first token", "next token"
# Measured on a small trained Llama: a step with its cache unread is 0.37 away from the text's own answer behind 16
# tokens. Float is 1e-6 away, int8 with ranges found at run time 0.03: those of one token are not those of many.
FURTHEST = 0.2

Run: TypeAlias = tuple[Entry, Condition, int]  # an engine, where, after how many tokens


@dataclass(frozen=True)
class Generation:
    """How fast one engine generates under one condition, after `context` tokens.

    Attributes:
        first: a prompt of `context` tokens, up to the logits that give the first token.
        token: one further token, behind a cache of `context` tokens.
        cache: bytes of that cache, all rows together.
        difference: of the step's logits from those of the whole text given at once, as `distance` tells it.
    """

    name: str
    condition: Condition
    context: int
    first: Latency
    token: Latency
    cache: int
    difference: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all rows together, each call one token a row."""
        return self.condition.batch / self.token.median * 1000.0


@dataclass(frozen=True)
class Prepared:
    """The feeds of the two calls that are timed; the cache of `step` is the engine's own answer to `prompt`."""

    prompt: Feeds
    step: Feeds
    cache: int
    difference: float


def contexts(asked: tuple[int, ...] | None, model: Model) -> tuple[int, ...]:
    """The numbers of tokens to generate after: as asked; else a usual one for a model with a cache, none for others.

    Raises:
        SettingsError: the model does not generate, or takes fewer tokens.
    """
    if not model.state:
        if asked:
            raise SettingsError(f"--context needs a language model with a cache; {model.name} does {model.task}.")
        return ()
    most = most_tokens(model)
    if asked is None:
        return (USUAL if most is None else min(USUAL, most - 1),)
    if most is not None and asked and max(asked) >= most:
        raise SettingsError(
            f"--context {max(asked)} and one more token do not fit {model.name}, which has {most} positions; "
            f"give at most {most - 1}."
        )
    return asked


def measure(stand: Stand, engines: Engines, rounds: int, scratch: Path, steps: Steps) -> tuple[Generation, ...]:
    """Time both calls of every engine under every condition, in one interleaved run, none for models without a cache.

    Args:
        stand: what is measured, and on what.
        engines: what was built.
        rounds: timed bursts of each.
        scratch: where the caches lie meanwhile: all of them together may not fit into memory.
        steps: told of the progress.

    Raises:
        BenchError: a step does not go on where the prompt ended.
    """
    if not stand.contexts:
        return ()
    runs: list[Run] = [
        (entry, condition, context)
        for condition in stand.conditions
        for context in stand.contexts
        for entry in stand.entries
    ]
    prepared = _prepared(stand, engines, runs, scratch, steps)
    openers = {
        _key(*run, part): partial(Fed, _opener(stand, engines, *run[:2]), feeds)
        for run in runs
        for part, feeds in _calls(prepared[_fed(*run)]).items()
    }
    # A prompt can take many seconds: one to warm up and one in a burst, as long as that takes. Steps fill the burst.
    latency = timed(openers, {}, rounds, steps, name="time generation", min_runs=1, warmup_runs=1)
    return tuple(
        Generation(
            entry.name,
            condition,
            context,
            latency[_key(entry, condition, context, FIRST)],
            latency[_key(entry, condition, context, NEXT)],
            prepared[_fed(entry, condition, context)].cache,
            prepared[_fed(entry, condition, context)].difference,
        )
        for entry, condition, context in runs
    )


def _prepared(
    stand: Stand, engines: Engines, runs: Sequence[Run], scratch: Path, steps: Steps
) -> dict[tuple[str, int, int], Prepared]:
    """The feeds of every run, each step checked; threads do not matter for them."""
    found: dict[tuple[str, int, int], Prepared] = {}
    with steps.step("fill the caches") as tick:
        for number, (entry, condition, context) in enumerate(runs):
            tick(number, len(runs), entry.name)
            if _fed(entry, condition, context) not in found:
                ids = token_ids(stand.loaded.data.test, condition.batch, context + 1)
                with _opener(stand, engines, entry, condition)() as engine:
                    ready = prepare(engine, stand.loaded.model, ids, scratch / f"cache{number}")
                found[_fed(entry, condition, context)] = _checked(entry, ready)
    return found


def _opener(stand: Stand, engines: Engines, entry: Entry, condition: Condition) -> Callable[[], Engine]:
    return partial(engines.openers[entry.name], stand.options(condition, entry))


def _calls(ready: Prepared) -> dict[str, Feeds]:
    return {FIRST: ready.prompt, NEXT: ready.step}


def _fed(entry: Entry, condition: Condition, context: int) -> tuple[str, int, int]:
    return entry.name, condition.batch, context


def _key(entry: Entry, condition: Condition, context: int, part: str) -> str:
    return f"{entry.name}, {condition}, context {context}, {part}"


def prepare(engine: Engine, model: Model, ids: npt.NDArray[np.int64], folder: Path) -> Prepared:
    """The two calls for all but the last token of a text, and for the last.

    Args:
        engine: what will be timed.
        model: says which output of a call is which input of the next.
        ids: [rows, tokens].
        folder: made, for the cache.
    """
    none = dict(empty(engine, model, len(ids)))
    whole = engine.run(called(ids, 0) | none)[model.answer][:, -1].copy()
    prompt = called(ids[:, :-1], 0) | none
    answers = engine.run(prompt)
    cache = {before: answers[after] for after, before in model.state.items() if before in none}
    kept = dict(stored(cache, folder))
    step = called(ids, ids.shape[1] - 1) | kept
    size = sum(value.nbytes for value in cache.values())
    return Prepared(prompt, step, size, distance(engine.run(step)[model.answer][:, -1], whole))


def distance(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest distance of any row's logits, as a share of how far the expected ones spread around their mean.

    >>> distance(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]]))
    0.0
    """
    spread = np.linalg.norm(expected - expected.mean(-1, keepdims=True), axis=-1)
    return float((np.linalg.norm(found - expected, axis=-1) / np.maximum(spread, np.finfo(np.float32).tiny)).max())


def _checked(entry: Entry, ready: Prepared) -> Prepared:
    if not ready.difference <= FURTHEST:  # NaN is not either
        raise BenchError(
            f"{entry.name} does not go on where its prompt ended: behind its cache the logits differ from those of "
            f"the whole text by {ready.difference:.2g} of their spread; expected at most {FURTHEST:g}. Export it again."
        )
    return ready
