"""Targets that build engines for GPUs that the building machine lacks: compilation ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias, cast, runtime_checkable

from runtimes.base.protocols import BuildOptions, LayerCounts, Runtime

# Called with the phase of the build, the number of its finished steps and the number of its steps.
Progress: TypeAlias = Callable[[str, int, int], None]


@runtime_checkable
class AheadOfTime(Protocol):
    """The functions that a target has in addition to those of `Runtime` if it can build without the device."""

    def missing_builder(self) -> str | None:
        """Return None if engines can be built here, else the reason and what to install."""

    def builder_version(self) -> str:
        """Return the name and the version of the library that builds and parses."""

    def gpus(self) -> tuple[str, ...]:
        """Return the GPU architectures that engines can be built for, by compute capability, such as "sm89"."""

    def build_for(
        self, source: Path, out: Path, options: BuildOptions, gpu: str, progress: Progress | None = None
    ) -> Path:
        """Build `<name of the source>.<gpu>.engine` in `out` and return its path; nothing is left after an error.

        `gpu` is one of `gpus()`, or several joined by "+", which share one engine with one copy of the weights.

        Raises:
            RuntimeUnavailable: The builder is not installed, or has no such GPU; the message lists those it has.
            BuildError: The builder refused the model; the message names the layer where it is known.
            OSError: The engine cannot be written.
        """

    def network_layers(self, source: Path) -> LayerCounts:
        """Return the layers of the parsed file before fusion. Raises the errors of build_for()."""


def ahead_of_time(target: Runtime) -> AheadOfTime | None:
    """Return the target as one that builds without the device; None if it cannot."""
    return cast(AheadOfTime, target) if isinstance(target, AheadOfTime) else None
