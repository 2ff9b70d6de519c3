"""ONNX Runtime on this CPU as a substitute for a target on another machine.

Latency is that of ONNX Runtime's own kernels; a bf16 file, for which it has none, is opened in float32. Quality is that
of the target's arithmetic where ONNX Runtime would compute otherwise: fp16 and bf16 files are opened with
`load_for_quality`.
"""

from __future__ import annotations

import tempfile
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
        """Return the engine of ONNX Runtime, which is the ONNX file itself, after checking that it opens."""
        self.load(source, options).close()
        return source

    def load(self, path: Path, options: BuildOptions) -> Engine:
        """Open the file in ONNX Runtime; a bf16 file in float32."""
        from compressor.target.half_arithmetic import BF16, half_types  # needs onnx, which a device may lack

        if BF16 in half_types(path):
            return self.load_float32(path, options, rounded=False)
        return runtime(self.name).load(path, options)

    def load_float32(self, path: Path, options: BuildOptions, *, rounded: bool) -> Engine:
        """Open an fp16 or bf16 file in float32; see `half_arithmetic.write_float32`."""
        from compressor.target.half_arithmetic import write_float32

        # Next to the engine, because weights of several GB may not fit into the system's temporary folder. An open
        # session may still read them, so that some systems keep the file until it is closed.
        with tempfile.TemporaryDirectory(prefix=".half-", dir=path.parent, ignore_cleanup_errors=True) as folder:
            written = Path(folder, path.name)
            write_float32(path, written, rounded=rounded)
            return runtime(self.name).load(written, options)

    def layers(self, path: Path, options: BuildOptions) -> LayerCounts | None:
        """Return None: the layers of ONNX Runtime could be mistaken for those of the target."""


def substitute_for(target: Runtime) -> Runtime:
    """Return the substitute that runs here for a target."""
    return StandIn(target.int8, {"cpu": target.precisions[target.devices[0]]})


def load_for_quality(target: Runtime, path: Path, options: BuildOptions) -> Engine:
    """Open an engine to measure its outputs.

    An engine of a substitute that holds fp16 or bf16 values computes as a GPU does (see `half_arithmetic`). Every other
    engine is opened as `Runtime.load` opens it.

    Args:
        target: the target, or its substitute.
        path: the engine that `target` built.
        options: device and threads.
    """
    if not isinstance(target, StandIn):
        return target.load(path, options)
    from compressor.target.half_arithmetic import half_types

    return target.load_float32(path, options, rounded=True) if half_types(path) else target.load(path, options)
