"""Target onnxruntime_fused: an ONNX-Runtime-only copy of the model with fused attention and int8 products, for the CPU.

The copy of a language model takes and gives what the portable file does; its cache can be written in place besides
(OnnxRuntimeEngine.bind and .cache).

A target of its own, so that nothing about it is decided by a stopwatch while building: what is fused follows from the
graph alone, the same file gives the same engine, and `compressor bench` times it beside the portable file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runtimes.base.protocols import BuildError, BuildOptions, Int8Style, Layers, first_line
from runtimes.base.registry import need
from runtimes.onnxruntime import target as onnxruntime
from runtimes.onnxruntime_fused import encoder_fusions as onnxruntime_graph

if TYPE_CHECKING:
    import onnx

name = "onnxruntime_fused"
description = "ONNX Runtime on the CPU with its own fused operators; writes model.fused.onnx"
devices = ("cpu",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cpu": ("fp32", "int8", "int8-dynamic", "int4")}
own = ()
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.fused.onnx"
WEIGHTS = f"{FILE}.data"
EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights beyond which they lie beside the file: protobuf ends at 2 GB


def missing() -> str | None:
    """Return None where ONNX Runtime can be used, else the reason and the command that changes it."""
    return onnxruntime.missing()


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Write the fused copy into the folder `out` and return its path.

    A model in which there is nothing to fuse, such as a float one of few tokens, is copied as it is. The answers are
    those of the portable file up to rounding; of int8, up to the values that rounding moves to the next of 256 steps.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not there.
        BuildError: ONNX Runtime refused the model.
    """
    need(name, missing(), devices, options)
    if not source.is_file():
        raise BuildError(f"There is no ONNX file {source}.")
    import onnx

    try:
        model = onnx.load(source)
        onnxruntime_graph.fuse(model)
        _save(model, out)
        del model  # a language model takes as much again when it is opened
        load(out / FILE, options).close()
    except Exception as error:  # protobuf's have no common base but that
        for file in (FILE, WEIGHTS):
            (out / file).unlink(missing_ok=True)
        raise BuildError(f"{source.name} cannot be fused for ONNX Runtime: {first_line(error)}.") from error
    return out / FILE


def _save(model: onnx.ModelProto, out: Path) -> None:
    """Write the file, and its weights beside it where they are too large for one."""
    import onnx

    (out / WEIGHTS).unlink(missing_ok=True)  # it would be written behind what is there
    apart = sum(len(each.raw_data) for each in model.graph.initializer) > EXTERNAL_ABOVE
    onnx.save(model, out / FILE, save_as_external_data=apart, location=WEIGHTS if apart else None)


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
