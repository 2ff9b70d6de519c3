"""Engines of one subject on one target: built, held against torch, quantized, judged, timed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from compressor.data import Split
from compressor.deferred import STAND_IN, stand_in
from compressor.errors import CompressorError
from compressor.evaluate import BATCH, Evaluation, EvaluationError, Runner, evaluate
from compressor.lower import OPSET, lower
from compressor.models.base import as_numpy
from compressor.parity import Parity, check_parity
from compressor.quantize import Quantized, quantize
from compressor.rewrite import finished
from compressor.settings import Settings
from compressor.steps import Steps, Tick
from compressor.subject import Loaded, accepting_data
from passes.graph import Graph
from passes.run import run
from runtimes.base import BuildOptions, Engine, Feeds, Runtime, check_device, need, runtime, targets
from runtimes.timing import MIN_RUNS, WARMUP_RUNS, Latency, Timeable, interleave

PARITY_ROWS = 8
CLOCK_ROUNDS = 8  # of the quick timing that a search goes by: short ones, of which some meet a quiet machine
CLOCK_SECONDS = 0.1
TIMING_CANDIDATES = 32  # samples among which the one of median length is timed


class WorkshopError(CompressorError):
    """The target cannot do what was asked for."""


def usable(settings: Settings) -> tuple[Runtime, BuildOptions]:
    """The target, if it can be used here: asked first, so that nobody waits for a search to learn that it cannot."""
    target = runtime(settings.target)
    device = target.devices[0] if settings.device is None else settings.device
    options = BuildOptions(device=device, threads=settings.threads)
    if settings.int8 is not None:
        _check_int8(target, settings.int8, device)
    if settings.defer_build:
        check_device(target.name, target.devices, options)
        target, options = stand_in(target), dataclasses.replace(options, device="cpu")
    need(target.name, _or_defer(target), target.devices, options)
    if options.device != target.devices[0]:
        _probe(target, options)
    return target, options


def _or_defer(target: Runtime) -> str | None:
    """The reason why a target cannot be used, with the way round it where there is one."""
    reason = target.missing()
    if reason is None or target.name == STAND_IN:
        return reason
    return f"{reason}, or export with --defer-build here and run `compressor build` on the device"


def _check_int8(target: Runtime, mode: str, device: str) -> None:
    """Refuse an int8 that the target would compute in float, on another device than asked for, or not at all."""
    if device not in target.int8.devices:
        others = " or ".join(name for name in targets() if device in runtime(name).int8.devices)
        raise WorkshopError(
            f"target {target.name} has int8 on {' and '.join(target.int8.devices)} only; on {device} int8 needs "
            f"--target {others}."
        )
    if mode == "dynamic" and not target.int8.dynamic:
        raise WorkshopError(
            f"target {target.name} has no dynamic int8, it needs the ranges in the file; use --int8 static."
        )


def _probe(target: Runtime, options: BuildOptions) -> None:
    """Build the smallest model there is: whether the device is there should not be learnt after a search."""
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.onnx")
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)
        target.build(path, Path(folder), options)


def sized(options: BuildOptions, subject: Loaded, settings: Settings) -> BuildOptions:
    """The options with the sizes that an engine will meet: from one row up to the batches of the evaluation."""
    parts = (subject.data.calibration, subject.data.validation, subject.data.test)
    rows = max(settings.batch, PARITY_ROWS, BATCH * parts[0].samples.rows_per_sample)
    options = dataclasses.replace(options, batches=(1, settings.batch, rows))
    axes = [(name, axis) for name, free in subject.model.dynamic_axes.items() for axis in free if axis != 0]
    if not axes:
        return options
    usual = timing_feeds(subject.data.test, settings.batch)
    feeds = (batch.feeds for part in parts for batch in part.batches(BATCH))
    longest = max(found[name].shape[axis] for found in feeds for name, axis in axes)
    least = 1
    if subject.model.state:  # the data's cache is empty, that of the example is not
        least, longest = 0, max(longest, *(subject.model.example[name].shape[axis] for name, axis in axes))
    return dataclasses.replace(options, lengths=(least, max(usual[name].shape[axis] for name, axis in axes), longest))


@dataclasses.dataclass(frozen=True)
class Workshop:
    """One target at work on one subject. Every engine gets a folder of its own under `scratch`, unless told where."""

    subject: Loaded
    target: Runtime
    options: BuildOptions
    scratch: Path

    def build(self, onnx: Path, out: Path | None = None) -> Path:
        """Build an engine from an ONNX file, in `out` or in a folder of its own; returns its path."""
        folder = self.scratch / f"{onnx.stem}.{self.target.name}" if out is None else out
        folder.mkdir(exist_ok=True)
        return self.target.build(onnx, folder, self.options)

    def timed_inputs(self, settings: Settings) -> dict[str, npt.NDArray[Any]]:
        """The inputs on which engines are timed."""
        return timing_feeds(self.subject.data.test, settings.batch)

    def clock(self, graphs: Mapping[str, Graph], settings: Settings, steps: Steps) -> dict[str, float]:
        """Build an engine from each finished graph, in the precision asked for, and time them against each other.

        Returns:
            Milliseconds by name, those of the quietest burst.
        """
        with steps.step(f"time {len(graphs)} designs on {self.target.name}") as tick, self._passing() as workshop:
            engines: dict[str, Path] = {}
            for number, (name, graph) in enumerate(graphs.items()):
                tick(number, 2 * len(graphs), f"build {name}")
                onnx = lower(graph, self.subject.model, workshop.scratch / f"design{number}.onnx")
                engines[name] = workshop.build(workshop.roughly_quantized(onnx, settings))
            found = interleave(
                {name: partial(self.target.load, path, self.options) for name, path in engines.items()},
                self.timed_inputs(settings),
                rounds=CLOCK_ROUNDS,
                burst_seconds=CLOCK_SECONDS,
                progress=lambda name, done, total: tick(total + done, 2 * total, f"time {name}"),
            )
        return {name: latency.quietest for name, latency in found.items()}

    @contextlib.contextmanager
    def _passing(self) -> Iterator[Workshop]:
        """The same workshop in a folder that is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            yield dataclasses.replace(self, scratch=Path(scratch))

    def roughly_quantized(self, onnx: Path, settings: Settings) -> Path:
        """An int8 version for timing, its ranges from one batch; the file itself where int8 was not asked for."""
        if settings.int8 is None:
            return onnx
        made = onnx.with_suffix(".int8.onnx")
        batch = next(self.subject.data.calibration.batches(PARITY_ROWS)).feeds
        self._to_int8(onnx, made, settings, lambda: iter([batch]))
        return made

    def parity(self, onnx: Path, graph: Graph) -> Parity:
        """Hold an ONNX file against torch on real samples, as a batch and one by one (a baked-in batch size shows).

        A language model is also held to it behind a cache of some tokens.
        """
        batch = next(self.subject.data.calibration.batches(PARITY_ROWS)).feeds
        several = [batch, {name: value[:1] for name, value in batch.items()}]
        if graph.state:  # the data's cache is empty
            several.append(as_numpy(self.subject.model.example))
        worst = Parity("", 0.0, 0)
        with self.target.load(self.build(onnx), self.options) as engine:
            for feeds in several:
                with accepting_data(self.subject):
                    outputs = run(graph, {name: torch.from_numpy(value) for name, value in feeds.items()})
                expected = dict(zip(graph.outputs, (value.numpy() for value in outputs), strict=True))
                found = check_parity(expected, partial(engine.run, feeds), name=onnx.name)
                worst = max(worst, found, key=lambda parity: parity.difference)
        return worst

    def quantized(
        self, files: Mapping[str, Path], settings: Settings, steps: Steps
    ) -> tuple[dict[str, Path], dict[str, Quantized]]:
        """Int8 versions of baseline and result, each from its own float file, which becomes ``original`` for one.

        Returns:
            ONNX files by variant, and what was done to each int8 one.
        """
        made: dict[str, Path] = {"original": files["baseline"]}
        facts: dict[str, Quantized] = {}
        for name, source in files.items():
            if name == "result" and source == files["baseline"]:
                made[name], facts[name] = made["baseline"], facts["baseline"]
                continue
            with steps.step(f"quantize the {name}") as tick:
                made[name] = self.scratch / f"{name}.int8.onnx"
                facts[name] = self._quantize(source, made[name], settings, tick)
        return made, facts

    def _quantize(self, source: Path, destination: Path, settings: Settings, tick: Tick) -> Quantized:
        batches = self.subject.data.calibration.batches
        return self._to_int8(
            source,
            destination,
            settings,
            lambda: (batch.feeds for batch in batches(BATCH)),
            loss=self._int8_loss(source),
            progress=lambda text: tick(text=text),
        )

    def _to_int8(
        self,
        source: Path,
        destination: Path,
        settings: Settings,
        feeds: Callable[[], Iterator[Feeds]],
        loss: Callable[[Path], float] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Quantized:
        mode: Literal["static", "dynamic"] = "dynamic" if settings.int8 == "dynamic" else "static"
        return quantize(
            source,
            destination,
            feeds,
            mode=mode,
            activations="uint8" if mode == "dynamic" else self.target.int8.activations,
            convolutions=mode == "static" and self.target.int8.convolutions,
            loss=loss,
            max_loss=settings.max_int8_loss,
            progress=progress,
        )

    def _int8_loss(self, source: Path) -> Callable[[Path], float] | None:
        """What measures the loss to expect of an int8 file against its float file, on validation data, in percent."""
        if self.subject.no_quality_because is not None:
            return None
        floating = self.build(source)

        def loss(quantized: Path) -> float:
            engines = {"float": floating, "int8": self.build(quantized)}
            try:
                evaluation = self._judge(engines, self.subject.data.validation, "float", lambda *_: None)
            except EvaluationError:  # NaN or infinity: the worst loss, so that layers return to float
                return math.inf
            return evaluation.expected_loss("float", "int8")

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
            return evaluation, workshop.latency(engines, self.timed_inputs(settings), settings.rounds, steps)

    def _engine(self, name: str, graph: Graph, settings: Settings, steps: Steps) -> Path:
        with steps.step(f"build {name}") as tick:
            onnx = lower(finished(graph), self.subject.model, self.scratch / f"{name}.onnx")
            self.parity(onnx, graph)
            if settings.int8 is None:
                return self.build(onnx)
            made = self.scratch / f"{name}.int8.onnx"
            self._quantize(onnx, made, settings, tick)
            return self.build(made)

    def _judge(self, engines: Mapping[str, Path], split: Split, reference: str, tick: Tick) -> Evaluation:
        """Run several engines side by side over a split."""
        # Waiting threads that spin would take the cores from the other open engines.
        shared = dataclasses.replace(self.options, spinning=False)
        return judge(self._openers(engines, shared), self.subject, split, reference, tick)

    def latency(self, engines: Mapping[str, Path], feeds: Feeds, rounds: int, steps: Steps) -> dict[str, Latency]:
        """Time the engines against each other on the same inputs."""
        return timed(self._openers(engines, self.options), feeds, rounds, steps)

    def _openers(self, engines: Mapping[str, Path], options: BuildOptions) -> dict[str, Callable[[], Engine]]:
        return {name: partial(self.target.load, path, options) for name, path in engines.items()}


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


def timing_feeds(split: Split, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Exactly `batch` rows of real inputs, repeated where the split is smaller; of texts those of median length."""
    few = itertools.islice((part.feeds for part in split.batches(batch)), max(1, TIMING_CANDIDATES // batch))
    by_size = sorted(few, key=lambda feeds: sum(value[0].size for value in feeds.values()))
    feeds = by_size[len(by_size) // 2]
    rows = len(next(iter(feeds.values())))
    return {name: np.concatenate([value] * (-(-batch // rows)))[:batch] for name, value in feeds.items()}
