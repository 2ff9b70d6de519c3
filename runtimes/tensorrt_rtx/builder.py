"""Parsing and building with TensorRT for RTX: the log, the progress and the configuration of one build."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtimes.base.ahead_of_time import Progress
from runtimes.base.layer_counts import count_layers
from runtimes.base.protocols import BuildOptions, LayerCounts
from runtimes.tensorrt.build_steps import build_errors, parse, profile_of, required
from runtimes.tensorrt.engine import Refused

if TYPE_CHECKING:
    import tensorrt_rtx as trt

LIBRARY = "TensorRT for RTX"
UNFUSED = frozenset({"CONSTANT"})  # kinds that are no layers of an engine


@dataclass
class Log:
    """Messages of one build, or of one open engine.

    Attributes:
        errors: error messages.
        warnings: warnings of the parser and the builder.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def logger(self) -> trt.ILogger:
        """Return the logger of the process, which appends its errors and warnings here until it is taken again.

        The library keeps the first logger that it is given and ignores every other one.
        """
        logger: trt.ILogger = (found := _logger())
        found.record = self
        return logger


@functools.cache
def _logger() -> Any:
    """Return a logger that writes to the `Log` in its attribute `record` and discards less severe messages."""
    import tensorrt_rtx as trt

    severities = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]  # Any where the library is not installed
        record = Log()

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                self.record.errors.append(msg)
            elif severity == severities.WARNING:
                self.record.warnings.append(msg)

    return Logger()


@dataclass
class Network:
    """An ONNX file as TensorRT for RTX parsed it; the objects live as long as this one.

    Attributes:
        log: messages of the parser and the builder.
        logger: the logger that writes them.
        builder: the builder of engines.
        network: the parsed layers.
        parser: owns weights of the network, so it must outlive the build.
    """

    log: Log
    logger: trt.ILogger
    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser

    @classmethod
    def of(cls, source: Path) -> Network:
        """Parse an ONNX file into a strongly typed network: every layer computes in the types of the file.

        Raises:
            BuildError: The parser refused the file; the message names the layer of the model.
        """
        import tensorrt_rtx as trt

        log = Log()
        with build_errors(f"{LIBRARY} cannot parse {source.name}", []):  # the log repeats the parser's own errors
            logger = log.logger()
            builder = trt.Builder(logger)
            strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            network = required(builder.create_network(strong), "it created no network")
            parser = trt.OnnxParser(network, logger)
            parse(parser, source)
            log.errors.clear()  # of attempts that the parser recovered from
        return cls(log, logger, builder, network, parser)

    def layers(self) -> LayerCounts:
        """Count the parsed layers by kind and precision, constants left out.

        A layer that reads a DequantizeLinear counts in the quantized type: the builder fuses the two. Whether attention
        is fused is decided later, by the builder.
        """
        network = self.network
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        quantized = (layer for layer in layers if layer.type.name == "DEQUANTIZE")
        stored = {layer.get_output(0).name: data for layer in quantized if (data := layer.get_input(0)) is not None}
        rows = []
        for layer in layers:
            inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
            types = [stored.get(tensor.name, tensor).dtype.name for tensor in inputs]
            rows.append((layer.type.name, types))
        return count_layers((row for row in rows if row[0] not in UNFUSED), fused_attention=None)

    def engine(
        self, options: BuildOptions, capabilities: Sequence[trt.ComputeCapability], progress: Progress | None
    ) -> trt.IHostMemory:
        """Build one engine for all given compute capabilities; it holds each weight once.

        Raises:
            Refused: The builder refused the network.
        """
        config = self._config(options)
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            if not config.set_compute_capability(capability, i):
                raise Refused(f"it rejected the compute capability {capability.name}")
        monitor = None if progress is None else Monitor(progress)
        if monitor is not None:
            config.progress_monitor = monitor.monitor()
        engine = self.builder.build_serialized_network(self.network, config)
        if monitor is not None and monitor.raised is not None:
            raise monitor.raised
        return required(engine, "it built no engine")

    def _config(self, options: BuildOptions) -> trt.IBuilderConfig:
        """Return the builder configuration with the sizes of the dynamic axes."""
        import tensorrt_rtx as trt

        config = required(self.builder.create_builder_config(), "it created no builder configuration")
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # A float32 model must run in float32, otherwise the parity check against torch fails.
        config.clear_flag(trt.BuilderFlag.TF32)
        profile = profile_of(self.builder, self.network, options)
        if profile is not None and config.add_optimization_profile(profile) < 0:
            raise Refused(f"it rejected the profile with batches {options.batches} and lengths {options.lengths}")
        return config


@dataclass
class Monitor:
    """Passes the progress of a build on, and cancels the build if that raises, as an interrupt does.

    An exception that left a callback would end the process inside the library.

    Attributes:
        progress: called with phase, finished steps and steps.
        raised: what `progress` raised.
        steps: the number of steps of each phase that has begun.
    """

    progress: Progress
    raised: BaseException | None = None
    steps: dict[str, int] = field(default_factory=dict)

    def monitor(self) -> trt.IProgressMonitor:
        """Return the monitor that the builder calls."""
        import tensorrt_rtx as trt

        owner = self

        class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]  # Any if not installed
            def __init__(self) -> None:
                super().__init__()

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                owner.steps[phase_name] = num_steps
                owner.show(phase_name, 0)

            def phase_finish(self, phase_name: str) -> None:
                owner.show(phase_name, owner.steps.get(phase_name, 1))

            def step_complete(self, phase_name: str, step: int) -> bool:
                return owner.show(phase_name, step + 1)

        return ProgressMonitor()

    def show(self, phase: str, done: int) -> bool:
        """Pass one step on; return whether the build continues."""
        if self.raised is None:
            try:
                self.progress(phase, done, self.steps.get(phase, 1))
            except BaseException as error:  # raised again when the builder has returned
                self.raised = error
        return self.raised is None
