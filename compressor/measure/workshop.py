"""Engines of one subject on one target: built, held against torch, quantized, judged, timed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from compressor.choices import AUTO
from compressor.data.splits import Split
from compressor.errors import CompressorError
from compressor.lower.checkpoint import ADVICE, CONFIG
from compressor.lower.fold_graph import finished
from compressor.lower.traced_model import Loaded, accepting_data
from compressor.lower.write_onnx import lower
from compressor.measure.workload import RUN, Call, Fed, calls_of, generate_of, together
from compressor.models.base import as_numpy
from compressor.quality.evaluate import BATCH, Evaluation, EvaluationError, Runner, evaluate
from compressor.quality.parity import REPORT_IT, Parity, check_parity
from compressor.quantize.convert import best_of, convert, usable_quantizers
from compressor.quantize.precision import Converted, Source, Trial, judged
from compressor.settings import Settings
from compressor.workspace.output_folder import copy_onnx
from compressor.workspace.progress import Steps, Tick
from passes.execute.interpreter import run
from passes.graph.graph import Graph
from runtimes.base.protocols import BuildOptions, Engine, Feeds, Runtime, RuntimesError
from runtimes.base.timing import MIN_RUNS, WARMUP_RUNS, Latency, Timeable, interleave

Key = TypeVar("Key")

PARITY_ROWS = 8
CLOCK_ROUNDS = 8  # of the quick timing that a search goes by: short ones, of which some meet a quiet machine
CLOCK_SECONDS = 0.1


def sized(options: BuildOptions, subject: Loaded, settings: Settings) -> BuildOptions:
    """The options with the sizes that an engine will meet: from one row up to the batches of the evaluation."""
    parts = (subject.data.calibration, subject.data.validation, subject.data.test)
    rows = max(settings.batch, PARITY_ROWS, BATCH * parts[0].samples.rows_per_sample)
    options = dataclasses.replace(options, batches=(1, settings.batch, rows))
    axes = [(name, axis) for name, free in subject.model.dynamic_axes.items() for axis in free if axis != 0]
    if not axes:
        return options
    usual = next(iter(calls_of(subject, settings).values())).shapes
    feeds = (batch.feeds for part in parts for batch in part.batches(BATCH))
    longest = max(found[name].shape[axis] for found in feeds for name, axis in axes)
    least = 1
    if subject.model.state:  # the data's cache is empty, that of the example is not
        least, longest = 0, max(longest, *(subject.model.example[name].shape[axis] for name, axis in axes))
    asked = generate_of(settings, subject.model)
    if asked is not None:
        longest = max(longest, asked.prompt + asked.new)
    return dataclasses.replace(options, lengths=(least, max(usual[name][axis] for name, axis in axes), longest))


@dataclasses.dataclass(frozen=True)
class Workshop:
    """One target at work on one subject. Every engine gets a folder of its own under `scratch`, unless told where."""

    subject: Loaded
    target: Runtime
    options: BuildOptions
    scratch: Path
    compiled: dict[Source, Path] = dataclasses.field(default_factory=dict, repr=False)
    made: dict[Source, tuple[Source, Converted]] = dataclasses.field(default_factory=dict, repr=False)

    def finished(self, graph: Graph) -> Graph:
        """A fork ready to be lowered; a checkpoint has the layers of its architecture, so nothing is folded there."""
        return graph.fork() if self.target.source == CONFIG else finished(graph)

    def lowered(self, graph: Graph, name: str) -> Path:
        """Write a finished graph in the form that the target builds from; returns its path, under `scratch`."""
        return lower(graph, self.subject.model, self.scratch / f"{name}{self.target.source}")

    def build(self, source: Source, out: Path | None = None) -> Path:
        """Build an engine, in `out` or in a folder of its own; returns its path.

        One from an exported program, which takes a compiler a while, is built once.
        """
        if source in self.compiled:
            return self.compiled[source]
        folder = self.scratch / f"{source.path.stem}.{source.precision}.{self.target.name}" if out is None else out
        folder.mkdir(exist_ok=True)
        samples = self._samples if source.precision in self.target.own else None
        options = dataclasses.replace(self.options, precision=source.precision, samples=samples)
        built = self.target.build(source.path, folder, options)
        if source.path.suffix == ".pt2":
            self.compiled[source] = built
        return built

    def shipped(self, source: Source, folder: Path) -> tuple[Source, Path]:
        """The result's engine in the output folder, with the portable file beside it where it comes from one.

        Returns:
            What it was built from, and the engine's path.
        """
        if self.target.source == CONFIG:
            return source, Path(shutil.copytree(source.path.parent, folder, dirs_exist_ok=True), source.path.name)
        if self.target.source == ".onnx":
            source = source._replace(path=copy_onnx(source.path, folder / "model.onnx"))
            return source, self.build(source, folder)
        built = self.build(source)
        return source, Path(shutil.copy(built, folder / built.name))

    def _samples(self) -> Iterator[Feeds]:
        return (batch.feeds for batch in self.subject.data.calibration.batches(BATCH))

    def calls(self, settings: Settings) -> dict[str, Call]:
        """The calls whose time is the latency; see calls.py."""
        return calls_of(self.subject, settings)

    def timed_inputs(self, settings: Settings) -> Feeds:
        """The inputs of the first call that engines are timed with."""
        return next(iter(self.calls(settings).values())).inputs

    def clock(self, graphs: Mapping[str, Graph], settings: Settings, steps: Steps) -> dict[str, dict[str, float]]:
        """Build an engine from each finished graph, in the precision asked for, and time them against each other.

        Returns:
            Milliseconds of each call by name, those of the quietest burst.
        """
        with steps.step(f"time {len(graphs)} designs on {self.target.name}") as tick, self._passing() as workshop:
            engines: dict[str, Path] = {}
            for number, (name, graph) in enumerate(graphs.items()):
                tick(number, 2 * len(graphs), f"build {name}")
                engines[name] = workshop.build(workshop.roughly(workshop.lowered(graph, f"design{number}"), settings))
            found = self._briefly(
                engines, settings, lambda name, done, total: tick(total + done, 2 * total, f"time {name}")
            )
            return {name: {call: each.quietest for call, each in parts.items()} for name, parts in found.items()}

    def _briefly(
        self, engines: Mapping[str, Path], settings: Settings, progress: Callable[[str, int, int], None] | None = None
    ) -> dict[str, dict[str, Latency]]:
        """Every call of every engine timed against the others in short bursts."""
        return self._interleaved(
            engines,
            settings,
            partial(interleave, rounds=CLOCK_ROUNDS, burst_seconds=CLOCK_SECONDS, progress=progress),
        )

    def _interleaved(
        self, engines: Mapping[str, Path], settings: Settings, interleaved: Callable[..., dict[str, Latency]]
    ) -> dict[str, dict[str, Latency]]:
        """Latencies by engine and call, all in one interleaved run."""
        openers, calls = self._openers(engines, self.options), self.calls(settings)
        if list(calls) == [RUN]:
            return {name: {RUN: each} for name, each in interleaved(openers, calls[RUN].inputs).items()}
        runs = [(name, call) for call in calls for name in engines]
        with tempfile.TemporaryDirectory(dir=self.scratch) as caches:
            fed = {
                f"{name}, {call}": partial(
                    Fed, openers[name], calls[call].feeds(openers[name], Path(caches, f"{number}"))
                )
                for number, (name, call) in enumerate(runs)
            }
            found = interleaved(fed, {})
        return {name: {call: found[f"{name}, {call}"] for call in calls} for name in engines}

    @contextlib.contextmanager
    def _passing(self) -> Iterator[Workshop]:
        """The same workshop in a folder that is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            yield dataclasses.replace(self, scratch=Path(scratch))

    def roughly(self, path: Path, settings: Settings) -> Source:
        """A file in the precision asked for, good enough to be timed: an int8 one has its ranges from one batch."""
        precision = settings.precision
        if precision == AUTO:  # what it will most likely be
            had = self.target.precisions[self.options.device]
            precision = "int8" if "int8" in had and "int8" not in self.target.own else "fp32"
        if precision == "fp32" or precision in self.target.own:
            return Source(path, precision)
        batch = next(self.subject.data.calibration.batches(PARITY_ROWS)).feeds
        made = path.with_suffix(f".{precision}.onnx")
        convert(path, made, precision, self.target.int8, lambda: iter([batch]), calibration="typical")
        return Source(made, precision)

    def parity(self, path: Path, graph: Graph) -> Parity:
        """Hold the float engine of a file against torch on real samples, as a batch and one by one.

        A baked-in batch size shows there. A language model is also held to it behind a cache of some tokens.
        """
        batch = next(self.subject.data.calibration.batches(PARITY_ROWS)).feeds
        several = [batch, {name: value[:1] for name, value in batch.items()}]
        if graph.state:  # the data's cache is empty
            several.append(as_numpy(self.subject.model.example))
        worst = Parity("", 0.0, 0)
        advice = ADVICE if self.target.source == CONFIG else REPORT_IT
        with self.target.load(self.build(Source(path)), self.options) as engine:
            for feeds in several:
                with accepting_data(self.subject):
                    outputs = run(graph, {name: torch.from_numpy(value) for name, value in feeds.items()})
                expected = dict(zip(graph.outputs, (value.numpy() for value in outputs), strict=True))
                found = check_parity(expected, partial(engine.run, feeds), name=path.name, advice=advice)
                worst = max(worst, found, key=lambda parity: parity.difference)
        return worst

    def precise(
        self, floats: Mapping[str, Path], settings: Settings, steps: Steps
    ) -> tuple[dict[str, Source], dict[str, Converted]]:
        """The variants in the precision asked for, each from its own float file; the float baseline is ``original``.

        Returns:
            What engines are built from, by variant, and how each got its precision.
        """
        if settings.precision == "fp32":
            return {name: Source(path) for name, path in floats.items()}, {}
        made = {"original": Source(floats["baseline"])}
        facts: dict[str, Converted] = {}
        for name, path in floats.items():
            if name == "result" and path == floats["baseline"]:
                made[name], facts[name] = made["baseline"], facts["baseline"]
                continue
            with steps.step(f"{settings.precision} of the {name}") as tick:
                made[name], facts[name] = self.converted(path, settings, tick)
        return made, facts

    def converted(self, path: Path, settings: Settings, tick: Tick) -> tuple[Source, Converted]:
        """A float file in the precision asked for, with the loss to expect of it; made once."""
        key = Source(path, settings.precision)
        if key not in self.made:
            self.made[key] = self._converted(path, settings, tick)
        return self.made[key]

    def _converted(self, path: Path, settings: Settings, tick: Tick) -> tuple[Source, Converted]:
        precision, loss = settings.precision, self._loss(path)
        if precision in self.target.own:
            source = Source(path, precision)
            tick(text=f"{precision}: building")
            return source, Converted(precision, self.target.name, None if loss is None else loss(source))
        made = {}
        for quantizer in usable_quantizers(precision, self.target.int8):
            source = Source(path.with_suffix(f".{precision}.{quantizer}.onnx"), precision)
            made[source] = convert(
                path,
                source.path,
                precision,
                self.target.int8,
                self._samples,
                quantizer=quantizer,
                calibration=settings.calibration,
                loss=None if loss is None else partial(_of_file, loss, precision),
                max_loss=settings.max_precision_loss,
                progress=lambda text: tick(text=text),
            )
        if len(made) == 1:
            return next(iter(made.items()))
        tick(text=f"{precision}: timing {len(made)} quantizers")
        return best_of(made, self.quick(dict(zip(made, made, strict=True)), settings), settings.max_precision_loss)

    def quick(self, sources: Mapping[Key, Source], settings: Settings) -> dict[Key, float]:
        """Milliseconds of the engines of some files, timed against each other in short bursts: the quietest of each."""
        engines = {str(number): self.build(source) for number, source in enumerate(sources.values())}
        found, calls = self._briefly(engines, settings).values(), self.calls(settings)
        return {
            key: sum(calls[call].times * each.quietest for call, each in parts.items())
            for key, parts in zip(sources, found, strict=True)
        }

    def choose_precision(self, path: Path, settings: Settings, steps: Steps) -> tuple[str, tuple[Trial, ...]]:
        """The fastest of the target's precisions whose loss stays within the budget, each tried on a float file."""
        sources, refused = {"fp32": Source(path)}, dict[str, str]()
        losses: dict[str, float | None] = {"fp32": 0.0}
        others = self.target.precisions[self.options.device][1:]
        with steps.step("try the precisions") as tick:
            for number, precision in enumerate(others):
                tick(number, len(others), precision)
                asked = dataclasses.replace(settings, precision=precision)
                try:
                    source, facts = self.converted(path, asked, tick)
                    self.build(source)
                except (CompressorError, RuntimesError) as error:
                    refused[precision] = str(error)
                    continue
                sources[precision], losses[precision] = source, facts.loss
            times = self.quick(sources, settings)
        return judged(times, losses, refused, settings.max_precision_loss)

    def _loss(self, path: Path) -> Callable[[Source], float] | None:
        """What measures the loss to expect of an engine against its float one, on validation data, in percent."""
        if self.subject.no_quality_because is not None:
            return None
        floating = self.build(Source(path))

        def loss(source: Source) -> float:
            engines = {"float": floating, "converted": self.build(source)}
            try:
                evaluation = self._judge(engines, self.subject.data.validation, "float", lambda *_: None)
            except EvaluationError:  # NaN or infinity: the worst loss, so that layers return to float
                return math.inf
            return evaluation.expected_loss("float", "converted")

        return loss

    def quality(self, engines: Mapping[str, Path], steps: Steps) -> Evaluation | None:
        """Quality on test data, which neither calibration nor search has seen; None where none may be stated."""
        if self.subject.no_quality_because is not None:
            return None
        reference = "original" if "original" in engines else "baseline"
        with steps.step("measure the quality") as tick:
            return self._judge(engines, self.subject.data.test, reference, tick)

    def measured(
        self, graphs: Mapping[str, Graph], settings: Settings, steps: Steps
    ) -> tuple[Evaluation | None, dict[str, Latency]]:
        """Quality on test data and latency of several graphs side by side, as engines in the precision asked for.

        The first is what the others are compared with. No quality where none may be stated.
        """
        with self._passing() as workshop:
            engines = {name: workshop._engine(name, graph, settings, steps) for name, graph in graphs.items()}
            evaluation = None
            if self.subject.no_quality_because is None:
                with steps.step("measure the quality") as tick:
                    evaluation = workshop._judge(engines, self.subject.data.test, next(iter(graphs)), tick)
            return evaluation, workshop.latency(engines, settings, steps)

    def _engine(self, name: str, graph: Graph, settings: Settings, steps: Steps) -> Path:
        with steps.step(f"build {name}") as tick:
            path = self.lowered(self.finished(graph), name)
            self.parity(path, graph)
            if settings.precision == "fp32":
                return self.build(Source(path))
            return self.build(self.converted(path, settings, tick)[0])

    def _judge(self, engines: Mapping[str, Path], split: Split, reference: str, tick: Tick) -> Evaluation:
        """Run several engines side by side over a split."""
        # Waiting threads that spin would take the cores from the other open engines.
        shared = dataclasses.replace(self.options, spinning=False)
        return judge(self._openers(engines, shared), self.subject, split, reference, tick)

    def latency(self, engines: Mapping[str, Path], settings: Settings, steps: Steps) -> dict[str, Latency]:
        """Time the engines against each other on the same inputs; all calls of each together."""
        calls = self.calls(settings)
        return {name: together(calls, parts) for name, parts in self.latencies(engines, settings, steps).items()}

    def latencies(self, engines: Mapping[str, Path], settings: Settings, steps: Steps) -> dict[str, dict[str, Latency]]:
        """Time every call of the engines against each other, by engine and call."""
        few = partial(timed, min_runs=3, warmup_runs=1) if self.subject.model.state else timed  # a prompt can take long
        return self._interleaved(engines, settings, partial(few, rounds=settings.rounds, steps=steps))

    def _openers(self, engines: Mapping[str, Path], options: BuildOptions) -> dict[str, Callable[[], Engine]]:
        return {name: partial(self.target.load, path, options) for name, path in engines.items()}


def _of_file(loss: Callable[[Source], float], precision: str, path: Path) -> float:
    return loss(Source(path, precision))


def timed(
    openers: Mapping[str, Callable[[], Timeable]],
    feeds: Feeds,
    rounds: int,
    steps: Steps,
    *,
    name: str = "measure the latency",
    min_runs: int = MIN_RUNS,
    warmup_runs: int = WARMUP_RUNS,
) -> dict[str, Latency]:
    """Time engines against each other in one interleaved run."""
    with steps.step(name) as tick:
        return interleave(
            openers,
            feeds,
            rounds=rounds,
            min_runs=min_runs,
            warmup_runs=warmup_runs,
            progress=lambda name, done, total: tick(done, total, name),
        )


def judge(
    openers: Mapping[str, Callable[[], Engine]], subject: Loaded, split: Split, reference: str, tick: Tick
) -> Evaluation:
    """Run engines side by side over a split; the others are compared with the reference."""
    with contextlib.ExitStack() as opened:
        engines = {name: opened.enter_context(opener()) for name, opener in openers.items()}
        runners = {name: _runner(engine, subject.model.answer) for name, engine in engines.items()}
        return evaluate(split, runners, metric=subject.metric, reference=reference, progress=tick)


def _runner(engine: Engine, answer: str) -> Runner:
    return lambda feeds: engine.run(feeds)[answer]
