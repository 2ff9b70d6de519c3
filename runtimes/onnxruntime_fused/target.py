"""Target onnxruntime_fused: a copy of the model with ONNX Runtime's own fused operators, on the CPU.

The fused operators are attention, norms and int8 products.

The copy of a language model has the inputs and outputs of the portable file. In addition, its KV cache can be updated
in place (OnnxRuntimeEngine.bind and .cache).

This is a separate target so that no measurement during the build decides what is fused. The fusions depend on the graph
alone, the same file gives the same engine, and `compressor bench` compares it with the portable file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runtimes.base.protocols import BuildError, BuildOptions, Int8Style, LayerCounts, first_line
from runtimes.base.registry import check_available
from runtimes.onnxruntime import target as onnxruntime
from runtimes.onnxruntime_fused import encoder_fusions as onnxruntime_graph

if TYPE_CHECKING:
    import onnx

name = "onnxruntime_fused"
description = "ONNX Runtime on the CPU with its own fused operators; writes model.fused.onnx"
devices = ("cpu",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cpu": ("fp32", "int8", "int8-dynamic", "int8-weight-only", "int4", "int2")}
own = ()
int8 = Int8Style(activations="uint8", convolutions=False)

FILE = "model.fused.onnx"
WEIGHTS = f"{FILE}.data"
EXTERNAL_ABOVE = 1_500_000_000  # bytes of weights; above, they go to a separate file, as protobuf is limited to 2 GB


def missing() -> str | None:
    """Return None if ONNX Runtime can be used, else the reason and the command that fixes it."""
    return onnxruntime.missing()


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Write the fused copy into the folder `out` and return its path.

    A model without a matching pattern, such as a float model of few tokens, is copied unchanged. The outputs equal
    those of the portable file up to rounding; in int8, rounding can move single values to the next of 256 steps.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not available.
        BuildError: ONNX Runtime refused the model.
    """
    check_available(name, missing(), devices, options)
    if not source.is_file():
        raise BuildError(f"There is no ONNX file {source}.")
    import onnx

    try:
        model = onnx.load(source)
        onnxruntime_graph.fuse(model)
        _save(model, out)
        del model  # a language model takes the same memory again when it is opened
        load(out / FILE, options).close()
    except Exception as error:  # protobuf's errors have no common base but Exception
        for file in (FILE, WEIGHTS):
            (out / file).unlink(missing_ok=True)
        raise BuildError(f"{source.name} cannot be fused for ONNX Runtime: {first_line(error)}.") from error
    return out / FILE


def _save(model: onnx.ModelProto, out: Path) -> None:
    """Write the model, with its weights in a separate file if they are too large for one."""
    import onnx

    (out / WEIGHTS).unlink(missing_ok=True)  # onnx would append to an existing file
    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE
    onnx.save(model, out / FILE, save_as_external_data=external, location=WEIGHTS if external else None)


def load(path: Path, options: BuildOptions) -> onnxruntime.OnnxRuntimeEngine:
    """Open the file that build() wrote.

    Raises:
        RuntimeUnavailable: ONNX Runtime or the device is not available.
        BuildError: ONNX Runtime refused the model.
    """
    check_available(name, missing(), devices, options)
    return onnxruntime.load_file(path, options)


def layers(path: Path, options: BuildOptions) -> LayerCounts | None:
    """Return the layers of the fused graph as ONNX Runtime runs it."""
    return onnxruntime.layers(path, options)
