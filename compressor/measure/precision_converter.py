"""Convert float files to a lower precision, and choose a precision by measured loss and latency."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from compressor.choices import AUTO, Calibration
from compressor.errors import CompressorError
from compressor.executor.base import Batches
from compressor.measure.engine_builder import PARITY_ROWS, EngineBuilder
from compressor.measure.engine_quality import evaluate_engines
from compressor.measure.latency import EngineTimer
from compressor.quality.evaluate import BATCH, EvaluationError
from compressor.quality.heads.registry import head_for
from compressor.quantize.convert import OURS, choose_conversion, convert, usable_quantizers
from compressor.quantize.half_precision import check_file
from compressor.quantize.output_error import HeadDivergence, Judge
from compressor.quantize.precision import Converted, Source, Trial, choose_precision
from compressor.workspace.progress import Steps, Tick
from runtimes.base.protocols import RuntimesError

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class PrecisionConverter:
    """Converts the files of one builder.

    Attributes:
        builder: builds the engines whose loss and time are measured.
        timer: times them.
        calibration: how activation ranges are chosen for int8; ``auto`` tries several.
        max_loss: largest quality loss against the float engine on validation data, in percent. Layers stay in float to
            keep within it, and ``auto`` accepts no precision that exceeds it.
        results: conversions by source, each made once.
    """

    builder: EngineBuilder
    timer: EngineTimer
    calibration: Calibration | Literal["auto"]
    max_loss: float
    results: dict[Source, tuple[Source, Converted]] = dataclasses.field(default_factory=dict, repr=False)

    def convert(self, path: Path, precision: str, tick: Tick) -> tuple[Source, Converted]:
        """Convert a float file; return the source of the engine and the facts of the conversion."""
        key = Source(path, precision)
        if key not in self.results:
            self.results[key] = self._convert(path, precision, tick)
        return self.results[key]

    def _convert(self, path: Path, precision: str, tick: Tick) -> tuple[Source, Converted]:
        target, loss = self.builder.target, self._expected_loss(path)
        if precision in target.own:
            source = Source(path, precision)
            tick(text=f"{precision}: building")
            return source, Converted(precision, target.name, None if loss is None else loss(source))
        converted, refused = dict[Source, Converted](), dict[str, str]()
        for quantizer in usable_quantizers(precision, target.int8, self.calibration):
            try:
                source, facts = self._by(quantizer, path, precision, loss, tick)
            except (CompressorError, RuntimesError) as error:
                if quantizer == OURS:
                    raise
                refused[quantizer] = str(error)
                continue
            converted[source] = facts
        converted = {source: dataclasses.replace(facts, refused=refused) for source, facts in converted.items()}
        if len(converted) == 1:
            return next(iter(converted.items()))
        tick(text=f"{precision}: timing {len(converted)} quantizers")
        return choose_conversion(converted, self.quick({source: source for source in converted}), self.max_loss)

    def _by(
        self, quantizer: str, path: Path, precision: str, loss: Callable[[Source], float] | None, tick: Tick
    ) -> tuple[Source, Converted]:
        """Convert a float file with one quantizer; another package's file is also opened, as the target may refuse it.

        Raises:
            CompressorError, RuntimesError: the quantizer, ONNX's checker or the target refuses the file.
        """
        source = Source(path.with_suffix(f".{precision}.{quantizer}.onnx"), precision)
        facts = convert(
            path,
            source.path,
            precision,
            self.builder.target.int8,
            self._calibration,
            quantizer=quantizer,
            calibration=self.calibration,
            loss=None if loss is None else partial(_loss_of_file, loss, precision),
            max_loss=self.max_loss,
            progress=lambda text: tick(text=text),
            judge=self._judge(),
        )
        check_file(source.path, precision)
        if quantizer != OURS and loss is None:
            self._check_engine(source)
        return source, facts

    def _calibration(self) -> Batches:
        """Return the calibration batches, which run on the builder's executor."""
        count = math.ceil(len(self.builder.subject.data.calibration) / BATCH)
        return Batches(self.builder.executor, self.builder.calibration_batches, count)

    def _judge(self) -> Judge:
        """Return the comparison of outputs: the divergence of the model's head."""
        model = self.builder.subject.model
        head = head_for(model.task, model.problem_type)
        return Judge((model.answer, *model.stacked), HeadDivergence(model.evaluated_output, head))

    def convert_for_timing(self, path: Path, precision: str) -> Source:
        """Convert a float file for timing alone: int8 ranges come from one batch, and the loss is not measured.

        ``auto`` is timed in int8 if the target reads int8 from the file, else in fp32.
        """
        target = self.builder.target
        if precision == AUTO:
            precisions = target.precisions[self.builder.options.device]
            precision = "int8" if "int8" in precisions and "int8" not in target.own else "fp32"
        if precision == "fp32" or precision in target.own:
            return Source(path, precision)
        batch = next(self.builder.subject.data.calibration.batches(PARITY_ROWS)).feeds
        converted = path.with_suffix(f".{precision}.onnx")
        convert(path, converted, precision, target.int8, lambda: iter([batch]), calibration="typical")
        return Source(converted, precision)

    def choose(self, path: Path, steps: Steps) -> tuple[str, tuple[Trial, ...]]:
        """Try every precision of the target on a float file.

        Returns:
            The fastest precision with a loss of at most `max_loss`, and all trials.
        """
        sources, refused = {"fp32": Source(path)}, dict[str, str]()
        losses: dict[str, float | None] = {"fp32": 0.0}
        others = self.builder.target.precisions[self.builder.options.device][1:]
        with steps.step("try the precisions") as tick:
            for number, precision in enumerate(others):
                tick(number, len(others), precision)
                try:
                    source, facts = self.convert(path, precision, tick)
                    if facts.loss is None:
                        self._check_engine(source)
                except (CompressorError, RuntimesError) as error:
                    refused[precision] = str(error)
                    continue
                sources[precision], losses[precision] = source, facts.loss
            times = self.quick(sources)
        return choose_precision(times, losses, refused, self.max_loss)

    def _check_engine(self, source: Source) -> None:
        """Build and open an engine whose loss was not measured, so that the target refuses it here."""
        self.builder.target.load(self.builder.build(source), self.builder.options).close()

    def quick(self, sources: Mapping[Key, Source]) -> dict[Key, float]:
        """Build engines and time them in short bursts; return the milliseconds of all calls, by key."""
        engines = {str(number): self.builder.build(source) for number, source in enumerate(sources.values())}
        times = self.timer.quick(self.builder, engines).values()
        return {key: self.timer.total(parts) for key, parts in zip(sources, times, strict=True)}

    def _expected_loss(self, path: Path) -> Callable[[Source], float] | None:
        """Return a function that measures the loss of an engine against the float engine of `path`.

        The loss is on validation data, in percent. Return None if no quality is stated.
        """
        if self.builder.subject.no_quality_because is not None:
            return None
        float_engine = self.builder.build(Source(path))

        def loss(source: Source) -> float:
            engines = {"float": float_engine, "converted": self.builder.build(source)}
            validation = self.builder.subject.data.validation
            try:
                evaluation = evaluate_engines(self.builder, engines, validation, "float", lambda *_: None)
            except EvaluationError:  # NaN or infinity counts as an infinite loss, so that layers return to float
                return math.inf
            return evaluation.expected_loss("float", "converted")

        return loss


def _loss_of_file(loss: Callable[[Source], float], precision: str, path: Path) -> float:
    return loss(Source(path, precision))
