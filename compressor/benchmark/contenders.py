"""What `compressor bench` measures: exported folders, ONNX files and torch models, each as something to open."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compressor import models
from compressor.choices import TRANSFORMERS
from compressor.errors import CompressorError, SettingsError
from compressor.models import Model
from compressor.report.report import REPORT
from compressor.target.torch_eager import Module
from compressor.workspace.output_folder import engine_bytes
from runtimes.base.protocols import BuildOptions, Engine, Runtime
from runtimes.base.registry import runtime

EAGER = "eager"


class BenchError(CompressorError):
    """Something given to `bench` cannot be measured."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A folder that `compressor export` wrote, as its report describes it."""

    path: Path
    report: Mapping[str, Any]

    @staticmethod
    def read(path: Path) -> Exported:
        """Read a folder's report.

        Raises:
            BenchError: it is no report, or the folder lacks model.onnx.
        """
        try:
            report = json.loads((path / REPORT).read_text(encoding="utf-8"))
            exported = Exported(path, report)
            _ = exported.target, exported.precision, exported.cells, report["model"]["task"], report["data"]["test_ids"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchError(f"{path / REPORT} is no report that `compressor export` wrote; export again.") from error
        return exported

    @property
    def target(self) -> str:
        """The target it was exported for."""
        return str(self.report["settings"]["target"])

    @property
    def precision(self) -> str:
        """The precision it was exported in."""
        return str(self.report["settings"]["precision"])

    @property
    def cache(self) -> bool:
        """Whether a language model was exported with its KV cache, or --no-cache left it out."""
        return bool(self.report["settings"].get("cache", True))

    @property
    def is_checkpoint(self) -> bool:
        """Whether it holds a model to be loaded, and no engine."""
        return self.target == TRANSFORMERS

    @property
    def engine(self) -> Path:
        """What an engine is built from: the portable file, or the engine itself where torch made it."""
        portable = self.path / "model.onnx"
        return portable if portable.is_file() else self.path / str(self.report["engine"].get("file", portable.name))

    @property
    def cells(self) -> dict[str, str]:
        """The files of its factorial by cell; none where it was exported without."""
        factorial = self.report.get("factorial")
        return {} if factorial is None else {name: str(cell["file"]) for name, cell in factorial["cells"].items()}

    def model(self) -> Model:
        """The model around the engine: preprocessing, task and names; its weights do not matter.

        A folder holds the config and preprocessing of its model, but those of a module of one's own, which is made
        again by the factory that it came from.

        Raises:
            CompressorError: it cannot be loaded from there.
        """
        facts, spec = self.report["model"], self.report["settings"]["model"]
        if facts["source"] == "module":
            if ":" not in str(spec):
                raise BenchError(
                    f"{self.path} was exported from a module that was handed over in Python; name with --model a "
                    "package.module:factory that makes it."
                )
            model = models.load(spec, task=facts["task"], cache=self.cache)
        else:
            model = models.load(self.path, task=facts["task"], random_weights=True, cache=self.cache)
        return dataclasses.replace(model, name=facts["name"], random_weights=bool(facts["random_weights"]))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One engine to measure.

    `target` is a runtime's name, or ``eager`` for a torch model; `file` what was given, None for a torch model;
    `precision` what an engine is built in from it; `cell` is of which folder it is a cell of the factorial.
    """

    name: str
    target: str
    file: Path | None
    module: Module | None = None
    precision: str = "fp32"
    cell: tuple[str, str] | None = None

    def opener(self, built: Path | None) -> Callable[[BuildOptions], Engine]:
        """What opens it, given what was built from its file."""
        if self.module is not None:
            return self.module.open
        assert built is not None
        return partial(_load, runtime(self.target), built)

    @property
    def compiled(self) -> bool:
        """Whether it was compiled by torch."""
        return self.module is not None and self.module.compiles

    @property
    def bytes(self) -> int | None:
        """Size of the file with its external data; None for a torch model, which needs none."""
        return None if self.file is None else engine_bytes(self.file)


def _load(target: Runtime, built: Path, options: BuildOptions) -> Engine:
    return target.load(built, options)


@dataclasses.dataclass(frozen=True)
class Given:
    """One thing to measure as it was named: an exported folder, an ONNX file, or else a model."""

    name: str
    spec: str
    folder: Exported | None = None
    file: Path | None = None

    @property
    def is_model(self) -> bool:
        """Whether it is a model to be loaded, exported or not."""
        return self.file is None and (self.folder is None or self.folder.is_checkpoint)

    def entries(self, model: Model | None, target: str | None, *, compiled: bool) -> Iterator[Entry]:
        """The engines to measure of it; `model` is what was loaded where it is one.

        Raises:
            BenchError: a file is missing.
        """
        if self.folder is not None and not self.folder.is_checkpoint:
            yield from _of_folder(self.name, self.folder, target)
        elif self.file is not None:
            yield Entry(self.name, target or "onnxruntime", self.file)
        elif model is not None:
            yield Entry(f"{self.name} (eager)", EAGER, None, Module(model))
            if compiled:
                yield Entry(f"{self.name} (compiled)", EAGER, None, Module(model, compiles=True))


def given(what: Sequence[str]) -> tuple[Given, ...]:
    """What each argument is. Its name is the last part of its path, or the whole where two would have the same.

    Raises:
        SettingsError: nothing was given, or one thing twice.
        BenchError: a folder's report is broken, or a file missing.
    """
    if not what:
        raise SettingsError("nothing to measure; give exported folders, .onnx files, or models.")
    twice = [spec for spec in what if what.count(spec) > 1]
    if twice:
        raise SettingsError(f"{twice[0]} is given twice; give each once.")
    short = [Path(spec).name for spec in what]
    return tuple(_one(name if short.count(name) == 1 else spec, spec) for spec, name in zip(what, short, strict=True))


def _one(name: str, spec: str) -> Given:
    path = Path(spec)
    if path.suffix.lower() == ".onnx":
        return Given(name, spec, file=_there(path))
    return Given(name, spec, folder=Exported.read(path) if (path / REPORT).is_file() else None)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise BenchError(f"there is no file {path}; check the path.")
    return path


def _of_folder(name: str, folder: Exported, target: str | None) -> Iterator[Entry]:
    """The engine of a folder, or one for each cell of its factorial."""
    chosen = folder.target if target is None else target
    own = folder.precision if chosen == folder.target and folder.precision in runtime(chosen).own else "fp32"
    if folder.engine.suffix != ".onnx" and chosen != folder.target:
        raise BenchError(f"{name} holds an engine of {folder.target}, which {chosen} cannot open; leave out --target.")
    if not folder.cells:
        yield Entry(name, chosen, _there(folder.engine), precision=own)
    for cell, file in folder.cells.items():
        yield Entry(f"{name}/{cell}", chosen, _there(folder.path / file), cell=(name, cell))


def cells(entries: Sequence[Entry]) -> dict[str, dict[str, Entry]]:
    """The cells of each folder's factorial, by the folder's name."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if entry.cell is not None:
            found.setdefault(entry.cell[0], {})[entry.cell[1]] = entry
    return found
