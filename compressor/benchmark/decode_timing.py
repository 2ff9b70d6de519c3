"""Timing of generation: prefill of a prompt of `context` tokens, and one decode step with a cache of that length.

Prefill is one call with the whole prompt and an empty KV cache; it yields the logits of the first token. A decode step
is one call with one token and the keys and values of `context` tokens. The engine computed this cache from the same
prompt, and it resides on the engine's device. Every output is written, including the extended cache. The same step is
repeated, so the context does not grow during timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from compressor.benchmark.contenders import BenchError, EngineEntry
from compressor.benchmark.runner import BenchRunner, Condition, Engines
from compressor.errors import SettingsError
from compressor.measure.latency import time_engines
from compressor.measure.workload import (
    USUAL,
    EngineWithFeeds,
    empty_cache,
    feeds_with_cache,
    memory_mapped,
    token_ids,
)
from compressor.models import Model
from compressor.models.base import most_tokens
from compressor.workspace.progress import Steps
from runtimes.base.protocols import Engine, Feeds, HoldsCache
from runtimes.base.timing import Latency

FIRST, NEXT = "first token", "next token"
# Measured on a small trained Llama with a context of 16 tokens: a step that ignores its cache has a distance of 0.37, a
# float engine 1e-6, and dynamic int8 0.03, since the activation range of one token differs from that of many.
MAX_DISTANCE = 0.2

Run: TypeAlias = tuple[EngineEntry, Condition, int]  # engine, condition, context length in tokens


@dataclass(frozen=True)
class Generation:
    """Prefill and decode latency of one engine under one condition, for a context of `context` tokens.

    Attributes:
        first: latency of the prefill, which yields the logits of the first token.
        token: latency of a decode step with a cache of `context` tokens.
        cache: size of that cache in bytes, all rows together.
        difference: `distance` of the step's logits from those of one call with the whole text.
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
        """Decoded tokens per second, all rows together."""
        return self.condition.batch / self.token.median * 1000.0


@dataclass(frozen=True)
class Prepared:
    """Inputs of the two timed calls; the cache in `step` is the engine's own output for `prompt`."""

    prompt: Feeds
    step: Feeds
    cache: int
    difference: float


def contexts(requested: tuple[int, ...] | None, model: Model) -> tuple[int, ...]:
    """Return the context lengths to time: those requested, or a default for models with a KV cache, none for others.

    Raises:
        SettingsError: the model has no KV cache, or too few positions.
    """
    if model.has_parts:
        if requested:
            kind = "an encoder-decoder" if model.is_encoder_decoder else "a vision-language model"
            raise SettingsError(
                f"--context times the tokens of causal language models; {model.name} is {kind}, timed on one call of "
                "all parts here, and on a generation by `compressor export`: leave --context out."
            )
        return ()
    if not model.state:
        if requested:
            raise SettingsError(f"--context needs a language model with a KV cache; {model.name} does {model.task}.")
        return ()
    most = most_tokens(model)
    if requested is None:
        return (USUAL if most is None else min(USUAL, most - 1),)
    if most is not None and requested and max(requested) >= most:
        raise SettingsError(
            f"--context {max(requested)} plus one token exceeds the {most} positions of {model.name}; "
            f"give at most {most - 1}."
        )
    return requested


def measure(
    runner: BenchRunner, engines: Engines, rounds: int, scratch: Path, steps: Steps, *, allowed: float = MAX_DISTANCE
) -> tuple[Generation, ...]:
    """Time prefill and decode of every engine under every condition in one interleaved run.

    Args:
        runner: the engines, conditions and data; without `contexts` nothing is timed.
        engines: the built engines.
        rounds: timed bursts of each engine.
        scratch: folder for the caches, which together may not fit into memory.
        steps: recorder of the progress.
        allowed: largest difference of a decode step from the whole text.

    Raises:
        BenchError: a decode step does not continue its prompt (see `MAX_DISTANCE`).
    """
    if not runner.contexts:
        return ()
    runs: list[Run] = [
        (entry, condition, context)
        for condition in runner.conditions
        for context in runner.contexts
        for entry in runner.entries
    ]
    prepared = _prepared(runner, engines, runs, scratch, steps, allowed)
    openers = {
        _key(*run, part): partial(EngineWithFeeds, _opener(runner, engines, *run[:2]), feeds)
        for run in runs
        for part, feeds in _calls(prepared[_feeds_key(*run)]).items()
    }
    # A prefill can take many seconds, so one call suffices for warm-up and for a burst; decode steps fill a burst.
    latency = time_engines(openers, {}, rounds, steps, name="time generation", min_runs=1, warmup_runs=1)
    return tuple(
        Generation(
            entry.name,
            condition,
            context,
            latency[_key(entry, condition, context, FIRST)],
            latency[_key(entry, condition, context, NEXT)],
            prepared[_feeds_key(entry, condition, context)].cache,
            prepared[_feeds_key(entry, condition, context)].difference,
        )
        for entry, condition, context in runs
    )


def _prepared(
    runner: BenchRunner, engines: Engines, runs: Sequence[Run], scratch: Path, steps: Steps, allowed: float
) -> dict[tuple[str, int, int], Prepared]:
    """Return the checked inputs of every run, which do not depend on the thread count."""
    prepared: dict[tuple[str, int, int], Prepared] = {}
    with steps.step("fill the caches") as tick:
        for number, (entry, condition, context) in enumerate(runs):
            tick(number, len(runs), entry.name)
            key = _feeds_key(entry, condition, context)
            if key not in prepared:
                ids = token_ids(runner.loaded.data.test, condition.batch, context + 1)
                with _opener(runner, engines, entry, condition)() as engine:
                    inputs = prepare(engine, runner.loaded.model, ids, scratch / f"cache{number}")
                prepared[key] = _checked(entry, inputs, allowed)
    return prepared


def _opener(runner: BenchRunner, engines: Engines, entry: EngineEntry, condition: Condition) -> Callable[[], Engine]:
    return partial(engines.openers[entry.name], runner.options(condition, entry))


def _calls(prepared: Prepared) -> dict[str, Feeds]:
    return {FIRST: prepared.prompt, NEXT: prepared.step}


def _feeds_key(entry: EngineEntry, condition: Condition, context: int) -> tuple[str, int, int]:
    return entry.name, condition.batch, context


def _key(entry: EngineEntry, condition: Condition, context: int, part: str) -> str:
    return f"{entry.name}, {condition}, context {context}, {part}"


def prepare(engine: Engine, model: Model, ids: npt.NDArray[np.int64], folder: Path) -> Prepared:
    """Build the inputs of a prefill with all tokens of a text but the last, and of a decode step with the last.

    Args:
        engine: the engine to time.
        model: the model, which pairs cache outputs with cache inputs.
        ids: token ids [rows, tokens].
        folder: folder to create for the cache.
    """
    no_tokens = dict(empty_cache(engine, model, len(ids)))
    expected = engine.run(feeds_with_cache(ids, 0) | no_tokens)[model.answer][:, -1].copy()
    prompt = feeds_with_cache(ids[:, :-1], 0) | no_tokens
    outputs = engine.run(prompt)
    cache = {before: outputs[after] for after, before in model.state.items() if before in no_tokens}
    cache_on_disk = dict(memory_mapped(cache, folder))
    step = feeds_with_cache(ids, ids.shape[1] - 1) | cache_on_disk
    size = sum(value.nbytes for value in cache.values())
    if isinstance(engine, HoldsCache):
        size = engine.cache_bytes(len(ids), ids.shape[1] - 1)
    return Prepared(prompt, step, size, distance(engine.run(step)[model.answer][:, -1], expected))


def distance(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Return the largest L2 distance of a row of logits, relative to the spread of `expected` around its mean.

    >>> distance(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0]]))
    0.0
    """
    spread = np.linalg.norm(expected - expected.mean(-1, keepdims=True), axis=-1)
    return float((np.linalg.norm(found - expected, axis=-1) / np.maximum(spread, np.finfo(np.float32).tiny)).max())


def _checked(entry: EngineEntry, prepared: Prepared, allowed: float = MAX_DISTANCE) -> Prepared:
    if not prepared.difference <= allowed:  # also refuses NaN
        raise BenchError(
            f"{entry.name} does not continue its prompt: logits with its KV cache differ from those of the whole text "
            f"by {prepared.difference:.2g} of their spread; expected at most {allowed:g}. Export it again."
        )
    return prepared
