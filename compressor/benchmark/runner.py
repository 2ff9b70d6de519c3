"""What `bench` measures with: every engine built, judged and timed on the same data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compressor.benchmark.contenders import EAGER, BenchError, Entry
from compressor.lower.traced_model import Loaded
from compressor.measure import peak_memory
from compressor.measure.peak_memory import Memory
from compressor.measure.workload import Fed
from compressor.measure.workshop import judge, sized, timed
from compressor.quality.evaluate import Evaluation
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions, Engine, Feeds
from runtimes.base.registry import need, runtime
from runtimes.base.timing import Latency


class Condition(NamedTuple):
    """A batch size and a number of threads; None leaves it to the runtime."""

    batch: int
    threads: int | None

    def __str__(self) -> str:
        return f"batch {self.batch}" + ("" if self.threads is None else f", threads {self.threads}")


@dataclass(frozen=True)
class Measurement:
    """What one engine does under one condition; no memory where it cannot be told."""

    name: str
    condition: Condition
    latency: Latency
    memory: Memory | None

    @property
    def throughput(self) -> float:
        """Rows a second, one batch after the other."""
        return self.condition.batch / self.latency.median * 1000.0


@dataclass(frozen=True)
class Engines:
    """What opens each engine, and what was built from the ONNX files, by name."""

    openers: Mapping[str, Callable[[BuildOptions], Engine]]
    paths: Mapping[str, Path]


@dataclass(frozen=True)
class Stand:
    """Everything that is measured, and on what; `contexts` are the tokens that generation is timed after."""

    loaded: Loaded
    settings: Settings
    entries: tuple[Entry, ...]
    against: str
    conditions: tuple[Condition, ...]
    feeds: Mapping[int, Feeds]
    contexts: tuple[int, ...] = ()

    @property
    def reference(self) -> str:
        """What quality is compared with: the baseline, or the eager model of a compiled one."""
        place = [entry.name for entry in self.entries].index(self.against)
        return self.entries[place - 1 if self.entries[place].compiled else place].name  # the eager one comes before it

    @property
    def judged(self) -> tuple[Entry, ...]:
        """The engines whose quality is measured: a compiled model is held against the eager one instead."""
        return tuple(entry for entry in self.entries if not entry.compiled)

    def options(self, condition: Condition, entry: Entry) -> BuildOptions:
        """How an engine is opened; `sized` for everything that it will meet."""
        device = self.settings.device
        if device is None:
            device = "cpu" if entry.target == EAGER else runtime(entry.target).devices[0]
        return dataclasses.replace(self._sized, device=device, threads=condition.threads)

    @cached_property
    def _sized(self) -> BuildOptions:
        """The sizes that engines will meet; of texts that takes a pass over the data."""
        options = sized(BuildOptions(), self.loaded, self.settings)
        smallest, usual, largest = options.batches
        batches = [condition.batch for condition in self.conditions]
        least, middle, longest = options.lengths
        return dataclasses.replace(
            options,
            batches=(smallest, usual, max(largest, *batches)),
            lengths=(least, middle, max((longest, *(context + 1 for context in self.contexts)))),
        )

    def built(self, scratch: Path, steps: Steps) -> Engines:
        """Build every engine anew, and see that it takes the data's inputs.

        Raises:
            BenchError: an engine has other inputs or outputs.
            RuntimesError: a target cannot be used, or refuses a file.
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
                    _check_ends(entry.name, engine, self.loaded)
        return Engines(openers, paths)

    def parity(self, engines: Engines) -> dict[str, float]:
        """Largest difference of each compiled model's answers from those of the eager one, on the timed inputs."""
        found = {}
        for before, entry in itertools.pairwise(self.entries):
            if entry.compiled:  # comes right after its eager one
                feeds, answer = self.feeds[self.conditions[0].batch], self.loaded.model.answer
                sides = []
                for each in (before, entry):
                    with engines.openers[each.name](self.options(self.conditions[0], each)) as engine:
                        sides.append(engine.run(feeds)[answer])
                found[entry.name] = float(np.abs(sides[0] - sides[1]).max())
        return found

    def quiet_openers(self, engines: Engines) -> dict[str, Callable[[], Engine]]:
        """What opens each engine that is judged; threads that wait and spin would take the cores from the others."""
        return {
            entry.name: partial(
                engines.openers[entry.name],
                dataclasses.replace(self.options(self.conditions[0], entry), spinning=False),
            )
            for entry in self.judged
        }

    def quality(self, engines: Engines, steps: Steps) -> Evaluation | None:
        """Quality on test data, on the same samples for all; None where none may be stated."""
        if self.loaded.no_quality_because is not None:
            return None
        with steps.step("measure the quality") as tick:
            return judge(self.quiet_openers(engines), self.loaded, self.loaded.data.test, self.reference, tick)

    def measurements(self, engines: Engines, rounds: int, steps: Steps) -> tuple[Measurement, ...]:
        """Latency of every engine under every condition in one interleaved run, then peak memory."""
        runs = {
            f"{entry.name}, {condition}": (entry, condition) for condition in self.conditions for entry in self.entries
        }
        fed = {
            key: partial(
                Fed, partial(engines.openers[entry.name], self.options(condition, entry)), self.feeds[condition.batch]
            )
            for key, (entry, condition) in runs.items()
        }
        latency = timed(fed, {}, rounds, steps)
        with steps.step("measure the memory") as tick:
            found = []
            for number, (key, (entry, condition)) in enumerate(runs.items()):
                tick(number, len(runs), key)
                peak = self._memory(entry, condition, engines.paths)
                found.append(Measurement(entry.name, condition, latency[key], peak))
        return tuple(found)

    def _memory(self, entry: Entry, condition: Condition, built: Mapping[str, Path]) -> Memory | None:
        options = self.options(condition, entry)
        if entry.name not in built or options.device != "cpu":
            return None
        return peak_memory.measure(entry.target, built[entry.name], options, self.feeds[condition.batch])


def _build(entry: Entry, file: Path, scratch: Path, options: BuildOptions) -> Path:
    target = runtime(entry.target)
    need(target.name, target.missing(), target.devices, options)
    if file.suffix != ".onnx":
        return file  # an engine already
    scratch.mkdir()
    return target.build(file, scratch, dataclasses.replace(options, precision=entry.precision))


def _check_ends(name: str, engine: Engine, loaded: Loaded) -> None:
    """Refuse an engine that takes or gives something else than the data's model; a cache may have lost layers."""
    model = loaded.model
    needed = set(model.inputs) - set(model.state.values())
    if not needed <= set(engine.inputs) <= set(model.inputs) or model.answer not in engine.outputs:
        raise BenchError(
            f"{name} goes from {', '.join(engine.inputs)} to {', '.join(engine.outputs)}, but {model.name} from "
            f"{', '.join(model.inputs)} to {model.answer}; measure models of one kind, or name theirs with --model."
        )
