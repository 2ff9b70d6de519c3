"""The contenders of `compressor bench`: exported folders, ONNX files and torch models, and the engines they yield."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compressor import models
from compressor.choices import DYNAMIC, TRANSFORMERS, parse_image_size
from compressor.errors import CompressorError, SettingsError
from compressor.internals.huggingface_hub import offline
from compressor.models import Model
from compressor.report.report import REPORT
from compressor.report.report_schema import read_report
from compressor.target.torch_eager import Module
from compressor.workspace.folder_errors import name_of
from compressor.workspace.manifest import check_folder, listed_file
from compressor.workspace.output_folder import engine_bytes
from runtimes.base.protocols import BuildOptions, Engine
from runtimes.base.registry import runtime

EAGER = "eager"
PORTABLE = "model.onnx"
COMPILED = (".pt2", ".so", ".dll", ".dylib")  # engines that are compiled code; opening one runs it


class BenchError(CompressorError):
    """An input of `bench` cannot be measured."""


@dataclasses.dataclass(frozen=True)
class ExportFolder:
    """A folder that `compressor export` wrote, with its report.json and the SHA-256 of its files by name."""

    path: Path
    report: Mapping[str, Any]
    digests: Mapping[str, str]

    @staticmethod
    def read(path: Path) -> ExportFolder:
        """Check a folder against its manifest, and read its report.

        Raises:
            CompressorError: a file is missing or has changed, or report.json does not fit its schema.
        """
        digests = check_folder(path)
        listed_file(path, REPORT, digests)
        return ExportFolder(path, read_report(path), digests)

    @property
    def target(self) -> str:
        """The target of the export."""
        return str(self.report["settings"]["target"])

    @property
    def precision(self) -> str:
        """The precision of the export."""
        return str(self.report["settings"]["precision"])

    @property
    def cache(self) -> bool:
        """Return whether the model was exported with its KV cache (False after --no-cache)."""
        return bool(self.report["settings"].get("cache", True))

    @property
    def image_size(self) -> str | None:
        """Return the size of the images as a value of --image-size; None for other models and older exports."""
        size = self.report["model"].get("image_size")
        if size is None:
            return None
        return DYNAMIC if self.report["settings"].get("image_size") == DYNAMIC else "x".join(map(str, size))

    @property
    def sequence_length(self) -> int | None:
        """Return the tokens, samples or frames that the export takes alone; None for any number."""
        length = self.report["settings"].get("sequence_length")
        return None if length is None else int(length)

    @property
    def is_checkpoint(self) -> bool:
        """Return whether the folder holds a transformers checkpoint instead of an engine."""
        return self.target == TRANSFORMERS

    @property
    def engine(self) -> Path:
        """The file to build from: model.onnx, or the engine's own file if there is no model.onnx."""
        name = PORTABLE if PORTABLE in self.digests else self.report["engine"].get("file", PORTABLE)
        return listed_file(self.path, name, self.digests)

    @property
    def cells(self) -> dict[str, Path]:
        """The files of the factorial by cell; empty for an export without --factorial."""
        cells = (self.report.get("factorial") or {"cells": {}})["cells"]
        return {name: listed_file(self.path, cell["file"], self.digests) for name, cell in cells.items()}

    @property
    def needs_module(self) -> bool:
        """Return whether the folder was exported from a user's module, which only the command line can name."""
        return bool(self.report["model"]["source"] == "module")

    def model(self) -> Model:
        """Load the model around the engine from the folder alone, for its preprocessing, task and input names.

        The weights are random, and nothing is downloaded.

        Raises:
            CompressorError: the model cannot be loaded, or it is a user's module.
        """
        facts = self.report["model"]
        if self.needs_module:
            raise BenchError(
                f"{self.path} was exported from a module of your own, and a folder cannot name code to run; name the "
                "package.module:factory that builds the module with --model."
            )
        with offline():
            model = models.load(self.path, random_weights=True, **self._options())
        return dataclasses.replace(model, name=facts["name"], random_weights=facts["random_weights"])

    def _options(self) -> dict[str, Any]:
        """Return the options with which the model of the folder was loaded for its export."""
        facts = self.report["model"]
        return {
            "task": facts["task"],
            "problem_type": facts.get("problem_type"),
            "cache": self.cache,
            "image_size": parse_image_size(self.image_size),
            "sequence_length": self.sequence_length,
        }

    def checkpoint(self) -> Model:
        """Load the checkpoint in the folder, with its weights, from the folder alone.

        Raises:
            CompressorError: the checkpoint cannot be loaded.
        """
        facts = self.report["model"]
        with offline():
            model = models.load(self.path, **self._options())
        return dataclasses.replace(model, random_weights=facts["random_weights"])


@dataclasses.dataclass(frozen=True)
class EngineEntry:
    """One engine to measure.

    Attributes:
        name: name in the tables.
        target: name of a runtime, or ``eager`` for a torch model.
        file: the file to build from; None for a torch model.
        module: the torch model; None for a file.
        precision: the precision to build in.
        cell: folder and cell of a factorial; None outside of one.
    """

    name: str
    target: str
    file: Path | None
    module: Module | None = None
    precision: str = "fp32"
    cell: tuple[str, str] | None = None

    def opener(self, built: Path | None) -> Callable[[BuildOptions], Engine]:
        """Return a function that opens the engine; `built` is the engine file, None for a torch model."""
        return self.load if built is None else partial(self.load, built)

    @property
    def load(self) -> Callable[..., Engine]:
        """Return the function that opens the engine from its file and options, or a torch model from options alone."""
        return runtime(self.target).load if self.module is None else self.module.open

    @property
    def compiled(self) -> bool:
        """Return whether the engine is a torch model under torch.compile."""
        return self.module is not None and self.module.compiles

    @property
    def bytes(self) -> int | None:
        """Size of the file with its external data, in bytes; None for a torch model."""
        return None if self.file is None else engine_bytes(self.file)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One argument of `bench`: an exported folder, an ONNX file, or otherwise a model."""

    name: str
    spec: str
    folder: ExportFolder | None = None
    file: Path | None = None

    @property
    def is_model(self) -> bool:
        """Return whether the argument is a model or an exported checkpoint."""
        return self.file is None and (self.folder is None or self.folder.is_checkpoint)

    def entries(
        self, model: Model | None, target: str | None, *, compiled: bool, trusted: bool = False
    ) -> Iterator[EngineEntry]:
        """Yield the engines of the argument.

        Args:
            model: the loaded model if `is_model`.
            target: the runtime; None takes that of the export.
            compiled: also measure a torch model with torch.compile.
            trusted: open engines that are compiled code, which runs when it is opened.

        Raises:
            BenchError: a file is missing, or the engine's file does not fit the target.
        """
        if self.folder is not None and not self.folder.is_checkpoint:
            yield from _folder_entries(self.name, self.folder, target, trusted)
        elif self.file is not None:
            yield EngineEntry(self.name, target or "onnxruntime", self.file)
        elif model is not None:
            yield EngineEntry(f"{self.name} ({EAGER})", EAGER, None, Module(model))
            if compiled:
                yield EngineEntry(f"{self.name} (compiled)", EAGER, None, Module(model, compiles=True))


def parse_contenders(what: Sequence[str]) -> tuple[Contender, ...]:
    """Classify the arguments. Names are the last parts of the paths, or the whole paths if these are not unique.

    Raises:
        SettingsError: there are no arguments, or two are equal.
        BenchError: a folder's report is invalid, or a file is missing.
    """
    if not what:
        raise SettingsError("nothing to measure; give exported folders, .onnx files or models.")
    places: dict[object, list[str]] = {}
    for spec in what:  # ./out and out are one folder
        places.setdefault(Path(spec).resolve() if Path(spec).exists() else spec, []).append(spec)
    twice = next((specs for specs in places.values() if len(specs) > 1), None)
    if twice is not None:
        other = f" (also as {twice[1]})" if twice[1] != twice[0] else ""
        raise SettingsError(f"{twice[0]} is given twice{other}; give each argument once.")
    short = [name_of(spec) for spec in what]
    return tuple(
        _classify(name if short.count(name) == 1 else spec, spec) for spec, name in zip(what, short, strict=True)
    )


def _classify(name: str, spec: str) -> Contender:
    path = Path(spec)
    if path.suffix.lower() == ".onnx":
        return Contender(name, spec, file=_existing(path))
    return Contender(name, spec, folder=ExportFolder.read(path) if (path / REPORT).is_file() else None)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BenchError(f"there is no file {path}; check the path.")
    return path


def _folder_entries(name: str, folder: ExportFolder, target: str | None, trusted: bool) -> Iterator[EngineEntry]:
    """Yield the engine of a folder, or one engine for each cell of its factorial."""
    chosen = folder.target if target is None else target
    precision = folder.precision if chosen == folder.target and folder.precision in runtime(chosen).own else "fp32"
    for file in folder.cells.values() or (folder.engine,):
        if file.suffix != ".onnx" and chosen != folder.target:
            raise BenchError(
                f"{name} holds an engine of {folder.target}, which {chosen} cannot open; leave out --target."
            )
        if file.suffix in COMPILED and not trusted:
            raise BenchError(
                f"{file} is compiled code, and opening it runs it; give --trust-remote-code if you trust the folder."
            )
    if not folder.cells:
        yield EngineEntry(name, chosen, folder.engine, precision=precision)
    for cell, file in folder.cells.items():
        yield EngineEntry(f"{name}/{cell}", chosen, file, cell=(name, cell))


def cells_by_folder(entries: Sequence[EngineEntry]) -> dict[str, dict[str, EngineEntry]]:
    """Group the entries that are cells of a factorial, by folder name and cell."""
    by_folder: dict[str, dict[str, EngineEntry]] = {}
    for entry in entries:
        if entry.cell is not None:
            by_folder.setdefault(entry.cell[0], {})[entry.cell[1]] = entry
    return by_folder
