"""ONNX Runtime on this CPU in place of a target that is on another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtimes.base.protocols import BuildOptions, Engine, Int8Style, Layers, Runtime
from runtimes.base.registry import runtime

STAND_IN = "onnxruntime"


@dataclass(frozen=True)
class StandIn:
    """ONNX Runtime on this CPU in the place of a target that is elsewhere; its int8 files are written as that wants."""

    int8: Int8Style
    precisions: Mapping[str, tuple[str, ...]]
    name: str = STAND_IN
    description: str = "ONNX Runtime on the CPU, in the place of the target"
    devices: tuple[str, ...] = ("cpu",)
    source: Literal[".onnx"] = ".onnx"
    own: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """As ONNX Runtime says."""
        return runtime(self.name).missing()

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        """As ONNX Runtime does: the file itself is the engine."""
        return runtime(self.name).build(source, out, options)

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """As ONNX Runtime does."""
        return runtime(self.name).load(path, options)

    def layers(self, path: Path, options: BuildOptions) -> Layers | None:
        """Nothing: those of the stand-in would pass for the target's."""


def stand_in(target: Runtime) -> Runtime:
    """What runs here in the place of a target."""
    return StandIn(target.int8, {"cpu": target.precisions[target.devices[0]]})
