"""The measurements of `bench`: build, evaluate and time every engine on the same data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compressor.benchmark.contenders import EAGER, BenchError, EngineEntry
from compressor.executor.base import Executor
from compressor.lower.traced_model import ModelAndData
from compressor.measure import peak_memory
from compressor.measure.engine_builder import with_input_sizes
from compressor.measure.engine_quality import evaluate_openers
from compressor.measure.latency import time_engines
from compressor.measure.peak_memory import Memory
from compressor.measure.workload import EngineWithFeeds
from compressor.quality.evaluate import Evaluation
from compressor.quality.parity import Reference, check_parity
from compressor.settings import Settings
from compressor.target.opener import Opener
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions, Engine, Feeds, HoldsCache
from runtimes.base.registry import check_available, runtime
from runtimes.base.timing import Latency


class Condition(NamedTuple):
    """A batch size and a thread count; None leaves the count to the runtime."""

    batch: int
    threads: int | None

    def __str__(self) -> str:
        return f"batch {self.batch}" + ("" if self.threads is None else f", threads {self.threads}")


@dataclass(frozen=True)
class Measurement:
    """Latency and peak memory of one engine under one condition; `memory` is None if it cannot be measured."""

    name: str
    condition: Condition
    latency: Latency
    memory: Memory | None

    @property
    def throughput(self) -> float:
        """Rows per second for consecutive batches, from the median latency."""
        return self.condition.batch / self.latency.median * 1000.0


@dataclass(frozen=True)
class Engines:
    """Functions that open the engines, and the engine files built from ONNX files, by name."""

    openers: Mapping[str, Callable[[BuildOptions], Engine]]
    paths: Mapping[str, Path]


@dataclass(frozen=True)
class BenchRunner:
    """The engines, conditions and data of one comparison.

    Attributes:
        loaded: the model and the data.
        settings: the settings by which engines are sized.
        entries: the engines.
        against: name of the baseline of the speed-ups.
        conditions: batch sizes and thread counts.
        feeds: inputs of the timed calls, by batch size.
        contexts: context lengths, in tokens, at which generation is timed.
    """

    loaded: ModelAndData
    settings: Settings
    entries: tuple[EngineEntry, ...]
    against: str
    conditions: tuple[Condition, ...]
    feeds: Mapping[int, Feeds]
    contexts: tuple[int, ...] = ()

    @property
    def reference(self) -> str:
        """Name of the reference for quality: the baseline, or its eager model if the baseline is compiled."""
        index = [entry.name for entry in self.entries].index(self.against)
        # The entry of an eager model directly precedes that of its compiled model.
        return self.entries[index - 1 if self.entries[index].compiled else index].name

    @property
    def judged(self) -> tuple[EngineEntry, ...]:
        """The engines whose quality is measured: all but compiled models, which are compared with the eager model."""
        return tuple(entry for entry in self.entries if not entry.compiled)

    def options(self, condition: Condition, entry: EngineEntry) -> BuildOptions:
        """Return the build options of an engine: device, threads, and the sizes of all inputs it will get."""
        device = self.settings.device
        if device is None:
            device = "cpu" if entry.target == EAGER else runtime(entry.target).devices[0]
        return dataclasses.replace(self._sized, device=device, threads=condition.threads)

    @cached_property
    def _sized(self) -> BuildOptions:
        """Options with the range of batch sizes and text lengths; cached, since lengths take a pass over the data."""
        options = with_input_sizes(BuildOptions(), self.loaded, self.settings)
        smallest, typical, largest = options.batches
        batches = [condition.batch for condition in self.conditions]
        shortest, middle, longest = options.lengths
        return dataclasses.replace(
            options,
            batches=(smallest, typical, max(largest, *batches)),
            lengths=(shortest, middle, max((longest, *(context + 1 for context in self.contexts)))),
        )

    def built(self, scratch: Path, steps: Steps) -> Engines:
        """Build every engine and check its inputs and outputs.

        Raises:
            BenchError: an engine has other inputs or outputs than the model.
            RuntimesError: a target is not available or cannot build a file.
        """
        openers: dict[str, Callable[[BuildOptions], Engine]] = {}
        paths: dict[str, Path] = {}
        with steps.step(f"build {len(self.entries)} engines") as tick:
            for number, entry in enumerate(self.entries):
                tick(number, len(self.entries), entry.name)
                options = self.options(self.conditions[0], entry)
                if entry.file is not None:
                    paths[entry.name] = _build(entry, entry.file, scratch / str(number), options)
                openers[entry.name] = entry.opener(paths.get(entry.name))
                with openers[entry.name](options) as engine:
                    _check_inputs_and_outputs(entry.name, engine, self.loaded)
        return Engines(openers, paths)

    def parity(self, engines: Engines) -> dict[str, float]:
        """Return the largest difference of each compiled model from the eager model, of all outputs.

        Differences are relative to the scale of the channel (see `compressor.quality.parity`).
        """
        differences = {}
        for eager, compiled in itertools.pairwise(self.entries):
            if compiled.compiled:  # directly follows its eager model
                feeds = self.feeds[self.conditions[0].batch]
                outputs = []
                for each in (eager, compiled):
                    with engines.openers[each.name](self.options(self.conditions[0], each)) as engine:
                        outputs.append(engine.run(feeds))
                reference = Reference.of(outputs[0], allowed=np.inf)
                parity = check_parity(reference, outputs[1].copy, name=compiled.name)
                differences[compiled.name] = parity.difference
        return differences

    def quiet_openers(self, engines: Engines) -> dict[str, Opener]:
        """Return functions that open the evaluated engines without spinning threads, which would occupy the cores."""
        return {
            entry.name: Opener(
                entry.load,
                dataclasses.replace(self.options(self.conditions[0], entry), spinning=False),
                engines.paths.get(entry.name),
            )
            for entry in self.judged
        }

    def quality(self, engines: Engines, steps: Steps, executor: Executor) -> Evaluation | None:
        """Evaluate all engines on the same test samples; return None if no quality may be stated.

        The executor runs them over the samples.
        """
        if self.loaded.no_quality_because is not None:
            return None
        with steps.step("measure the quality") as tick:
            return evaluate_openers(
                self.quiet_openers(engines), self.loaded, self.loaded.data.test, self.reference, tick, executor
            )

    def measurements(self, engines: Engines, rounds: int, steps: Steps) -> tuple[Measurement, ...]:
        """Time every engine under every condition in one interleaved run, then measure peak memory."""
        runs = {
            f"{entry.name}, {condition}": (entry, condition) for condition in self.conditions for entry in self.entries
        }
        fed = {
            key: partial(
                EngineWithFeeds,
                partial(engines.openers[entry.name], self.options(condition, entry)),
                self.feeds[condition.batch],
            )
            for key, (entry, condition) in runs.items()
        }
        latency = time_engines(fed, {}, rounds, steps)
        with steps.step("measure the memory") as tick:
            measurements = []
            for number, (key, (entry, condition)) in enumerate(runs.items()):
                tick(number, len(runs), key)
                peak = self._memory(entry, condition, engines.paths)
                measurements.append(Measurement(entry.name, condition, latency[key], peak))
        return tuple(measurements)

    def _memory(self, entry: EngineEntry, condition: Condition, built: Mapping[str, Path]) -> Memory | None:
        options = self.options(condition, entry)
        if entry.name not in built or options.device != "cpu":
            return None
        return peak_memory.measure(entry.target, built[entry.name], options, self.feeds[condition.batch])


def _build(entry: EngineEntry, file: Path, scratch: Path, options: BuildOptions) -> Path:
    target = runtime(entry.target)
    check_available(target.name, target.missing(), target.devices, options)
    if file.suffix != ".onnx":
        return file  # already an engine
    scratch.mkdir()
    return target.build(file, scratch, dataclasses.replace(options, precision=entry.precision))


def _check_inputs_and_outputs(name: str, engine: Engine, loaded: ModelAndData) -> None:
    """Raise if an engine's inputs or outputs differ from the model's; it may lack cache inputs of dropped layers.

    An engine that keeps the cache itself counts positions itself.
    """
    model = loaded.model
    required = set(model.inputs) - set(model.state.values())
    required -= {"position_ids"} if isinstance(engine, HoldsCache) else set()
    known = {*model.inputs, *model.state.values()}
    if not required <= set(engine.inputs) <= known or model.answer not in engine.outputs:
        raise BenchError(
            f"{name} maps {_listed(engine.inputs)} to {_listed(engine.outputs)}, but {model.name} maps "
            f"{_listed(model.inputs)} to {model.answer}; measure models of one kind, or name the model with --model."
        )


def _listed(names: Iterable[str]) -> str:
    """List names of inputs or outputs; the caches of all layers as one.

    >>> _listed(["input_ids", "past_key_values.0.key", "past_key_values.0.value"])
    'input_ids, past_key_values.*'
    """
    cached = ("past_", "present")
    return ", ".join(dict.fromkeys(f"{name.split('.')[0]}.*" if name.startswith(cached) else name for name in names))
