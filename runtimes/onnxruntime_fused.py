"""Target onnxruntime_fused: an ONNX-Runtime-only copy of the model with fused attention and int8 products, for the CPU.

A target of its own, so that nothing about it is decided by a stopwatch while building: what is fused follows from the
graph alone, the same file gives the same engine, and `compressor bench` times it beside the portable file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from runtimes import onnxruntime, onnxruntime_graph
from runtimes.base import BuildError, BuildOptions, Int8Style, Layers, first_line, need

name = "onnxruntime_fused"
description = "ONNX Runtime on the CPU with its own fused operators; writes model.fused.onnx"
devices = ("cpu",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cpu": ("fp32", "int8", "int8-dynamic", "int4")}
own = ()
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.fused.onnx"


def missing() -> str | None:
    """Return None where ONNX Runtime can be used, else the reason and the command that changes it."""
    return onnxruntime.missing()


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Write the fused copy into the folder `out` and return its path.

    A model in which there is nothing to fuse, such as a float one of few tokens, is copied as it is. The answers are
    those of the portable file up to rounding; of int8, up to the values that rounding moves to the next of 256 steps.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not there.
        BuildError: ONNX Runtime refused the model, or it takes more than the 2 GB of one file.
    """
    need(name, missing(), devices, options)
    if not source.is_file():
        raise BuildError(f"There is no ONNX file {source}.")
    import onnx

    try:
        model = onnx.load(source)
        onnxruntime_graph.fuse(model)
        onnx.save(model, out / FILE)
        del model  # a language model takes as much again when it is opened
        load(out / FILE, options).close()
    except Exception as error:  # protobuf's errors and ValueError, which onnx.save raises for what is too large
        (out / FILE).unlink(missing_ok=True)
        raise BuildError(f"{source.name} cannot be fused for ONNX Runtime: {first_line(error)}.") from error
    return out / FILE


def load(path: Path, options: BuildOptions) -> onnxruntime.OnnxRuntimeEngine:
    """Open the file that build() wrote.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not there.
        BuildError: ONNX Runtime refused the model.
    """
    need(name, missing(), devices, options)
    return onnxruntime.load(path, options)


def layers(path: Path, options: BuildOptions) -> Layers | None:
    """Return the layers of the fused graph as ONNX Runtime runs it."""
    return onnxruntime.layers(path, options)
