"""Functions that open an engine, here or in another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from compressor.workspace.output_folder import engine_files
from runtimes.base.protocols import BuildOptions, Engine


@dataclasses.dataclass(frozen=True)
class Opener:
    """Opens one engine.

    Attributes:
        load: opens the engine of `path`, or a torch model from the options alone.
        options: device and threads.
        path: the engine; None for a torch model in memory.
    """

    load: Callable[..., Engine]
    options: BuildOptions
    path: Path | None = None

    def __call__(self) -> Engine:
        """Open the engine."""
        return self.load(self.options) if self.path is None else self.load(self.path, self.options)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that the engine is opened from."""
        return () if self.path is None else engine_files(self.path)

    def on(self, places: Mapping[Path, Path]) -> Opener:
        """Return the opener of files that lie elsewhere; `places` has where, by the paths here."""
        return self if self.path is None else dataclasses.replace(self, path=places[self.path])

    def with_threads(self, threads: int | None) -> Opener:
        """Return the opener of an engine with a number of threads; None keeps that of the options."""
        if threads is None:
            return self
        return dataclasses.replace(self, options=dataclasses.replace(self.options, threads=threads, samples=None))
