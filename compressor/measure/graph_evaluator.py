"""Measure the latency and quality of graphs as engines, for a search or a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from compressor.lower.traced_model import TracedModel
from compressor.measure.engine_builder import EngineBuilder, with_input_sizes
from compressor.measure.engine_quality import quality_on_test
from compressor.measure.latency import EngineTimer
from compressor.measure.precision_converter import PrecisionConverter
from compressor.measure.variant import lower_variant
from compressor.measure.workload import workload_calls
from compressor.quality.evaluate import Evaluation
from compressor.quantize.precision import Converted
from compressor.quantize.qdq_rewrite import NothingToQuantizeError
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph
from runtimes.base.protocols import BuildOptions, Runtime
from runtimes.base.timing import Latency


@dataclasses.dataclass(frozen=True)
class GraphEvaluator:
    """Builds engines from graphs in one precision, and measures them."""

    builder: EngineBuilder
    timer: EngineTimer
    converter: PrecisionConverter
    precision: str

    def time(self, graphs: Mapping[str, Graph], steps: Steps) -> dict[str, dict[str, float]]:
        """Build an engine from each folded graph and time them against each other in short bursts.

        Returns:
            Milliseconds of the quietest burst, by graph and call.
        """
        target = self.builder.target.name
        with steps.step(f"time {len(graphs)} designs on {target}") as tick, self.builder.temporary() as builder:
            converter = dataclasses.replace(self.converter, builder=builder)
            engines: dict[str, Path] = {}
            for number, (name, graph) in enumerate(graphs.items()):
                tick(number, 2 * len(graphs), f"build {name}")
                path = builder.lower(graph, f"design{number}")
                engines[name] = builder.build(converter.convert_for_timing(path, self.precision))
            return self.timer.quick(
                builder, engines, lambda name, done, total: tick(total + done, 2 * total, f"time {name}")
            )

    def measure(
        self, graphs: Mapping[str, Graph], steps: Steps
    ) -> tuple[Evaluation | None, dict[str, Latency], dict[str, Converted], list[str]]:
        """Measure quality on test data and latency of graphs side by side.

        Returns:
            The evaluation, in which the first graph is the reference (None if no quality is stated), the latencies, the
            conversions to a precision below fp32, and the names of graphs that leave no layer for it, which are not
            built.

        Raises:
            NothingToQuantizeError: the first graph has no layer for the precision.
        """
        with self.builder.temporary() as builder:
            converter = dataclasses.replace(self.converter, builder=builder, results={})
            engines, conversions, left_out = dict[str, Path](), dict[str, Converted](), list[str]()
            for name, graph in graphs.items():
                with steps.step(f"build {name}") as tick:
                    variant = lower_variant(name, graph, builder.fold(graph), builder)
                    source = variant.source
                    if self.precision != "fp32":
                        try:
                            source, conversions[name] = converter.convert(variant.float_file, self.precision, tick)
                        except NothingToQuantizeError:
                            if not engines:
                                raise
                            left_out.append(name)
                            continue
                    engines[name] = builder.build(source)
            quality = quality_on_test(builder, engines, next(iter(graphs)), steps)
            return quality, self.timer.latency(builder, engines, steps), conversions, left_out


def graph_evaluator(
    subject: TracedModel, target: Runtime, options: BuildOptions, settings: Settings, scratch: Path
) -> GraphEvaluator:
    """Return the evaluator of a model on a target.

    Args:
        subject: the model and its data, with the executor that runs its engines over them.
        target: builds the engines.
        options: device and threads of the engines; the sizes are set here.
        settings: precision, calibration, batch, rounds and generation.
        scratch: a folder for engines.
    """
    sized = with_input_sizes(options, subject, settings)
    builder = EngineBuilder(subject, target, sized, scratch, executor=subject.executor)
    timer = EngineTimer(workload_calls(subject, settings), settings.rounds)
    converter = PrecisionConverter(builder, timer, settings.calibration, settings.max_precision_loss)
    return GraphEvaluator(builder, timer, converter, settings.precision)
