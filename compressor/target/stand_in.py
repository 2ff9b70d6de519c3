"""ONNX Runtime on this CPU as a substitute for a target on another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtimes.base.protocols import BuildOptions, Engine, Int8Style, LayerCounts, Runtime
from runtimes.base.registry import runtime

STAND_IN = "onnxruntime"


@dataclass(frozen=True)
class StandIn:
    """ONNX Runtime on this CPU as a substitute for a target on another machine.

    Attributes:
        int8: the style of int8 files that the target wants.
        precisions: the precisions of the target on its first device.
    """

    int8: Int8Style
    precisions: Mapping[str, tuple[str, ...]]
    name: str = STAND_IN
    description: str = "ONNX Runtime on the CPU, as a substitute for the target"
    devices: tuple[str, ...] = ("cpu",)
    source: Literal[".onnx"] = ".onnx"
    own: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Return why ONNX Runtime cannot be used; None if it can."""
        return runtime(self.name).missing()

    def build(self, source: Path, out: Path, options: BuildOptions) -> Path:
        """Return the engine of ONNX Runtime, which is the ONNX file itself."""
        return runtime(self.name).build(source, out, options)

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """Open the file in ONNX Runtime."""
        return runtime(self.name).load(path, options)

    def layers(self, path: Path, options: BuildOptions) -> LayerCounts | None:
        """Return None: the layers of ONNX Runtime could be mistaken for those of the target."""


def substitute_for(target: Runtime) -> Runtime:
    """Return the substitute that runs here for a target."""
    return StandIn(target.int8, {"cpu": target.precisions[target.devices[0]]})
