"""Lower the graphs of one model and build engines from them on one target."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from compressor.executor.base import Executor, InProcess
from compressor.lower.checkpoint import CONFIG
from compressor.lower.cut import encoder_decoder, vision_language
from compressor.lower.cut.two_towers import cut_towers
from compressor.lower.fold_graph import fold_graph
from compressor.lower.traced_model import ModelAndData
from compressor.lower.write_onnx import lower
from compressor.measure.workload import generation_lengths, workload_calls
from compressor.quality.evaluate import BATCH
from compressor.quantize.precision import Source
from compressor.settings import Settings
from compressor.target.opener import Opener
from compressor.target.stand_in import load_for_quality
from compressor.workspace.folder_errors import readable_errors
from compressor.workspace.output_folder import copy_onnx, engine_bytes
from passes.graph.graph import Graph
from runtimes.base.part_files import part_files
from runtimes.base.protocols import BuildOptions, Engine, Feeds, Runtime

PARITY_ROWS = 8  # rows of real samples on which engines are compared with torch
PARITY_TOKENS = 512  # their tokens in sum; texts that have more are fewer, see `Split.middle`


@dataclasses.dataclass(frozen=True)
class EngineBuilder:
    """Lowers graphs and builds engines.

    Attributes:
        subject: the model and its data.
        target: builds and opens the engines.
        options: where engines run and which sizes they take.
        scratch: a folder; each engine gets a folder of its own in it.
        compiled: engines that take long to build and are built once: those from exported programs and GGUF files.
        executor: runs engines over the data to measure their quality.
    """

    subject: ModelAndData
    target: Runtime
    options: BuildOptions
    scratch: Path
    compiled: dict[Source, Path] = dataclasses.field(default_factory=dict, repr=False)
    executor: Executor = dataclasses.field(default_factory=InProcess, repr=False)

    def fold(self, graph: Graph) -> Graph:
        """Return a folded fork that is ready to be lowered.

        A checkpoint and a GGUF file keep the layers of the model, so nothing is folded.
        """
        return graph.fork() if self.target.source in (CONFIG, ".gguf") else fold_graph(graph)

    def lower(self, graph: Graph, name: str) -> Path:
        """Write a folded graph in the form that the target builds from; return its path, under `scratch`."""
        return lower(graph, self.subject.model, self.scratch / f"{name}{self.target.source}")

    def build(self, source: Source, out: Path | None = None) -> Path:
        """Build an engine and return its path.

        Args:
            source: the file and the precision.
            out: an existing folder for the engine; None makes one under `scratch`.
        """
        if source in self.compiled:
            return self.compiled[source]
        folder = self.scratch / f"{source.path.stem}.{source.precision}.{self.target.name}" if out is None else out
        folder.mkdir(exist_ok=True)
        samples = self.calibration_batches if source.precision in self.target.own else None
        options = dataclasses.replace(self.options, precision=source.precision, samples=samples)
        with readable_errors(self.scratch.parent, needed=engine_bytes(source.path)):
            built = self._built(source.path, folder, options)
        if source.path.suffix in (".pt2", ".gguf"):
            self.compiled[source] = built
        return built

    def _built(self, path: Path, folder: Path, options: BuildOptions) -> Path:
        """Build the engine of a file: of a model of several files, those of its parts; return the path of the first."""
        first, *_ = [self.target.build(part, folder, options) for part in part_files(self._cut(path, folder))]
        return first

    def _cut(self, path: Path, folder: Path) -> Path:
        """Write the files of the parts of a model of several files, and return the first; else the file itself."""
        model = self.subject.model
        if model.is_encoder_decoder:
            return encoder_decoder.cut(path, folder)
        if model.is_vision_language:
            assert model.preprocess.image_token is not None
            return vision_language.cut(path, folder, model.preprocess.image_token, model.preprocess.grid)
        return path

    def ship(self, source: Source, folder: Path) -> tuple[Source, Path]:
        """Build an engine in the output folder, and copy the ONNX file that it is built from, if any.

        Of a model of images and texts, the files of its towers are written too.

        Returns:
            The source that the engine was built from, and the path of the engine.
        """
        if self.target.source == CONFIG:
            return source, Path(shutil.copytree(source.path.parent, folder, dirs_exist_ok=True), source.path.name)
        if self.subject.model.has_parts:
            return source, self.build(source, folder)
        if self.target.source == ".onnx":
            source = source._replace(path=copy_onnx(source.path, folder / "model.onnx"))
            if self.subject.model.has_two_towers:
                cut_towers(source.path, folder, projected=hasattr(self.subject.model.module, "text_projection"))
            return source, self.build(source, folder)
        built = self.build(source)
        return source, Path(shutil.copy(built, folder / built.name))

    def openers(self, engines: Mapping[str, Path]) -> dict[str, Callable[[], Engine]]:
        """Return a function for each engine that opens it for timing; `engines` are paths that `build` returned."""
        return {name: partial(self.target.load, path, self.options) for name, path in engines.items()}

    def quality_openers(self, engines: Mapping[str, Path]) -> dict[str, Opener]:
        """Return a function for each engine that opens it to measure its outputs, in the arithmetic of the target.

        These engines may be open at the same time, so their waiting threads do not spin, which would take the cores
        from the others.
        """
        options = dataclasses.replace(self.options, spinning=False)
        return {name: Opener(partial(load_for_quality, self.target), options, path) for name, path in engines.items()}

    def calibration_batches(self) -> Iterator[Feeds]:
        """Return a fresh stream of calibration batches."""
        return (batch.feeds for batch in self.subject.data.calibration.bounded_batches(BATCH))

    @contextlib.contextmanager
    def temporary(self) -> Iterator[EngineBuilder]:
        """Yield the same builder with a scratch folder that is removed afterwards, with its engines."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
            yield dataclasses.replace(self, scratch=Path(scratch), compiled={})


def with_input_sizes(options: BuildOptions, subject: ModelAndData, settings: Settings) -> BuildOptions:
    """Return the options with the batch sizes and sequence lengths that engines are run with.

    Each is a tuple of the least, the timed and the largest size. The largest batch is that of the timing, the parity
    check or the evaluation.
    """
    parts = subject.data.parts
    rows = max(settings.batch, PARITY_ROWS, BATCH * parts[0].samples.rows_per_sample)
    if subject.model.has_two_towers:  # the number of texts is that of the classes
        rows = max(rows, *map(len, next(parts[0].batches(1)).feeds.values()))
    options = dataclasses.replace(options, batches=(1, settings.batch, rows))
    axes = [(name, axis) for name, free in subject.model.dynamic_axes.items() for axis in free if axis == 1]
    if not axes:
        return options
    timed_shapes = next(iter(workload_calls(subject, settings).values())).shapes
    feeds = (batch.feeds for part in parts for batch in part.batches(BATCH))
    longest = max(inputs[name].shape[axis] for inputs in feeds for name, axis in axes)
    least = 1
    if subject.model.state:  # the KV cache is empty in the data, but not in the example inputs
        least, longest = 0, max(longest, *(subject.model.example[name].shape[axis] for name, axis in axes))
    generation = generation_lengths(settings, subject.model)
    if generation is not None:
        longest = max(longest, generation.prompt + generation.new)
    return dataclasses.replace(options, lengths=(least, max(timed_shapes[name][axis] for name, axis in axes), longest))
